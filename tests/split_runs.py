"""What tests/test_shards.py runs on eight devices: split_runs.py PART FOLDER."""

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import random_mdp

from jaxpg import Hyperparams, batching, devices, make_trainer, train
from jaxpg.devices import check_split, split_over
from jaxpg.envs import from_gymnax, from_mdp
from jaxpg.estimators import Estimator
from jaxpg.lab import Source, gradient_statistics, gradient_trace
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.worlds.world import world
from jaxpg.policies import actor_critic, tabular
from jaxpg.runs.config.config import check, completed
from jaxpg.runs.config.presets import preset
from jaxpg.runs.play.policy import load_policy
from jaxpg.runs.train.replicas import check_layout, layout_of
from jaxpg.runs.train.run import execute, prepare, prepare_resume
from jaxpg.training import improvement
from jaxpg.training.algorithm import algorithm
from jaxpg.training.data import with_reference
from jaxpg.training.scaling import scaled

ENV = from_gymnax("CartPole-v1", max_steps_in_episode=24)
NUMBERS = jax.tree.map(jnp.float32, Hyperparams(learning_rate=1e-2, critic_learning_rate=1e-2))


def trainer_of(row, network="mlp", recompute=None):
    agent = actor_critic(ENV, network, hidden=(4,), normalise=row.data.whole_episodes is False)
    steps = 20 if row.data.whole_episodes else 8
    return make_trainer(ENV, agent, row, num_envs=32, num_steps=steps, recompute=recompute)


def rows():
    """Parameters and metrics agree to rounding, and streams and counts exactly."""
    held = algorithm("grpo", 4)
    ppo, noisy = algorithm("ppo"), algorithm("a2c")._replace(measure_noise=True)
    for name, trainer in {
        "ppo": trainer_of(ppo._replace(data=scaled(ppo.data), measure_kl=True)),
        "recurrent": trainer_of(ppo, "gru"),
        "a2c": trainer_of(noisy),
        "trpo": trainer_of(algorithm("trpo")),
        "again": trainer_of(algorithm("reinforce_baseline"), recompute=True),
        "grpo": trainer_of(held._replace(data=with_reference(held.data))),
        "dapo": trainer_of(algorithm("dapo", 4)),
    }.items():
        found = []
        for count in (1, 2, 8) if name == "ppo" else (1, 8):
            split = split_over(trainer, count) if count > 1 else trainer
            run = partial(train, split, num_updates=2)
            state = jax.jit(split.init)(jax.random.key(0))
            found.append((state.params, *jax.jit(run)(state, NUMBERS)))
        for _, state, metrics in found[1:]:
            start, one, expected = found[0]
            assert metrics.keys() == expected.keys()
            moved = 0.0
            for x in metrics:
                np.testing.assert_allclose(
                    metrics[x], expected[x], 2e-4, 1e-5, equal_nan=True, err_msg=f"{name} {x}"
                )
            for a, b, c in zip(
                *map(jax.tree.leaves, (state.params, one.params, start)), strict=True
            ):
                np.testing.assert_allclose(a, b, 1e-4, 2e-5, err_msg=name)
                moved = max(moved, np.abs(b - c).max())
            assert moved > 1e-2, f"{name} has not moved"
            for a, b in zip(*map(jax.tree.leaves, (state.data, one.data)), strict=True):
                np.testing.assert_allclose(a, b, 1e-3, 1e-5, err_msg=name)
            np.testing.assert_array_equal(metrics["env_steps"], expected["env_steps"])
    # The negative control: a device that believed itself alone would draw what the first draws.
    alone, split = trainer_of(ppo), split_over(trainer_of(ppo), 8)
    with devices.undivided():
        same = jax.jit(lambda key: alone.init(key).data.obs)(jax.random.key(0))
    assert (
        len(np.unique(jax.jit(split.init)(jax.random.key(0)).data.obs, axis=0)) == len(same) == 32
    )


def laboratory():
    """Statistics over devices are one device's, and so is a trace."""
    env = from_mdp(random_mdp(0, horizon=4))
    policy = tabular(env.observation, env.action)
    source = Source(env, policy, Estimator(), policy.init(None), jax.random.key(0), NUMBERS)
    place = world("A")
    forms = [form(name, place) for name in ("rtg", "is_total", "rtg_optimal_loo")]

    def measured():
        # As many batches of two as an interval needs, and so every experiment that measures.
        found = measure(place, forms, jax.random.key(0), 256, (2,))
        return [
            (each.levels, each.env_steps, each.effective_sample_size) for each in found.values()
        ]

    def all_measured():
        trace = gradient_trace(source, 3200, route="jvp")
        return gradient_statistics(source, 3200), trace, measured()

    with_all = all_measured()
    alone = jax.devices()[:1]
    with mock.patch.object(jax, "devices", return_value=alone):
        jax.clear_caches()
        one = all_measured()
    for a, b in zip(jax.tree.leaves(with_all), jax.tree.leaves(one), strict=True):
        if not isinstance(a, str):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)
    text = jax.jit(lambda: batching.map_over_devices(lambda i: i * 2.0, 32)).lower().as_text()
    assert "mhlo.num_partitions = 8" in text


def messages():
    """One message for each network and optimizer step, and none of the size of the data."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    from benchmark_programs import CHIPS
    from compiled_text import measured, parsed

    def cost(function, *arguments):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return measured(parsed(text), CHIPS["h100"]).once

    trainer = trainer_of(algorithm("ppo"))
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    split = split_over(trainer, 8)
    steps, size = 16, sum(x.size for x in jax.tree.leaves(state.params))
    found = cost(split.update, state, NUMBERS)
    # Rescaling takes two, normalising observations two, metrics two: one of numbers and one of counts.
    assert found.collectives <= 2 * steps + 8, found
    assert found.collective_bytes <= steps * 4 * (size + 20) + 8 * 4 * 64, found
    assert found.collectives >= 2 * steps, "they were not counted"
    # Replicas share nothing.
    mesh = devices.mesh_of({"replica": 8})
    spec = jax.sharding.PartitionSpec("replica")
    apart = jax.shard_map(
        jax.vmap(trainer.update, (0, None)),
        mesh=mesh,
        in_specs=(spec, jax.sharding.PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    keys = jax.random.split(jax.random.key(0), 8)
    assert cost(apart, jax.eval_shape(jax.vmap(trainer.init), keys), NUMBERS).collectives == 0


def command(folder):
    """A run on other devices, and resumed on fewer, ends as one device's, to rounding."""
    config, grid = preset("CartPole-v1", "ppo")
    config = replace(
        config,
        seeds=2,
        num_envs=32,
        num_steps=8,
        hidden=(4,),
        updates=4,
        evaluation_episodes=8,
        settings="max_steps_in_episode=12",
        schedule="constant",
        quiet=True,
        compilation_cache=False,
    )

    def trained(name, **changes):
        own = replace(config, run=str(folder / name), **changes)
        execute(prepare(own, grid))
        return own

    trained("one", devices="1")
    shared = trained("both", devices="8", shard="both", updates=2)
    again = replace(shared, devices="2", shard="environments", updates=4)
    execute(prepare_resume(again, grid))
    trained("environments", devices="8", shard="environments")
    one, *others = [load_policy(folder / name).params for name in ("one", "both", "environments")]
    for other in others:
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-5)

    trainer = trainer_of(algorithm("ppo"))

    def refused(*parts, seeds=2, **changes):
        own = replace(config, seeds=seeds, **changes)

        def checked():
            check(own, completed(own, grid))
            check_layout(own, seeds, trainer)

        with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
            checked()
        assert all(part in str(raised.value) for part in parts), raised.value

    refused("devices=9", "8; use 1 to 8", devices="9")
    refused("devices=two must be all, or a number", devices="two")
    refused("shard=lanes must be replicas, environments or both", shard="lanes")
    refused("3 agents", "devices=8; use 8 agents", "--devices 3", seeds=3, shard="replicas")
    refused(
        "8 blocks",
        "3 devices cannot share evenly; use 2 of them",
        "12 environments",
        devices="3",
        shard="environments",
    )
    refused("5 agents", "devices=7", "--devices 5", "448 environments", seeds=5, devices="7")
    for row, why in (("enac", "enac compares the scores"), ("impala", "replay(stream, 4)")):
        with pytest.raises(ValueError, match=f"{re.escape(why)}.*--shard replicas"):
            check_split(trainer_of(algorithm(row)), 2)
    for changes, expected in (
        ({}, (8, 1)),
        ({"seeds": 4, "devices": "8"}, (4, 2)),
        ({"seeds": 4}, (4, 1)),  # on a CPU, policy and critic take two cores
        ({"seeds": 4, "algorithm": "reinforce"}, (4, 2)),
        ({"seeds": 1, "shard": "environments"}, (1, 8)),
        ({"seeds": 6, "shard": "both"}, (2, 4)),
        ({"seeds": 3, "devices": "1"}, (1, 1)),
    ):
        own = replace(config, **({"seeds": 8} | changes))
        assert layout_of(own, own.seeds, trainer) == expected, (
            changes,
            layout_of(own, own.seeds, trainer),
        )


if __name__ == "__main__":
    # Small blocks, so that few environments make many.
    batching.LANES = improvement.LANES = devices.LANES = 4
    part, folder = sys.argv[1], Path(sys.argv[2])
    parts = {"rows": rows, "laboratory": laboratory, "messages": messages}
    command(folder) if part == "command" else parts[part]()
