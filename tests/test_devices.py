"""Replicas in groups, and policy and critic on separate devices, give the same results as together."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import Hyperparams, make_trainer
from jaxpg.batching import in_groups
from jaxpg.devices import (
    GRAPHS,
    backend,
    built_for,
    check_devices,
    compiler_options,
    launch_options,
    on_two_devices,
    take_gpu_memory,
)
from jaxpg.envs import from_gymnax
from jaxpg.policies import actor_critic
from jaxpg.training.algorithm import algorithm


def work(params, key, common):
    """A function of a tree, a key and an input that all replicas share."""
    noise = jax.random.randint(key, (3,), 0, 1000)
    return {"sum": params["w"] * common["scale"] + noise, "key": jax.random.split(key)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("total", "loop"), [(12, [3]), (4, []), (3, []), (13, [13]), (6, [2]), (1, [])]
)
def test_groups_change_nothing_but_the_order(total, loop):
    arguments = (
        {"w": jnp.arange(3.0 * total).reshape(total, 3), "none": ()},
        jax.random.split(jax.random.key(0), total),
        {"scale": jnp.array([2.0, 3.0, 5.0])},
    )
    axes = (0, 0, None)
    grouped = jax.vmap(in_groups(work, 4), axes)
    loops = [
        e.params["length"]
        for e in jax.make_jaxpr(grouped)(*arguments).eqns
        if e.primitive.name == "scan"
    ]
    assert loops == loop
    found, expected = grouped(*arguments), jax.vmap(work, axes)(*arguments)
    np.testing.assert_array_equal(found["sum"], expected["sum"])
    np.testing.assert_array_equal(*(jax.random.key_data(x["key"]) for x in (found, expected)))
    # The negative control: replicas differ.
    assert len(np.unique(np.asarray(expected["sum"])[:, 0])) == total


@pytest.mark.slow
def test_one_alone_is_the_function():
    arguments = {"w": jnp.ones(3)}, jax.random.key(0), {"scale": 2.0}
    found, expected = in_groups(work, 4)(*arguments), work(*arguments)
    np.testing.assert_array_equal(found["sum"], expected["sum"])


# Runs in a process of its own, because a process cannot change its number of devices.
APART = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jaxpg import Hyperparams, make_trainer, train
from jaxpg.training.algorithm import algorithm
from jaxpg.devices import concurrently, on_two_devices
from jaxpg.envs import from_gymnax
from jaxpg.runs.config.presets import preset
from jaxpg.runs.config.config import points
from jaxpg.runs.train.replicas import make_replicas, use_cpu_cores
from jaxpg.policies import actor_critic
from dataclasses import replace

jax.config.update("jax_num_cpu_devices", 3)

def one(x, n):
    return {"x": jnp.sin(x), "n": n + 1, "ended": n > 2, "none": ()}

def other(x, n):
    return [x[:2] * n, n.astype(jnp.uint8), jax.lax.axis_index("pair") if halved else jnp.int32(1)]

arguments = jnp.arange(6.0).reshape(2, 3), jnp.int32(3)
halved = False
plain = concurrently(one, other, *arguments)
halved = True
apart = jax.jit(on_two_devices(partial(concurrently, one, other)))(*arguments)
# The last number of the second function says that it ran on the second device.
for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(apart), strict=True):
    assert a.dtype == b.dtype, (a, b)
    np.testing.assert_array_equal(a, b)

env = from_gymnax("CartPole-v1")
agent = actor_critic(env, hidden=(4,))
trainer = make_trainer(env, agent, algorithm("ppo"), num_envs=4, num_steps=8)
run = partial(train, trainer, num_updates=2)
hyperparams = jax.tree.map(jnp.float32, Hyperparams(learning_rate=1e-3, critic_learning_rate=1e-3))
state = jax.jit(trainer.init)(jax.random.key(0))
plain, apart = jax.jit(run)(state, hyperparams), jax.jit(on_two_devices(run))(state, hyperparams)
def numbers(tree):
    raw = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
           for x in jax.tree.leaves(tree)]
    return [np.asarray(x) for x in raw]
for a, b, before in zip(numbers(plain[0]), numbers(apart[0]), numbers(state), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
for start, end in zip(state.params, apart[0].params, strict=True):  # of the policy, of the critic
    change = [np.abs(a - b).max() for a, b in zip(numbers(start), numbers(end), strict=True)]
    assert max(change) > 1e-3, change
assert set(plain[1]) == set(apart[1])

config, grid = preset("CartPole-v1", "ppo")
def mesh(**changes):
    found = make_replicas(replace(config, **changes), points(grid)).sharding
    return found and dict(found.mesh.shape)
assert mesh(seeds=1) == {"replica": 1, "pair": 2}
assert mesh(seeds=2) == {"replica": 2}
assert mesh(seeds=3) == {"replica": 3}
assert mesh(seeds=1, algorithm="reinforce") is None
"""


@pytest.mark.slow
def test_policy_and_critic_are_fitted_on_a_device_each():
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    subprocess.run([sys.executable, "-c", APART], check=True, env=environment)


def test_one_device_is_no_pair():
    if jax.device_count() == 1:
        assert on_two_devices(work) is work


@pytest.mark.slow
@pytest.mark.parametrize(("row", "num_steps"), [("ppo", 4), ("reinforce_baseline", None)])
def test_a_program_is_built_for_what_it_is_told(row, num_steps, monkeypatch):
    env = from_gymnax("CartPole-v1", max_steps_in_episode=8)
    agent = actor_critic(env, hidden=(8,))
    trainer = make_trainer(env, agent, algorithm(row), num_envs=4096, num_steps=num_steps)
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    numbers = jax.eval_shape(lambda: jax.tree.map(jnp.float32, Hyperparams()))

    def traced():
        return str(jax.make_jaxpr(trainer.update)(state, numbers))

    here = traced()
    with monkeypatch.context() as patch, built_for("tpu"):
        patch.setattr(
            jax, "default_backend", lambda: pytest.fail("asked for this machine's device")
        )
        assert traced() != here
    assert traced() == here


def test_a_trace_for_another_platform_is_not_reused():
    ask = jax.jit(lambda: int(backend() == "cpu"))
    assert ask() == 1
    with built_for("tpu"):
        assert ask() == 0
        with built_for("gpu"):
            assert backend() == "gpu"
        assert backend() == "tpu"
    assert ask() == 1


def test_one_function_asks_what_programs_are_built_for():
    root = Path(__file__).parent.parent / "jaxpg"
    found = {file.name for file in root.rglob("*.py") if "default_backend" in file.read_text()}
    assert found == {"devices.py"}


def test_a_gpu_gets_graphs_of_loops_unless_the_user_says(monkeypatch):
    commands = "xla_gpu_enable_command_buffer"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    monkeypatch.setattr("jaxpg.devices._GRAPHS_KNOWN", True)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".6")
    assert (compiler_options(None), launch_options()) == (None, {})
    with built_for("gpu"):
        options = compiler_options(2)
        assert options is not None and "WHILE" in options[commands].split(",")
        assert launch_options() == options | {"XLA_CLIENT_MEM_FRACTION": ".6"}
        # The compiler of this machine shares the options of a GPU's, and refuses what it does not know.
        jax.jit(lambda: 0).lower().compile(options)
        with pytest.raises(RuntimeError, match="not a valid enum value"):
            jax.jit(lambda: 0).lower().compile({commands: "LOOPS"})
        for option in GRAPHS:
            monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 --{option}=+WHILE")
            assert compiler_options(2) is None
        monkeypatch.delenv("XLA_FLAGS")
        monkeypatch.setattr("jaxpg.devices._GRAPHS_KNOWN", False)
        assert compiler_options(2) is None


@pytest.mark.parametrize(
    ("platforms", "plugins", "given", "found"),
    [
        ("", ["xla_cuda12"], {}, "0.9"),
        ("cuda,cpu", ["xla_cuda13"], {}, "0.9"),
        ("rocm", ["xla_rocm7"], {"HOME": "/"}, "0.9"),
        ("cpu", ["xla_cuda12"], {}, None),
        ("", ["xla_tpu"], {}, None),
        ("", [], {}, None),
        ("", ["xla_cuda12"], {"XLA_CLIENT_MEM_FRACTION": ".5"}, ".5"),
        ("", ["xla_cuda12"], {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, None),
        ("", ["xla_cuda12"], {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, None),
    ],
)
def test_memory_is_taken_where_a_gpu_will_be_used_and_the_user_has_not_said(
    platforms, plugins, given, found
):
    environment = dict(given)
    take_gpu_memory(platforms, plugins, environment)
    assert environment.get("XLA_CLIENT_MEM_FRACTION") == found
    assert {name: environment[name] for name in given} == given


def test_plugins_are_found_before_devices_start(tmp_path, monkeypatch):
    (tmp_path / "jax_plugins" / "xla_cuda12").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda12" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")  # undone at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(jax, "config", type("Asked", (), {"jax_platforms": None}))
    check_devices()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.9"
