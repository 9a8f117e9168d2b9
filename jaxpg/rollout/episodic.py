"""Whole episodes from reset, in groups with a key each."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpg.batching import any_replica, fair_divisor
from jaxpg.devices import backend
from jaxpg.envs import Env
from jaxpg.policies import Agent, AgentParams, check_params, initial_carry
from jaxpg.rollout.stepping import (
    EpisodeSums,
    act,
    check_sizes,
    kept,
    noise_function,
    reset_lanes,
    step_keys,
    step_lanes,
)
from jaxpg.types import Array, Key, Trajectory

# Steps between checks whether all episodes have ended. A check costs a device round trip on a GPU.
BLOCK = 32

# Episodes that share a key, as many on every device, so that a batch is the same on all of them.
GROUP = 1024

# Groups that run as one program. On a CPU, more would not keep it busier, and would leave its cache.
GROUPS_AT_ONCE = {"cpu": 1}
OTHER_GROUPS_AT_ONCE = 64


def episodes(
    env: Env,
    agent: Agent,
    params: AgentParams,
    key: Key,
    num_episodes: int,
    num_steps: int | None = None,
) -> tuple[Trajectory, EpisodeSums]:
    """B whole episodes from reset, [T, B, ...], masked after their end; stops when all have ended.

    num_steps: T, by default the environment's horizon; an episode still running then is truncated.
    Nothing is reset inside the loop. Rows after an end hold zeros. The loop also stops early under vmap.
    More than GROUP episodes come in groups with a key each, the same on every device.
    Raises ValueError for fewer than one episode or step.
    """
    num_steps = env.horizon if num_steps is None else num_steps
    check_sizes(num_episodes, num_steps)
    check_params(agent, params)
    lanes, part = lanes_at_once(num_episodes), partial(_part, env, agent, params, key)
    part = partial(part, num_episodes=num_episodes, num_steps=num_steps)
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
) -> Trajectory:
    """The index-th `lanes_at_once` lanes of `episodes`, rolled out again because they were not kept."""
    return _completed(*_part(env, agent, params, key, index, num_episodes, num_steps))[0]


def lanes_at_once(num_episodes: int) -> int:
    """How many episodes run as one program: whole groups, and a divisor of num_episodes."""
    size = fair_divisor(num_episodes, GROUP)
    groups = GROUPS_AT_ONCE.get(backend(), OTHER_GROUPS_AT_ONCE)
    return size * fair_divisor(num_episodes // size, groups)


def _part(env, agent, params, key, index, num_episodes, num_steps):
    run = partial(_episodes, env, agent, params, num_steps=num_steps)
    size, lanes = fair_divisor(num_episodes, GROUP), lanes_at_once(num_episodes)
    if size == num_episodes:
        return run(key, size)
    first = index * (lanes // size)
    if lanes == size:
        return run(jax.random.fold_in(key, first), size)
    keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(lanes // size))
    trajectory, sums = jax.vmap(partial(run, num_episodes=size))(keys)
    return jax.tree.map(_lanes_together, trajectory), jax.tree.map(lambda x: x.sum(axis=0), sums)


def _episodes(
    env: Env, agent: Agent, params: AgentParams, key: Key, num_episodes: int, num_steps: int
) -> tuple[Trajectory, EpisodeSums]:
    """Roll out one group of episodes."""
    num_blocks = -(-num_steps // BLOCK)
    block = -(-num_steps // num_blocks)
    k_reset, k_steps = jax.random.split(key)
    env_state, obs = reset_lanes(env, jax.random.split(k_reset, num_episodes))
    carry = initial_carry(agent, num_episodes)
    alive = jnp.ones(num_episodes, bool)
    keys, noise_of = (
        step_keys(k_steps, num_blocks * block),
        noise_function(agent, params.policy, obs),
    )

    def step(state, inputs):
        t, key, noise = inputs
        env_state, obs, policy_carry, alive, cut = state
        action, chosen, policy_carry = act(agent, params.policy, policy_carry, obs, t == 0, noise)
        log_prob = chosen.log_prob(action)
        env_state, result = step_lanes(env, key, env_state, action)
        last = alive & (result.terminated | result.truncated | (t == num_steps - 1))
        row = (
            # Keep the successor of a step that cut an episode, because the critic values it; not of one
            # that terminated it: its value is not used and its numbers may be NaN.
            kept(alive | cut, obs),
            kept(alive, action),
            kept(alive, log_prob),
            kept(alive, result.reward),
            kept(alive, 1.0 - result.terminated),
            last,
            alive,
        )
        cut = last & ~result.terminated
        return (env_state, result.obs, policy_carry, alive & ~last, cut), row

    def inputs(index):
        part = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, index * block, block, 0), keys
        )
        return index * block + jnp.arange(block), part.step, noise_of(part.action)

    def run_block(state):
        loop, index, rows = state
        loop, new = jax.lax.scan(step, loop, inputs(index))
        rows = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_slice_in_dim(all_, x, index * block, 0),
            rows,
            new,
        )
        return loop, index + 1, rows

    loop = (env_state, obs, carry.policy, alive, ~alive)
    shapes = jax.eval_shape(lambda loop: jax.lax.scan(step, loop, inputs(0))[1], loop)
    total = num_blocks * block
    rows = jax.tree.map(lambda x: jnp.zeros((total, *x.shape[1:]), x.dtype), shapes)
    loop, index, rows = jax.lax.while_loop(
        lambda state: (state[1] < num_blocks) & any_replica(state[0][3]),
        run_block,
        (loop, jnp.int32(0), rows),
    )
    obs, action, log_prob, reward, discount, last, mask = jax.tree.map(
        lambda x: x[:num_steps], rows
    )
    nothing: Any = ()
    value = next_value = nothing
    if agent.critic is not None:
        # A last step's successor stands in the next row; append the one that follows the loop.
        final = kept(loop[4], loop[1])[None]
        extended = jnp.concatenate([rows[0], jnp.zeros_like(final)])
        extended = jax.lax.dynamic_update_slice_in_dim(extended, final, index * block, 0)
        extended_first = jnp.arange(total + 1)[:, None] == jnp.zeros((1, num_episodes), int)
        _, found = agent.critic.apply(params.critic, carry.critic, extended, extended_first)
        value = jnp.where(mask, found[:num_steps], 0.0)
        next_value = jnp.where(mask & (discount > 0.0), found[1 : num_steps + 1], 0.0)
        obs = kept(mask, obs)
    trajectory = Trajectory(
        obs, action, log_prob, reward, discount, nothing, last, mask, value, next_value
    )
    sums = EpisodeSums(reward.sum(), mask.sum().astype(reward.dtype), last.sum())
    return trajectory, sums


def _lanes_together(x):
    """[G, T, B, ...] -> [T, G B, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
