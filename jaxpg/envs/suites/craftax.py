"""Craftax and Craftax-Classic: survival in a generated world, seen as symbols or pixels."""

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Discrete
from jaxpg.envs.suites.raw import Raw, between, from_raw, package, silence

NEVER = 2**30


def names() -> list[str]:
    return [
        f"Craftax-{world}{sight}-v1"
        for world in ("", "Classic-")
        for sight in ("Symbolic", "Pixels")
    ]


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: by default Craftax's max_timesteps; the rest sets its parameters."""
    with silence():
        made = package("craftax.craftax_env").make_craftax_env_from_name(name, auto_reset=False)
    params = made.default_params
    horizon = int(horizon or params.max_timesteps)
    # Craftax would call the end of its clock a death.
    params = params.replace(max_timesteps=NEVER, **settings)

    def reset(key):
        obs, state = made.reset_env(key, params)
        return state, obs, 0.0, False

    def step(key, state, action):
        obs, after, reward, done, _ = made.step_env(key, state[0], action, params)
        return after, obs, reward, done

    space = made.observation_space(params)
    return from_raw(
        Raw(reset, step, lambda state: (*state[1:], False)),
        between(0.0, 1.0, space.shape),
        Discrete(made.num_actions),
        horizon,
    )
