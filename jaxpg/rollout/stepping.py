"""Stepping: keys, noise, one action and one step of many environments at once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.batching import lane_block
from jaxpg.devices import first_of, shards
from jaxpg.envs import Env, check_action, check_env
from jaxpg.policies import Agent, initial_carry
from jaxpg.types import Array, Key, Params


class EpisodeSums(NamedTuple):
    """Sums over the episodes that ended in a rollout; scalars."""

    returns: Array
    lengths: Array
    episodes: Array  # how many


class StepKeys(NamedTuple):
    action: Key
    step: Key
    reset: Key


def step_keys(key: Key, num_steps: int, start: Array | int = 0) -> StepKeys:
    """The keys of T steps from the start-th, [T] each."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(3 * start + jnp.arange(3 * num_steps))
    return StepKeys(*(keys[use::3] for use in range(3)))  # typed keys or rows of raw ones


def block_keys(
    key: Key, num_lanes: int, group_size: int = 1, index: Array | int = 0, count: int | None = None
) -> Key:
    """The keys of `count` blocks of lanes, by default all of this device's, from the index-th.

    If there is but one block on all devices, its key is the given one.
    """
    blocks = num_lanes // lane_block(num_lanes, group_size)
    if blocks * shards() == 1:
        return key[None]
    numbers = first_of(blocks) + index + jnp.arange(count or blocks)
    return jax.vmap(partial(jax.random.fold_in, key))(numbers)


def noise_function(agent: Agent, params: Params, obs):
    """Map keys [T] to the noise of actions [T, B, ...]; without `draw`, to keys [T, 1]."""

    def distribution(carry, obs):
        first = jnp.zeros((1, obs.shape[0]), bool)
        _, found = agent.policy.apply(params, carry, obs[None], first)
        return jax.tree.map(lambda x: x[0], found)

    carry = jax.eval_shape(lambda: initial_carry(agent, obs.shape[0]).policy)
    noise = getattr(jax.eval_shape(distribution, carry, obs), "noise", None)
    return jax.vmap(noise) if noise else lambda keys: keys[:, None]


def act(agent: Agent, params: Params, carry, obs, first, noise, greedy=False):
    """Act in B lanes; noise: [B, ...], or the keys [G] of their groups."""
    first = jnp.broadcast_to(first, obs.shape[:1])
    carry, distribution = agent.policy.apply(params, carry, obs[None], first[None])
    distribution = jax.tree.map(lambda x: x[0], distribution)
    if greedy:
        action = distribution.mode()
    elif hasattr(distribution, "draw"):
        action = distribution.draw(noise)
    else:
        groups = jax.tree.map(lambda x: x.reshape(len(noise), -1, *x.shape[1:]), distribution)
        action = lanes_together(jax.vmap(lambda own, key: own.sample(key))(groups, noise), 0)
    return action, distribution, carry


def inputs_of(agent: Agent, params: Params, keys: Key, obs: Array) -> Callable:
    """Return (start, T) -> what those T steps of G blocks take: times [T], keys [T, G], noise [T, B, ...]."""

    def inputs(start, num_steps):
        own = block_step_keys(keys, num_steps, start)
        noise = lane_noise(agent, params, own.action, obs)
        return start + jnp.arange(num_steps), own.step, noise

    return inputs


def block_step_keys(keys: Key, num_steps: int, start: Array | int = 0) -> StepKeys:
    """The keys of T steps of G blocks, [T, G] each; keys: [G]."""
    return jax.vmap(lambda key: step_keys(key, num_steps, start), out_axes=1)(keys)


def lane_noise(agent: Agent, params: Params, keys: Key, obs: Array):
    """The noise [T, B, ...] of the actions of T steps of G blocks; keys: [T, G]."""
    noise_of = noise_function(agent, params, obs[: len(obs) // keys.shape[1]])
    return jax.tree.map(lambda x: lanes_together(x, 1), jax.vmap(noise_of, 1, 1)(keys))


def lane_keys(keys: Key, size: int) -> Key:
    """The keys [G size] of the lanes of G groups with a key each."""
    return lanes_together(jax.vmap(lambda key: jax.random.split(key, size))(keys), 0)


def lanes_together(x: Array, axis: int) -> Array:
    """[..., G, size, ...] -> [..., G size, ...], with G at this axis."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def step_lanes(env: Env, keys, env_state, action):
    """Step the lanes of G groups; keys: [G]."""
    check_action(env, action)
    # XLA drops the split where the environment does not read its key.
    keys = lane_keys(keys, action.shape[0] // len(keys))
    env_state, result = jax.vmap(env.step)(keys, env_state, action)
    return env_state, result._replace(reward=jnp.asarray(result.reward, jnp.result_type(float)))


def reset_lanes(env: Env, keys):
    check_env(env)
    return jax.vmap(env.reset)(keys)


def check_sizes(num_episodes: int, num_steps: int) -> None:
    for name, value in (("num_episodes", num_episodes), ("the longest episode", num_steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def kept(keep, x):
    return select(keep, x, jnp.zeros_like(x))


def select(condition, yes, no):
    return jnp.where(
        condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim)), yes, no
    )
