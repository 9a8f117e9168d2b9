"""XLand-MiniGrid: rooms, doors and keys, seen by the agent from where it stands."""

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Discrete, MultiDiscrete
from jaxpg.envs.suites.raw import Raw, from_raw, package, silence


def names() -> list[str]:
    return list(package("xminigrid").registered_environments())


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: by default max_steps, which also decides the reward; the rest sets xminigrid's parameters.

    Observations are the tiles and colours around the agent, one-hot.
    """
    with silence():
        made, params = package("xminigrid").make(name)
        constants = package("xminigrid.core.constants")
    horizon = int(horizon or params.max_steps)
    params = params.replace(max_steps=horizon, **settings)
    height, width, _ = made.observation_shape(params)
    return from_raw(
        Raw(
            lambda key: made.reset(params, key),
            lambda key, state, action: made.step(params, state, action),
            lambda state: (
                state.observation,
                state.reward,
                state.last() & (state.discount == 0.0),
                state.last(),
            ),
        ),
        MultiDiscrete((constants.NUM_TILES, constants.NUM_COLORS) * (height * width)),
        Discrete(made.num_actions(params)),
        horizon,
    )
