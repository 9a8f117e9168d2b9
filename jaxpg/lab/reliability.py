"""Reliability: what a handful of seeds can say about an algorithm (Agarwal et al., 2021).

Scores are [..., R, K]: R runs (seeds) on each of K tasks; leading axes are bootstrap resamples.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpg.lab.streaming import Estimate

RESAMPLES = 2000


def interquartile_mean(scores) -> np.ndarray:
    """The mean of the middle half of all R x K scores, [...].

    The scores at the quartiles count by the fraction of them that lies inside, so R x K need not be a
    multiple of 4. More robust than the mean, less noisy than the median.
    """
    scores = np.asarray(scores, np.float64)
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    count = ordered.shape[-1]
    rank = np.arange(count)
    upper = np.minimum(rank + 1, 0.75 * count)
    inside = np.maximum(upper - np.maximum(rank, 0.25 * count), 0.0)
    return ordered @ inside / inside.sum()


def performance_profile(scores, thresholds) -> np.ndarray:
    """The fraction of runs above each threshold, every task weighing alike: [..., T]."""
    scores = np.asarray(scores, np.float64)
    return np.stack([(scores > limit).mean(axis=(-2, -1)) for limit in thresholds], axis=-1)


def probability_of_improvement(scores, others) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 for a run of each on the same task, mean over tasks: [...].

    The Mann-Whitney statistic. scores: [..., R, K]; others: [..., R', K].
    """
    one, other = (np.asarray(x, np.float64) for x in (scores, others))
    one, other = one[..., :, None, :], other[..., None, :, :]
    return ((one > other) + 0.5 * (one == other)).mean(axis=(-3, -2, -1))


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
    resampled = []
    for scores in (np.asarray(x, np.float64) for x in groups):
        if scores.ndim != 2 or scores.shape[0] < 2:
            raise ValueError(
                f"scores have shape {scores.shape}; an interval needs [runs, tasks] with 2 runs or more"
            )
        num_runs, num_tasks = scores.shape
        index = rng.integers(num_runs, size=(num_resamples, num_runs, num_tasks))
        resampled.append(scores[index, np.arange(num_tasks)])
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(statistic(*resampled), [tail, 1.0 - tail], axis=0)
    return Estimate(statistic(*(np.asarray(x, np.float64) for x in groups)), low, high)
