"""Rollouts: whole episodes, streams with automatic reset, and evaluation.

Every reset of every environment suite happens in this file.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.envs import Env, check_action, check_env
from jaxpg.policies import Agent, AgentCarry, AgentParams, Network, initial_carry
from jaxpg.types import Array, Key, Params, Trajectory

# Steps between two looks at whether all episodes have ended. A look costs a device round trip on a GPU.
BLOCK = 32
# Episodes that draw from one key, whatever the device, so that a batch is the same on every one.
GROUP = 1024
# Groups that run as one program. More keep no more of a CPU busy, and leave its cache.
GROUPS_AT_ONCE = {"cpu": 1}
OTHER_GROUPS_AT_ONCE = 64


# Lanes of a stream of which each has a start of its own ready in every step; with more, so many share one.
# A start costs a CPU more than to find the lanes that ended, but for few lanes that is more to compile. On an
# accelerator it costs next to nothing, and to ask whether any lane ended is a round trip to the host.
FEW = {"cpu": 32}
SHARING = 8
# Steps that a feed-forward critic judges at once after a rollout: on a CPU more would leave the cache.
JUDGED = {"cpu": 2048}


class RolloutState(NamedTuple):
    """Where a stream stands: B environments between two steps."""

    env_state: Any
    obs: Array  # [B, ...]
    first: Array  # [B] bool
    carry: AgentCarry
    episode_return: Array  # [B] undiscounted, of the running episode
    episode_length: Array  # [B]


class EpisodeSums(NamedTuple):
    """Sums over the episodes that ended in a rollout; scalars."""

    returns: Array
    lengths: Array
    episodes: Array  # how many


class Evaluation(NamedTuple):
    """Over whole episodes, one per environment, so long episodes are not under-represented."""

    mean: Array
    standard_error: Array  # infinite for one episode, which says nothing about the spread
    episodes: Array  # how many
    smallest: Array  # return of an episode: with the largest, a range that returns can attain
    largest: Array


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
    _check_sizes(num_episodes, num_steps)
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
    """With the fields that cost memory to carry and nothing to say afterwards."""
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
    """How many episodes run as one program: whole groups, and a divisor of them all."""
    size = divisor(num_episodes, GROUP)
    groups = GROUPS_AT_ONCE.get(jax.default_backend(), OTHER_GROUPS_AT_ONCE)
    return size * divisor(num_episodes // size, groups)


def _part(env, agent, params, key, index, num_episodes, num_steps):
    run = partial(_episodes, env, agent, params, num_steps=num_steps)
    size, lanes = divisor(num_episodes, GROUP), lanes_at_once(num_episodes)
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
    """One group."""
    num_blocks = -(-num_steps // BLOCK)
    block = -(-num_steps // num_blocks)
    k_reset, k_steps = jax.random.split(key)
    env_state, obs = _reset(env, k_reset, num_episodes)
    carry = initial_carry(agent, num_episodes)
    alive = jnp.ones(num_episodes, bool)
    keys, noise_of = _keys(k_steps, num_blocks * block), _noise_of(agent, params.policy, obs)

    def step(state, inputs):
        t, key, noise = inputs
        env_state, obs, policy_carry, alive, cut = state
        action, log_prob, policy_carry = _act(
            agent, params.policy, policy_carry, obs, t == 0, noise
        )
        env_state, result = _step(env, key, env_state, action)
        last = alive & (result.terminated | result.truncated | (t == num_steps - 1))
        row = (
            # Also the successor of a step that cut an episode, whose value a critic is asked for; not of
            # one that terminated it, whose value nobody needs and whose numbers may be NaN.
            _where(alive | cut, obs),
            _where(alive, action),
            _where(alive, log_prob),
            _where(alive, result.reward),
            _where(alive, 1.0 - result.terminated),
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
    value = next_value = ()
    if agent.critic is not None:
        # The successors of last steps stand in the rows after them, but for the row after the loop.
        final = _where(loop[4], loop[1])[None]
        extended = jnp.concatenate([rows[0], jnp.zeros_like(final)])
        extended = jax.lax.dynamic_update_slice_in_dim(extended, final, index * block, 0)
        extended_first = jnp.arange(total + 1)[:, None] == jnp.zeros((1, num_episodes), int)
        _, found = agent.critic.apply(params.critic, carry.critic, extended, extended_first)
        value = jnp.where(mask, found[:num_steps], 0.0)
        next_value = jnp.where(mask & (discount > 0.0), found[1 : num_steps + 1], 0.0)
        obs = _where(mask, obs)
    trajectory = Trajectory(
        obs, action, log_prob, reward, discount, (), last, mask, value, next_value
    )  # see _completed
    sums = EpisodeSums(reward.sum(), mask.sum().astype(reward.dtype), last.sum())
    return trajectory, sums


def _lanes_together(x):
    """[G, T, B, ...] -> [T, G B, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def divisor(total: int, wanted: int) -> int:
    """The largest divisor up to the wanted size; the whole where there is none of a fair size."""
    size = next(n for n in range(min(wanted, total), 0, -1) if total % n == 0)
    return size if 4 * size >= min(wanted, total) else total


def init_stream(env: Env, agent: Agent, key: Key, num_envs: int) -> RolloutState:
    """B freshly reset environments."""
    env_state, obs = _reset(env, key, num_envs)
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
    # Without memory it can wait: one pass over all steps is cheaper than a small one in each.
    waits = critic is not None and not jax.tree.leaves(state.carry.critic)
    keys = _keys(key, num_steps)
    noise = _noise_of(agent, params.policy, state.obs)(keys.action)
    few = num_envs <= FEW.get(jax.default_backend(), num_envs)
    pool_size = num_envs if few else num_envs // SHARING
    pools = jax.vmap(partial(_pool, env, size=pool_size))(keys.reset)

    def value_of(carry, obs, first):
        if critic is None:
            return (), jnp.zeros(num_envs, state.episode_return.dtype)
        carry, value = critic.apply(params.critic, carry, obs[None], first[None])
        return carry, value[0].astype(state.episode_return.dtype)

    def step(state, inputs):
        key, noise, pool = inputs
        env_state, obs, first, carry, episode_return, episode_length = state
        action, log_prob, policy_carry = _act(agent, params.policy, carry.policy, obs, first, noise)
        value = jnp.zeros_like(episode_return)
        critic_carry = carry.critic
        if not waits:
            critic_carry, value = value_of(carry.critic, obs, first)
        env_state, result = _step(env, key.step, env_state, action)
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
            lambda: _where(cut, value_of(critic_carry, result.obs, jnp.zeros_like(last))[1]),
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
            last,  # in the mask's place: every step counts, which needs no row
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
        trajectory = trajectory._replace(value=_judged(critic, params.critic, trajectory))
    # Unless the episode ended, the successor's value is the next row's.
    _, beyond = value_of(state.carry.critic, state.obs, state.first)
    later = jnp.concatenate([trajectory.value[1:], beyond[None]])
    next_value = jnp.where(trajectory.last, trajectory.next_value, later)
    sums = jax.tree.map(lambda x: x.sum(axis=0), ended)
    return state, (trajectory._replace(next_value=next_value), sums)


def evaluate(
    env: Env,
    agent: Agent,
    params: AgentParams,
    key: Key,
    num_episodes: int,
    greedy: bool = False,
) -> Evaluation:
    """The mean undiscounted return of fresh episodes, one per environment, and its standard error.

    One whole episode per environment weighs every episode alike; pooling whatever ends in a window
    over-counts short ones (Glynn and Heidelberger, 1990). An episode that still runs at the environment's
    horizon ends there, as in training, and counts. greedy: take the distribution's mode. Raises ValueError
    for fewer than one episode or step.
    """
    _check_sizes(num_episodes, env.horizon)
    k_reset, k_steps = jax.random.split(key)
    env_state, obs = _reset(env, k_reset, num_episodes)
    carry = initial_carry(agent, num_episodes).policy
    returns = jnp.zeros(num_episodes, jnp.result_type(float))
    alive = jnp.ones(num_episodes, bool)
    noise_of = _noise_of(agent, params.policy, obs)

    def step(state):
        t, env_state, obs, carry, alive, returns = state
        key = StepKeys(*(jax.random.fold_in(k_steps, 3 * t + use) for use in range(3)))
        noise = jax.tree.map(lambda x: x[0], noise_of(key.action[None]))
        action, _, carry = _act(agent, params.policy, carry, obs, t == 0, noise, greedy)
        env_state, result = _step(env, key.step, env_state, action)
        returns = returns + _where(alive, result.reward)
        alive = alive & ~(result.terminated | result.truncated)
        return t + 1, env_state, result.obs, carry, alive, returns

    start = (jnp.int32(0), env_state, obs, carry, alive, returns)
    *_, returns = jax.lax.while_loop(
        lambda state: (state[0] < env.horizon) & any_replica(state[4]), step, start
    )
    error = jnp.full((), jnp.inf, returns.dtype)
    if num_episodes > 1:
        error = returns.std(ddof=1) / num_episodes**0.5
    count = jnp.int32(num_episodes)
    return Evaluation(returns.mean(), error, count, returns.min(), returns.max())


def _check_sizes(num_episodes: int, num_steps: int) -> None:
    for name, value in (("num_episodes", num_episodes), ("the longest episode", num_steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _judged(critic: Network, params: Params, trajectory: Trajectory) -> Array:
    """The values [T, B] of a critic without memory, a few rows at a time."""
    num_steps, num_envs = trajectory.mask.shape
    wanted = max(JUDGED.get(jax.default_backend(), num_steps * num_envs) // num_envs, 1)
    rows = next(n for n in range(min(wanted, num_steps), 0, -1) if num_steps % n == 0)

    def judge(block):
        return critic.apply(params, (), *block)[1]

    blocks = jax.tree.map(
        lambda x: x.reshape(-1, rows, *x.shape[1:]), (trajectory.obs, trajectory.first)
    )
    return jax.lax.map(judge, blocks).reshape(num_steps, num_envs)


class StepKeys(NamedTuple):
    action: Key
    step: Key
    reset: Key


def _keys(key: Key, num_steps: int) -> StepKeys:
    """[T] each."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(3 * num_steps))
    return StepKeys(*(keys[use::3] for use in range(3)))  # typed keys or rows of raw ones


def _noise_of(agent: Agent, params: Params, obs):
    """keys [T] -> the noise of actions [T, B, ...]; a distribution that has only `sample` gets the keys."""

    def distribution(carry, obs):
        first = jnp.zeros((1, obs.shape[0]), bool)
        _, found = agent.policy.apply(params, carry, obs[None], first)
        return jax.tree.map(lambda x: x[0], found)

    carry = jax.eval_shape(lambda: initial_carry(agent, obs.shape[0]).policy)
    noise = getattr(jax.eval_shape(distribution, carry, obs), "noise", None)
    return jax.vmap(noise) if noise else lambda keys: keys


def _act(agent: Agent, params: Params, carry, obs, first, noise, greedy=False):
    first = jnp.broadcast_to(first, obs.shape[:1])
    carry, distribution = agent.policy.apply(params, carry, obs[None], first[None])
    distribution = jax.tree.map(lambda x: x[0], distribution)
    draw = getattr(distribution, "draw", distribution.sample)
    action = distribution.mode() if greedy else draw(noise)
    return action, distribution.log_prob(action), carry


def _step(env: Env, key, env_state, action):
    check_action(env, action)
    # XLA drops the split where the environment does not read its key.
    keys = jax.random.split(key, action.shape[0])
    env_state, result = jax.vmap(env.step)(keys, env_state, action)
    return env_state, result._replace(reward=jnp.asarray(result.reward, jnp.result_type(float)))


def _reset(env: Env, key, num_lanes):
    check_env(env)
    return jax.vmap(env.reset)(jax.random.split(key, num_lanes))


def _pool(env: Env, key, size):
    """So many starts; each has the key of its place, so a larger pool begins with the same ones."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(size))
    return jax.vmap(env.reset)(keys)


def _reset_ended(env: Env, ended, pool, key, env_state, obs):
    """Fresh starts where an episode ended: from the lane's own place in the pool if there is one for each.

    Otherwise the k-th lane that ended takes the k-th; where more have ended than the pool holds, the key
    draws as many as there are lanes. Every step has a pool of its own, so starts are independent.
    """
    num_lanes, size = ended.shape[0], jax.tree.leaves(pool)[0].shape[0]
    before = env_state, obs

    def put(fresh):
        return jax.tree.map(partial(_select, ended), fresh, before)

    def placed(pool, size):
        place = jnp.clip(jnp.cumsum(ended) - 1, 0, size - 1)
        return jax.tree.map(lambda x: x[place], pool)

    def fresh():
        return jax.lax.cond(
            any_replica(ended.sum()[None] > size),
            lambda: placed(_pool(env, key, num_lanes), num_lanes),
            lambda: placed(pool, size),
        )

    if size == num_lanes:
        return put(pool)
    return jax.lax.cond(any_replica(ended), lambda: put(fresh()), lambda: before)


def _where(keep, x):
    return _select(keep, x, jnp.zeros_like(x))


def _select(condition, yes, no):
    return jnp.where(
        condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim)), yes, no
    )


@jax.custom_batching.custom_vmap
def any_replica(flags):
    """Whether any flag is set: under vmap, in any replica.

    A predicate that differs between replicas turns `cond` into computing both branches, and `while_loop`
    into a select over all it carries, the stored trajectory too, in every iteration. Work done for a
    replica that did not ask for it is masked, so one common predicate changes no result.
    """
    return flags.any()


@any_replica.def_vmap
def _any_of_replicas(axis_size, in_batched, flags):
    del axis_size, in_batched
    return any_replica(flags.any(axis=0)), False
