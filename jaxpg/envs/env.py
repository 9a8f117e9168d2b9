"""The environment protocol: two pure functions that never reset by themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpg.envs.spaces import Space
from jaxpg.types import Array, Key, TimeStep

EnvState = Any


class Env(NamedTuple):
    """One environment, unbatched; `rollout` vmaps it and owns every reset."""

    reset: Callable[[Key], tuple[EnvState, Array]]
    step: Callable[[Key, EnvState, Array], tuple[EnvState, TimeStep]]
    observation: Space
    action: Space
    horizon: int  # whole episodes and evaluations end after this many steps, one way or the other
