"""Slot values: pure functions that carry what the rest of the package must know about them.

>>> @slot(couples=True)
... def mean(psi, scores, trajectory, hyperparams):
...     return psi.mean(axis=1, keepdims=True)
>>> describe(mean), isinstance(mean, Slot), facts_of(mean) == Facts(couples=True)
('mean', True, True)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex

from jaxpg.types import Array, Hyperparams, Trajectory

# (advantage, resolution, mask), each [T, B] -> advantage in units of the batch
Rescale = Callable[[Array, Array, Array], Array]
# (log ratio [T, B], mask, hyperparams) -> [T, B] bool, the ratios that are outside the range kept to
Clips = Callable[[Array, Array, Hyperparams], Array]


class Facts(NamedTuple):
    """What is known about a slot value beyond the numbers it returns; unstated facts have their defaults."""

    couples: bool = False  # what one lane contributes depends on the other lanes of its batch
    min_lanes: int = 1  # with fewer it is undefined, or its gradient is always 0
    whole_episodes: bool = False  # undefined on a stream, which cuts episodes
    constant: bool = False  # of a credit: the same number at every step
    reads_critic: bool = False
    reads_reference: bool = False  # it needs data that records a reference policy
    corrects: bool = True  # correct for data that another policy gathered
    linear: bool = False  # of a reduction: linear in the gain, so it may be taken in parts
    ignores_lanes: bool = False  # of a reduction: does not depend on which lane a step is in
    averages: str = ""  # of a linear reduction: what it is the mean over, "steps" or "lanes"
    splits: bool = False  # though it couples lanes: it sums over those of all devices
    by_lane: bool = False  # of a surrogate: a step's gain depends on the other steps of its lane
    clips: Clips | None = None  # of a surrogate: where it clips a ratio
    rescale: Rescale | None = None  # of a wrapped surrogate: applied to a (mini)batch's advantages
    scale: Rescale | None = None  # likewise, but once, to those of the whole batch
    group_size: int = 1  # it compares groups of this many lanes, which share a start


# A plain function may compare lanes, so its lanes are not treated as independent, nor its batch cut.
UNKNOWN = Facts(couples=True)


class Slot(NamedTuple):
    """A slot value: call it like the function that it wraps. All its arrays are [T, B]."""

    function: Callable
    name: str
    arguments: tuple = ()  # numbers, tables or the slot value inside, passed before the slot's own
    facts: Facts = Facts()

    def __call__(self, *inputs: Any) -> Any:
        lanes = [x.mask if isinstance(x, Trajectory) else x for x in inputs]
        chex.assert_equal_shape([x for x in lanes if hasattr(x, "shape")])
        return self.function(*self.arguments, *inputs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.function.__doc__


def slot(**facts: Any) -> Callable[[Callable], Slot]:
    """Decorate a function with its facts: `@slot(couples=True, min_lanes=2)`."""
    return lambda function: Slot(function, function.__name__, (), Facts(**facts))


def facts_of(value: Any) -> Facts:
    """The facts of a slot value; a plain function is assumed, to be safe, to couple the batch."""
    return value.facts if isinstance(value, Slot) else UNKNOWN


def describe(value: Any) -> str:
    """A slot value by name: `from_start(one_step)`, `constant(2.0)`."""
    if isinstance(value, Slot):
        inner = ", ".join(describe(x) for x in value.arguments)
        return f"{value.name}({inner})" if value.arguments else value.name
    return getattr(value, "__name__", repr(value))
