"""Measured: sampled statistics of one estimator, with intervals and a warning when not to trust them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxpg.lab.measure.statistics import MIN_EFFECTIVE, heavy_tail, signal_of, trace_of
from jaxpg.stats.intervals import Estimate, mean_interval, within
from jaxpg.stats.moments import SampleMoments, jackknife, jackknife_ratio, merge_groups


class Measured(NamedTuple):
    """Sampled moments of an estimator's mean over N trajectories, from independent batches."""

    levels: dict[int, SampleMoments]  # N -> moments in GROUPS groups, float64
    trajectories: int
    env_steps: int
    effective_sample_size: float  # of whole-episode weights; the number of trajectories on-policy
    fourth_sample_size: float  # the same for their fourth powers
    cosines: dict[int, np.ndarray]  # N -> [GROUPS, 2]: to the reference, and between two batches

    def trace(self, size: int = 1) -> Estimate:
        """tr Cov of the mean over `size` trajectories."""
        return within(self.estimate(trace_of, size))

    def bias(self, truth: np.ndarray, size: int = 1) -> Estimate:
        """|E g - truth|^2, unbiased: it may be negative."""
        return self.estimate(lambda m: signal_of(m._replace(mean=m.mean - truth)), size)

    def signal(self, size: int = 1) -> Estimate:
        """|E g|^2, unbiased: it may be negative."""
        return self.bias(np.zeros(self.levels[size].mean.shape[-1]), size)

    def noise_scale(self, size: int = 1) -> Estimate:
        """size tr Cov / |E g|^2: B_simple in trajectories (McCandlish et al., 2018); see `ratio`."""
        if self.effective_sample_size < MIN_EFFECTIVE:
            return Estimate(*[float("nan")] * 3)
        return within(jackknife_ratio(lambda m: size * trace_of(m), signal_of, self.levels[size]))

    def estimate(self, function: Callable[[SampleMoments], Any], size: int = 1) -> Estimate:
        """A function of moments with its jackknife interval, which is nan if the weights are degenerate."""
        found = jackknife(function, self.levels[size])
        if self.effective_sample_size < MIN_EFFECTIVE:
            return Estimate(found.value, float("nan"), float("nan"))
        return found

    def cosine(self, size: int = 1) -> tuple[Estimate, Estimate]:
        """Mean cosine of the mean over `size` trajectories to the reference, and to another such mean."""
        found = mean_interval(self.cosines[size], (-1.0, 1.0))
        one, other = (Estimate(*map(float, each)) for each in zip(*found, strict=True))
        return one, other

    @property
    def counts(self) -> dict[str, int]:
        """The columns of a row that say how much was sampled."""
        return {"trajectories": self.trajectories, "env_steps": self.env_steps}

    @property
    def mean(self) -> np.ndarray:
        """The mean over all trajectories [P]."""
        return merge_groups(self.levels[min(self.levels)]).mean

    @property
    def warning(self) -> str:
        """A warning that the weights are degenerate or heavy-tailed, or an empty string."""
        ess = self.effective_sample_size
        if ess < MIN_EFFECTIVE:
            return f"ESS {ess:.1f} < {MIN_EFFECTIVE}: no interval"
        return heavy_tail(self.fourth_sample_size)


def need_effective(found: Measured, name: str) -> None:
    """Raises ValueError where importance weights leave too few effective samples for an interval."""
    ess = found.effective_sample_size
    if ess < MIN_EFFECTIVE:
        raise ValueError(
            f"{name}: the importance weights have an effective sample size of {ess:.1f}, below "
            f"{MIN_EFFECTIVE}: an interval would mean nothing; use more --trajectories than "
            f"{found.trajectories}, or a closer behaviour"
        )
