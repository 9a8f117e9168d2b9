"""The smallest run that has every part: streams, minibatches, a critic, several seeds."""

from pathlib import Path

from jaxpg.runs.config.flags import request
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
