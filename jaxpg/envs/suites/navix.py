"""navix: MiniGrid's rooms, doors and keys."""

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Discrete
from jaxpg.envs.suites.raw import Raw, between, from_raw, package, silence

TRUNCATION, TERMINATION = 1, 2  # of navix's step_type


def names() -> list[str]:
    return sorted(package("navix").registry())


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: by default navix's max_steps. Observations are the whole grid, [H, W, 3]."""
    with silence():
        made = package("navix").make(name, **settings)
    horizon = int(horizon or made.max_steps)
    made = made.replace(max_steps=horizon)
    space = made.observation_space
    return from_raw(
        Raw(
            made.reset,
            lambda key, state, action: made._step(state, action),  # its `step` resets by itself
            lambda state: (
                state.observation,
                state.reward,
                state.step_type == TERMINATION,
                state.step_type == TRUNCATION,
            ),
        ),
        between(0.0, 255.0, space.shape),
        Discrete(int(made.action_space.maximum) + 1),
        horizon,
    )
