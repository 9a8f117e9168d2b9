"""Real environments with exact truth: their tables, and the moments of estimators in them."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs.tabulate import mdp_from_gymnax
from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.types import Hyperparams

TOTAL, TO_GO = credit.total_return, credit.reward_to_go
ON = importance.from_start(importance.on_policy)
table = functools.cache(mdp_from_gymnax)


def uniform(mdp):
    return np.zeros((mdp.observation.max() + 1, mdp.reward.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gamma", "average", "length", "traces"),
    [
        (
            "FrozenLake-misc",
            1.0,
            0.013939795959,
            6.811576760e-3,
            (0.1382468276, 0.1382468276, 0.1245591100, 0.0701383245, 0.0016659449),
        ),
        (
            "FrozenLake-misc",
            0.99,
            0.012356137226,
            6.021717547e-3,
            (0.1035970695, 0.1035970695, 0.0931526392, 0.0540471749, 0.0013007328),
        ),
        (
            "Catch-bsuite",
            1.0,
            -0.6,
            1.804500062e-1,
            (5.9674377953, 5.9674377953, 3.3680593623, 2.3446011224, 0.5112788186),
        ),
    ],
)
def test_moments_under_the_uniform_policy(name, gamma, average, length, traces):
    mdp = table(name)
    logits = uniform(mdp)
    assert abs(exact.objective(mdp, logits, gamma) - average) < 1e-12
    true = exact.gradient(mdp, logits, gamma)
    np.testing.assert_allclose(np.linalg.norm(true), length, rtol=1e-9)
    # The critic sees what the policy sees.
    value, action_value = exact.observation_values(mdp, logits, gamma)
    found = [
        exact.moments(
            mdp, logits, estimator, Hyperparams(gamma=gamma, lambda_=0.95), critic=value
        ).trace
        for estimator in (
            Estimator(TOTAL),
            Estimator(TO_GO, baselines.none, ON),
            Estimator(TO_GO, baselines.critic, ON),
            Estimator(credit.lambda_return, baselines.critic, ON),
        )
    ]
    start = gamma ** np.arange(mdp.horizon)[:, None, None]
    coefficients = exact.Coefficients(
        action_value, decay=0.0, step=start, shift=start * value[:, :, None]
    )
    found.append(exact.pair_moments(mdp, logits, coefficients).trace)
    np.testing.assert_allclose(found, traces, atol=6e-11)


def test_dropping_the_discount_on_the_frozen_lake():
    mdp = table("FrozenLake-misc")
    logits = uniform(mdp)
    true = exact.gradient(mdp, logits, 0.99)
    mean = exact.moments(mdp, logits, Estimator(), Hyperparams(gamma=0.99)).mean
    assert abs(np.linalg.norm(mean - true) / np.linalg.norm(true) - 0.0979) < 5e-5
    cosine = mean @ true / np.linalg.norm(mean) / np.linalg.norm(true)
    assert abs(cosine - 0.99966) < 5e-6
    steps = exact.objective(mdp._replace(reward=np.ones_like(mdp.reward)), logits, 1.0)
    assert abs(steps - 7.6726) < 5e-5


def test_the_discounting_chain():
    mdp = table("DiscountingChain-bsuite")
    logits = uniform(mdp)
    # Rewards are float32: 1.1 is off by 2e-8.
    known = {
        1.0: (1.02, (0.016, -0.004, -0.004, -0.004, -0.004), 83.35968, 23.07328),
        0.99: (
            0.8221037959,
            (0.05557924, 0.03159924, 0.01828269, -0.01498634, -0.09047483),
            59.18838253,
            6.84395354,
        ),
    }
    for gamma, (average, gradient, total, to_go) in known.items():
        hyperparams = Hyperparams(gamma=gamma)
        np.testing.assert_allclose(exact.objective(mdp, logits, gamma), average, rtol=1e-7)
        np.testing.assert_allclose(exact.gradient(mdp, logits, gamma), gradient, atol=2e-8)
        found = [
            exact.moments(mdp, logits, estimator, hyperparams).trace
            for estimator in (Estimator(TOTAL), Estimator(TO_GO, baselines.none, ON))
        ]
        np.testing.assert_allclose(found, (total, to_go), rtol=5e-8)


def test_deep_sea():
    mdp = table("DeepSea-bsuite")
    logits = uniform(mdp)
    assert mdp.horizon == 8
    np.testing.assert_allclose(exact.objective(mdp, logits, 1.0), -0.00109375, rtol=1e-6)
    # With the corner's reward alone, only one path of eight steps is paid.
    corner = mdp._replace(reward=np.where(mdp.reward > 0.5, 1.0, 0.0))
    np.testing.assert_allclose(exact.objective(corner, logits, 1.0), 2.0**-8, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FrozenLake-misc", "Catch-bsuite"])
def test_the_table_moves_as_the_environment_does(name):
    """Random play of the environment itself has the table's mean return and length, to 5 standard errors."""
    environment, params = gymnax.make(name)
    mdp, num_episodes = table(name), 20_000

    def episode(key):
        k_reset, k_act, k_step = jax.random.split(key, 3)
        _, state = environment.reset_env(k_reset, params)

        def step(carry, t):
            state, alive = carry
            action = jax.random.randint(
                jax.random.fold_in(k_act, t), (), 0, environment.num_actions
            )
            _, state, reward, ended, _ = environment.step_env(
                jax.random.fold_in(k_step, t), state, action, params
            )
            paid = jnp.where(alive, reward, 0.0)
            return (state, alive & ~ended), (paid, alive)

        _, (paid, alive) = jax.lax.scan(step, (state, True), jnp.arange(mdp.horizon))
        return paid.sum(), alive.sum()

    keys = jax.random.split(jax.random.key(0), num_episodes)
    returns, lengths = (np.asarray(x, np.float64) for x in jax.jit(jax.vmap(episode))(keys))
    logits = uniform(mdp)
    ones = mdp._replace(reward=np.ones_like(mdp.reward))
    for sample, world in ((returns, mdp), (lengths, ones)):
        variance = exact.return_variance(world, logits, 1.0)
        stderr = np.sqrt(variance / num_episodes)
        assert abs(sample.mean() - exact.objective(world, logits, 1.0)) <= 5 * stderr + 1e-12


def test_settings_and_refusals():
    firm = mdp_from_gymnax("FrozenLake-misc", is_slippery=False, max_steps_in_episode=20)
    assert firm.horizon == 20
    assert firm.reward.shape == (16, 4)
    assert set(np.unique(firm.transition)) == {0.0, 1.0}
    with pytest.raises(ValueError, match="CartPole-v1 has no known table; these have: FrozenLake"):
        mdp_from_gymnax("CartPole-v1")
    with pytest.raises(ValueError, match="only with deterministic=True"):
        mdp_from_gymnax("DeepSea-bsuite", deterministic=False)
