"""Wrappers: an environment in, an environment out. Time limits keep terminated and truncated apart."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Box, check_space, encode, encoded_size


def mask_observation(env: Env, keep: Sequence[int]) -> Env:
    """Only these entries of the observation, in this order; hiding velocities makes CartPole non-Markov.

    Raises ValueError for observations that are no vector, and for entries that are not there.
    """
    space = env.observation
    check_space("Env.observation", space)
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ValueError(
            f"keep chooses entries of a vector, but observations are {type(space).__name__} of shape "
            f"{space.shape}; leave keep out"
        )
    index, size = np.asarray(keep, int), space.shape[0]
    if index.size == 0 or (index < 0).any() or (index >= size).any():
        listed = ",".join(map(str, keep))
        raise ValueError(f"keep={listed} must name entries of the observation: 0 to {size - 1}")

    def reset(key):
        state, obs = env.reset(key)
        return state, obs[index]

    def step(key, state, action):
        state, result = env.step(key, state, action)
        return state, result._replace(obs=result.obs[index])

    return Env(reset, step, Box(space.low[index], space.high[index]), env.action, env.horizon)


def history(env: Env, k: int) -> Env:
    """The last k observations, each with the action that led to it, oldest first: [k (obs + action)].

    Zeros before the episode. Observations are flattened; what is discrete is one-hot; Box actions are as the
    environment takes them, clipped. If k steps determine the state, this is Markov. A recurrent network
    needs history(env, 1) to see its last action. Raises ValueError when k < 1.
    """
    _at_least_one("history", k)
    taken, seen = env.action, env.observation
    check_space("Env.action", taken)
    check_space("Env.observation", seen)
    zeros = np.zeros(encoded_size(taken) + encoded_size(seen), np.float32)
    low, high = (np.concatenate([bound(taken), bound(seen)]) for bound in (_lowest, _highest))
    # Zero, before the episode, is an observation too.
    space = Box(np.tile(np.minimum(low, 0), k), np.tile(np.maximum(high, 0), k))

    def reset(key):
        state, obs = env.reset(key)
        window = jnp.tile(zeros, (k, 1)).at[-1, encoded_size(taken) :].set(encode(seen, obs))
        return (state, window), window.ravel()

    def step(key, wrapped, action):
        state, window = wrapped
        state, result = env.step(key, state, action)
        row = jnp.concatenate([encode(taken, _clipped(taken, action)), encode(seen, result.obs)])
        window = jnp.concatenate([window[1:], row[None].astype(window.dtype)])
        return (state, window), result._replace(obs=window.ravel())

    return Env(reset, step, space, taken, env.horizon)


def repeat_action(env: Env, k: int) -> Env:
    """Every action is taken k times, or until the episode ends; the rewards are summed.

    Random actions then add up instead of cancelling, which reaches goals that single random steps
    do not. gamma discounts decisions, not single steps. Raises ValueError when k < 1.
    """
    _at_least_one("repeat", k)

    def step(key, state, action):
        def once(carry, key):
            state, total, result = carry
            after = env.step(key, state, action)
            over = result.terminated | result.truncated
            state, result = jax.tree.map(
                lambda old, new: jnp.where(over, old, new), (state, result), after
            )
            return (state, total + jnp.where(over, 0.0, after[1].reward), result), None

        keys = jax.random.split(key, k)
        state, result = env.step(keys[0], state, action)
        (state, total, result), _ = jax.lax.scan(once, (state, result.reward, result), keys[1:])
        return state, result._replace(reward=total)

    return env._replace(step=step, horizon=-(-env.horizon // k))


def _at_least_one(name, k):
    if k < 1:
        raise ValueError(f"{name}={k} must be at least 1")


def _clipped(space, action):
    return jnp.clip(action, space.low, space.high) if isinstance(space, Box) else action


def _lowest(space):
    return space.low.ravel() if isinstance(space, Box) else np.zeros(encoded_size(space))


def _highest(space):
    return space.high.ravel() if isinstance(space, Box) else np.ones(encoded_size(space))
