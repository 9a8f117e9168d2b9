"""The linear-quadratic regulator as an environment, simulated and compared with its closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Lqr, from_lqr
from jaxpg.lab.exact import lqr
from jaxpg.lab.worlds.regulators import gain_policy, objective, value_critic
from jaxpg.policies import Agent, AgentParams, actor_critic, init_params
from jaxpg.rollout import episodes

NUMBERS = (-0.6, np.log(0.5), 0.3)  # k, log sigma, m
PARAMS = {
    name: jnp.full(1, x) for name, x in zip(("gain", "log_std", "offset"), NUMBERS, strict=True)
}


def roll(num_episodes, lqr_=Lqr(), key=0):  # noqa: B008
    critic, table = value_critic(lqr_, NUMBERS, 0.9)
    agent = Agent(gain_policy(offset=True), critic)
    params = AgentParams(PARAMS, table)
    return episodes(from_lqr(lqr_), agent, params, jax.random.key(key), num_episodes)[0]


def test_dynamics_rewards_and_end():
    found = roll(2**14)
    assert found.obs.shape == found.action.shape == (5, 2**14, 1)
    s, u = np.asarray(found.obs[..., 0], float), np.asarray(found.action[..., 0], float)
    np.testing.assert_allclose(found.reward, -(s**2 + 0.1 * u**2), rtol=1e-5)
    noise = s[1:] - s[:-1] - 0.5 * u[:-1]
    count = noise.size
    assert abs(noise.mean()) < 5 * 0.1 / count**0.5
    assert abs(noise.std() / 0.1 - 1) < 5 / (2 * count) ** 0.5
    assert (
        abs(s[0].mean() - 1) < 5 * 0.5 / 2**7
        and abs(s[0].var() / 0.25 - 1) < 5 * (2 / 2**14) ** 0.5
    )
    # The horizon belongs to the process: the last step ends the episode, and nothing is bootstrapped.
    assert found.mask.all() and found.last[-1].all() and not found.last[:-1].any()
    assert (found.discount[-1] == 0).all() and (found.discount[:-1] == 1).all()


def test_returns_and_values_agree_with_the_closed_form():
    found = roll(2**16)
    reward = np.asarray(found.reward, float)
    returns = (0.9 ** np.arange(5))[:, None] * reward
    total = returns.sum(axis=0)
    error = total.std() / len(total) ** 0.5
    known = lqr.objective(Lqr(), NUMBERS, 0.9)
    assert abs(total.mean() - known) < 5 * error
    # The critic is V_t(s): the reward to go equals it on average, whatever the state.
    to_go = np.cumsum(returns[::-1], axis=0)[::-1] / (0.9 ** np.arange(5))[:, None]
    off = to_go - np.asarray(found.value, float)
    for weight in (np.ones_like(off), found.obs[..., 0]):
        x = off * np.asarray(weight, float)
        assert (abs(x.mean(axis=1)) < 5 * x.std(axis=1) / x.shape[1] ** 0.5).all()
    assert float(objective(Lqr(), gain_policy(offset=True), PARAMS, 0.9)) == pytest.approx(
        known, rel=1e-5
    )


@pytest.mark.slow
def test_a_network_acts_in_it():
    env = from_lqr(Lqr(horizon=3))
    agent = actor_critic(env, "mlp")
    found, _ = episodes(env, agent, init_params(agent, jax.random.key(1)), jax.random.key(0), 4)
    assert found.action.shape == (3, 4, 1) and bool(jnp.isfinite(found.reward).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "Lqr.horizon=0 must be a whole number of steps, at least 1"),
        ({"horizon": 2.5}, "Lqr.horizon=2.5 must be a whole number"),
        ({"process_std": -0.1}, "Lqr.process_std=-0.1 must not be negative"),
        ({"initial_variance": -1.0}, "Lqr.initial_variance=-1.0 must not be negative"),
        ({"state_gain": float("nan")}, "Lqr.state_gain=nan must be a finite number"),
    ],
)
def test_mistakes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_lqr(Lqr(**change))
