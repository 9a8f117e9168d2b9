"""Observation normalisation against NumPy's statistics of the same observations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing import take, traced_once, trained
from worlds import clock

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import Box, Discrete, Env, from_gymnax
from jaxpg.optimizers import OPTIMIZERS
from jaxpg.policies import actor_critic, linear, mlp, normalised
from jaxpg.policies.normalisation import LIMIT, Statistics, merged
from jaxpg.rollout import unroll
from jaxpg.training.algorithm import algorithm
from jaxpg.types import TimeStep


def offset(mean=(1e4, -3.0), std=(1.0, 1e-3), horizon=40) -> Env:
    """Observations far from 0, of unlike scales; one of them never changes."""

    def view(key):
        noise = jax.random.normal(key, (2,)) * jnp.array(std) + jnp.array(mean)
        return jnp.concatenate([noise, jnp.full(1, 7.0)]).astype(jnp.float32)

    def step(key, t, action):
        ended = t + 1 >= horizon
        return t + 1, TimeStep(view(key), action.astype(jnp.float32), ended, jnp.zeros_like(ended))

    bound = np.full(3, np.inf, np.float32)
    return Env(
        lambda key: (jnp.int32(0), view(key)), step, Box(-bound, bound), Discrete(2), horizon
    )


def chunks_of(rows, mask, sizes):
    zeros = jnp.zeros(rows.shape[1], rows.dtype)
    statistics, start = Statistics(zeros[0], zeros, zeros), 0
    for size in sizes:
        part = slice(start, start + size)
        statistics = merged(statistics, jnp.asarray(rows[part]), jnp.asarray(mask[part]))
        start += size
    return statistics


@pytest.mark.parametrize("sizes", [(1000,), (1, 999), (10,) * 100, (0, 500, 500)])
def test_merged_statistics_are_those_of_all_rows(x64, sizes):
    rng = np.random.default_rng(0)
    rows = rng.normal([1e4, -3.0, 7.0], [1.0, 1e-3, 0.0], (1000, 3))
    mask = rng.random(1000) < 0.7
    count, mean, squares = chunks_of(np.where(mask[:, None], rows, np.nan), mask, sizes)
    kept = rows[mask]
    assert count == len(kept) and np.allclose(mean, kept.mean(0), rtol=1e-12)
    assert np.allclose(squares / count, kept.var(0), rtol=1e-8, atol=1e-15)
    if sizes == (1000,):
        shifted = chunks_of(rows, np.ones(1000, bool), sizes)
        assert abs(shifted.mean - mean).max() > 1e-4, "control: the mask counts"


def test_float32_keeps_a_small_spread_about_a_large_mean():
    rows = np.random.default_rng(1).normal(1e4, 1.0, (2**15, 1)).astype(np.float32)
    mask = np.ones(len(rows), bool)
    count, mean, squares = chunks_of(rows, mask, (2**9,) * 2**6)
    exact = rows.astype(np.float64)
    assert np.allclose(mean, exact.mean(0), rtol=1e-6)
    assert np.allclose(squares / count, exact.var(0), rtol=1e-3)
    naive = (rows**2).mean(dtype=np.float32) - rows.mean(dtype=np.float32) ** 2
    assert abs(naive / exact.var() - 1) > 0.1, "control: the mean of squares loses it"


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "linear", "gru"])
def test_training_keeps_the_statistics_of_everything_seen(network):
    """Compare with a stream gathered separately; chunks are invisible, bitwise, and vmap equals a loop."""
    env = offset()
    agent = actor_critic(
        env, network, normalise=True, **({} if network == "linear" else {"hidden": (8,)})
    )
    row = algorithm("ppo")._replace(num_epochs=2, num_minibatches=2)
    trainer = traced_once(make_trainer(env, agent, row, num_envs=4, num_steps=25))
    hyperparams = jax.tree.map(jnp.float32, Hyperparams(learning_rate=1e-2))
    learn = {
        n: jax.jit(jax.vmap(partial(train, trainer, num_updates=n), (0, None))) for n in (2, 4)
    }
    states = jax.vmap(trainer.init)(jax.random.split(jax.random.key(0), 2))
    half, _ = learn[2](states, hyperparams)
    twice, _ = learn[2](half, hyperparams)
    whole, metrics = learn[4](states, hyperparams)
    for one, other in zip(
        jax.tree.leaves(twice.params), jax.tree.leaves(whole.params), strict=True
    ):
        assert np.array_equal(one, other)
    assert all(np.isfinite(x).all() for k, x in metrics.items() if not k.startswith("episode"))

    # Here observations do not depend on the policy, only on the key, which is the trainer's.
    gather = jax.jit(partial(unroll, env, agent, num_steps=25))
    alone = take(states, 1)
    rollout, seen = alone.data, []
    for update in range(4):
        k_rollout, _ = jax.random.split(jax.random.fold_in(alone.key, update))
        rollout, (trajectory, _) = gather(alone.params, rollout, k_rollout)
        seen.append(np.asarray(trajectory.obs, np.float64).reshape(-1, 3))
    exact = np.concatenate(seen)
    for params in whole.params:
        count, mean, squares = jax.tree.map(lambda x: np.asarray(x[1]), params["statistics"])
        assert count == 400 and np.allclose(mean, exact.mean(0), rtol=1e-5)
        # For -3 +- 1e-3, float32 holds the deviations to a relative error of 1e-4.
        assert np.allclose((squares / count)[:2], exact.var(0)[:2], rtol=1e-3)
        assert squares[2] / count < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["off_policy", "trpo"])
def test_every_observation_counts_once(name):
    """This holds where old batches are used again, and where the step is the natural gradient's."""
    env = offset(horizon=10)
    row = algorithm(name)
    agent = actor_critic(env, hidden=(4,), normalise=True)
    num_steps = None if row.data.whole_episodes else 10
    trainer = make_trainer(env, agent, row, num_envs=4, num_steps=num_steps)
    after, metrics = trained(trainer, Hyperparams(), 3)
    assert after.params.policy["statistics"].seen == metrics["env_steps"].sum() == 120


@pytest.mark.slow
def test_the_network_sees_standardised_and_clipped_observations():
    space = Box(np.full(2, -np.inf, np.float32), np.full(2, np.inf, np.float32))
    inner = linear(space, None)
    network = normalised(inner, space)
    params = network.init(jax.random.key(0))
    obs = jnp.array([[[3.0, -1.0]], [[500.0, 5.0]]])
    first = jnp.zeros((2, 1), bool)
    untouched = inner.apply(params["network"], (), jnp.clip(obs, -LIMIT, LIMIT), first)[1]
    assert np.array_equal(network.apply(params, (), obs, first)[1], untouched)
    params |= {
        "statistics": Statistics(jnp.float32(4), jnp.array([1.0, 5.0]), jnp.array([16.0, 0]))
    }
    shown = jnp.array([[[1.0, -LIMIT]], [[LIMIT, 0.0]]])  # over std 2; a constant entry gives 0
    expected = inner.apply(params["network"], (), shown, first)[1]
    assert np.allclose(network.apply(params, (), obs, first)[1], expected)

    gradient = jax.grad(lambda p: network.apply(p, (), obs, first)[1].sum())(params)
    assert all((x == 0).all() for x in jax.tree.leaves(gradient["statistics"]))
    assert any((x != 0).any() for x in jax.tree.leaves(gradient["network"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_the_statistics(name):
    space = Box(np.full(3, -1, np.float32), np.full(3, 1, np.float32))
    network = normalised(mlp(space, None, (8,)), space)
    params = network.observe(
        network.init(jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (5, 2, 3)),
        jnp.ones((5, 2), bool),
    )
    optimizer = OPTIMIZERS[name](Hyperparams(learning_rate=0.1, weight_decay=0.1))
    gradient = jax.tree.map(jnp.ones_like, params) | {
        "statistics": jax.tree.map(jnp.zeros_like, params["statistics"])
    }
    step, state = optimizer.update(gradient, optimizer.init(params), params)
    step, _ = optimizer.update(gradient, state, params)
    assert all((x == 0).all() for x in jax.tree.leaves(step["statistics"]))
    assert all((x != 0).any() for x in jax.tree.leaves(step["network"]))


@pytest.mark.slow
def test_updates_start_at_ratio_one():
    """Statistics move after the fit, so log-probs at the update equal those at the rollout."""
    env = offset()
    agent = actor_critic(env, hidden=(8,), normalise=True)
    row = algorithm("ppo")._replace(num_epochs=1, num_minibatches=1)
    trainer = make_trainer(env, agent, row, num_envs=4, num_steps=25)
    _, metrics = trained(trainer, Hyperparams(learning_rate=1e-2), 3)
    assert np.abs(metrics["kl"]).max() < 1e-9


@pytest.mark.slow
def test_normalisation_lets_unlike_scales_be_learnt():
    """The reward is for the sign of a 1e-3 signal next to 1e3 noise, which a plain network cannot see."""

    def view(key):
        return jax.random.normal(key, (2,)) * jnp.array([1e-3, 1e3])

    def step(key, obs, action):
        over = jnp.bool_(True)
        right = (action == 1) == (obs[0] > 0)
        return view(key), TimeStep(view(key), right.astype(jnp.float32), over, ~over)

    bound = np.full(2, np.inf, np.float32)
    env = Env(lambda key: (view(key),) * 2, step, Box(-bound, bound), Discrete(2), 1)
    numbers, found = Hyperparams(learning_rate=1e-2, critic_learning_rate=1e-2), {}
    for normalise in (True, False):
        agent = actor_critic(env, hidden=(8,), normalise=normalise)
        trainer = make_trainer(env, agent, algorithm("ppo"), num_envs=32, num_steps=8)
        _, metrics = trained(trainer, numbers, 40, seeds=3)
        found[normalise] = np.asarray(metrics["episode_return"])[:, -5:].mean(axis=1)
    assert (found[True] > 0.8).all() and (found[False] < 0.6).all()


def test_discrete_observations_are_refused():
    with pytest.raises(ValueError, match="these are Discrete; leave normalise out"):
        actor_critic(from_gymnax("FrozenLake-misc"), normalise=True)
    actor_critic(clock(3), normalise=True)
