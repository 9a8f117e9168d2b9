"""pgx, board games and MinAtar: those for one player."""

import numpy as np

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Discrete
from jaxpg.envs.suites.raw import Raw, between, from_raw, package, silence

EPISODE = 1000  # pgx itself sets no limit
ALONE = ("2048", "minatar-")  # games for one player begin so
NOTE = " (games of several players, and self-play, are left out)"


def names() -> list[str]:
    return [name for name in package("pgx").available_envs() if name.startswith(ALONE)]


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: 1000 by default."""
    with silence():
        made = package("pgx").make(name, **settings)
    return from_raw(
        Raw(
            made.init,
            lambda key, state, action: made.step(state, action, key),
            lambda state: (
                state.observation,
                state.rewards[0],
                state.terminated,
                state.truncated,
            ),
            # MinAtar allows everything everywhere.
            (lambda state: state.legal_action_mask) if name == "2048" else None,
        ),
        between(0.0, 1.0, tuple(np.asarray(made.observation_shape).tolist())),
        Discrete(made.num_actions),
        horizon or EPISODE,
    )
