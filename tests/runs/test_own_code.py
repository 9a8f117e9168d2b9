"""Runs on an environment of the user's own, named by its module."""

import json
import sys

import jax
import numpy as np
import pytest
from small_runs import FLAGS, resume

from jaxpg.cli import main
from jaxpg.runs.config.flags import request
from jaxpg.runs.play.policy import load_policy
from jaxpg.runs.train.run import execute, prepare

WORLD = '''
import jax.numpy as jnp, numpy as np
from jaxpg.envs import Box, Discrete, Env
from jaxpg.types import TimeStep

def make(size=4):
    """A walk that pays for steps to the right."""
    def reset(key):
        return jnp.int32(0), jnp.zeros(1)
    def step(key, state, action):
        after, reward = state + 1, jnp.float32(action)
        return after, TimeStep(jnp.full(1, after / size), reward, jnp.bool_(False), after >= size)
    anywhere = np.full(1, np.inf, np.float32)
    return Env(reset, step, Box(-anywhere, anywhere), Discrete(2), size)

def torso(observation, action):
    return lambda key, obs: jnp.ones(3), lambda params, obs: jnp.tanh(obs * params[None])
'''


@pytest.mark.slow
def test_a_run_on_a_factory_has_everything_that_a_named_one_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_walk.py").write_text(WORLD)
    flags = FLAGS.replace("CartPole-v1", "own_walk:make --settings size=6").split()
    flags += ["--network", "own_walk:torso"]
    config, grid, _ = request([*flags, "--updates", "2"], "jaxpg train")
    run = prepare(config, grid)
    assert run.folder.name.startswith("own_walk-make-ppo-"), "a folder's name has no colon"
    execute(run)
    recorded = json.loads((run.folder / "config.json").read_text())
    assert set(recorded["sources"]) == {"own_walk:make", "own_walk:torso"}

    (tmp_path / "own_walk.py").write_text(WORLD + "# another version\n")
    capsys.readouterr()
    resume(run.folder, "--updates", "4")
    again = json.loads((run.folder / "config.json").read_text())["resumed"][0]["changed"]
    assert set(again) == {"sources own_walk:make", "sources own_walk:torso"}

    action = load_policy(run.folder).act(jax.random.key(0), np.zeros((3, 1), np.float32))
    assert action.shape == (3,)
    main(["evaluate", str(run.folder)])
    main(["record", str(run.folder), "--episodes", "2", "--out", "two.npz"])
    main(["render", str(run.folder), "--out", "film.gif"])
    assert "2 episodes of replica" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "own_walk:mke"])
    assert "own_walk has no 'mke'; did you mean make?" in capsys.readouterr().err
