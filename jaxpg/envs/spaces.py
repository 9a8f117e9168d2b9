"""Spaces of observations and actions: static descriptions, never traced."""

from typing import NamedTuple

import numpy as np


class Discrete(NamedTuple):
    """Integers 0 .. n-1."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


class Box(NamedTuple):
    """Real arrays of one shape, between low and high (either may be infinite)."""

    low: np.ndarray
    high: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low.shape


class MultiDiscrete(NamedTuple):
    """Vectors of integers, the d-th in 0 .. nvec[d]-1."""

    nvec: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.nvec),)


Space = Discrete | Box | MultiDiscrete
