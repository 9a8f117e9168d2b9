"""One table of optimizers, one set of properties."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg.optimizers import BATCH_SCALINGS, OPTIMIZERS, SCHEDULES, batch_scaled, constant, linear
from jaxpg.runs.config.config import Config
from jaxpg.runs.config.presets import PRESETS, preset
from jaxpg.runs.train.build import build_algorithm
from jaxpg.training.algorithm import ALGORITHMS
from jaxpg.types import Hyperparams

DECAYING = {"adamw", "lion", "muon"}
START = {
    "matrix": jnp.array([[2.0, -1.0, 0.5], [0.3, 1.0, -2.0]]),
    "vector": jnp.array([1.0, -3.0]),
}
TARGET = {"matrix": jnp.zeros((2, 3)), "vector": jnp.array([0.5, 0.5])}


def loss(params):
    errors = jax.tree.map(lambda x, y: ((x - y) ** 2).sum(), params, TARGET)
    return 0.5 * sum(jax.tree.leaves(errors))


def descend(name, params, hyperparams, num_steps):
    """The rate falls linearly, because optimizers that step by sign do not settle otherwise."""
    initial = OPTIMIZERS[name](hyperparams).init(params)

    def step(state, t):
        params, optimizer_state = state
        rate = hyperparams.learning_rate * linear(t / num_steps)
        optimizer = OPTIMIZERS[name](hyperparams._replace(learning_rate=rate))
        step, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state, params)
        return (optax.apply_updates(params, step), optimizer_state), None

    return jax.lax.scan(step, (params, initial), jnp.arange(num_steps))[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    """Each minimises a quadratic, compiles once for all numbers, and under vmap equals a loop."""
    traces = []

    def run(hyperparams, num_steps):
        traces.append(num_steps)
        return descend(name, START, hyperparams, num_steps)

    rates = jnp.array([0.1, 0.05], jnp.float32)
    numbers = jax.tree.map(jnp.float32, Hyperparams(max_grad_norm=10.0))
    learn = jax.jit(partial(run, num_steps=300))
    ends = [learn(numbers._replace(learning_rate=rate)) for rate in rates]
    assert all(loss(end) < 1e-2 * loss(START) for end in ends)
    assert traces == [300]
    few = jax.jit(partial(run, num_steps=20))
    grid = Hyperparams(*(jnp.repeat(x, 2) for x in numbers))._replace(learning_rate=rates)
    together = jax.jit(jax.vmap(partial(run, num_steps=20)))(grid)
    for i, rate in enumerate(rates):
        alone = few(numbers._replace(learning_rate=rate))
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert np.allclose(one, other[i], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_clipped_by_global_norm_first(name):
    """Beyond the limit, only the direction counts."""
    optimizer = OPTIMIZERS[name](Hyperparams(learning_rate=0.1, max_grad_norm=0.5))
    gradient = jax.grad(loss)(START)
    step = [
        optimizer.update(
            jax.tree.map(lambda x, k=k: k * x, gradient), optimizer.init(START), START
        )[0]
        for k in (1.0, 100.0)
    ]
    for one, other in zip(*map(jax.tree.leaves, step), strict=True):
        assert np.allclose(one, other, rtol=1e-5)
    limits = [0.5, 5.0]
    norms = [
        optax.tree.norm(
            OPTIMIZERS["sgd"](Hyperparams(learning_rate=1.0, max_grad_norm=limit)).update(
                gradient, OPTIMIZERS["sgd"](Hyperparams()).init(START), START
            )[0]
        )
        for limit in limits
    ]
    assert np.allclose(norms, [0.5, min(5.0, float(optax.tree.norm(gradient)))])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_matrices_alone(name):
    """Decay subtracts rate x decay x weight besides the step; with a gradient of 0, nothing else happens."""
    nothing = jax.tree.map(jnp.zeros_like, START)
    numbers = Hyperparams(learning_rate=0.1, weight_decay=0.2)
    optimizer = OPTIMIZERS[name](numbers)
    step, _ = optimizer.update(nothing, optimizer.init(START), START)
    decay = 0.1 * 0.2 if name in DECAYING else 0.0
    assert np.allclose(step["matrix"], -decay * START["matrix"], atol=1e-7)
    assert (step["vector"] == 0).all()


def test_muon_orthogonalises_matrices():
    """Its first step is nearly c U V' of the gradient's singular vectors, whatever the singular values."""
    gradient = {"matrix": jnp.array([[10.0, 1.0, 0.0], [0.0, 1.0, 0.5]])}
    u, before, v = np.linalg.svd(np.asarray(gradient["matrix"]), full_matrices=False)
    optimizer = OPTIMIZERS["muon"](Hyperparams(learning_rate=1.0, max_grad_norm=1e9))
    step, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    after = -np.asarray(step["matrix"])
    singular = np.linalg.svd(after, compute_uv=False)
    assert before[0] > 8 * before[1] and singular[0] < 1.7 * singular[1]
    assert (after * (u @ v)).sum() > 0.97 * np.linalg.norm(after) * 2**0.5


@pytest.mark.parametrize(("rule", "power"), [("none", 0), ("linear", 1), ("sqrt", 0.5)])
def test_batch_scaling_is_a_power_of_the_ratio(rule, power):
    assert set(BATCH_SCALINGS) == {"none", "linear", "sqrt"}
    for schedule in SCHEDULES.values():
        scaled = batch_scaled(schedule, rule, 4096, 1024)
        assert scaled(jnp.float32(0.25)) == pytest.approx(4**power * schedule(jnp.float32(0.25)))


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_baseline"])
def test_the_command_scales_from_the_presets_batch(algorithm):
    config, _ = preset("CartPole-v1", algorithm)
    config = replace(config, batch_scaling="linear", schedule="constant")
    start = jnp.float32(0)
    assert build_algorithm(config).schedule(start) == 1.0
    larger = replace(config, num_envs=4 * config.num_envs)
    assert build_algorithm(larger).schedule(start) == 4.0
    # For whole episodes the batch size is their number, however long they are.
    longer = replace(config, num_steps=2 * (config.num_steps or 100))
    expected = 2.0 if config.num_steps else 1.0
    assert build_algorithm(longer).schedule(start) == expected
    half = replace(larger, batch_scaling="sqrt", reference_batch=16 * larger.reference_batch)
    assert build_algorithm(half).schedule(start) == 0.5
    assert build_algorithm(replace(larger, batch_scaling="none")).schedule is constant


@pytest.mark.parametrize(("environment", "algorithm"), PRESETS)
def test_every_preset_is_its_own_reference(environment, algorithm):
    config, _ = preset(environment, "ppo" if algorithm == "*" else algorithm)
    config = replace(config, batch_scaling="linear", schedule="constant")
    row = ALGORITHMS[config.algorithm]
    if row.data.demonstrations:
        config = replace(config, demonstrations="a file that nothing reads here")
    assert build_algorithm(config).schedule(jnp.float32(0)) == 1.0


def test_mistakes_are_one_clear_line():
    with pytest.raises(ValueError, match="unknown batch scaling 'squared'; did you mean"):
        build_algorithm(Config("CartPole-v1", "reinforce", batch_scaling="squared"))
    with pytest.raises(
        ValueError, match=r"batch_scaling=linear needs the batch size .* give reference_batch"
    ):
        build_algorithm(Config("CartPole-v1", "reinforce", batch_scaling="linear"))
    with pytest.raises(ValueError, match="unknown optimizer 'muom'; did you mean muon"):
        build_algorithm(Config("CartPole-v1", "reinforce", optimizer="muom"))
