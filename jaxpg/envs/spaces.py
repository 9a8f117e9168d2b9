"""Spaces of observations and actions: static descriptions, never traced."""

from typing import NamedTuple

import jax
import numpy as np

from jaxpg.types import Array


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


def encoded_size(space: Space) -> int:
    """How many numbers `encode` makes of one element."""
    if isinstance(space, Box):
        return int(np.prod(space.shape))
    return space.n if isinstance(space, Discrete) else sum(space.nvec)


def encode(space: Space, x: Array) -> Array:
    """Elements [..., *shape] as vectors [..., features]: real numbers flattened, integers one-hot."""
    if isinstance(space, Box):
        return x.reshape(*x.shape[: x.ndim - len(space.shape)], -1)
    if isinstance(space, Discrete):
        return jax.nn.one_hot(x, space.n)
    offsets = np.cumsum((0, *space.nvec[:-1]))
    return jax.nn.one_hot(x + np.broadcast_to(offsets, x.shape), sum(space.nvec)).sum(-2)
