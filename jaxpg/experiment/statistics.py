"""Statistics over seeds."""

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Summary(NamedTuple):
    """Of a number that each seed has: its mean with a 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float
    smallest: float
    largest: float


def summarise(values: np.ndarray) -> Summary:
    """Over the seeds that have a value; NaN where there are too few."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not values.size:
        return Summary(*[float("nan")] * 5)
    mean, half = values.mean(), float("nan")
    if values.size > 1:
        half = stdtrit(values.size - 1, 0.975) * values.std(ddof=1) / values.size**0.5
    return Summary(mean, mean - half, mean + half, values.min(), values.max())


def number(value: float, digits: int = 1) -> str:
    """Fixed digits, or a dash for NaN."""
    return f"{value:,.{digits}f}" if np.isfinite(value) else "-"


def interval(summary: Summary) -> str:
    """`[low, high]`, or a dash."""
    if not np.isfinite(summary.low):
        return "-"
    return f"[{number(summary.low)}, {number(summary.high)}]"
