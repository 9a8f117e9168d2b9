"""Wrappers: functions from an environment to an environment, which keep terminated and truncated apart.

Each also turns an actor of the outer environment into one of the inner, so a policy can act without it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs.env import Actor, Env
from jaxpg.envs.spaces import Box, check_space, clip, encode, encoded_size, unbounded
from jaxpg.types import Array


def unwrapped(env: Env, actor: Actor) -> tuple[Env, Actor]:
    """The environment inside all wrappers, and an actor that does there what this one does in `env`.

    >>> env = jaxpg.envs.from_gymnax("CartPole-v1")
    >>> unwrapped(history(env, 2), Actor(lambda num_lanes: (), None))[0] is env
    True
    """
    while env.wraps:
        env, inside = env.wraps
        actor = inside(actor)
    return env, actor


def flatten_observation(env: Env) -> Env:
    """Show the parts of a dictionary, a tuple or another tree of observations as one vector, without bounds.

    Parts are in the order of `jax.tree.leaves`: fields as declared, a dictionary's by sorted names; each is
    flattened, and numbers and flags become real. env.observation is not read. Policies see the vector.

    >>> env = jaxpg.envs.from_gymnax("CartPole-v1")
    >>> parts = env._replace(reset=lambda key: (0, {"b": jnp.zeros((2, 2)), "a": jnp.int32(1)}))
    >>> flatten_observation(parts).reset(jax.random.key(0))[1].tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0]
    """

    def reset(key):
        state, obs = env.reset(key)
        return state, joined(obs)

    def step(key, state, action):
        state, result = env.step(key, state, action)
        return state, result._replace(obs=joined(result.obs))

    shape = jax.eval_shape(lambda: reset(jax.random.key(0))[1]).shape
    return env._replace(reset=reset, step=step, observation=unbounded(shape), wraps=None)


def joined(parts: Any) -> Array:
    """The leaves of a tree, each flattened, as one vector of real numbers."""
    kind = jnp.result_type(float)
    return jnp.concatenate([jnp.ravel(jnp.asarray(x, kind)) for x in jax.tree.leaves(parts)])


def mask_observation(env: Env, keep: Sequence[int]) -> Env:
    """Keep only these entries of the observation, in this order; hiding velocities makes CartPole non-Markov.

    Raises ValueError for observations that are not vectors, and for entries that do not exist.

    >>> mask_observation(jaxpg.envs.from_gymnax("CartPole-v1"), (0, 2)).observation.shape
    (2,)
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

    def inside(actor):
        def act(key, obs, carry, first):
            return actor.step(key, obs[:, index], carry, first)

        return actor._replace(step=act)

    space = Box(space.low[index], space.high[index])
    return Env(reset, step, space, env.action, env.horizon, (env, inside))


def history(env: Env, k: int) -> Env:
    """The last k observations, each with the action that led to it, oldest first: [k (obs + action)].

    Rows before the episode are zeros. Observations are flattened, discrete values are one-hot, and Box
    actions are clipped, as the environment takes them. If k steps determine the state, the result is Markov.
    A recurrent network needs history(env, 1) to see its last action. Raises ValueError when k < 1.

    >>> history(jaxpg.envs.from_gymnax("CartPole-v1"), 3).observation.shape
    (18,)
    """
    _at_least_one("history", k)
    taken, seen = env.action, env.observation
    check_space("Env.action", taken)
    check_space("Env.observation", seen)
    dtype = jnp.result_type(float)
    before = np.zeros(encoded_size(taken), dtype)
    zeros = np.zeros((k, encoded_size(taken) + encoded_size(seen)), dtype)
    low, high = (np.concatenate([bound(taken), bound(seen)]) for bound in (_lowest, _highest))
    # The bounds include the zeros before the episode.
    space = Box(np.tile(np.minimum(low, 0), k), np.tile(np.maximum(high, 0), k))

    def shown(window, action, obs):
        row = jnp.concatenate([action, encode(seen, obs)])
        return jnp.concatenate([window[1:], row[None].astype(window.dtype)])

    def encoded(action):
        return encode(taken, clip(taken, action))

    def reset(key):
        state, obs = env.reset(key)
        window = shown(zeros, before, obs)
        return (state, window), window.ravel()

    def step(key, wrapped, action):
        state, window = wrapped
        state, result = env.step(key, state, action)
        window = shown(window, encoded(action), result.obs)
        return (state, window), result._replace(obs=window.ravel())

    def inside(actor):
        def initial_carry(num_lanes):
            window, action = (jnp.zeros((num_lanes, *x.shape), x.dtype) for x in (zeros, before))
            return window, action, actor.initial_carry(num_lanes)

        def act(key, obs, carry, first):
            window, last, inner = carry
            start = jnp.zeros_like(window), jnp.zeros_like(last)
            window, last = _where(first, start, (window, last))
            window = jax.vmap(shown)(window, last, obs)
            action, inner = actor.step(key, window.reshape(len(obs), -1), inner, first)
            return action, (window, jax.vmap(encoded)(action).astype(window.dtype), inner)

        return Actor(initial_carry, act)

    return Env(reset, step, space, taken, env.horizon, (env, inside))


def repeat_action(env: Env, k: int) -> Env:
    """Take every action k times, or until the episode ends, and sum the rewards.

    Random actions then add up instead of cancelling, which reaches goals that single random steps
    do not. gamma discounts decisions, not single steps. Raises ValueError when k < 1.

    >>> repeat_action(jaxpg.envs.from_gymnax("CartPole-v1"), 4).horizon
    125
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

    def inside(actor):
        def initial_carry(num_lanes):
            kind = jnp.float32 if isinstance(env.action, Box) else jnp.int32
            action = jnp.zeros((num_lanes, *env.action.shape), kind)
            return jnp.zeros(num_lanes, jnp.int32), action, actor.initial_carry(num_lanes)

        def act(key, obs, carry, first):
            left, action, inner = carry
            decides = first | (left == 0)
            # Between two decisions, the inner actor's carry stays.
            decided = actor.step(key, obs, inner, first)
            action, inner = _where(decides, decided, (action, inner))
            return action, (jnp.where(decides, k, left) - 1, action, inner)

        return Actor(initial_carry, act)

    return env._replace(step=step, horizon=-(-env.horizon // k), wraps=(env, inside))


def _at_least_one(name, k):
    if k < 1:
        raise ValueError(f"{name}={k} must be at least 1")


def _where(lanes, new, old):
    """The new values in these lanes, the old ones in the others."""
    return jax.tree.map(partial(jax.vmap(jnp.where), lanes), new, old)


def _lowest(space):
    return space.low.ravel() if isinstance(space, Box) else np.zeros(encoded_size(space))


def _highest(space):
    return space.high.ravel() if isinstance(space, Box) else np.ones(encoded_size(space))
