"""The variance laboratory: exact answers where they exist, honest measurements where they do not."""

from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration
from jaxpg.lab.measure.samples import gradient_samples
from jaxpg.lab.measure.statistics import GradientStatistics, gradient_statistics
from jaxpg.lab.measure.traces import gradient_trace
from jaxpg.stats.moments import Estimate

__all__ = [
    "Estimate",
    "GradientStatistics",
    "enumeration",
    "exact",
    "gradient_samples",
    "gradient_statistics",
    "gradient_trace",
]
