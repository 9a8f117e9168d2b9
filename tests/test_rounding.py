"""Rounding is never scaled up to a step: equal returns have advantage 0, at any scale of rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import Box, Discrete, Env
from jaxpg.estimators import Estimator, assess, baselines, credit, importance, rescaled, surrogates
from jaxpg.optimizers import sgd
from jaxpg.policies import actor_critic
from jaxpg.training.algorithm import Algorithm, algorithm, check_algorithm
from jaxpg.training.data import episodes as own_episodes
from jaxpg.types import TimeStep, Trajectory

STANDARDISED = surrogates.standardised(surrogates.score)


def paying(reward: float, length: int = 10) -> Env:
    """An environment in which every step pays the same, whatever the action."""

    def reset(key):
        return jnp.int32(0), jnp.stack([jnp.float32(0), jax.random.uniform(key)])

    def step(key, state, action):
        del action
        time = state + 1
        obs = jnp.stack([time / length, jax.random.uniform(key)])
        return time, TimeStep(obs, reward, time >= length, jnp.bool_(False))

    bound = np.full(2, np.inf, np.float32)
    return Env(reset, step, Box(-bound, bound), Discrete(2), length)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leave_one_out", "batch_mean", "time_mean", "none"])
@pytest.mark.parametrize("num_envs", [7, 300])
def test_equal_returns_move_nothing(name, num_envs):
    row = Algorithm(
        Estimator(credit.total_return, getattr(baselines, name), surrogate=STANDARDISED),
        own_episodes,
        policy_optimizer=sgd,
    )

    def learn(reward):
        env = paying(reward)
        trainer = make_trainer(env, actor_critic(env, hidden=(4,)), row, num_envs=num_envs)
        state = trainer.init(jax.random.key(0))
        return train(trainer, state, Hyperparams(gamma=1.0), num_updates=1)[1]["grad_norm"][0]

    assert (jax.jit(jax.vmap(learn))(jnp.array([0.1, 1e-4, 3e3])) == 0.0).all()


def trajectory(reward) -> Trajectory:
    shape = np.shape(reward)
    ones, yes = jnp.ones(shape, jnp.float32), jnp.ones(shape, bool)
    last = jnp.arange(shape[0])[:, None] == jnp.full((1, shape[1]), shape[0] - 1)
    zero = 0 * ones
    return Trajectory(
        jnp.zeros((*shape, 1)), jnp.zeros(shape, jnp.int32), zero, jnp.asarray(reward, jnp.float32),
        ones, yes, last, yes, zero, zero,
    )  # fmt: skip


def advantage(reward, baseline=baselines.leave_one_out):
    estimator = Estimator(credit.total_return, baseline, surrogate=STANDARDISED)
    given = trajectory(reward)
    batch = assess(estimator, given, given.log_prob, Hyperparams(gamma=1.0))
    return np.asarray(rescaled(estimator, batch)[1].advantage)


@pytest.mark.parametrize("baseline", [baselines.leave_one_out, baselines.none])
def test_returns_that_differ_by_the_order_of_their_sum_are_equal(baseline):
    rng = np.random.default_rng(0)
    row = rng.uniform(0.0, 1.0, 50)
    shuffled = np.stack([rng.permutation(row) for _ in range(16)], axis=1)
    for scale in (1e-6, 1.0, 1e6):
        psi = np.float32(scale * shuffled).sum(axis=0)
        assert len(set(psi.tolist())) > 1, "the control: rounding differs"
        assert (advantage(scale * shuffled, baseline) == 0.0).all()


def test_small_differences_that_are_real_are_standardised():
    """A thousandth of the return is far above rounding, and any scale of rewards gives the same."""
    rng = np.random.default_rng(1)
    reward = 1.0 + 1e-3 * rng.normal(size=(20, 32))
    psi = np.broadcast_to(reward.sum(axis=0), reward.shape)
    exact = psi - (psi.sum(axis=1, keepdims=True) - psi) / 31
    exact = (exact - exact.mean()) / exact.std()
    for scale in (1e-12, 1.0, 1e6):
        assert np.allclose(advantage(scale * reward), exact, atol=2e-3)


def test_a_constant_credit_is_not_standardised():
    """Its advantage would be 0 at every step; weighted by ratios it is not."""
    row = algorithm("reinforce")._replace(estimator=Estimator(credit.unit, surrogate=STANDARDISED))
    with pytest.raises(ValueError, match="an advantage of 0, so the policy would never move"):
        check_algorithm(row, has_critic=False)
    weighted = row.estimator._replace(importance=importance.one_step)
    check_algorithm(row._replace(estimator=weighted), has_critic=False)
