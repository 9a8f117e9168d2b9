"""Reliability: what a handful of seeds can say about an algorithm (Agarwal et al., 2021).

Scores are [..., R, K]: R runs (seeds) on each of K tasks; leading axes are bootstrap resamples.
"""

import numpy as np


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
    """The fraction of runs above each threshold, with equal weight for every task: [..., T]."""
    scores = np.asarray(scores, np.float64)
    return np.stack([(scores > limit).mean(axis=(-2, -1)) for limit in thresholds], axis=-1)


def probability_of_improvement(scores, others) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 for a run of each on the same task, mean over tasks: [...].

    The Mann-Whitney statistic. scores: [..., R, K]; others: [..., R', K].
    """
    one, other = (np.asarray(x, np.float64) for x in (scores, others))
    # Run by run, because all pairs of thousands of runs would be gigabytes.
    better = 0.0
    for run in np.moveaxis(one[..., None, :], -3, 0):
        better = better + ((run > other) + 0.5 * (run == other)).mean(axis=(-2, -1))
    return better / one.shape[-2]
