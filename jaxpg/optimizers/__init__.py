"""Optimizers, which turn a gradient into a step, with their schedules and adaptation."""

from jaxpg.optimizers.first_order import (
    OPTIMIZERS,
    Optimizer,
    adam,
    adamw,
    lion,
    momentum,
    muon,
    rmsprop,
    sgd,
)
from jaxpg.optimizers.schedules import (
    BATCH_SCALINGS,
    SCHEDULES,
    Schedule,
    batch_scaled,
    constant,
    cosine,
    linear,
    scheduled,
)

__all__ = [
    "BATCH_SCALINGS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Optimizer",
    "Schedule",
    "adam",
    "adamw",
    "batch_scaled",
    "constant",
    "cosine",
    "linear",
    "lion",
    "momentum",
    "muon",
    "rmsprop",
    "scheduled",
    "sgd",
]
