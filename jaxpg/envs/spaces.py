"""Spaces of observations and actions: static descriptions, never traced.

>>> Box(np.zeros(3), np.ones(3)).shape, Discrete(4).shape, MultiDiscrete((2, 5)).shape
((3,), (), (2,))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpg.types import Array


class Discrete(NamedTuple):
    """Integers 0 .. n-1."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


class Box(NamedTuple):
    """Real arrays of one shape, between low and high (either may be infinite).

    An entry of an action with low = high is fixed: no policy chooses it.
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.low)


class MultiDiscrete(NamedTuple):
    """Vectors of integers, the d-th in 0 .. nvec[d]-1."""

    nvec: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.nvec),)


Space = Discrete | Box | MultiDiscrete

# The square of a larger float32 overflows, so a larger bound can only mean that there is none.
LARGEST = float(np.sqrt(np.finfo(np.float32).max))


def check_space(name: str, space: Space) -> None:
    """Raises ValueError, giving the name, if this is not a space or it has no elements."""
    if isinstance(space, Box):
        return _check_bounds(name, space)
    if not isinstance(space, Discrete | MultiDiscrete):
        raise ValueError(
            f"{name} is {_kind(space)}; it must be a Box, Discrete or MultiDiscrete: flatten several parts "
            "into one vector"
        )
    sizes = (space.n,) if isinstance(space, Discrete) else tuple(space.nvec)
    whole = all(isinstance(n, int | np.integer) and n >= 1 for n in sizes)
    if not (sizes and whole):
        raise ValueError(f"{name}={space} must have a whole number of values, at least 1")
    return None


def _check_bounds(name, space: Box) -> None:
    bounds = {"low": space.low, "high": space.high}
    for which, bound in bounds.items():
        if isinstance(bound, Tracer):
            raise ValueError(
                f"{name}: Box.{which} is traced; bounds must be known when a policy is built, so give "
                "numbers, or -np.inf and np.inf where they vary"
            )
        if not isinstance(bound, np.ndarray | jax.Array) or bound.dtype.kind not in "iuf":
            raise ValueError(
                f"{name}: Box.{which}={bound!r} must be a real array of the space's shape, as in "
                "Box(np.full(3, -1.0), np.full(3, 1.0))"
            )
    low, high = np.asarray(space.low), np.asarray(space.high)
    if low.shape != high.shape:
        raise ValueError(f"{name}: Box.low has shape {low.shape} and Box.high {high.shape}")
    holds = (low <= high) & (low < LARGEST) & (high > -LARGEST)  # False for NaN
    if not holds.all():
        place = tuple(np.argwhere(~holds)[0].tolist())
        raise ValueError(
            f"{name}: Box.low={low[place]} and Box.high={high[place]} at {list(place)} leave nothing to "
            "choose from; give low <= high, and infinite bounds where there is none"
        )


def limits(space: Box) -> tuple[np.ndarray, np.ndarray]:
    """Bounds as float32, infinite where they are too large to use, such as the largest floats."""
    low, high = (np.asarray(bound) for bound in space)
    low = np.where(low <= -LARGEST, -np.inf, low).astype(np.float32)
    return low, np.where(high >= LARGEST, np.inf, high).astype(np.float32)


def unbounded(shape: tuple[int, ...]) -> Box:
    """Real arrays of a shape, without bounds."""
    anywhere = np.full(shape, np.inf, np.float32)
    return Box(-anywhere, anywhere)


def _kind(x) -> str:
    return f"a {type(x).__name__}"


def encoded_size(space: Space) -> int:
    """How many features `encode` makes from one element."""
    if isinstance(space, Box):
        return int(np.prod(space.shape))
    return space.n if isinstance(space, Discrete) else sum(space.nvec)


def clip(space: Space, x: Array) -> Array:
    """The nearest element [*shape]; integers are elements already."""
    return jax.numpy.clip(x, space.low, space.high) if isinstance(space, Box) else x


def encode(space: Space, x: Array) -> Array:
    """Elements [..., *shape] as vectors [..., features]: real numbers flattened, integers one-hot.

    The result has the default precision, whatever the environment's own.
    """
    if isinstance(space, Box):
        x = jnp.asarray(x, jnp.result_type(float))
        return x.reshape(*x.shape[: x.ndim - len(space.shape)], -1)
    if isinstance(space, Discrete):
        return jax.nn.one_hot(x, space.n)
    offsets = np.cumsum((0, *space.nvec[:-1]))
    return jax.nn.one_hot(x + np.broadcast_to(offsets, x.shape), sum(space.nvec)).sum(-2)
