"""Masked steps affect no result, even in worlds whose physics breaks down where an episode ends."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import Box, Discrete, Env
from jaxpg.estimators import Estimator, baselines, credit, masked, surrogates
from jaxpg.lab import Source, gradient_samples
from jaxpg.optimizers import adam
from jaxpg.policies import actor_critic, init_params
from jaxpg.rollout import episodes
from jaxpg.training.algorithm import ALGORITHMS, Algorithm, algorithm
from jaxpg.types import TimeStep

BOUND = np.full(2, np.inf, np.float32)


def breaking(after_death: float, limit: int = 6) -> Env:
    """A clock that dies after 2 to 4 steps; its next observation is then `after_death`."""

    def reset(key):
        dies = jax.random.randint(key, (), 2, 5)
        return (jnp.int32(0), dies), jnp.zeros(2)

    def step(key, state, action):
        time, dies = state[0] + 1, state[1]
        terminated = time >= dies
        obs = jnp.stack([time / 4.0, jax.random.normal(key)])
        obs = jnp.where(terminated, after_death, obs)
        reward = 1.0 + 0.5 * action
        # A careless environment flags the same step as both.
        return (time, dies), TimeStep(obs, reward, terminated, terminated)

    return Env(reset, step, Box(-BOUND, BOUND), Discrete(2), limit)


@cache
def learner(row, normalise=False):
    """after_death, demonstrations -> parameters and metrics: one program for every way to break down."""

    def learn(after_death, demonstrations=None):
        env = breaking(after_death)
        agent = actor_critic(env, hidden=(4,), normalise=normalise)
        num_steps = None if row.data.whole_episodes else 8
        trainer = make_trainer(env, agent, row, num_envs=4, num_steps=num_steps)
        state = trainer.init(jax.random.key(0))
        return train(trainer, state, Hyperparams(), demonstrations, num_updates=2)

    return jax.jit(learn)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


@cache
def demonstrated():
    env = breaking(0.0)
    agent = actor_critic(env, hidden=(4,))
    return episodes(env, agent, init_params(agent, jax.random.key(1)), jax.random.key(2), 3)[0]


CRITIC_OF_EPISODES = Algorithm(
    Estimator(credit.lambda_return, baselines.critic, reduce=surrogates.per_step),
    critic_optimizer=adam,
)
# Rows that treat a trajectory differently; the other rows differ from these only in numbers.
ROWS = {
    name: ALGORITHMS[name]
    for name in ("reinforce_baseline", "off_policy", "guided", "enac", "ppo", "trpo", "impala")
} | {"critic of episodes": CRITIC_OF_EPISODES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_what_follows_an_end_changes_no_row(name):
    row, normalise = ROWS[name], name in ("reinforce_baseline", "ppo")
    given = (demonstrated(),) if row.data.demonstrations else ()
    learn = learner(row, normalise)
    state, metrics = learn(0.0, *given)
    params = state.params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    for after_death in (jnp.nan, jnp.inf):
        found, others = learn(after_death, *given)
        assert_same((found.params, others), (params, metrics))


@pytest.mark.slow
def test_gradients_of_trajectories():
    estimator = Estimator(baseline=baselines.optimal_constant)
    rows = []
    for after_death in (np.nan, 0.0):
        env = breaking(after_death)
        policy = actor_critic(env, hidden=(4,)).policy
        params = policy.init(jax.random.key(0))
        source = Source(env, policy, estimator, params, jax.random.key(1), Hyperparams())
        rows.append(jax.jit(lambda source=source: gradient_samples(source, 8))())
    assert np.isfinite(rows[0]).all() and np.array_equal(*rows)


def test_demonstrations_may_hold_anything_where_they_are_masked():
    clean = demonstrated()

    def broken(x):
        keep = clean.mask.reshape(clean.mask.shape + (1,) * (x.ndim - 2))
        return jnp.where(keep, x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x

    dirty = jax.tree.map(broken, clean)
    assert np.isnan(dirty.obs).any() and np.isfinite(masked(dirty).obs).all()
    for name in ("behaviour_cloning", "guided"):
        learn = learner(algorithm(name))
        (one, _), (other, _) = learn(0.0, dirty), learn(0.0, clean)
        assert_same(one.params, other.params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(one.params))
