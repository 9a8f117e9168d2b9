"""Five routes to the trace of a gradient's covariance."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.batching import map_over_devices
from jaxpg.lab.measure.samples import Source, chunk_size, dependent, gather, log_probs, rows_of
from jaxpg.lab.measure.statistics import plan, trace_of
from jaxpg.stats.intervals import Estimate, mean_interval
from jaxpg.stats.moments import GROUPS, moments_of


def gradient_trace(
    source: Source,
    num_trajectories: int,
    *,
    route: str = "trajectories",
    confidence: float = 0.95,
) -> Estimate:
    """tr Cov g of one trajectory's gradient by one of five routes, with an interval over 32 groups.

    trajectories: every gradient, one backward pass each. jvp: E_v Var_i(v . g_i) over Rademacher v, one
    forward-mode pass for all i, memory O(N). vjp: E|sum_i e_i g_i|^2 with contrasts sum e = 0, sum e^2 = 1,
    one backward pass, memory O(P). micro_batches: n Var of the means of n. two_batch: from |g|^2 at two
    batch sizes (McCandlish et al., 2018). All unbiased; they differ in cost and spread.
    Raises ValueError for an unknown route, an estimator that couples the batch, or too few trajectories.
    """
    if route not in ROUTES:
        raise ValueError(f"unknown route {route!r}; use one of {', '.join(ROUTES)}")
    if dependent(source):
        raise ValueError(
            "the estimator couples the trajectories, or they share a start; use gradient_statistics"
        )
    _, num_samples = plan(source, num_trajectories, None)
    per_group = num_samples // GROUPS
    pieces = -(-per_group // min(chunk_size(source), per_group))
    size = per_group // pieces
    if size < 4:
        raise ValueError(
            f"num_trajectories={num_trajectories} leaves chunks of fewer than 4; use {4 * GROUPS} or more"
        )

    # Probes and contrasts are random: at the same cost, many of them on few trajectories each are more
    # precise than few on many.
    parts = max(1, size // 64)
    size = size // parts * parts

    def piece(index):
        chunk = gather(source, index * size, size)
        keys = jax.random.split(jax.random.fold_in(source.key, -1 - index), parts)
        split = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0), chunk
        )
        return jax.lax.map(lambda part: ROUTES[route](source, *part), (split, keys)).mean()

    values = jax.jit(lambda: map_over_devices(piece, GROUPS * pieces))()
    groups = np.asarray(values, np.float64).reshape(GROUPS, pieces).mean(axis=1)
    return Estimate(*map(float, mean_interval(groups, confidence=confidence)))


def _by_rows(source: Source, chunk, key):
    del key
    return trace_of(moments_of(rows_of(source, chunk)))


def _by_jvp(source: Source, chunk, key):
    flat, unravel = ravel_pytree(source.policy_params)
    direction = unravel(jax.random.rademacher(key, flat.shape, flat.dtype))
    log_prob = log_probs(source, chunk.trajectory)
    slope = jax.jvp(log_prob, (source.policy_params,), (direction,))[1]
    return (chunk.coefficient * slope).sum(axis=0).var(ddof=1)


def _by_vjp(source: Source, chunk, key):
    size = chunk.coefficient.shape[1]
    sign = jax.random.rademacher(key, (size,), chunk.coefficient.dtype)
    contrast = sign - sign.mean()
    # Given the signs, E|sum e_i g_i|^2 = tr Cov * sum e^2 if sum e = 0; equal signs leave no contrast.
    contrast = contrast / jnp.maximum(jnp.linalg.norm(contrast), 1e-6)
    _, pull = jax.vjp(log_probs(source, chunk.trajectory), source.policy_params)
    (gradient,) = pull(chunk.coefficient * contrast[None, :])
    return sum((x**2).sum() for x in jax.tree.leaves(gradient))


def _micro_means(source: Source, chunk, parts: int):
    """Means of equal parts of the chunk, one backward pass each: [parts, P]."""
    size = chunk.coefficient.shape[1] // parts

    def mean(lanes):
        part = jax.tree.map(lambda x: x[:, lanes], chunk)
        _, pull = jax.vjp(log_probs(source, part.trajectory), source.policy_params)
        return ravel_pytree(pull(part.coefficient / size)[0])[0]

    return jax.lax.map(mean, jnp.arange(parts * size).reshape(parts, size)), size


def _by_micro_batches(source: Source, chunk, key):
    del key
    means, size = _micro_means(source, chunk, max(2, min(16, chunk.coefficient.shape[1] // 2)))
    return size * trace_of(moments_of(means))


def _by_two_batches(source: Source, chunk, key):
    del key
    means, size = _micro_means(source, chunk, 2)
    small = (means**2).sum(axis=1).mean()
    large = (means.mean(axis=0) ** 2).sum()
    return (small - large) / (1 / size - 1 / (2 * size))


ROUTES = {
    "trajectories": _by_rows,
    "jvp": _by_jvp,
    "vjp": _by_vjp,
    "micro_batches": _by_micro_batches,
    "two_batch": _by_two_batches,
}
