"""Gradient estimators: five slots, and the two functions that compose them."""

from jaxpg.estimators import (
    baselines,
    control_variates,
    credit,
    groups,
    importance,
    reference,
    surrogates,
)
from jaxpg.estimators.estimator import (
    Batch,
    Estimator,
    assess,
    check_lanes,
    coefficients,
    group_size_of,
    lane_gradients,
    masked,
    objective,
    rescaled,
)
from jaxpg.estimators.importance import Weights
from jaxpg.estimators.slot import Facts, Slot, describe, facts_of, slot

__all__ = [
    "Batch",
    "Estimator",
    "Facts",
    "Slot",
    "Weights",
    "assess",
    "baselines",
    "check_lanes",
    "coefficients",
    "control_variates",
    "credit",
    "describe",
    "facts_of",
    "group_size_of",
    "groups",
    "importance",
    "lane_gradients",
    "masked",
    "objective",
    "reference",
    "rescaled",
    "slot",
    "surrogates",
]
