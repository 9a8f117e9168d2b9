"""Streams: environments that carry on from rollout to rollout and are reset where an episode ends."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.batching import any_replica, divisor
from jaxpg.devices import backend
from jaxpg.envs import Env, check_env
from jaxpg.policies import Agent, AgentCarry, AgentParams, Network, initial_carry
from jaxpg.rollout.stepping import (
    EpisodeSums,
    act,
    kept,
    noise_function,
    reset_lanes,
    select,
    step_keys,
    step_lanes,
)
from jaxpg.types import Array, Key, Params, Trajectory

# Up to this many lanes, pre-draw one start per lane and step. With more, the k-th lane that ended takes the
# k-th start, so that few need drawing.
FEW = 32

# Lanes per pre-drawn start. On an accelerator drawing one costs next to nothing, and asking how many lanes
# ended is a round trip to the host, so none are pre-drawn there: every step draws one per lane.
SHARING = {"cpu": 8}

# Steps that a feed-forward critic evaluates at once after a rollout; on a CPU, more would leave the cache.
ROWS_AT_ONCE = {"cpu": 2048}


class RolloutState(NamedTuple):
    """The state of a stream: B environments between two steps."""

    env_state: Any
    obs: Array  # [B, ...]
    first: Array  # [B] bool
    carry: AgentCarry
    episode_return: Array  # [B] undiscounted, of the running episode
    episode_length: Array  # [B]


def init_stream(env: Env, agent: Agent, key: Key, num_envs: int) -> RolloutState:
    """B freshly reset environments."""
    env_state, obs = reset_lanes(env, jax.random.split(key, num_envs))
    zeros = jnp.zeros(num_envs, jnp.result_type(float))
    first = jnp.ones(num_envs, bool)
    return RolloutState(env_state, obs, first, initial_carry(agent, num_envs), zeros, zeros)


def unroll(
    env: Env, agent: Agent, params: AgentParams, state: RolloutState, key: Key, num_steps: int
) -> tuple[RolloutState, tuple[Trajectory, EpisodeSums]]:
    """T further steps of B streams, [T, B, ...]; a lane whose episode ends is reset afresh.

    next_value is V of the true successor, also where a time limit cut the episode: the critic sees that
    successor, with its own carry, before the reset.
    """
    check_env(env)
    num_envs = state.first.shape[0]
    critic = agent.critic
    # A critic without memory can wait: one pass over all steps is cheaper than a small one per step.
    waits = critic is not None and not jax.tree.leaves(state.carry.critic)
    keys = step_keys(key, num_steps)
    noise = noise_function(agent, params.policy, state.obs)(keys.action)
    sharing = 1 if num_envs <= FEW else SHARING.get(backend())
    pools = None
    if sharing:
        places = jnp.arange(num_envs // sharing)
        pools = jax.vmap(lambda key: _starts(env, key, places))(keys.reset)

    def value_of(carry, obs, first):
        if critic is None:
            return (), jnp.zeros(num_envs, state.episode_return.dtype)
        carry, value = critic.apply(params.critic, carry, obs[None], first[None])
        return carry, value[0].astype(state.episode_return.dtype)

    def step(state, inputs):
        key, noise, pool = inputs
        env_state, obs, first, carry, episode_return, episode_length = state
        action, log_prob, policy_carry = act(agent, params.policy, carry.policy, obs, first, noise)
        value = jnp.zeros_like(episode_return)
        critic_carry = carry.critic
        if not waits:
            critic_carry, value = value_of(carry.critic, obs, first)
        env_state, result = step_lanes(env, key.step, env_state, action)
        last = result.terminated | result.truncated
        episode_return = episode_return + result.reward
        episode_length = episode_length + 1
        ended = EpisodeSums(
            jnp.where(last, episode_return, 0.0).sum(),
            jnp.where(last, episode_length, 0.0).sum(),
            last.sum(),
        )
        cut = result.truncated & ~result.terminated
        cut_value = jax.lax.cond(
            any_replica(cut),
            lambda: kept(cut, value_of(critic_carry, result.obs, jnp.zeros_like(last))[1]),
            lambda: jnp.zeros_like(value),
        )
        env_state, next_obs = _reset_ended(env, last, pool, key.reset, env_state, result.obs)
        row = Trajectory(
            obs,
            action,
            log_prob,
            result.reward,
            1.0 - result.terminated,
            first,
            last,
            last,  # a placeholder for the mask: every step counts, so it is set after the loop
            value,
            cut_value,
        )
        after = RolloutState(
            env_state,
            next_obs,
            last,
            AgentCarry(policy_carry, critic_carry),
            jnp.where(last, 0.0, episode_return),
            jnp.where(last, 0.0, episode_length),
        )
        return after, (row, ended)

    state, (trajectory, ended) = jax.lax.scan(step, state, (keys, noise, pools))
    trajectory = trajectory._replace(mask=jnp.ones_like(trajectory.mask))
    if critic is not None and waits:
        trajectory = trajectory._replace(value=_values(critic, params.critic, trajectory))
    # Unless the episode ended, the successor's value is the next row's.
    _, beyond = value_of(state.carry.critic, state.obs, state.first)
    later = jnp.concatenate([trajectory.value[1:], beyond[None]])
    next_value = jnp.where(trajectory.last, trajectory.next_value, later)
    sums = jax.tree.map(lambda x: x.sum(axis=0), ended)
    return state, (trajectory._replace(next_value=next_value), sums)


def _values(critic: Network, params: Params, trajectory: Trajectory) -> Array:
    """The values [T, B] of a critic without memory, a few rows at a time."""
    num_steps, num_envs = trajectory.mask.shape
    wanted = max(ROWS_AT_ONCE.get(backend(), num_steps * num_envs) // num_envs, 1)
    rows = divisor(num_steps, wanted)

    def judge(block):
        return critic.apply(params, (), *block)[1]

    blocks = jax.tree.map(
        lambda x: x.reshape(-1, rows, *x.shape[1:]), (trajectory.obs, trajectory.first)
    )
    return jax.lax.map(judge, blocks).reshape(num_steps, num_envs)


def _starts(env: Env, key: Key, places: Array) -> Any:
    """Draw fresh starts, each with its place's key, so that they are the same however many are drawn."""
    return reset_lanes(env, jax.vmap(partial(jax.random.fold_in, key))(places))


def _reset_ended(env: Env, ended, pool, key, env_state, obs):
    """Reset lanes whose episode ended: few lanes to their own starts, more to the k-th start for the k-th.

    Starts are the same whether or not they were pre-drawn. Every step has its own starts, so all are
    independent.
    """
    before = env_state, obs

    def put(fresh):
        return jax.tree.map(partial(select, ended), fresh, before)

    if len(ended) <= FEW:
        return put(pool)
    place = jnp.maximum(jnp.cumsum(ended) - 1, 0)
    if pool is None:
        return put(_starts(env, key, place))
    size = jax.tree.leaves(pool)[0].shape[0]

    def fresh():
        return jax.lax.cond(
            any_replica(ended.sum()[None] > size),
            lambda: _starts(env, key, place),
            lambda: jax.tree.map(lambda x: x[jnp.minimum(place, size - 1)], pool),
        )

    return jax.lax.cond(any_replica(ended), lambda: put(fresh()), lambda: before)
