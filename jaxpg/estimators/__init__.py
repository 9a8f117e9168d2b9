"""Gradient estimators: five slots, and the two functions that compose them."""

from jaxpg.estimators import baselines, credit, importance, surrogates
from jaxpg.estimators.estimator import Batch, Estimator, assess, describe, objective, uses
from jaxpg.estimators.importance import Weights

__all__ = [
    "Batch",
    "Estimator",
    "Weights",
    "assess",
    "baselines",
    "credit",
    "describe",
    "importance",
    "objective",
    "surrogates",
    "uses",
]
