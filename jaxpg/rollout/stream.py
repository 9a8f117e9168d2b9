"""Streams: environments that carry on from rollout to rollout and are reset where an episode ends."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.batching import any_replica, divisor, if_any
from jaxpg.devices import backend, first_of
from jaxpg.envs import Env, check_env
from jaxpg.policies import (
    Agent,
    AgentCarry,
    AgentParams,
    Network,
    check_params,
    critic_of,
    initial_carry,
)
from jaxpg.rollout.packing import pack, small, unpack
from jaxpg.rollout.stepping import (
    EpisodeSums,
    act,
    block_keys,
    block_step_keys,
    kept,
    lane_keys,
    lane_noise,
    reset_lanes,
    select,
    step_lanes,
)
from jaxpg.types import Array, Key, Params, Trajectory

# Steps per start that is drawn ahead for each lane, all at once before a rollout; a lane that ends more
# often has its further starts drawn in the step. On an accelerator drawing costs next to nothing and asking
# is a round trip to the host, so every step draws one per lane there.
STEPS_PER_START = {"cpu": 8}

# Size of an observation up to which the true successor of every step is kept, for a critic to evaluate after
# the rollout. To ask in every step whether a lane was truncated is a round trip to the host on a GPU, and a
# tenth of the update on a TPU.
SMALL = {"gpu": 64, "tpu": 64}

# Steps that a feed-forward critic evaluates at once after a rollout. On a CPU more would leave the cache; on
# an accelerator the activations would be the largest arrays of the program.
AT_ONCE = {"cpu": 2048}
OTHERS_AT_ONCE = 2**17

# Steps in one pass of the loop. On an accelerator four write their rows at once: on a v5e a step of 8x16
# CartPoles takes 25,000 cycles instead of 33,000.
UNROLL = {"gpu": 4, "tpu": 4}


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
    numbers = first_of(num_envs) + jnp.arange(num_envs)
    env_state, obs = reset_lanes(env, jax.vmap(partial(jax.random.fold_in, key))(numbers))
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
    check_params(agent, params)
    num_envs, (critic, critic_params) = state.first.shape[0], critic_of(agent, params)
    # A critic without memory can wait: one pass over all steps is cheaper than a small one per step.
    waits = critic is not None and not jax.tree.leaves(state.carry.critic)
    keeps = waits and math.prod(state.obs.shape[1:]) <= SMALL.get(backend(), 0)
    keys = block_step_keys(block_keys(key, num_envs), num_steps)
    noise = lane_noise(agent, params.policy, keys.action, state.obs)
    lanes = lane_keys(keys.reset[0], num_envs // keys.reset.shape[1])
    reset = _resets(env, lanes, num_steps)

    def value_of(carry, obs, first) -> tuple[Any, Any]:
        if critic is None:
            return (), ()
        carry, value = critic.apply(critic_params, carry, obs[None], first[None])
        return carry, value[0].astype(state.episode_return.dtype)

    def step(state, inputs):
        key, noise = inputs
        env_state, obs, first, carry, resets = state
        action, chosen, policy_carry = act(agent, params.policy, carry.policy, obs, first, noise)
        critic_carry, value = carry.critic, ()
        if not waits:
            critic_carry, value = value_of(carry.critic, obs, first)
        env_state, result = step_lanes(env, key, env_state, action)
        last = result.terminated | result.truncated
        beyond: Any = ()
        if keeps:
            beyond = result.obs
        elif critic is not None:
            cut = result.truncated & ~result.terminated
            beyond = if_any(
                cut,
                lambda: value_of(critic_carry, kept(cut, result.obs), jnp.zeros_like(last))[1],
            )
        env_state, next_obs = reset(last, resets, (env_state, result.obs))
        # log pi(a|s), or while it is small what to find it from, for all steps at once.
        chosen = chosen if small(chosen) else chosen.log_prob(action)
        row = obs, action, chosen, result.reward, result.terminated, last, value, beyond
        carry = AgentCarry(policy_carry, critic_carry)
        return (env_state, next_obs, last, carry, resets + last), pack(row, num_envs)

    none = jnp.zeros(num_envs, jnp.int32)
    start = state.env_state, state.obs, state.first, state.carry, none
    after, rows = jax.lax.scan(step, start, (keys.step, noise), unroll=UNROLL.get(backend(), 1))
    env_state, obs, ending, carry, _ = after
    value: Any
    seen, action, chosen, reward, terminated, last, value, beyond = unpack(rows)
    log_prob = chosen if isinstance(chosen, jax.Array) else chosen.log_prob(action)
    first = jnp.concatenate([state.first[None], last[:-1]])
    if critic is None:
        value = next_value = jnp.zeros_like(reward)
    else:
        cut = last & ~terminated
        if keeps:
            beyond = _values(critic, critic_params, kept(cut, beyond), jnp.zeros_like(last), cut)
        if waits:
            value = _values(critic, critic_params, seen, first)
        # Unless the episode ended, the successor's value is the next row's.
        later = jnp.concatenate([value[1:], value_of(carry.critic, obs, ending)[1][None]])
        next_value = jnp.where(last, kept(cut, beyond), later)
    mask, discount = jnp.ones_like(last), 1.0 - terminated
    trajectory = Trajectory(
        seen, action, log_prob, reward, discount, first, last, mask, value, next_value
    )
    return _accounted(state, (env_state, obs, ending, carry), trajectory)


def _accounted(state: RolloutState, after, trajectory: Trajectory):
    """The state after a rollout, with the running episodes' sums, and the sums of those that ended."""
    number = jnp.arange(len(trajectory.last))[:, None]
    # Steps of a lane up to the last end of an episode; all later ones are of the running episode.
    done = jnp.max(trajectory.last * (number + 1), axis=0)
    over, reward = number < done[None], trajectory.reward
    earlier = EpisodeSums(state.episode_return, state.episode_length, jnp.zeros_like(done))
    sums = EpisodeSums(jnp.where(over, reward, 0.0).sum(axis=0), done, trajectory.last.sum(axis=0))
    sums = jax.tree.map(lambda x, y: x + jnp.where(done > 0, y, 0), sums, earlier)
    running = jnp.where(over, 0.0, reward).sum(axis=0), len(trajectory.last) - done
    running = jax.tree.map(lambda x, y: x + jnp.where(done > 0, 0, y), running, earlier[:2])
    sums = jax.tree.map(lambda x: x.sum(), sums)
    return RolloutState(*after, *running), (trajectory, sums)


def _values(critic: Network, params: Params, obs, first, asked=None) -> Array:
    """Return the values [T, B] of a critic without memory, a few rows at a time.

    asked: [T, B], where they are needed; all others may be 0.
    """
    num_steps, num_envs = first.shape
    wanted = max(AT_ONCE.get(backend(), OTHERS_AT_ONCE) // num_envs, 1)
    rows = divisor(num_steps, wanted)

    def judge(block):
        obs, first, asked = block

        def value():
            return critic.apply(params, (), obs, first)[1]

        return value() if asked is None else if_any(asked, value)

    blocks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (obs, first, asked))
    return jax.lax.map(judge, blocks).reshape(num_steps, num_envs)


def _resets(env: Env, keys: Key, num_steps: int) -> Callable[[Array, Array, Any], Any]:
    """Return (ended, resets, state) -> the state after lanes [B] that ended start afresh.

    keys: [B]. resets: [B], how often each lane has ended before; its k-th start has the k-th key folded from
    the lane's, whether or not it was drawn ahead, so that all are independent and the same on every backend.
    """

    def draw(number):
        return reset_lanes(env, jax.vmap(jax.random.fold_in)(keys, number))

    ahead = num_steps // STEPS_PER_START.get(backend(), num_steps + 1)
    lanes, everyone = jnp.arange(len(keys)), jnp.ones(len(keys), jnp.int32)
    pool = jax.vmap(lambda number: draw(number * everyone))(jnp.arange(ahead))

    def fresh(ended, resets):
        if not ahead:
            return draw(resets)
        return jax.lax.cond(
            any_replica(ended & (resets >= ahead)),
            lambda: draw(resets),
            lambda: jax.tree.map(lambda x: x[jnp.minimum(resets, ahead - 1), lanes], pool),
        )

    def reset(ended, resets, before):
        def put():
            return jax.tree.map(partial(select, ended), fresh(ended, resets), before)

        if backend() not in STEPS_PER_START:
            return put()
        return jax.lax.cond(any_replica(ended), put, lambda: before)

    return reset
