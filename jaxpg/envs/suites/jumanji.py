"""jumanji: puzzles, packing and routing."""

import jax
import numpy as np

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Box, Discrete, MultiDiscrete, Space, unbounded
from jaxpg.envs.suites.raw import Raw, foreign, from_raw, package, silence
from jaxpg.envs.wrappers import joined

EPISODE = 1000  # for environments without a limit of their own
MASK = "action_mask"


def names() -> list[str]:
    return sorted(package("jumanji").registered_environments())


def make(name: str, horizon: int | None = None, part: str | None = None, **settings) -> Env:
    """The parts of an observation become one vector, in jumanji's order, with the mask of actions at the end.

    horizon: by default the environment's time_limit. part: the name of the one part to show, in its own
    shape, such as Snake's `grid`. The rest goes to the constructor.
    """
    with silence():
        made = package("jumanji").make(name, **settings)
        made = getattr(made, "unwrapped", made)
    if made.reward_spec.shape:
        raise ValueError("it rewards several agents apart, and jaxpg trains one")
    horizon = int(horizon or getattr(made, "time_limit", EPISODE))
    if hasattr(made, "time_limit"):
        made.time_limit = horizon + 1  # jumanji would call the end of its clock a death

    def shown(seen):
        parts = seen._asdict() if hasattr(seen, "_asdict") else {"": seen}
        if part is None:
            return joined([x for name, x in parts.items() if name != MASK])
        if part not in parts:
            raise ValueError(f"{name} shows no part {part!r}; it shows {', '.join(parts)}")
        return parts[part]

    def read(state):
        _, step = state
        return shown(step.observation), step.reward, step.last() & (step.discount == 0), step.last()

    action, mask = _space(name, made.action_spec), None
    if isinstance(action, Discrete) and hasattr(made.observation_spec, MASK):
        mask = lambda state: getattr(state[1].observation, MASK)  # noqa: E731

    def first(key):
        return shown(made.reset(key)[1].observation)

    return from_raw(
        Raw(made.reset, lambda key, state, action: made.step(state[0], action), read, mask),
        unbounded(jax.eval_shape(foreign(first), jax.random.key(0)).shape),
        action,
        horizon,
    )


def _space(name, spec) -> Space:
    kind = type(spec).__name__
    if kind == "DiscreteArray":
        return Discrete(int(spec.num_values))
    if kind == "MultiDiscreteArray":
        return MultiDiscrete(tuple(np.ravel(spec.num_values).tolist()))
    if kind == "BoundedArray":
        return Box(
            *(np.broadcast_to(np.float32(x), spec.shape) for x in (spec.minimum, spec.maximum))
        )
    raise ValueError(
        f"jumanji/{name} takes actions of the kind {kind}; jaxpg knows numbers and arrays"
    )
