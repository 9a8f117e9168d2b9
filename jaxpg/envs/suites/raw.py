"""Raw: what a suite's own reset and step give, made an Env with a clock of its own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from importlib import import_module
from io import StringIO
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs.env import Env
from jaxpg.envs.masking import with_mask
from jaxpg.envs.narrow import narrow, narrowed
from jaxpg.envs.spaces import Box, Space
from jaxpg.types import TimeStep


class Raw(NamedTuple):
    """A suite's environment, unbatched, that never resets by itself."""

    reset: Callable[[Any], Any]  # key -> state
    step: Callable[[Any, Any, Any], Any]  # (key, state, action) -> state
    # state -> (obs, reward, whether the process ended, whether the suite's own clock did)
    read: Callable[[Any], tuple[Any, Any, Any, Any]]
    mask: Callable[[Any], Any] | None = None  # state -> the actions that it allows, bool [A]


def from_raw(raw: Raw, observation: Space, action: Space, horizon: int) -> Env:
    """The Env of a suite's environment, whose episodes end after `horizon` steps at the latest.

    Runs in 32 bits, whatever the default precision. Real actions are clipped to their space. Observations
    and rewards take the dtype that the spaces promise. With a mask, observations end with it (`with_mask`).
    """
    kinds = [jnp.float32 if isinstance(x, Box) else jnp.int32 for x in (observation, action)]

    def seen(obs):
        return jnp.asarray(obs, kinds[0]).reshape(observation.shape)

    @foreign
    def reset(key):
        state = jax.tree.map(lambda x: narrowed(jnp.asarray(x)), raw.reset(key))
        return (state, jnp.int32(0)), seen(raw.read(state)[0])

    @foreign
    def step(key, state, chosen):
        before, time = state
        chosen = jnp.asarray(chosen, kinds[1])
        if isinstance(action, Box):
            chosen = jnp.clip(chosen, action.low, action.high)
        after = raw.step(key, before, chosen)
        # Some suites widen a dtype in a step.
        after = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, before)
        obs, reward, terminated, truncated = raw.read(after)
        terminated = jnp.asarray(terminated, bool).reshape(())
        truncated = jnp.asarray(truncated, bool).reshape(()) | (time + 1 >= horizon)
        reward = jnp.asarray(reward, jnp.float32)
        # The clock stays at its end once the process has ended, so that an end lasts.
        time = jnp.where(terminated, horizon, time + 1)
        return (after, time), TimeStep(seen(obs), reward, terminated, truncated & ~terminated)

    env, mask = Env(reset, step, observation, action, horizon), raw.mask
    return env if mask is None else with_mask(env, foreign(lambda state: mask(state[0])))


def between(low: float, high: float, shape: tuple[int, ...]) -> Box:
    return Box(np.full(shape, low, np.float32), np.full(shape, high, np.float32))


@contextmanager
def silence() -> Iterator[None]:
    """Importing a suite, or making one of its environments, prints and warns about what is not used here."""
    with ExitStack() as stack:
        for each in (catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO())):
            stack.enter_context(each)
        simplefilter("ignore")
        yield


def package(name: str) -> Any:
    """A suite's module, imported at the first call. Its types are its own affair."""
    with silence():
        return import_module(name)


def foreign(run: Callable) -> Callable:
    """Run a suite's code under the rules that it was written for: 32 bits, silent broadcasting."""

    @wraps(run)
    def inside(*arguments):
        with narrow(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return run(*arguments)

    return inside
