"""Small worlds with known answers, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Box, Discrete, Env, Mdp
from jaxpg.types import TimeStep


def bandit(rewards=(1.0, 0.0)) -> Mdp:
    """One state, one step."""
    num_arms = len(rewards)
    return Mdp(
        np.ones(1),
        np.ones((1, num_arms, 1)),
        np.asarray([rewards], float),
        np.zeros((1, num_arms)),
        np.zeros(1, bool),
        np.zeros(1, int),
        1,
    )


def random_mdp(seed: int, num_states=3, num_actions=2, horizon=3, terminal=True) -> Mdp:
    """Random dynamics; with `terminal`, the last state absorbs."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(num_states), (num_states, num_actions))
    reward = rng.normal(size=(num_states, num_actions))
    absorbing = np.zeros(num_states, bool)
    initial = rng.dirichlet(np.ones(num_states))
    if terminal:
        absorbing[-1] = True
        transition[-1] = np.eye(num_states)[-1]
        reward[-1] = 0.0
        initial = np.append(rng.dirichlet(np.ones(num_states - 1)), 0.0)
    variance = np.zeros_like(reward)
    return Mdp(initial, transition, reward, variance, absorbing, np.arange(num_states), horizon)


def clock(limit: int, death: int | None = None, continuous: bool = False) -> Env:
    """Counts steps and pays 1 for each; truncated after `limit`, terminated after `death`.

    The reset draws a real number and shows it, so that fresh resets can be told from a cached one.
    """

    def reset(key):
        start = jax.random.uniform(key)
        return (jnp.int32(0), start), jnp.stack([jnp.float32(0), start])

    def step(key, state, action):
        del key, action
        time, start = state[0] + 1, state[1]
        terminated = time >= (death if death is not None else limit + 1)
        truncated = (time >= limit) & ~terminated
        obs = jnp.stack([time.astype(jnp.float32), start])
        return (time, start), TimeStep(obs, jnp.float32(1), terminated, truncated)

    action = Box(-np.ones(1, np.float32), np.ones(1, np.float32)) if continuous else Discrete(2)
    bound = np.full(2, np.inf, np.float32)
    return Env(reset, step, Box(-bound, bound), action, limit)
