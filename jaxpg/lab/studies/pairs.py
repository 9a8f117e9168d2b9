"""Pairs: compare two estimates from the same episodes without their shared noise; and groups of samples."""

import numpy as np

from jaxpg.stats.moments import GROUPS, SampleMoments


def paired(one: SampleMoments, other: SampleMoments) -> SampleMoments:
    """Group means of (one, other, other - one) [GROUPS, 3P] as samples, for `jackknife`."""
    mean = np.concatenate([one.mean, other.mean, other.mean - one.mean], axis=-1)
    return SampleMoments(np.ones(len(mean)), mean, np.zeros_like(mean))


def squares(moments: SampleMoments) -> np.ndarray:
    """|E x|^2 of the three parts of `paired`, each unbiased, so it may be negative."""
    parts = moments.mean**2 - moments.squares / (moments.count - 1) / moments.count
    return parts.reshape(3, -1).sum(axis=-1)


def grouped(rows) -> SampleMoments:
    """Moments of GROUPS equal parts of rows [N, K], for `jackknife`; the remainder is left out."""
    rows = np.asarray(rows, np.float64)
    parts = rows[: len(rows) // GROUPS * GROUPS].reshape(GROUPS, -1, rows.shape[-1])
    mean = parts.mean(axis=1)
    deviations = ((parts - mean[:, None]) ** 2).sum(axis=1)
    return SampleMoments(np.full(GROUPS, float(parts.shape[1])), mean, deviations)


def norm(x) -> float:
    """The Euclidean norm of all entries."""
    return float(np.linalg.norm(x))


def square(x) -> float:
    """|x|^2, or 0 if it is only rounding."""
    found = float((x**2).sum())
    return found if found > 1e-20 else 0.0
