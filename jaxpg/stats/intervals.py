"""Intervals: Student's t for means, and the bootstrap where t would leave the attainable range."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 2000
MOST_SCORES = 2**22  # resampled at a time
ANY = (-np.inf, np.inf)
NOT_RESOLVED = "not resolved"


class Estimate(NamedTuple):
    """A number with its confidence interval; see `ratio` for one that is not resolved."""

    value: Any  # floats, or arrays of one shape
    low: Any
    high: Any


def quantile(confidence: float, groups: int) -> float:
    """Student's t for a two-sided interval from this many groups."""
    return float(stdtrit(groups - 1, 0.5 + confidence / 2))


def mean_interval(
    values, attainable: tuple[float, float] = ANY, confidence: float = 0.95
) -> Estimate:
    """The mean of R independent values [R, ...] with an interval by Student's t or, where that leaves the
    attainable range, by the percentile bootstrap, which stays within the range of the values.

    Near an end of the attainable range, values pile up on one side and their mean is far from normal. The
    interval of a single value is NaN.
    """
    values = np.asarray(values, np.float64)
    columns = values.reshape(len(values), -1)
    mean, half = columns.mean(axis=0), np.full(columns.shape[1], np.nan)
    if len(values) > 1:
        half = quantile(confidence, len(values)) * columns.std(axis=0, ddof=1) / len(values) ** 0.5
    found = np.stack([mean, mean - half, mean + half])
    beyond = (found[1] < attainable[0]) | (found[2] > attainable[1])
    if beyond.any():
        found[:, beyond] = bootstrap(
            lambda x: x.mean(axis=-2), columns[:, beyond], confidence=confidence
        )
    return Estimate(*(x.reshape(values.shape[1:])[()] for x in found))


def within(estimate: Estimate, lowest: float = 0.0, highest: float = np.inf) -> Estimate:
    """The estimate with its interval clipped to the range that the quantity is known to have.

    The value stays: an unbiased estimate of a square may be negative.
    """
    value, low, high = estimate
    return Estimate(value, *(np.clip(end, lowest, highest) for end in (low, high)))


def ratio(top: Estimate, bottom: Estimate, quotient: Estimate) -> Estimate:
    """`quotient`, an estimate of top / bottom >= 0, where the interval of bottom >= 0 is clear of 0.

    Elsewhere bottom may be arbitrarily small, and only a lower bound is known:
    (nan, top.low / bottom.high, inf), with nan for the bound where top may be 0 too. Fields may be arrays.
    """
    resolved = np.asarray(bottom.low) > 0
    known = (np.asarray(top.low) > 0) & (np.asarray(bottom.high) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = np.where(known, np.asarray(top.low) / np.asarray(bottom.high), np.nan)
    otherwise = np.nan, bound, np.inf
    return Estimate(
        *(np.where(resolved, x, y)[()] for x, y in zip(quotient, otherwise, strict=True))
    )


def unresolved(estimate: Estimate) -> bool:
    """Whether `ratio` found only a bound."""
    return bool(np.isnan(estimate.value) and estimate.high == np.inf)


def told(bound: float) -> str:
    """The text for a ratio that is not resolved, with its lower bound, or nan if it has none."""
    return NOT_RESOLVED if np.isnan(bound) else f"{NOT_RESOLVED}; above {bound:.4g}"


def ratio_of_means(top: np.ndarray, bottom: np.ndarray, confidence: float = 0.95) -> Estimate:
    """`ratio` of the means of n paired samples [..., n]; not resolved with fewer than 2."""
    count = top.shape[-1]
    if count < 2:
        none = np.full(top.shape[:-1], np.nan)
        return Estimate(none, none, none + np.inf)
    level = quantile(confidence, count)

    def around(value, error):
        return Estimate(value, value - level * error, value + level * error)

    means = (
        around(x.mean(axis=-1), x.std(axis=-1, ddof=1) / np.sqrt(count)) for x in (top, bottom)
    )
    one, other = means
    with np.errstate(divide="ignore", invalid="ignore"):
        left = (top.sum(axis=-1, keepdims=True) - top) / (
            bottom.sum(axis=-1, keepdims=True) - bottom
        )
        error = np.sqrt((count - 1) * left.var(axis=-1))
        return ratio(one, other, around(one.value / other.value, error))


def attained(*values) -> tuple[float, float]:
    """The range of the finite values seen, which are hence attainable; ANY if there are none."""
    seen = np.concatenate([np.ravel(x) for x in values])
    seen = seen[np.isfinite(seen)]
    return (float(seen.min()), float(seen.max())) if seen.size else ANY


def bootstrap(
    statistic: Callable[..., Any],
    *groups,
    num_resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The statistic of groups of scores [R, K], with a stratified percentile bootstrap interval.

    Runs are drawn with replacement within each task and group, never across them. Fields are arrays where
    the statistic is one. Raises ValueError for scores that are not [R, K], or with fewer than 2 runs.
    """
    rng = np.random.default_rng(seed)
    groups = [np.asarray(x, np.float64) for x in groups]
    for scores in groups:
        if scores.ndim != 2 or scores.shape[0] < 2:
            raise ValueError(
                f"scores have shape {scores.shape}; an interval needs [runs, tasks] with 2 runs or more"
            )

    def resampled(scores, count):
        num_runs, num_tasks = scores.shape
        index = rng.integers(num_runs, size=(count, num_runs, num_tasks))
        return scores[index, np.arange(num_tasks)]

    # In parts, because all resamples of thousands of runs would be gigabytes.
    part = max(1, MOST_SCORES // max(scores.size for scores in groups))
    sizes = [min(part, num_resamples - start) for start in range(0, num_resamples, part)]
    found = [statistic(*(resampled(scores, size) for scores in groups)) for size in sizes]
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1.0 - tail], axis=0)
    return Estimate(statistic(*groups), low, high)
