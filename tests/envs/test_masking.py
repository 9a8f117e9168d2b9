"""Masks of actions travel at the end of the observation, and the policy obeys them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import clock

from jaxpg.envs import Discrete, Masked, check_env, from_gymnax, with_mask
from jaxpg.policies import actor_critic, check_agent, init_params
from jaxpg.rollout import episodes
from jaxpg.training.algorithm import algorithm
from jaxpg.training.trainer import make_trainer
from jaxpg.types import Hyperparams


def alternating(num_actions=4):
    """At step t the actions t and t + 1 are allowed, modulo their number."""
    env = clock(6)._replace(action=Discrete(num_actions))

    def action_mask(state):
        place = state[0] + jnp.arange(2)
        return jnp.zeros(num_actions, bool).at[place % num_actions].set(True)

    return with_mask(env, action_mask)


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_only_allowed_actions_are_taken(network, normalise):
    env = alternating()
    check_env(env)
    agent = actor_critic(env, network, normalise=normalise, hidden=(8,))
    check_agent(env, agent)
    params = init_params(agent, jax.random.key(0))
    found, _ = jax.jit(lambda: episodes(env, agent, params, jax.random.key(1), 200))()
    ahead = (np.asarray(found.action) - np.arange(6)[:, None]) % 4
    assert set(np.unique(ahead)) == {0, 1}
    # Both are about as likely at first: log 1/2, not log 1/4.
    assert np.abs(np.asarray(found.log_prob) - np.log(0.5)).max() < 0.1

    def loss(params):
        d = agent.policy.apply(params, agent.policy.initial_carry(200), found.obs, found.first)[1]
        return (d.log_prob(found.action) + d.entropy() + d.kl(d)).sum()

    gradient = jax.jit(jax.grad(loss, allow_int=True))(params.policy)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_an_update_leaves_masks_out_of_the_statistics():
    env = alternating()
    agent = actor_critic(env, normalise=True, hidden=(4,))
    trainer = make_trainer(env, agent, algorithm("ppo"), num_envs=8, num_steps=16)
    state = trainer.init(jax.random.key(0))
    state, _ = jax.jit(trainer.update)(state, Hyperparams())
    statistics = state.params.policy["statistics"]
    assert statistics.mean.shape == (2,) and statistics.seen == 128


def test_a_mask_that_allows_nothing_later_leaves_all_equally_likely():
    space = Masked(from_gymnax("CartPole-v1").observation, 3)
    env = clock(2)._replace(observation=space, action=Discrete(3))
    agent = actor_critic(env)
    params = init_params(agent, jax.random.key(0))
    obs, first = jnp.zeros((1, 1, 7)), jnp.zeros((1, 1), bool)
    d = agent.policy.apply(params.policy, (), obs, first)[1]
    np.testing.assert_allclose(jax.nn.softmax(d.logits[0, 0]), np.ones(3) / 3, 1e-6)
    assert np.isfinite(d.entropy()).all()


def test_discrete_observations_survive():
    env = with_mask(from_gymnax("FrozenLake-misc"), lambda state: jnp.ones(4, bool))
    space = env.observation
    check_env(env)
    inner, mask = space.split(jnp.array([[9.0, 1.0, 0.0, 1.0, 1.0]]))
    assert inner.tolist() == [9] and inner.dtype == jnp.int32
    assert mask.tolist() == [[True, False, True, True]]
    assert actor_critic(env, "tabular").policy.init(None)["logits"].shape == (16, 4)


@pytest.mark.parametrize(
    ("action_mask", "said"),
    [
        (lambda state: jnp.ones(3, bool), r"bool \[3\]; for Discrete\(2\) it must be bool \[2\]"),
        (lambda state: jnp.ones(2), r"float32 \[2\]; for Discrete\(2\)"),
        (lambda state: jnp.zeros(2, bool), "allows none of 2 actions after a reset"),
    ],
)
def test_a_wrong_mask_is_refused(action_mask, said):
    with pytest.raises(ValueError, match=said) as error:
        with_mask(clock(3), action_mask)
    assert "\n" not in str(error.value)


def test_masks_are_for_discrete_actions():
    with pytest.raises(ValueError, match="the actions are Box"):
        with_mask(clock(3, continuous=True), lambda state: jnp.ones(2, bool))
