"""brax, physics of rigid bodies: the raw environments, without its training wrappers."""

import jax

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import unbounded
from jaxpg.envs.suites.raw import Raw, between, foreign, from_raw, package, silence

EPISODE = 1000  # brax's own episode_length


def names() -> list[str]:
    return sorted(package("brax.envs")._envs)


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: 1000 by default; the rest goes to the environment, as `backend="spring"`."""
    with silence():
        made = package("brax.envs").get_environment(name, **settings)
    return from_state(made, horizon or EPISODE)


def from_state(made, horizon: int) -> Env:
    """The Env of an environment whose state holds obs, reward and done, as in brax and MuJoCo Playground."""

    def shown(state):
        # Beside what an actor may see, Playground gives a critic's privileged part.
        return state.obs["state"] if isinstance(state.obs, dict) else state.obs

    with silence():
        obs = jax.eval_shape(foreign(lambda key: shown(made.reset(key))), jax.random.key(0))
    return from_raw(
        Raw(
            made.reset,
            lambda key, state, action: made.step(state, action),
            lambda state: (shown(state), state.reward, state.done > 0.5, False),
        ),
        unbounded(obs.shape),
        between(-1.0, 1.0, (made.action_size,)),
        horizon,
    )
