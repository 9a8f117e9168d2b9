"""Streaming moments and intervals.

Samples are split into groups; each group keeps its count, mean and sum of squared deviations, merged by
Chan's shifted formula (Chan et al., 1983), so a large mean costs no precision. Intervals come from the
delete-one-group jackknife: one rule for means, traces and ratios alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpg.stats.intervals import Estimate, quantile, ratio
from jaxpg.types import Array

GROUPS = 32


class SampleMoments(NamedTuple):
    """Count, mean and sum of squared deviations of vectors; leading axes are groups."""

    count: Any  # [...] jax arrays on the device, float64 NumPy arrays on the host
    mean: Any  # [..., P]
    squares: Any  # [..., P]


def moments_of(rows: Array, valid: Array | None = None) -> SampleMoments:
    """The moments of the valid rows [C, P], in two passes: the mean, then deviations from it."""
    keep = jnp.ones(rows.shape[0], bool) if valid is None else valid
    count = keep.sum().astype(rows.dtype)
    mean = jnp.where(keep[:, None], rows, 0.0).sum(axis=0) / jnp.maximum(count, 1.0)
    deviation = jnp.where(keep[:, None], rows - mean[None], 0.0)
    return SampleMoments(count, mean, (deviation**2).sum(axis=0))


def merge(one: SampleMoments, other: SampleMoments) -> SampleMoments:
    """The moments of both sets of samples together (Chan et al., 1983)."""
    count = one.count + other.count
    share = other.count / jnp.maximum(count, 1)
    shift = other.mean - one.mean
    squares = one.squares + other.squares + shift**2 * one.count * share
    return SampleMoments(count, one.mean + shift * share, squares)


def merge_groups(moments: SampleMoments) -> SampleMoments:
    """The moments over all groups, on the host."""
    count = moments.count.sum()
    mean = moments.count @ moments.mean / count
    shift = moments.mean - mean
    return SampleMoments(count, mean, moments.squares.sum(axis=0) + moments.count @ shift**2)


def jackknife(
    function: Callable[[SampleMoments], Any], moments: SampleMoments, confidence: float = 0.95
) -> Estimate:
    """function of all groups, with the interval from leaving out one group at a time.

    A ratio to a variance of 0 is infinite or undefined, and comes out as such.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return _jackknife(function, moments, confidence)


def jackknife_ratio(
    top: Callable[[SampleMoments], Any],
    bottom: Callable[[SampleMoments], Any],
    moments: SampleMoments,
    confidence: float = 0.95,
) -> Estimate:
    """`ratio` of two functions of moments."""
    one, other = (jackknife(each, moments, confidence) for each in (top, bottom))
    return ratio(one, other, jackknife(lambda m: top(m) / bottom(m), moments, confidence))


def _jackknife(function, moments, confidence) -> Estimate:
    groups = len(moments.count)
    level = quantile(confidence, groups)
    value = float(function(merge_groups(moments)))
    left = np.array(
        [
            function(merge_groups(SampleMoments(*(np.delete(x, g, axis=0) for x in moments))))
            for g in range(groups)
        ]
    )
    error = np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum())
    return Estimate(value, float(value - level * error), float(value + level * error))
