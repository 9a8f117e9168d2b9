"""MuJoCo Playground below 1.0, the last on JAX: robots in MJX."""

from jaxpg.envs.env import Env
from jaxpg.envs.suites.brax import from_state
from jaxpg.envs.suites.raw import package, silence


def names() -> list[str]:
    return sorted(package("mujoco_playground").registry.ALL_ENVS)


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: by default the configuration's episode_length; the rest overrides the configuration."""
    with silence():
        registry = package("mujoco_playground").registry
        usual = registry.get_default_config(name)
        # Of its two implementations of MuJoCo, the one in JAX is mapped and compiled with everything else.
        settings = ({"impl": "jax"} if "impl" in usual else {}) | settings
        made = registry.load(name, config_overrides=settings)
    horizon = int(horizon or usual.episode_length)
    return from_state(made, horizon)
