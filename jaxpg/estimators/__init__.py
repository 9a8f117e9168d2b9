"""Gradient estimators: five slots, and the two functions that compose them."""

from jaxpg.estimators import baselines, control_variates, credit, importance, surrogates
from jaxpg.estimators.estimator import (
    Batch,
    Estimator,
    assess,
    coefficients,
    describe,
    lane_gradients,
    objective,
    uses,
)
from jaxpg.estimators.importance import Weights

__all__ = [
    "Batch",
    "Estimator",
    "Weights",
    "assess",
    "baselines",
    "coefficients",
    "control_variates",
    "credit",
    "describe",
    "importance",
    "lane_gradients",
    "objective",
    "surrogates",
    "uses",
]
