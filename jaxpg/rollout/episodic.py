"""Whole episodes from reset, in blocks of lanes with a key each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpg.batching import any_replica, fair_divisor, lane_block
from jaxpg.devices import backend
from jaxpg.envs import Env
from jaxpg.policies import Agent, AgentParams, check_params, critic_of, initial_carry
from jaxpg.rollout.packing import pack, unpack
from jaxpg.rollout.stepping import (
    EpisodeSums,
    act,
    block_keys,
    check_sizes,
    inputs_of,
    kept,
    lane_keys,
    reset_lanes,
    step_lanes,
)
from jaxpg.types import Array, Key, Trajectory

# Steps between checks whether all episodes have ended. A check costs a device round trip on a GPU.
BLOCK = 32

# Steps in one pass of the loop over a block: on a GPU every pass copies what it carries and writes its rows.
# REINFORCE on CartPole takes 12 kernels per step in passes of 1 step, 7 in passes of 4 and 6 in passes of 8
# or 16.
UNROLL = {"gpu": 8}

# Blocks of lanes that run as one program. On a CPU, more would not keep it busier, and would leave its cache.
BLOCKS_AT_ONCE = {"cpu": 16}
OTHER_BLOCKS_AT_ONCE = 1024


def episodes(
    env: Env,
    agent: Agent,
    params: AgentParams,
    key: Key,
    num_episodes: int,
    num_steps: int | None = None,
    group_size: int = 1,
) -> tuple[Trajectory, EpisodeSums]:
    """B whole episodes from reset, [T, B, ...], masked after their end; stops when all have ended.

    num_steps: T, by default the environment's horizon; an episode still running then is truncated.
    group_size: G lanes side by side begin with one reset and differ from then on.
    Nothing is reset inside the loop. Rows after an end hold zeros. The loop also stops early under vmap.
    Blocks of lanes have a key each, the same on every device; split over devices, these are its own blocks.
    Raises ValueError for fewer than one episode or step, and for episodes that make no whole groups.
    """
    num_steps = env.horizon if num_steps is None else num_steps
    check_sizes(num_episodes, num_steps)
    check_groups(num_episodes, group_size)
    check_params(agent, params)
    lanes, part = lanes_at_once(num_episodes, group_size), partial(_part, env, agent, params, key)
    part = partial(part, num_episodes=num_episodes, num_steps=num_steps, group_size=group_size)
    if lanes == num_episodes:
        return _completed(*part(0))

    def fill(index, state):
        whole, total = state
        trajectory, sums = part(index)
        whole = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, index * lanes, 1),
            whole,
            trajectory,
        )
        return whole, jax.tree.map(jnp.add, total, sums)

    shapes, sums = jax.eval_shape(part, 0)
    whole = jax.tree.map(
        lambda x: jnp.zeros((x.shape[0], num_episodes, *x.shape[2:]), x.dtype), shapes
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    return _completed(*jax.lax.fori_loop(0, num_episodes // lanes, fill, (whole, zeros)))


def _completed(trajectory: Trajectory, sums: EpisodeSums) -> tuple[Trajectory, EpisodeSums]:
    """Add the fields that follow from the others and would cost memory to carry through the loop."""
    mask = trajectory.mask
    trajectory = trajectory._replace(first=mask & (jnp.arange(len(mask))[:, None] == 0))
    if isinstance(trajectory.value, tuple):  # without a critic
        zeros = jnp.zeros_like(trajectory.reward)
        trajectory = trajectory._replace(value=zeros, next_value=zeros)
    return trajectory, sums


def episodes_again(
    env: Env,
    agent: Agent,
    params: AgentParams,
    key: Key,
    num_episodes: int,
    num_steps: int,
    index: Array,
    group_size: int = 1,
) -> Trajectory:
    """The index-th `lanes_at_once` lanes of `episodes`, rolled out again because they were not kept."""
    sizes = num_episodes, num_steps, group_size
    return _completed(*_part(env, agent, params, key, index, *sizes))[0]


def episodes_from(
    env: Env, agent: Agent, params: AgentParams, keys: Key, group_size: int = 1
) -> Trajectory:
    """The groups of episodes [T, B, ...] that each of the keys [B / group_size] gives alone."""
    return _completed(*_episodes(env, agent, params, keys, group_size, env.horizon, group_size))[0]


def check_groups(num_episodes: int, group_size: int, name: str = "num_episodes") -> None:
    """Raises ValueError unless episodes come in whole groups."""
    if group_size < 1 or num_episodes % group_size:
        near = max(num_episodes // max(group_size, 1), 1) * max(group_size, 1)
        raise ValueError(
            f"{name}={num_episodes} is not a multiple of group_size={group_size}; use {near}"
        )


def lanes_at_once(num_episodes: int, group_size: int = 1) -> int:
    """How many episodes run as one program: whole blocks, and a divisor of num_episodes."""
    size = lane_block(num_episodes, group_size)
    blocks = BLOCKS_AT_ONCE.get(backend(), OTHER_BLOCKS_AT_ONCE)
    return size * fair_divisor(num_episodes // size, blocks)


def _part(env, agent, params, key, index, num_episodes, num_steps, group_size):
    size = lane_block(num_episodes, group_size)
    count = lanes_at_once(num_episodes, group_size) // size
    keys = block_keys(key, num_episodes, group_size, index * count, count)
    return _episodes(env, agent, params, keys, size, num_steps, group_size)


def _episodes(
    env: Env,
    agent: Agent,
    params: AgentParams,
    keys: Key,
    size: int,
    num_steps: int,
    group_size: int = 1,
) -> tuple[Trajectory, EpisodeSums]:
    """The episodes of G blocks of the same size, side by side, [T, G size, ...]; keys: [G]."""
    k_reset, k_steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    starts = lane_keys(k_reset, size // group_size)
    if group_size > 1:
        starts = jnp.repeat(starts, group_size, axis=0)
    env_state, opening = reset_lanes(env, starts)
    num_lanes = len(opening)
    carry = initial_carry(agent, num_lanes)

    def step(state, inputs):
        t, keys, noise = inputs
        alive, env_state, obs, policy_carry = state
        action, chosen, policy_carry = act(agent, params.policy, policy_carry, obs, t == 0, noise)
        env_state, result = step_lanes(env, keys, env_state, action)
        last = alive & (result.terminated | result.truncated | (t == num_steps - 1))
        dies = last & result.terminated
        row = (
            # The value of a successor that terminated is not used, and its numbers may be NaN.
            kept(alive & ~dies, result.obs),
            kept(alive, action),
            kept(alive, chosen.log_prob(action)),
            kept(alive, result.reward),
            # 0 after the end, 1 on the way, 2 at a truncation, 3 at a termination.
            kept(alive, jnp.int32(1) + last + dies),
        )
        return (alive & ~last, env_state, result.obs, policy_carry), pack(row, num_lanes)

    inputs = inputs_of(agent, params.policy, k_steps, opening)
    start = jnp.ones(num_lanes, bool), env_state, opening, carry.policy
    _, rows = until_ended(step, start, inputs, num_steps)
    successor, action, log_prob, reward, phase = unpack(rows)
    mask, last = phase > 0, phase > 1
    discount = (mask & (phase < 3)).astype(reward.dtype)
    seen = jnp.concatenate([opening[None], successor])
    nothing: Any = ()
    value = next_value = nothing
    critic, critic_params = critic_of(agent, params)
    if critic is not None:
        first = jnp.arange(num_steps + 1)[:, None] == jnp.zeros((1, num_lanes), int)
        _, found = critic.apply(critic_params, carry.critic, seen, first)
        value = jnp.where(mask, found[:-1], 0.0)
        next_value = jnp.where(mask & (discount > 0.0), found[1:], 0.0)
    trajectory = Trajectory(
        kept(mask, seen[:-1]),
        action,
        log_prob,
        reward,
        discount,
        nothing,
        last,
        mask,
        value,
        next_value,
    )
    sums = EpisodeSums(reward.sum(), mask.sum().astype(reward.dtype), last.sum())
    return trajectory, sums


def until_ended(
    step: Callable, state: tuple, inputs: Callable, num_steps: int, block: int | None = None
) -> tuple[tuple, Any]:
    """Scan the step over inputs(start, number) until no lane is alive; return the state and rows [T, ...].

    state[0] [B] says which are alive; it is asked before each block of steps (by default BLOCK), and none may
    be after T. Rows that were not reached hold zeros.
    """
    num_blocks = -(-num_steps // (block or BLOCK))
    block = -(-num_steps // num_blocks)

    def scan(state, index):
        unroll = UNROLL.get(backend(), 1)
        return jax.lax.scan(step, state, inputs(index * block, block), unroll=unroll)

    def run(loop):
        index, rows, state = loop
        state, new = scan(state, index)
        rows = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_slice_in_dim(all_, x, index * block, 0),
            rows,
            new,
        )
        return index + 1, rows, state

    shapes = jax.eval_shape(scan, state, 0)[1]
    rows = jax.tree.map(lambda x: jnp.zeros((num_blocks * block, *x.shape[1:]), x.dtype), shapes)
    _, rows, state = jax.lax.while_loop(
        lambda loop: (loop[0] < num_blocks) & any_replica(loop[2][0]),
        run,
        (jnp.int32(0), rows, state),
    )
    return state, jax.tree.map(lambda x: x[:num_steps], rows)
