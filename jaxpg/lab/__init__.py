"""The variance laboratory: exact answers where they exist, honest measurements where they do not."""

from jaxpg.lab import enumeration, exact
from jaxpg.lab.samples import gradient_samples
from jaxpg.lab.statistics import GradientStatistics, gradient_statistics
from jaxpg.lab.streaming import Estimate
from jaxpg.lab.traces import gradient_trace

__all__ = [
    "Estimate",
    "GradientStatistics",
    "enumeration",
    "exact",
    "gradient_samples",
    "gradient_statistics",
    "gradient_trace",
]
