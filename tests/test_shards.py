"""An agent whose environments are split over devices is the agent of one device, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import random_mdp

from jaxpg import make_trainer
from jaxpg.devices import (
    SHARDS,
    across,
    check_split,
    first_of,
    largest,
    mean_across,
    split_over,
    undivided,
)
from jaxpg.envs import from_gymnax, from_mdp
from jaxpg.estimators import Estimator
from jaxpg.policies import actor_critic
from jaxpg.training.algorithm import ALGORITHMS, Algorithm, algorithm

# In a process of its own, because a process cannot change its number of devices.
APART = Path(__file__).parent / "split_runs.py"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rows", "laboratory", "messages", "command"])
def test_split_over_eight_devices(part, tmp_path):
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    flags.append("--xla_force_host_platform_device_count=8")
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, str(APART), part, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_rows_say_whether_they_can_be_split():
    env = from_mdp(random_mdp(0, horizon=4))
    agent = actor_critic(env, "tabular")
    why = {
        name: make_trainer(env, agent, row, num_envs=128).obstacle
        for name, row in ALGORITHMS.items()
    }
    apart = {"enac", "impala", "off_policy", "guided", "behaviour_cloning"}
    assert {name for name, reason in why.items() if reason} == apart, why

    def own(psi, scores, trajectory, hyperparams):
        return jnp.broadcast_to(psi.mean(axis=1, keepdims=True), psi.shape)

    trainer = make_trainer(env, agent, Algorithm(Estimator(baseline=own)), num_envs=128)
    assert trainer.obstacle == "own compares all environments of a batch"


@pytest.mark.parametrize(
    ("row", "num_envs", "blocks"),
    [("ppo", 4096, 64), ("ppo", 100, 2), ("ppo", 16, 1), ("grpo", 480, 10)],
)
def test_blocks_do_not_depend_on_the_machine(row, num_envs, blocks):
    env = from_gymnax("CartPole-v1")
    trainer = make_trainer(env, actor_critic(env), algorithm(row), num_envs=num_envs, num_steps=8)
    assert trainer.blocks == blocks


def test_what_cannot_be_split_is_refused():
    env = from_gymnax("CartPole-v1")
    few, many = len(jax.devices()), len(jax.devices()) + 1
    trainer = make_trainer(env, actor_critic(env), algorithm("ppo"), num_envs=64)
    with pytest.raises(ValueError, match=f"devices={many}, but there are {few}; use 1 to {few}"):
        split_over(trainer, many)
    # On one device an agent is what it was, demonstrations and all.
    given = []
    cloning = make_trainer(env, actor_critic(env), algorithm("behaviour_cloning"), num_envs=64)
    spied = cloning._replace(update=lambda *inputs: (inputs[0], given.append(inputs[2]) or {}))
    split_over(spied, 1).update(cloning.init(jax.random.key(0)), None, jnp.ones(3))
    assert len(given) == 1 and given[0].shape == (3,)
    with pytest.raises(
        ValueError, match=r"1 block, which 2 devices .* use one of them, or .* 128 env"
    ):
        check_split(trainer, 2)


def test_sums_over_devices():
    """Each device has one row; what is undivided stays its own."""
    rows = jnp.arange(6.0).reshape(3, 2)

    def one(row):
        with undivided():
            own = across(row), first_of(2)
        return across({"row": row, "count": jnp.int32(1)}), largest(row), first_of(2), own

    total, most, first, (own, zero) = jax.vmap(one, axis_name=SHARDS)(rows)
    assert total["row"].tolist() == [[6.0, 9.0]] * 3 and total["count"].tolist() == [3] * 3
    assert most.tolist() == [[4.0, 5.0]] * 3 and np.array_equal(first, [0, 2, 4])
    assert np.array_equal(own, rows) and np.array_equal(zero, [0] * 3)
    mean, count = jax.vmap(lambda x, n: mean_across(x, n, n), axis_name=SHARDS)(rows, jnp.arange(3))
    assert mean[0].tolist() == ((rows[1] + 2 * rows[2]) / 3).tolist() and count.tolist() == [3] * 3
    assert mean_across(rows[0], 0.0)[0].tolist() == rows[0].tolist()
