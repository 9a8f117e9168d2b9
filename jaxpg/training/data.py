"""Data: where an update's data comes from, and the density that it was drawn from.

A row of the algorithm table names one source: the policy's own whole `episodes`, a `stream` that goes on
between updates, a `replay` of the last batches of either, the `mixture` of own episodes with
demonstrations, or the `demonstrations` alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg import rollout
from jaxpg.devices import across, mean_across
from jaxpg.envs import Env
from jaxpg.estimators import Estimator, check_lanes, importance, masked
from jaxpg.estimators.estimator import Batch
from jaxpg.estimators.importance import Importance
from jaxpg.estimators.reference import divergence
from jaxpg.estimators.surrogates import per_step
from jaxpg.policies import Agent, AgentCarry, AgentParams, Network, initial_carry
from jaxpg.types import Array, Carry, Hyperparams, Key, Metrics, Params, Trajectory


class Task(NamedTuple):
    """The agent that gathers data, its environment, and how much it gathers at a time."""

    env: Env
    agent: Agent
    estimator: Estimator
    num_envs: int
    num_steps: int
    group_size: int = 1  # episodes that share a start


class Gathered(NamedTuple):
    """The data that an update learns from."""

    trajectory: Trajectory  # [T, B, ...]; log_prob is the density that it was drawn from
    log_prob: Array  # [T, B] under the policy to improve
    carry: AgentCarry  # at the first row
    new: Trajectory  # the part that no earlier update has seen
    metrics: Metrics
    share: Array | float = 1.0  # the share of lanes that count; all steps of the others are masked


class Moment(NamedTuple):
    """The circumstances of gathering: parameters, hyperparameters, key, and the update's number."""

    params: AgentParams
    hyperparams: Hyperparams
    key: Key
    num_updates: Array
    demonstrations: Trajectory | None = None


class Data(NamedTuple):
    """A source of data: the state that it carries from update to update, and how it gathers a batch.

    init(task, params, key) -> state; gather(task, moment, state) -> (state, Gathered).
    """

    name: str
    init: Callable[[Task, AgentParams, Key], Any]
    gather: Callable[[Task, Moment, Any], tuple[Any, Gathered]]
    whole_episodes: bool = True  # lanes are whole episodes, not parts of a stream
    gathers: bool = True  # the policy acts; False: it only learns from what is given
    demonstrations: bool = False  # it needs demonstrations
    reweighs: bool = (
        False  # trajectory.log_prob is not that of the policy at the start of the update
    )
    records_reference: bool = False  # trajectory.reference is filled
    repeats: bool = False  # the same key gives the same lanes again, so they need not be kept
    splits: bool = False  # its lanes may be split over devices, which share nothing but sums
    num_batches: int = 1  # how many of the last batches it holds
    inner: "Data | None" = None  # what a wrapper wraps


def _start_episodes(task: Task, params: AgentParams, key: Key) -> tuple:
    del task, params, key
    return ()


def _gather_episodes(task: Task, moment: Moment, state: tuple) -> tuple[tuple, Gathered]:
    trajectory, ended = rollout.episodes(
        task.env,
        task.agent,
        moment.params,
        moment.key,
        task.num_envs,
        task.num_steps,
        task.group_size,
    )
    carry = initial_carry(task.agent, task.num_envs)
    return state, _own(trajectory, carry, ended)


def _start_stream(task: Task, params: AgentParams, key: Key) -> rollout.RolloutState:
    del params
    return rollout.init_stream(task.env, task.agent, key, task.num_envs)


def _gather_stream(
    task: Task, moment: Moment, state: rollout.RolloutState
) -> tuple[rollout.RolloutState, Gathered]:
    after, (trajectory, ended) = rollout.unroll(
        task.env, task.agent, moment.params, state, moment.key, task.num_steps
    )
    return after, _own(trajectory, state.carry, ended)


def _own(trajectory, carry, ended) -> Gathered:
    """The policy's own data: no forward pass is needed to know that every ratio is 1."""
    ended, steps = across((ended, trajectory.mask.sum()))
    metrics = episode_metrics(ended) | {"env_steps": steps}
    return Gathered(trajectory, trajectory.log_prob, carry, trajectory, metrics)


def episode_metrics(ended: rollout.EpisodeSums) -> Metrics:
    # 0/0 is NaN: a curve has no value until an episode has ended. jax_debug_nans must not trip on it.
    watched = jax.config.jax_debug_nans  # type: ignore[attr-defined]
    count = jnp.maximum(ended.episodes, 1) if watched else ended.episodes
    return {
        "episode_return": ended.returns / count,
        "episode_length": ended.lengths / count,
        "episodes": ended.episodes,
    }


episodes = Data("episodes", _start_episodes, _gather_episodes, repeats=True, splits=True)
stream = Data("stream", _start_stream, _gather_stream, whole_episodes=False, splits=True)


class Memory(NamedTuple):
    """The last K batches of B lanes, side by side, the n-th at slot n mod K."""

    trajectory: Trajectory  # [T, K x B, ...]; masked where no batch has come yet
    carry: AgentCarry


def replay(data: Data, num_batches: int) -> Data:
    """The last `num_batches` batches of `data`, weighted by the importance slot; with one, `data` itself.

    Raises ValueError for data with demonstrations, and for less than one batch.

    >>> replay(stream, 4).name, replay(stream, 4).num_batches
    ('replay(stream, 4)', 4)
    """
    data = data.inner or data
    if num_batches < 1:
        raise ValueError(f"num_batches={num_batches} must be at least 1")
    if num_batches == 1:
        return data
    if data.demonstrations:
        raise ValueError(
            f"num_batches={num_batches} replays the policy's own data, not {data.name}"
        )

    def init(task, params, key):
        state = data.init(task, params, key)
        moment = Moment(params, Hyperparams(), key, jnp.int32(0))
        new = jax.eval_shape(lambda: data.gather(task, moment, state)[1])
        return state, empty_memory((new.trajectory, new.carry), num_batches)

    def gather(task, moment, state):
        state, memory = state
        state, own = data.gather(task, moment, state)
        memory = remember(memory, own.trajectory, own.carry, moment.num_updates)
        slot, policy, params = task.estimator.importance, task.agent.policy, moment.params.policy
        found = recalled(
            memory, num_batches, slot, policy, params, moment.hyperparams, moment.num_updates
        )
        metrics = own.metrics | found.metrics
        return (state, memory), found._replace(new=own.new, metrics=metrics)

    return data._replace(
        name=f"replay({data.name}, {num_batches})",
        init=init,
        gather=gather,
        reweighs=True,
        repeats=False,
        splits=False,
        num_batches=num_batches,
        inner=data,
    )


class Reference(NamedTuple):
    """A fixed policy of the same network, and what it remembers of a stream."""

    params: Params
    carry: Carry


def with_reference(data: Data) -> Data:
    """`data` that records what a fixed reference policy thinks of the actions, once per batch.

    Its parameters are those of the policy at the start, until `referring` gives others. They are part of
    the state, so a resumed run has the same reference. Raises ValueError for data with demonstrations.

    >>> with_reference(replay(stream, 4)).name
    'replay(with_reference(stream), 4)'
    """
    if data.demonstrations:
        raise ValueError(
            f"a reference policy is compared with on the policy's own data, not on {data.name}; use another "
            "algorithm, or leave the reference out"
        )
    if data.inner:
        return replay(with_reference(data.inner), data.num_batches)

    def init(task, params, key):
        carry = task.agent.policy.initial_carry(task.num_envs)
        return Reference(params.policy, carry), data.init(task, params, key)

    def gather(task, moment, state):
        (params, carry), inner = state
        inner, found = data.gather(task, moment, inner)
        given, policy = found.trajectory, task.agent.policy
        after, distribution = policy.apply(params, carry, given.obs, given.first)
        # The own log-probability where masked, so that the ratio is 1 there.
        log_prob = jnp.where(given.mask, distribution.log_prob(given.action), given.log_prob)
        given = given._replace(reference=log_prob)
        apart = per_step(divergence("k3", given.log_prob, given), given.mask)
        apart, _ = mean_across(apart, given.mask.sum())
        found = found._replace(trajectory=given, metrics=found.metrics | {"kl_reference": apart})
        # Whole episodes begin anew.
        return (Reference(params, carry if data.whole_episodes else after), inner), found

    return data._replace(
        name=f"with_reference({data.name})",
        init=init,
        gather=gather,
        records_reference=True,
        repeats=False,
    )


def referring(state: Any, params: Params) -> Any:
    """The state of data with a reference, with these parameters of its policy."""

    def put(node):
        return node._replace(params=params) if isinstance(node, Reference) else node

    return jax.tree.map(put, state, is_leaf=lambda node: isinstance(node, Reference))


def empty_memory(batch: tuple[Trajectory, AgentCarry], num_batches: int) -> Memory:
    """An empty memory for batches of these shapes."""

    def blank(x, axis):
        shape = list(x.shape)
        shape[axis] *= num_batches
        return jnp.zeros(shape, x.dtype)

    trajectory, carry = batch
    return Memory(
        jax.tree.map(lambda x: blank(x, 1), trajectory), jax.tree.map(lambda x: blank(x, 0), carry)
    )


def remember(
    memory: Memory, trajectory: Trajectory, carry: AgentCarry, num_updates: Array
) -> Memory:
    """Put the newest batch in place of the oldest."""
    num_lanes = trajectory.mask.shape[1]
    start = (num_updates % (memory.trajectory.mask.shape[1] // num_lanes)) * num_lanes

    def put(axis):
        return lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)

    return Memory(
        jax.tree.map(put(1), memory.trajectory, trajectory),
        jax.tree.map(put(0), memory.carry, carry),
    )


def recalled(
    memory: Memory,
    num_batches: int,
    slot: Importance,
    policy: Network,
    params: Params,
    hyperparams: Hyperparams,
    num_updates: Array,
) -> Gathered:
    """The batches that are still useful, with the effective sample share of each old one.

    A batch is dropped when (sum w)^2 / (n sum w^2) over its n steps is below ess_floor, with w the weights of
    the importance slot relative to on-policy ones; the newest is never dropped. Metrics: this ess and the
    mean KL of the policy from the one that gathered the batch, by lag in updates.
    """
    trajectory = memory.trajectory
    log_prob = log_prob_of(policy, params, memory.carry.policy, trajectory)
    log_ratio = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0)
    # Relative to on-policy weights, so that gamma^t cancels.
    weight = slot(log_ratio, trajectory, hyperparams).step
    weight = weight / slot(jnp.zeros_like(log_ratio), trajectory, hyperparams).step

    def by_batch(x):
        x = jnp.where(trajectory.mask, x, 0.0)
        return x.reshape(x.shape[0], num_batches, -1).sum(axis=(0, 2))

    count = by_batch(1.0)
    ess = by_batch(weight) ** 2 / (count * by_batch(weight**2))
    kl = by_batch(jnp.expm1(log_ratio) - log_ratio) / count
    newest = num_updates % num_batches
    kept = (ess >= hyperparams.ess_floor) | (jnp.arange(num_batches) == newest)
    lanes = jnp.repeat(kept, trajectory.mask.shape[1] // num_batches)
    metrics: Metrics = {"batches": kept.sum()}
    for lag in range(1, num_batches):
        at = (num_updates - lag) % num_batches
        metrics |= {f"ess_lag{lag}": ess[at], f"kl_lag{lag}": kl[at]}
    seen = trajectory._replace(mask=trajectory.mask & lanes[None])
    return Gathered(seen, log_prob, memory.carry, trajectory, metrics, kept.mean())


def _start_demonstrations(task: Task, params: AgentParams, key: Key) -> tuple:
    del task, params, key
    return ()


def _gather_demonstrations(task: Task, moment: Moment, state: tuple) -> tuple[tuple, Gathered]:
    """Treat demonstrations as the policy's own data: maximum likelihood needs no other density."""
    given, agent = _given(moment), task.agent
    carry = initial_carry(agent, given.mask.shape[1])
    log_prob = log_prob_of(agent.policy, moment.params.policy, carry.policy, given)
    none = jnp.zeros(())
    found = _own(given._replace(log_prob=log_prob), carry, rollout.EpisodeSums(none, none, none))
    return state, found


def _start_mixture(task: Task, params: AgentParams, key: Key) -> Params:
    """The policy's parameters, which stand in for the behaviour's until those are fitted."""
    del task, key
    return params.policy


def _gather_mixture(task: Task, moment: Moment, state: Params) -> tuple[Params, Gathered]:
    given = _given(moment)
    _, own = _gather_episodes(task, moment, ())
    found = joined(task.agent, moment.params.policy, state, own.trajectory, given)
    share = share_of_demonstrations(found, task.num_envs)
    return state, found._replace(new=own.new, metrics=own.metrics | share)


def _given(moment: Moment) -> Trajectory:
    if moment.demonstrations is None:
        raise ValueError("this algorithm learns from demonstrations, but none were given")
    return masked(moment.demonstrations)


demonstrations = Data(
    "demonstrations",
    _start_demonstrations,
    _gather_demonstrations,
    gathers=False,
    demonstrations=True,
)
mixture = Data("mixture", _start_mixture, _gather_mixture, demonstrations=True, reweighs=True)


def joined(
    agent: Agent,
    params: Params,
    behaviour: Params,
    own: Trajectory,
    demonstrations: Trajectory,
) -> Gathered:
    """Own episodes and demonstrations as draws from the mixture of both densities, by their shares.

    q(tau) = share_own pi(tau) + share_demo beta(tau): a demonstration that pi would never produce has a small
    weight pi/q, and an episode that beta would never produce has one of at most 1/share_own (Levine and
    Koltun, 2013). behaviour: parameters of the policy network that give beta on the policy's own episodes;
    on the demonstrations beta is their log_prob, or the same network where that is NaN.
    """
    check_lanes(own)
    check_lanes(demonstrations)
    num_steps = own.mask.shape[0]
    if demonstrations.mask.shape[0] > num_steps:
        raise ValueError(
            f"demonstrations of {demonstrations.mask.shape[0]} steps are longer than episodes of "
            f"num_steps={num_steps}; raise num_steps"
        )
    demonstrations = jax.tree.map(lambda x: _padded(x, num_steps), demonstrations)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), own, demonstrations)
    counts = [own.mask.shape[1], demonstrations.mask.shape[1]]
    carry = [initial_carry(agent, n) for n in counts]
    under_pi = jnp.concatenate(
        [own.log_prob, log_prob_of(agent.policy, params, carry[1].policy, demonstrations)], 1
    )
    fitted = log_prob_of(agent.policy, behaviour, carry[1].policy, demonstrations)
    known = jnp.where(jnp.isnan(demonstrations.log_prob), fitted, demonstrations.log_prob)
    under_beta = jnp.concatenate(
        [log_prob_of(agent.policy, behaviour, carry[0].policy, own), known], 1
    )
    density = importance.mixture(jnp.stack([under_pi, under_beta]), both.mask, counts)
    carry = initial_carry(agent, sum(counts))
    return Gathered(both._replace(log_prob=density), under_pi, carry, own, {})


def corrected(batch: Batch, gathered: Gathered, whole: bool) -> Batch:
    """The batch after weighting: from here on, ratios are to the policy at the start of the update.

    whole: the mean is over episodes, and only a share of them counts.
    """
    log_prob = jax.lax.stop_gradient(gathered.log_prob)
    advantage = batch.advantage / gathered.share if whole else batch.advantage
    return batch._replace(
        trajectory=batch.trajectory._replace(log_prob=log_prob), advantage=advantage
    )


def share_of_demonstrations(gathered: Gathered, num_own: int) -> Metrics:
    """The demonstrations' share of the self-normalised weight, and the effective share of the sample."""
    trajectory = gathered.trajectory
    log_ratio = jnp.where(trajectory.mask, gathered.log_prob - trajectory.log_prob, 0.0)
    weight = jax.nn.softmax(log_ratio.sum(axis=0))
    return {
        "demo_share": weight[num_own:].sum(),
        "ess_mixture": 1.0 / (weight**2).sum() / weight.size,
    }


def log_prob_of(policy: Network, params: Params, carry: Carry, trajectory: Trajectory) -> Array:
    """log pi(a_t|s_t) [T, B] of a policy; the trajectory's own where masked."""
    check_lanes(trajectory)
    _, distribution = policy.apply(params, carry, trajectory.obs, trajectory.first)
    log_prob = distribution.log_prob(trajectory.action)
    return jnp.where(trajectory.mask, log_prob, trajectory.log_prob)


def _padded(x: Array, num_steps: int) -> Array:
    return jnp.pad(x, [(0, num_steps - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
