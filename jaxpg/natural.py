"""The natural gradient, under the name that scripts import."""

from jaxpg.optimizers.natural import enac, npg, precondition_by_fisher, trpo

__all__ = ["enac", "npg", "precondition_by_fisher", "trpo"]
