"""The smallest run that has every part: streams, minibatches, a critic, several seeds."""

from pathlib import Path

import numpy as np

from jaxpg.runs.config.flags import request
from jaxpg.runs.sweep import ranking, sweep
from jaxpg.runs.sweep.record import description
from jaxpg.runs.sweep.search import choose, places
from jaxpg.runs.train.run import execute, prepare, prepare_resume

ROOT = Path(__file__).parents[2]
FLAGS = (
    "CartPole-v1 --seeds 2 --num-envs 2 --num-steps 8 --num-minibatches 2 --num-epochs 1 --hidden 4 "
    "--evaluation-episodes 2 --schedule constant --quiet"
)


def start(folder, *flags):
    config, grid, _ = request([*FLAGS.split(), *flags, "--run", str(folder)], "jaxpg train")
    execute(prepare(config, grid))


def resume(folder, *flags):
    config, grid, resumed = request(["--resume", str(folder), "--quiet", *flags], "jaxpg train")
    assert resumed
    execute(prepare_resume(config, grid))


def prepared(arguments, folder):
    return sweep.prepare([*arguments.split(), "--run", str(folder)])


def write_part(folder, arguments, part="", complete=True, diverged=0):
    """The folder that a sweep of two seeds, or `--part i/n` of it, writes; its results are made up."""
    found = prepared(f"{arguments} {part}", folder)
    config, search, part = found.config, found.search, found.search.options.part
    every = choose(search.grid, search.options, config.seed)
    own = np.arange(len(every))[places(part, len(every))]
    assert [every[k] for k in own] == search.points
    outcomes = ranking.nothing_yet(len(own), 2, config.updates)
    outcomes.returns[:] = (100 * own % 7)[:, None] + np.arange(2)[None] + 1 / 3
    outcomes.areas[:] = own[:, None] + 0.1
    outcomes.updates[:], outcomes.evaluated[:] = config.updates, True
    outcomes.diverged[:] = diverged
    costs = ranking.Costs(10 * len(own), 0.5, 2.0, 4, None if part else 7)
    ranking.write(folder, description(config, search), search, outcomes, costs, complete)
    return found
