"""Actions as real vectors: the bounds are the inner environment's, and so is what happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import clock

from jaxpg.envs import Actor, Box, check_env, from_gymnax, history, squashed, unwrapped
from jaxpg.policies import Agent, actor_critic, check_agent, init_params
from jaxpg.rollout import episodes, evaluate, unroll
from jaxpg.rollout.stream import init_stream
from jaxpg.types import TimeStep


def echo(low, high):
    """Shows the action that it was given."""
    low, high = (np.asarray(x, np.float32) for x in (low, high))
    bound = np.full(low.shape, np.inf, np.float32)

    def step(key, state, action):
        false = jnp.bool_(False)
        return state, TimeStep(action.astype(jnp.float32), jnp.float32(0), false, false)

    env = clock(3, continuous=True)
    return env._replace(
        reset=lambda key: ((), jnp.zeros(low.shape)),
        step=step,
        observation=Box(-bound, bound),
        action=Box(low, high),
    )


def test_an_action_is_centre_plus_half_tanh_and_fixed_entries_stay():
    low, high = [[-2.0, 1.0], [0.5, -0.3]], [[2.0, 1.0], [3.5, 0.7]]
    env = squashed(echo(low, high))
    check_env(env)
    assert env.action.shape == (3,)
    for u in ([0.3, -1.0, 2.0], [400.0, -400.0, 9.1]):
        _, result = env.step(jax.random.key(0), (), jnp.array(u))
        a = np.tanh(np.array(u))
        expected = [[2 * a[0], 1.0], [2 + 1.5 * a[1], 0.2 + 0.5 * a[2]]]
        np.testing.assert_allclose(result.obs, expected, 1e-6, 1e-6)
        assert (result.obs >= np.float32(low)).all() and (result.obs <= np.float32(high)).all()


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["tanh", "beta"])
def test_a_rollouts_log_prob_is_that_of_its_action(distribution):
    env = squashed(from_gymnax("Pendulum-v1"))
    agent = actor_critic(env, hidden=(8,), distribution=distribution, normalise=True)
    check_agent(env, agent)
    params = init_params(agent, jax.random.key(0))

    @jax.jit
    def both(params, key):
        whole, _ = episodes(env, agent, params, key, 3, 20)
        _, (stream, _) = unroll(env, agent, params, init_stream(env, agent, key, 3), key, 20)
        return whole, stream, evaluate(env, agent, params, key, 2)

    whole, stream, _ = both(params, jax.random.key(1))
    for trajectory in (whole, stream):
        carry = agent.policy.initial_carry(3)
        _, d = agent.policy.apply(params.policy, carry, trajectory.obs, trajectory.first)
        found = d.log_prob(trajectory.action)
        np.testing.assert_allclose(trajectory.log_prob, found, 1e-4, 1e-5)
        assert np.std(trajectory.action) > 0.1


def test_a_policy_acts_in_the_inner_environment():
    inner = history(echo([-2.0], [2.0]), 1)
    env, actor = unwrapped(squashed(inner), _constant(0.7))
    action, _ = actor.step(
        jax.random.key(0), jnp.zeros((2, 1)), actor.initial_carry(2), jnp.ones(2, bool)
    )
    np.testing.assert_allclose(action, 2 * np.tanh(0.7) * np.ones((2, 1)), 1e-6)
    assert env.wraps is None


def _constant(u):
    return Actor(
        lambda lanes: (), lambda key, obs, carry, first: (jnp.full((len(obs), 1), u), carry)
    )


def test_what_cannot_be_bounded_is_refused():
    with pytest.raises(ValueError, match=r"entry \[1\] of the action has the range -inf to 1"):
        squashed(echo([-1.0, -np.inf], [1.0, 1.0]))
    with pytest.raises(ValueError, match="but the actions are Discrete"):
        squashed(from_gymnax("CartPole-v1"))
    with pytest.raises(ValueError, match="but the actions are Squashed"):
        squashed(squashed(echo([-1.0], [1.0])))
    with pytest.raises(ValueError, match="nothing to choose"):
        squashed(echo([1.0], [1.0]))


def test_distributions_fit_their_actions():
    plain = echo([-1.0], [1.0])
    for env, distribution, said in (
        (plain, "beta", "does not fit actions that are Box; use gaussian, or bound"),
        (squashed(plain), "gaussian", "does not fit actions that are Squashed; use tanh or beta"),
        (
            from_gymnax("CartPole-v1"),
            "beta",
            "does not fit actions that are Discrete; use categorical",
        ),
        (plain, "gausian", "unknown distribution 'gausian'"),
    ):
        with pytest.raises(ValueError, match=said):
            actor_critic(env, distribution=distribution)
    with pytest.raises(ValueError, match="state_dependent_std is for gaussian and tanh"):
        actor_critic(squashed(plain), distribution="beta", state_dependent_std=True)
    inner, outer = actor_critic(plain), actor_critic(squashed(plain))
    for env, agent in ((plain, outer), (squashed(plain), inner)):
        with pytest.raises(ValueError, match="build it for"):
            check_agent(env, Agent(agent.policy))
