"""Per-trajectory gradients of any estimator, in any environment, with any network.

Every gradient of the package is a weighted sum of scores: with coefficients w = N d objective / d log pi,
row i is g_i = sum_t w_{t,i} grad log pi(a_{t,i}|s_{t,i}), and the mean over rows is the batch estimate,
whatever couples the trajectories of the batch (a mean baseline, self-normalisation, standardisation).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.envs import Env, check_env
from jaxpg.estimators import (
    Estimator,
    assess,
    coefficients,
    describe,
    facts_of,
    group_size_of,
    importance,
    lane_gradients,
)
from jaxpg.estimators.control_variates import ControlVariate
from jaxpg.memory import available_bytes
from jaxpg.policies import Agent, AgentParams, Network
from jaxpg.rollout.episodic import check_groups, episodes_from
from jaxpg.types import Array, Hyperparams, Key, Params, Trajectory

# Working memory of one chunk of trajectories. On a CPU small enough for its cache to help, large enough to
# fill its vector units. An accelerator starts as many operations for a large chunk as for a small one: on an
# H100 10^5 trajectories of CartPole take 54,000 kernels, or 12,000,000 in a CPU's chunks.
CHUNK_BYTES = {"cpu": 2**25}
OTHER_CHUNK_BYTES = 2**33


class Source(NamedTuple):
    """Where gradients come from: the episodes of a policy, and the estimator that turns them into gradients.

    behaviour_params: the policy that acts, if it is another one; the importance slot should then correct
    for it. A tuple of K of them is a mixture: trajectory i follows the (i mod K)-th and is weighted by
    the density of the mixture.
    """

    env: Env
    policy: Network
    estimator: Estimator
    policy_params: Params
    key: Key
    hyperparams: Hyperparams
    behaviour_params: Params = None  # None: on-policy
    critic: Network | None = None
    critic_params: Params = ()
    group_size: int = 1  # episodes that share a start


class Chunk(NamedTuple):
    """Trajectories with the coefficients of their scores, [T, C]."""

    trajectory: Trajectory
    coefficient: Array
    log_ratio: Array  # 0 on-policy and where masked


def gradient_samples(
    source: Source, num_trajectories: int, control_variate: ControlVariate | None = None
) -> Array:
    """Row i is trajectory i's contribution; the mean over rows is the batch estimate. [N, P]

    Parameters are flattened as by `ravel_pytree`. Trajectory i's key is fold_in(source.key, i), and the work
    goes in chunks of bounded memory, so rows do not depend on N, unless the estimator couples the batch.
    control_variate: a per-parameter baseline of `estimators.control_variates`; it couples the rows.
    Pure: wrap it in `jax.jit` with num_trajectories bound to compile it once.
    Raises ValueError for N < 1, for a baseline that compares trajectories with N < 2, and for rows that
    would not fit in memory.
    """
    check_source(source, num_trajectories)
    size = min(chunk_size(source), num_trajectories)
    _check_memory(source, num_trajectories, size)
    num_chunks = -(-num_trajectories // size)
    starts = size * jnp.arange(num_chunks)
    if not couples(source.estimator) and control_variate is None:
        rows = jax.lax.map(lambda start: rows_of(source, gather(source, start, size)), starts)
        return rows.reshape(num_chunks * size, -1)[:num_trajectories]
    whole = jax.lax.map(lambda start: roll(source, start, size), starts)
    whole = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), whole
    )
    whole = jax.tree.map(lambda x: x[:, :num_trajectories], whole)
    chunk = weigh(source, whole)

    def gradients(weight):
        return _in_chunks(
            partial(lane_gradients, source.policy, source.policy_params), size, whole, weight
        )

    if control_variate is None:
        return gradients(chunk.coefficient)
    return control_variate(gradients, chunk.coefficient, whole, source.hyperparams)


def _in_chunks(function, size: int, *trees) -> Array:
    """Apply the function to pieces [T, C] of trees [T, N], and join its results [C, P] into [N, P]."""
    num_lanes = jax.tree.leaves(trees)[0].shape[1]
    num_chunks = -(-num_lanes // size)
    padding = num_chunks * size - num_lanes

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, size, *x.shape[2:]), 1, 0)

    rows = jax.lax.map(lambda parts: function(*parts), jax.tree.map(split, trees))
    return rows.reshape(num_chunks * size, -1)[:num_lanes]


def couples(estimator: Estimator) -> bool:
    """Whether a trajectory's gradient depends on the others of its batch."""
    return any(facts_of(slot).couples for slot in estimator)


def dependent(source: Source) -> bool:
    """Whether trajectories are no independent samples: an estimator couples them, or they share a start."""
    return couples(source.estimator) or source.group_size > 1


def chunk_size(source: Source) -> int:
    """Trajectories per chunk, so that a chunk's rollout, activations and gradients fill its bytes."""
    room = CHUNK_BYTES.get(backend(), OTHER_CHUNK_BYTES)
    groups = min(2**16, int(room // trajectory_bytes(source, 2))) // source.group_size
    return max(1, groups) * source.group_size


def trajectory_bytes(source: Source, gradients: float) -> float:
    """Approximate bytes of a trajectory's rollout, its activations and this many gradients.

    A step costs its fields and the activations kept for the backward pass: a few times the width of a
    dense layer, which is about the square root of the number of parameters.
    """
    num_params = sum(x.size for x in jax.tree.leaves(source.policy_params))
    per_step = 16 + math.prod(source.env.observation.shape) + 8 * int(num_params**0.5)
    return 4 * (source.env.horizon * per_step + gradients * num_params)


def check_source(source: Source, num_trajectories: int) -> None:
    """Raises ValueError for a request that makes no sense, before anything is compiled."""
    check_env(source.env)
    if num_trajectories < 1:
        raise ValueError(f"num_trajectories={num_trajectories} must be at least 1")
    check_groups(num_trajectories, source.group_size, "num_trajectories")
    compared = group_size_of(source.estimator)
    if compared not in (1, source.group_size):
        raise ValueError(
            f"the estimator compares groups of {compared} episodes from one start; pass group_size={compared}"
        )
    if source.group_size > 1 and isinstance(source.behaviour_params, tuple):
        raise ValueError("a mixture of behaviours has no groups; leave group_size out")
    reads_critic = facts_of(source.estimator.baseline).reads_critic
    if reads_critic and source.critic is None:
        raise ValueError("baseline critic reads a critic's values; pass critic= and critic_params=")
    slot = source.estimator.importance
    if source.behaviour_params is None and facts_of(slot).corrects:
        raise ValueError(
            f"importance {describe(slot)} needs the log-probabilities of another behaviour; pass "
            "behaviour_params=, or use on_policy"
        )


def _check_memory(source: Source, num_trajectories: int, size: int) -> None:
    num_params = sum(x.size for x in jax.tree.leaves(source.policy_params))
    needed, limit = 4 * num_trajectories * num_params, available_bytes()
    if limit is not None and needed > limit:
        raise ValueError(
            f"{num_trajectories:,} gradients of {num_params:,} parameters are {needed / 2**30:.1f} GiB, more "
            f"than the {limit / 2**30:.1f} GiB of memory; gradient_statistics needs only chunks of {size:,}, "
            f"or ask for {limit // (4 * num_params):,} trajectories"
        )


def gather(source: Source, start: Array | int, size: int) -> Chunk:
    """Trajectories start .. start+size-1, and the coefficients of their scores."""
    return weigh(source, roll(source, start, size))


def rows_of(source: Source, chunk: Chunk) -> Array:
    """One backward pass per trajectory: [C, P]."""

    return lane_gradients(source.policy, source.policy_params, chunk.trajectory, chunk.coefficient)


def log_probs(source: Source, trajectory: Trajectory) -> Callable[[Params], Array]:
    """The function params -> log pi(a|s) [T, C], 0 where masked."""
    carry = source.policy.initial_carry(trajectory.mask.shape[1])

    def log_prob(params):
        _, distribution = source.policy.apply(params, carry, trajectory.obs, trajectory.first)
        return jnp.where(trajectory.mask, distribution.log_prob(trajectory.action), 0.0)

    return log_prob


def roll(source: Source, start: Array | int, size: int) -> Trajectory:
    env, agent = source.env, Agent(source.policy, source.critic)
    behaviour = source.policy_params if source.behaviour_params is None else source.behaviour_params
    several = tuple(behaviour) if isinstance(behaviour, tuple | list) else (behaviour,)
    kinds = len(several)
    groups = source.group_size
    # Column j holds the trajectories of one behaviour, so that all of them share its products.
    index = start // groups + jnp.arange(-(-size // (groups * kinds)) * kinds).reshape(-1, kinds)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)

    def column(policy_params, index):
        params = AgentParams(policy_params, source.critic_params)
        keys = jax.vmap(partial(jax.random.fold_in, source.key))(index)
        return episodes_from(env, agent, params, keys, groups)

    columns = jax.tree.map(lambda x: x[index[0] % kinds], stacked)
    found = jax.vmap(column, (0, 1), 2)(columns, index)
    trajectory = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])[:, :size], found)
    if kinds == 1:
        return trajectory
    each = jax.vmap(log_probs(source, trajectory))(stacked)
    return trajectory._replace(log_prob=importance.mixture(each, trajectory.mask))


def weigh(source: Source, trajectory: Trajectory) -> Chunk:
    estimator, hyperparams = source.estimator, source.hyperparams
    log_prob = trajectory.log_prob
    if source.behaviour_params is not None:
        log_prob = log_probs(source, trajectory)(source.policy_params)
    batch = assess(
        estimator, trajectory, log_prob, hyperparams, source.policy, source.policy_params
    )

    log_ratio = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0)
    return Chunk(trajectory, coefficients(estimator, log_prob, batch, hyperparams), log_ratio)
