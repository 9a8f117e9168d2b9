"""Statistics over seeds: for one number per seed, for a curve, and for several tasks."""

from typing import NamedTuple

import numpy as np

from jaxpg.stats.intervals import ANY, Estimate, bootstrap, mean_interval, ratio_of_means, within

FEWEST = 0.5  # with a value for a smaller share of seeds, statistics would describe survivors only
BAND_RESAMPLES = 500  # enough for a drawn band


class Band(NamedTuple):
    """A curve with its 95 % band, [T] each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Summary(NamedTuple):
    """The mean of one number per seed with a 95 % interval, and its extremes."""

    mean: float
    low: float
    high: float
    smallest: float
    largest: float


def summarise(values: np.ndarray, attainable: tuple[float, float] = ANY) -> Summary:
    """The summary over the seeds that have a value; NaN where there are too few.

    attainable: a range in which the mean must lie; see mean_interval.
    """
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not values.size:
        return Summary(*[float("nan")] * 5)
    return Summary(*mean_interval(values, attainable), values.min(), values.max())


def number(value: float, digits: int = 1) -> str:
    """The value with fixed digits, three significant ones where those would show less; a dash for NaN."""
    least = 10.0 ** (1 - digits)
    if 0 < abs(value) < least and abs(float(short := f"{value:.3g}")) < least:
        return short
    return f"{value:,.{digits}f}" if np.isfinite(value) else "-"


def interval(summary: Summary | Estimate, digits: int = 1) -> str:
    """`[low, high]`, or a dash."""
    if not np.isfinite(summary.low):
        return "-"
    return f"[{number(summary.low, digits)}, {number(summary.high, digits)}]"


def robust(values: np.ndarray) -> Estimate:
    """Interquartile mean of seeds [R], or of runs on tasks [R, K], with its 95 % bootstrap interval.

    With [R], seeds without a value are left out, and the result is NaN if none remain. One seed or run has no
    interval (Agarwal et al., 2021).
    """
    from jaxpg.stats.reliability import interquartile_mean

    values = np.asarray(values, float)
    if values.ndim == 1:
        values = values[np.isfinite(values), None]
    if len(values) > 1:
        return Estimate(*map(float, bootstrap(interquartile_mean, values)))
    nan = float("nan")
    return Estimate(float(interquartile_mean(values)) if len(values) else nan, nan, nan)


def band(curves: np.ndarray) -> Band:
    """The interquartile mean over seeds [R, T], with its pointwise 95 % bootstrap band.

    NaN at points where fewer than half of the seeds have a value.
    """
    from jaxpg.stats.reliability import interquartile_mean

    curves = np.asarray(curves, float)
    found = np.isfinite(curves)
    shown = np.full((3, curves.shape[1]), np.nan)
    whole = found.all(axis=0) & (len(curves) > 1)
    if whole.any():
        # Points are strata: each is resampled on its own.
        shown[:, whole] = bootstrap(
            lambda x: interquartile_mean(np.moveaxis(x, -1, -2)[..., None]),
            curves[:, whole],
            num_resamples=BAND_RESAMPLES,
        )
    for t in np.flatnonzero(~whole & (found.mean(axis=0) >= FEWEST)):
        shown[:, t] = robust(curves[:, t])
    return Band(*shown)


def noise_ratios(noise: np.ndarray, signal: np.ndarray, num_envs: int) -> dict[str, Estimate]:
    """The noise scale (in episodes or lanes) and the signal-to-noise ratio from n measurements [..., n].

    These are ratios of averages, because each measurement's own ratio is mostly noise. Where the denominator
    is not clear of 0, the result is a bound (see intervals.ratio).
    """
    return {
        "noise_scale": within(ratio_of_means(num_envs * noise, signal)),
        "signal_to_noise": within(ratio_of_means(signal, noise)),
    }


def scaled(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores [R, K] by name, scaled so that 0 and 1 are the lowest and highest of all runs on each task."""
    everything = np.concatenate(list(scores.values()))
    low, high = np.nanmin(everything, axis=0), np.nanmax(everything, axis=0)
    span = np.where(high > low, high - low, 1.0)
    return {name: (each - low[None]) / span[None] for name, each in scores.items()}
