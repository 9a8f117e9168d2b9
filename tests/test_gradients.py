"""The gradients of blocks, and those of an epoch's minibatches, add up to the gradient of the whole."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import Hyperparams, episodes
from jaxpg.batching import fair_divisor
from jaxpg.devices import built_for
from jaxpg.envs import from_gymnax
from jaxpg.estimators import Estimator, assess, baselines, credit, surrogates
from jaxpg.estimators.estimator import Batch
from jaxpg.optimizers import sgd
from jaxpg.policies import Agent, AgentCarry, AgentParams, mlp
from jaxpg.training.accumulation import gradient_of
from jaxpg.training.algorithm import Algorithm
from jaxpg.training.data import stream
from jaxpg.training.improvement import improve, optimizers

SURROGATES = {
    "score": surrogates.score,
    "standardised clip": surrogates.standardised(surrogates.clipped),
}


def take(i, x):
    return x[i]


@cache
def data(num_episodes=30):
    env = from_gymnax("CartPole-v1", max_steps_in_episode=24)
    policy = mlp(env.observation, env.action, (8,))
    params = policy.init(jax.random.key(0))
    agent = Agent(policy)
    rollout = jax.jit(partial(episodes, env, agent, num_episodes=num_episodes))
    trajectory, _ = rollout(AgentParams(params, ()), jax.random.key(1))
    # No episode reaches the last rows, so that there are blocks to skip.
    trajectory = trajectory._replace(mask=trajectory.mask.at[-8:].set(False))
    elsewhere = jax.tree.map(lambda x: x + 0.1, params)
    to64 = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return policy, jax.tree.map(to64, elsewhere), jax.tree.map(to64, trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [surrogates.per_episode, surrogates.per_step])
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_blocks_add_up(platform, name, reduce, x64):
    policy, params, trajectory = data()
    estimator = Estimator(credit.reward_to_go, baselines.leave_one_out, reduce=reduce)
    estimator = estimator._replace(surrogate=SURROGATES[name])
    numbers = Hyperparams(entropy_coef=0.1)
    batch = assess(estimator, trajectory, trajectory.log_prob, numbers)

    def of(block):
        with built_for(platform):  # on a GPU no block is skipped
            run = jax.jit(lambda p: gradient_of(estimator, policy, p, (), batch, numbers, block))
            return run(params)

    whole, metrics = of(10**6)
    for block in (72, 60):
        parts, found = of(block)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            assert np.allclose(a, b, rtol=1e-9, atol=1e-12)
        for key in metrics:
            assert np.isclose(found[key], metrics[key], rtol=1e-9), key
    # Replicas whose episodes end at different times share the loop but not the result.
    both = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    short = both.trajectory.mask.at[1, 3:].set(False)
    both = both._replace(
        trajectory=both.trajectory._replace(mask=short),
        advantage=jnp.where(short, both.advantage, 0.0),
    )
    run = jax.jit(jax.vmap(lambda b: gradient_of(estimator, policy, params, (), b, numbers, 60)[0]))
    with built_for(platform):
        together = run(both)
    for i in (0, 1):
        one = Batch(*(jax.tree.map(partial(take, i), x) for x in both))
        alone, _ = gradient_of(estimator, policy, params, (), one, numbers, 10**6)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert np.allclose(a[i], b, rtol=1e-9, atol=1e-12)


def test_reductions_that_are_no_sums_stay_whole(x64):
    policy, params, trajectory = data()

    def largest(gain, mask):
        return jnp.where(mask, gain, -jnp.inf).max()

    estimator = Estimator(reduce=largest)
    batch = assess(estimator, trajectory, trajectory.log_prob, Hyperparams())
    found, metrics = gradient_of(estimator, policy, params, (), batch, Hyperparams(), 60)
    same, _ = gradient_of(estimator, policy, params, (), batch, Hyperparams(), 10**6)
    assert np.isfinite(metrics["objective"])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(same), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("total", "wanted", "size"),
    [(500 * 64, 512, 500), (720, 60, 60), (7919, 512, 7919), (5, 10, 5)],
)
def test_blocks_aredivisors_of_a_fair_size(total, wanted, size):
    assert fair_divisor(total, wanted) == size


@pytest.mark.parametrize(("layout", "parts"), [("steps", 16), ("lanes", 5)])
def test_an_epoch_uses_every_step_once(layout, parts, x64):
    """With a vanishing rate, SGD's minibatch steps add up to the gradient of the whole batch."""
    policy, params, trajectory = data(30)
    # Minibatches of equal weight.
    trajectory = trajectory._replace(mask=jnp.ones_like(trajectory.mask))
    estimator = Estimator(surrogate=surrogates.ratio, reduce=surrogates.per_step)
    row = Algorithm(estimator, policy_optimizer=sgd, num_minibatches=parts, data=stream)
    numbers = Hyperparams(learning_rate=1e-8, max_grad_norm=1e9)
    batch = assess(estimator, trajectory, trajectory.log_prob, numbers)
    start, carry = AgentParams(params, ()), AgentCarry((), ())
    optimizer, _ = optimizers(Agent(policy), row, numbers)
    after, *_ = improve(
        Agent(policy), row, layout, start, (optimizer.init(params), ()), batch, carry, numbers,
        jax.random.key(3),
    )  # fmt: skip
    whole, _ = gradient_of(estimator, policy, params, (), batch, numbers)
    moved = jax.tree.map(lambda a, b: (a - b) / (parts * 1e-8), after.policy, params)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(whole), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)
