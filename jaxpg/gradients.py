"""The gradient of the objective on a batch, in blocks that fit a processor's cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpg.estimators import Estimator, objective, surrogates
from jaxpg.estimators.estimator import Batch
from jaxpg.policies import Network
from jaxpg.rollout import any_replica
from jaxpg.types import Array, Carry, Hyperparams, Metrics, Params

# Steps in a block. On a CPU a block's activations should stay in the cache, and larger products are spread
# over threads that cost more than they give: policy and critic of 2x64 took 26 ms in blocks of 512, 44 ms in
# blocks of 1024 or in one piece. Elsewhere it bounds the memory.
BLOCK = {"cpu": 512}
OTHER_BLOCK = 2**18


def gradient_of(
    estimator: Estimator,
    policy: Network,
    params: Params,
    carry: Carry,
    batch: Batch,
    hyperparams: Hyperparams,
    block: int | None = None,
) -> tuple[Params, Metrics]:
    """The gradient of the objective, and what is known of the batch after a forward pass.

    Where the objective is a sum over steps and the policy has no memory, block after block of about `block`
    steps (by default by backend), without those in which every episode has ended: on whole episodes the
    cost is that of the steps that count.
    """
    num_steps, num_lanes = batch.advantage.shape
    size = _block_size(num_steps * num_lanes, block)
    # Over the whole batch, before it is cut.
    surrogate, advantage = surrogates.unwrapped(
        estimator.surrogate, batch.advantage, batch.trajectory.mask
    )
    estimator, batch = estimator._replace(surrogate=surrogate), batch._replace(advantage=advantage)
    scale = _share_of_block(estimator.reduce, size, num_lanes)
    if scale is None or jax.tree.leaves(carry) or 2 * size >= num_steps * num_lanes:
        gradient, sums = _sums(estimator, policy, params, carry, batch, hyperparams, lambda m: 1.0)
        return gradient, _metrics(sums)
    count = jnp.maximum(batch.trajectory.mask.sum(), 1)

    def one(cut):
        share = partial(scale, count=count)
        return _sums(estimator, policy, params, carry, cut, hyperparams, share)

    zero = jnp.zeros((), batch.advantage.dtype)
    gradient, sums = _over_blocks(one, batch, size, (params, (zero,) * 6))
    return gradient, _metrics(sums)


def critic_gradient(
    critic: Network,
    params: Params,
    carry: Carry,
    batch: Batch,
    hyperparams: Hyperparams,
    block: int | None = None,
) -> tuple[Params, Array]:
    """The gradient of the mean squared error of the values, halved, and the loss itself.

    As far as value_clip_eps allows, the larger of the errors of the value and of the value held near the
    old one counts (the code of Schulman et al., 2017). In blocks like gradient_of.
    """
    count = jnp.maximum(batch.trajectory.mask.sum(), 1)

    def one(cut):
        def loss(params):
            trajectory, far = cut.trajectory, hyperparams.value_clip_eps
            _, value = critic.apply(params, carry, trajectory.obs, trajectory.first)
            near = trajectory.value + jnp.clip(value - trajectory.value, -far, far)
            error = jnp.maximum((value - cut.target) ** 2, (near - cut.target) ** 2)
            return 0.5 * jnp.where(trajectory.mask, error, 0.0).sum() / count

        value, gradient = jax.value_and_grad(loss)(params)
        return gradient, value

    num_steps, num_lanes = batch.advantage.shape
    size = _block_size(num_steps * num_lanes, block)
    if jax.tree.leaves(carry) or 2 * size >= num_steps * num_lanes:
        return one(batch)
    return _over_blocks(one, batch, size, (params, jnp.zeros((), batch.target.dtype)))


def _block_size(total: int, block: int | None) -> int:
    """Steps in a block, by default by backend."""
    return divisor(total, block or BLOCK.get(jax.default_backend(), OTHER_BLOCK))


def _over_blocks(one: Callable[[Batch], Any], batch: Batch, size: int, like: Any) -> Any:
    """The sum of one(block) over blocks of so many steps, up to the last that holds a step that counts.

    like: arrays of the sum's shapes, because to find them by tracing `one` doubles the time to trace.
    """
    flat = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
    counts = flat.trajectory.mask.reshape(-1, size).any(axis=1)
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

    zeros = jax.tree.map(jnp.zeros_like, like)
    return jax.lax.while_loop(
        lambda state: any_replica(ahead[state[0]]), step, (jnp.int32(0), zeros)
    )[1]


def _sums(estimator, policy, params, carry, batch, hyperparams, share) -> tuple[Params, Any]:
    """The gradient, and the sums over steps that the metrics are made of."""
    mask = batch.trajectory.mask

    def value(params):
        gain, (log_prob, distribution) = objective(
            estimator, policy, params, carry, batch, hyperparams
        )
        return share(mask) * gain, (log_prob, distribution.entropy())

    (gain, (log_prob, entropy)), gradient = jax.value_and_grad(value, has_aux=True)(params)
    log_rho = jnp.where(mask, log_prob - batch.trajectory.log_prob, 0.0)
    rho = jnp.exp(log_rho)
    terms = (mask, entropy, jnp.expm1(log_rho) - log_rho, rho, rho**2)
    # Stacked, because a CPU spends more on starting a sum than on a block's terms.
    sums = jnp.where(mask, jnp.stack([jnp.broadcast_to(x, mask.shape) for x in terms]), 0.0)
    return gradient, (gain, *sums.sum(axis=(1, 2)))


def _metrics(sums) -> Metrics:
    gain, count, entropy, divergence, rho, square = sums
    count = jnp.maximum(count, 1)
    return {
        "objective": gain,
        "entropy": entropy / count,
        "kl": divergence / count,
        # Effective share of the batch: (sum rho)^2 / (N sum rho^2), 1 on-policy.
        "ess": rho**2 / (count * square),
    }


def _share_of_block(reduce, size, num_lanes):
    """What a block's reduction counts for in the whole's; None for reductions that are no sums."""
    if reduce is surrogates.per_episode:
        return lambda mask, count: size / num_lanes
    if reduce is surrogates.per_step:
        return lambda mask, count: mask.sum() / count
    return None


def divisor(total: int, wanted: int) -> int:
    """The largest divisor up to the wanted size; the whole where there is none of a fair size."""
    size = next(n for n in range(min(wanted, total), 0, -1) if total % n == 0)
    return size if 4 * size >= min(wanted, total) else total
