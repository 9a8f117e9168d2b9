"""The gradient of the objective on a batch, in parts that fit the memory and a processor's cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpg.batching import any_replica, fair_divisor
from jaxpg.devices import backend, mean_across
from jaxpg.estimators import Estimator, check_lanes, facts_of, objective, rescaled
from jaxpg.estimators.estimator import Batch
from jaxpg.policies import Network
from jaxpg.rollout import lanes_at_once
from jaxpg.types import Array, Carry, Hyperparams, Metrics, Params, Trajectory

# Steps in a block. On a CPU a block's activations should stay in the cache, and larger products are spread
# over threads that cost more than they save: policy and critic of 2x64 took 26 ms in blocks of 512, 44 ms in
# blocks of 1024 or in one piece. On other devices the block bounds the memory. On an H100 the gradient of
# 65,536 CartPole episodes takes 1,152 kernels in blocks of 2^20 steps, and 4,250 and as much memory in 2^18.
BLOCK = {"cpu": 512, "gpu": 2**20}
OTHER_BLOCK = 2**18

# Where blocks after the last step that counts are skipped. On a GPU to ask whether another is left would be a
# round trip to the host before each.
SKIPS = ("cpu", "tpu")

# Where metrics are added up in one array: starting a sum costs a CPU more than a block's terms. To write them
# into one array took a TPU 8 of the 34 operations of ppo's step.
STACKED = ("cpu",)


def gradient_of(
    estimator: Estimator,
    policy: Network,
    params: Params,
    carry: Carry,
    batch: Batch,
    hyperparams: Hyperparams,
    block: int | None = None,
    recall: Callable[[Array], Trajectory] | None = None,
) -> tuple[Params, Metrics]:
    """The gradient of the objective, and the metrics that a forward pass gives.

    An objective that is a sum over steps is taken in groups of lanes and, for a policy without memory, in
    blocks of about `block` steps (by default by backend), up to the last in which an episode still runs.
    recall: index -> the index-th `lanes_at_once` lanes of the trajectory, where they were not kept.
    """
    check_lanes(batch.trajectory, batch.advantage)
    # Rescale over the whole batch, before it is cut.
    estimator, batch = rescaled(estimator, batch)
    mask = batch.trajectory.mask
    splits = facts_of(estimator.reduce).linear and not facts_of(estimator.surrogate).by_lane
    if not (splits and _cuts(mask, carry, block, recall)):
        found = _sums(estimator, policy, params, carry, batch, hyperparams)
        return _of_all_devices(estimator, mask, *found)
    # A reduction that is linear in the gain is a weighted sum over steps; its gradient is the weights.
    weight = jax.grad(estimator.reduce)(jnp.zeros_like(batch.advantage), mask)

    def one(cut, carry):
        batch, weight = cut
        part = estimator._replace(
            reduce=lambda gain, mask: jnp.where(mask, weight * gain, 0.0).sum()
        )
        return _sums(part, policy, params, carry, batch, hyperparams)

    zero = jnp.zeros((), batch.advantage.dtype)
    # The gain, and what `_sums` adds up.
    like = params, (zero,) * (6 + (facts_of(estimator.surrogate).clips is not None))
    found = _over_lanes(
        one, (batch, weight), carry, mask, block, like, recall and partial(_recalled, recall)
    )
    return _of_all_devices(estimator, mask, *found)


def _of_all_devices(estimator, mask, gradient, sums) -> tuple[Params, Metrics]:
    gain, *sums = sums
    (gradient, gain), sums = mean_across((gradient, gain), weight_of(estimator, mask), sums)
    return gradient, _metrics((gain, *sums))


def weight_of(estimator: Estimator, mask: Array) -> Array | float:
    """The weight of this device's lanes in the mean that the estimator reduces to."""
    return mask.sum() if facts_of(estimator.reduce).averages == "steps" else 1.0


def critic_gradient(
    critic: Network,
    params: Params,
    carry: Carry,
    batch: Batch,
    hyperparams: Hyperparams,
    block: int | None = None,
) -> tuple[Params, Array]:
    """The gradient of half the mean squared error of the values, and that loss.

    The larger of two errors counts: the value's, and that of the value clipped to within value_clip_eps of
    the old one (the code of Schulman et al., 2017). Taken in parts like gradient_of.
    """
    check_lanes(batch.trajectory, batch.target)
    mask = batch.trajectory.mask
    count = jnp.maximum(mask.sum(), 1)

    def one(cut, carry):
        def loss(params):
            trajectory, far = cut.trajectory, hyperparams.value_clip_eps
            _, value = critic.apply(params, carry, trajectory.obs, trajectory.first)
            near = trajectory.value + jnp.clip(value - trajectory.value, -far, far)
            error = jnp.maximum((value - cut.target) ** 2, (near - cut.target) ** 2)
            return 0.5 * jnp.where(trajectory.mask, error, 0.0).sum() / count

        value, gradient = jax.value_and_grad(loss)(params)
        return gradient, value

    like = params, jnp.zeros((), batch.target.dtype)
    found = _over_lanes(one, batch, carry, mask, block, like)
    return mean_across(found, mask.sum())[0]


def _recalled(recall, index, cut):
    batch, weight = cut
    return batch._replace(trajectory=recall(index)), weight


def _block_size(total: int, block: int | None) -> int:
    """Steps in a block, by default by backend."""
    return fair_divisor(total, block or BLOCK.get(backend(), OTHER_BLOCK))


def _cuts(mask: Array, carry: Carry, block: int | None, recall: Any) -> bool:
    """Whether a batch is taken in parts."""
    lanes = lanes_at_once(mask.shape[1])
    return recall is not None or lanes < mask.shape[1] or _in_blocks(mask, carry, block)


def _in_blocks(mask: Array, carry: Carry, block: int | None) -> bool:
    return not jax.tree.leaves(carry) and 2 * _block_size(mask.size, block) < mask.size


def _over_lanes(
    one: Callable,
    data: Any,
    carry: Carry,
    mask: Array,
    block: int | None,
    like: Any,
    again: Callable | None = None,
) -> Any:
    """Sum one(part of data, its carry) over all lanes.

    If the network has memory or lanes are rolled out again, lanes go in the groups of a rollout; otherwise
    blocks of steps bound the memory, and all lanes are cut at once.

    again: (index, part of data) -> the part with its trajectory rolled out again.
    like: arrays of the sum's shapes, because finding them by tracing `one` doubles the time to trace.
    """
    num_lanes, lanes = mask.shape[1], lanes_at_once(mask.shape[1])
    if again is None and not jax.tree.leaves(carry):
        lanes = num_lanes  # blocks bound the memory, whatever the number of lanes

    def part(index, data, carry, mask):
        data = again(index, data) if again else data
        if _in_blocks(mask, carry, block):
            return _over_blocks(partial(one, carry=carry), data, mask, block, like)
        return one(data, carry)

    if lanes == num_lanes:
        return part(0, data, carry, mask)

    def add(index, total):
        def cut(axis):
            return lambda x: jax.lax.dynamic_slice_in_dim(x, index * lanes, lanes, axis)

        own, lane_carry = jax.tree.map(cut(1), (data, mask)), jax.tree.map(cut(0), carry)
        return jax.tree.map(jnp.add, total, part(index, own[0], lane_carry, own[1]))

    return jax.lax.fori_loop(0, num_lanes // lanes, add, jax.tree.map(jnp.zeros_like, like))


def _over_blocks(one: Callable, data: Any, mask: Array, block: int | None, like: Any) -> Any:
    """The sum of one(block of data); where blocks are skipped, up to the last with a step that counts."""
    size = _block_size(mask.size, block)
    flat = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), data)
    counts = mask.reshape(-1, size).any(axis=1)
    # Whether any step counts in this block or a later one.
    ahead = jax.lax.cummax(counts.astype(jnp.int32), reverse=True).astype(bool)
    ahead = jnp.append(ahead, False)

    def cut(index):
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1), flat
        )

    def step(state):
        index, total = state
        return index + 1, jax.tree.map(jnp.add, total, one(cut(index)))

    def more(state):
        return any_replica(ahead[state[0]]) if backend() in SKIPS else state[0] < len(counts)

    zeros = jax.tree.map(jnp.zeros_like, like)
    return jax.lax.while_loop(more, step, (jnp.int32(0), zeros))[1]


def _sums(estimator, policy, params, carry, batch, hyperparams) -> tuple[Params, Any]:
    """The gradient, and the sums over steps that the metrics are made from."""
    mask = batch.trajectory.mask

    def value(params):
        gain, (log_prob, distribution) = objective(
            estimator, policy, params, carry, batch, hyperparams
        )
        return gain, (log_prob, distribution.entropy())

    (gain, (log_prob, entropy)), gradient = jax.value_and_grad(value, has_aux=True)(params)
    log_rho = jnp.where(mask, log_prob - batch.trajectory.log_prob, 0.0)
    rho = jnp.exp(log_rho)
    terms = [mask, entropy, jnp.expm1(log_rho) - log_rho, rho, rho**2]
    if clips := facts_of(estimator.surrogate).clips:
        terms.append(clips(log_rho, mask, hyperparams).astype(rho.dtype))
    if backend() in STACKED:
        terms = jnp.stack([jnp.broadcast_to(x, mask.shape) for x in terms])
        return gradient, (gain, *jnp.where(mask, terms, 0.0).sum(axis=(1, 2)))
    return gradient, (gain, *(jnp.where(mask, x, 0.0).sum() for x in terms))


def _metrics(sums) -> Metrics:
    gain, count, entropy, divergence, rho, square, *clipped = sums
    count = jnp.maximum(count, 1)
    found = {
        "objective": gain,
        "entropy": entropy / count,
        "kl": divergence / count,
        # Effective share of the batch: (sum rho)^2 / (N sum rho^2), 1 on-policy.
        "ess": rho**2 / (count * square),
    }
    # The share of ratios outside the range that the surrogate keeps to.
    return found | ({"clip_fraction": clipped[0] / count} if clipped else {})
