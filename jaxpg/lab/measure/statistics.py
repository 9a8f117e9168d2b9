"""Statistics of an estimator's gradient, with intervals, without ever holding all gradients [N, P]."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.batching import divisor, map_over_devices
from jaxpg.lab.measure.samples import (
    Source,
    check_source,
    chunk_size,
    dependent,
    gather,
    gradient_samples,
    rows_of,
)
from jaxpg.rollout.episodic import check_groups
from jaxpg.stats.intervals import Estimate, within
from jaxpg.stats.moments import (
    GROUPS,
    SampleMoments,
    jackknife,
    jackknife_ratio,
    merge,
    merge_groups,
    moments_of,
)
from jaxpg.types import Array, Params

HEAVY = "few weights decide the variance"
MIN_EFFECTIVE = 50  # an interval from a smaller effective sample size would mean nothing


class GradientStatistics(NamedTuple):
    """Statistics of one trajectory's gradient g, E g = G, or of one batch's if the estimator couples it."""

    mean: np.ndarray  # [P]
    variance: np.ndarray  # [P] per component
    trace: Estimate  # tr Cov g
    squared_norm: Estimate  # E|g|^2
    signal: Estimate  # |G|^2, unbiased: may be negative
    # B_simple = tr Cov g / |G|^2 (McCandlish et al., 2018), in units of g; nan with a lower bound where
    # |G|^2 is not clear of 0
    noise_scale: Estimate
    cosine: Estimate | None  # between the mean of all samples and the reference
    layers: dict[str, Estimate]  # |G|^2 / tr Cov g of each parameter array, its signal to noise
    effective_sample_size: float  # of the trajectory weights; N on-policy
    num_trajectories: int
    num_steps: int  # environment steps
    batch_size: int  # trajectories per g: 1 unless the estimator couples the batch
    warnings: tuple[str, ...]


def gradient_statistics(
    source: Source,
    num_trajectories: int,
    *,
    reference: np.ndarray | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
) -> GradientStatistics:
    """Mean, variance, trace, noise scale and cosine of an estimator's gradient, with intervals.

    Memory: a chunk of trajectories and 2 x 32 gradients, whatever N. Estimators that couple the batch are
    measured by replicated batches of `batch_size` (their rows are not independent). reference: [P].
    Raises ValueError for too few samples for an interval, importance weights with an effective sample
    size below 50, and a behaviour without support.
    """
    size, num_samples = plan(source, num_trajectories, batch_size)
    moments, weights = jax.jit(lambda key: _measure(source._replace(key=key), size, num_samples))(
        source.key
    )
    ess, warnings = _check_weights(source, weights)
    moments = jax.tree.map(lambda x: np.asarray(x, np.float64), moments)

    def estimate(function: Callable[[SampleMoments], Any]) -> Estimate:
        return jackknife(function, moments, confidence)

    whole = merge_groups(moments)
    spans = _layer_spans(source.policy_params)
    return GradientStatistics(
        mean=whole.mean,
        variance=whole.squares / (whole.count - 1),
        trace=within(estimate(trace_of)),
        squared_norm=within(estimate(lambda m: signal_of(m) + trace_of(m))),
        signal=estimate(signal_of),
        noise_scale=within(jackknife_ratio(trace_of, signal_of, moments, confidence)),
        cosine=None
        if reference is None
        else within(estimate(lambda m: _cosine(m.mean, reference)), -1.0, 1.0),
        layers={
            name: within(jackknife_ratio(signal_of, trace_of, _part(moments, span), confidence))
            for name, span in spans.items()
        },
        effective_sample_size=ess,
        num_trajectories=num_samples * size,
        num_steps=int(weights.steps),
        batch_size=size,
        warnings=warnings,
    )


_POWERS = (1.0, 2.0, 4.0, 8.0)


class _Weights(NamedTuple):
    log_sums: Array  # [4] logs of the sums of the trajectory weights W, W^2, W^4 and W^8
    steps: Array
    unsupported: Array  # steps where the policy may take an action that the behaviour never takes


def plan(source: Source, num_trajectories: int, batch_size: int | None) -> tuple[int, int]:
    """Trajectories per sample, and the number of samples."""
    check_source(source, num_trajectories)
    coupled, groups = dependent(source), source.group_size
    size = (batch_size or max(64 // groups, 1) * groups) if coupled else 1
    check_groups(size, groups, "batch_size")
    if coupled and size < 2:
        raise ValueError(
            f"batch_size={size} must be at least 2 for an estimator that couples a batch"
        )
    num_samples = num_trajectories // size
    if num_samples < 2 * GROUPS:
        raise ValueError(
            f"num_trajectories={num_trajectories} gives {num_samples} independent samples; an interval "
            f"needs {2 * GROUPS}: use num_trajectories={2 * GROUPS * size} or more"
        )
    return size, num_samples


def _measure(source: Source, size: int, num_samples: int) -> tuple[SampleMoments, _Weights]:
    per_group = -(-num_samples // GROUPS)
    at_a_time = max(1, min(chunk_size(source) // size, per_group))
    pieces = -(-per_group // at_a_time)
    at_a_time = -(-per_group // pieces)

    def samples(start):
        if size == 1:
            chunk = gather(source, start, at_a_time)
            return rows_of(source, chunk), _weights_of(source, chunk)
        return jax.vmap(lambda i: _one_batch(source, i, size))(start + jnp.arange(at_a_time))

    def group(index):
        def piece(state, offset):
            moments, weights = state
            start = index * per_group + offset * at_a_time
            rows, new = samples(start)
            number = offset * at_a_time + jnp.arange(at_a_time)
            # Rows beyond the group's share, or beyond the request, were computed only to fill the chunk.
            valid = (number < per_group) & (index * per_group + number < num_samples)
            return (merge(moments, moments_of(rows, valid)), _add(weights, new, valid)), None

        num_params = sum(x.size for x in jax.tree.leaves(source.policy_params))
        zeros = jnp.zeros(num_params, jnp.result_type(float))
        none = jnp.full(len(_POWERS), -jnp.inf)
        start = (
            SampleMoments(jnp.zeros(()), zeros, zeros),
            _Weights(none, jnp.zeros(()), jnp.zeros(())),
        )
        return jax.lax.scan(piece, start, jnp.arange(pieces))[0]

    beside = divisor(GROUPS, max(1, chunk_size(source) // (per_group * size)))
    moments, weights = map_over_devices(group, GROUPS, beside)
    return moments, _Weights(
        jax.nn.logsumexp(weights.log_sums, axis=0),
        weights.steps.sum(),
        weights.unsupported.sum(),
    )


def _one_batch(source: Source, index, size: int):
    one = source._replace(key=jax.random.fold_in(source.key, index))
    rows = gradient_samples(one, size)
    weights = _weights_of(one, gather(one, 0, size))
    return rows.mean(axis=0), jax.tree.map(lambda x: x.sum(axis=0), weights)


def _weights_of(source: Source, chunk) -> _Weights:
    """Per trajectory: log W, steps, unsupported steps."""
    log_weight = chunk.log_ratio.sum(axis=0)
    mask = chunk.trajectory.mask
    unsupported = jnp.zeros(mask.shape)
    if source.behaviour_params is not None:
        unsupported = _unsupported(source, chunk.trajectory)
    steps, unsupported = mask.sum(axis=0), jnp.where(mask, unsupported, 0.0).sum(axis=0)
    return _Weights(log_weight, steps, unsupported)


def _unsupported(source: Source, trajectory):
    carry = source.policy.initial_carry(trajectory.mask.shape[1])
    several = source.behaviour_params
    several = several if isinstance(several, tuple | list) else (several,)
    found = [
        source.policy.apply(params, carry, trajectory.obs, trajectory.first)[1]
        for params in (source.policy_params, *several)
    ]
    if not hasattr(found[0], "logits"):
        return jnp.zeros(trajectory.mask.shape)
    target, *each = (jax.nn.softmax(d.logits) for d in found)
    behaviour = jnp.stack(each).max(axis=0)
    never = ((behaviour == 0.0) & (target > 0.0)).any(axis=-1)
    return never.reshape(*trajectory.mask.shape, -1).any(axis=-1).astype(target.dtype)


def _add(weights: _Weights, new: _Weights, valid) -> _Weights:
    log_weight = jnp.where(valid, new.log_sums, -jnp.inf)
    return _Weights(
        jnp.logaddexp(weights.log_sums, log_power_sums(log_weight)),
        weights.steps + jnp.where(valid, new.steps, 0).sum(),
        weights.unsupported + jnp.where(valid, new.unsupported, 0).sum(),
    )


def _check_weights(source: Source, weights: _Weights) -> tuple[float, tuple[str, ...]]:
    total, squares, fourths, eighths = np.asarray(weights.log_sums, np.float64)
    ess = float(np.exp(2 * total - squares))
    if float(weights.unsupported) > 0:
        raise ValueError(
            "the behaviour never takes actions that the policy may take (probability 0 where the policy's "
            "is positive): importance weights cannot correct that; mix some exploration into the behaviour"
        )
    if source.behaviour_params is None:
        return ess, ()
    if ess < MIN_EFFECTIVE:
        raise ValueError(
            f"the importance weights have an effective sample size of {ess:.1f}, below {MIN_EFFECTIVE}: an "
            "interval would mean nothing; use more trajectories, shorter episodes or a closer behaviour"
        )
    warning = heavy_tail(float(np.exp(2 * fourths - eighths)))
    return ess, (warning,) if warning else ()


def log_power_sums(log_weight: Array) -> Array:
    """log sum W^k [4] over [C] weights, for k = 1, 2, 4, 8."""
    return jax.nn.logsumexp(log_weight[None] * jnp.array(_POWERS)[:, None], axis=1)


def heavy_tail(fourth_sample_size: float) -> str:
    """A warning that the interval of a variance is too narrow, or an empty string.

    The error of a variance of weighted gradients depends on the fourth powers of the weights. If a few
    dominate their sum, the samples understate that error, and 95 % intervals hold the truth less often.
    """
    if fourth_sample_size >= MIN_EFFECTIVE:
        return ""
    return f"{HEAVY} (ESS of W^4 {fourth_sample_size:.1f}): interval too narrow"


def trace_of(moments: SampleMoments):
    """tr Cov of one sample, unbiased."""
    return moments.squares.sum() / (moments.count - 1)


def signal_of(moments: SampleMoments):
    """The squared norm of the mean, unbiased: it may be negative."""
    return moments.mean @ moments.mean - trace_of(moments) / moments.count


def _part(moments: SampleMoments, span: slice) -> SampleMoments:
    return SampleMoments(moments.count, moments.mean[:, span], moments.squares[:, span])


def _cosine(one, other):
    return one @ other / np.sqrt((one @ one) * (other @ other))


def _layer_spans(params: Params) -> dict[str, slice]:
    spans, start = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)
        spans[name] = slice(start, start + leaf.size)
        start += leaf.size
    return spans
