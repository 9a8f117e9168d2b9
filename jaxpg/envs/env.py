"""The environment protocol: two pure functions that never reset by themselves.

>>> env = jaxpg.envs.from_lqr(jaxpg.envs.Lqr())
>>> state, obs = env.reset(jax.random.key(0))
>>> state, result = env.step(jax.random.key(1), state, jnp.zeros(1))
>>> bool(result.terminated), isinstance(env, Env)
(False, True)
>>> check_action(env, jnp.zeros((2, 1)))
>>> check_env(env._replace(horizon=0))
Traceback (most recent call last):
ValueError: Env.horizon=0 must ...
>>> still = Actor(lambda lanes: (), lambda key, obs, carry, first: (0 * obs, carry))
>>> still.step(jax.random.key(0), jnp.ones((1, 1)), (), None)[0].tolist()
[[0.0]]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs.spaces import Box, Space, check_space
from jaxpg.types import Array, Carry, Key, TimeStep

EnvState = Any


class Actor(NamedTuple):
    """Pure functions that act in B environments at once."""

    initial_carry: Callable[[int], Carry]  # of B lanes
    # (key, obs [B, ...], carry [B, ...], first [B]) -> (action [B, ...], carry)
    step: Callable[[Key, Array, Carry, Array], tuple[Array, Carry]]


class Env(NamedTuple):
    """One environment, unbatched; `rollout` vmaps it and owns every reset."""

    reset: Callable[[Key], tuple[EnvState, Array]]
    step: Callable[[Key, EnvState, Array], tuple[EnvState, TimeStep]]
    observation: Space
    action: Space
    horizon: int  # whole episodes and evaluations end after at most this many steps
    # Set by a wrapper: the environment inside, and the map from its own actors to actors there.
    wraps: tuple["Env", Callable[[Actor], Actor]] | None = None


def check_env(env: Env) -> None:
    """Raises ValueError, naming the field, when reset or step does not return what the spaces promise.

    Both are only traced for their shapes; compiled programs contain none of it.
    """
    check_space("Env.observation", env.observation)
    check_space("Env.action", env.action)
    if not isinstance(env.horizon, int | np.integer) or env.horizon < 1:
        raise ValueError(
            f"Env.horizon={env.horizon} must be a whole number of steps, at least 1: it is a shape"
        )
    key = jax.eval_shape(jax.random.key, 0)
    state, obs = _results(jax.eval_shape(env.reset, key), "reset", "(state, obs)")
    _check_obs("reset", obs, env.observation)
    dtype = np.float32 if isinstance(env.action, Box) else np.int32
    action = jax.ShapeDtypeStruct(env.action.shape, dtype)
    try:
        found = jax.eval_shape(env.step, key, state, action)
    except Exception as error:
        raise ValueError(
            f"Env.step does not take an action of its own action space, {_said(action)}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    after, result = _results(found, "step", "(state, TimeStep)")
    if not all(hasattr(result, name) for name in TimeStep._fields):
        raise ValueError(
            f"Env.step returns a {type(result).__name__} with the state; it must be a jaxpg.TimeStep(obs, "
            "reward, terminated, truncated)"
        )
    _check_obs("step", result.obs, env.observation)
    _check_same("obs", obs, result.obs)
    for name in ("reward", "terminated", "truncated"):
        _check_scalar(name, getattr(result, name))
    _check_same("the state", state, after)


def check_action(env: Env, action: Array) -> None:
    """Raises ValueError when a policy's actions [B, ...] do not fit the environment's action space."""
    space = env.action
    kinds = _REAL[:1] if isinstance(space, Box) else _REAL[1:2]
    if action.shape[1:] != space.shape or not _is(action, kinds):
        raise ValueError(
            f"the policy's action is {action.dtype} {list(action.shape[1:])}, but Env.action is a "
            f"{type(space).__name__} of shape {list(space.shape)}; build the policy for env.action"
        )


def _results(found, function, promised):
    # A TimeStep alone is a tuple too.
    if isinstance(found, tuple) and len(found) == 2:
        return found
    what = "one array" if hasattr(found, "dtype") else f"a {type(found).__name__} of {len(found)}"
    raise ValueError(f"Env.{function} gives {what}; it must give {promised}")


def _check_obs(function, obs, space: Space) -> None:
    if not hasattr(obs, "dtype"):
        raise ValueError(
            f"Env.{function}: obs is a {type(obs).__name__}; it must be one array of shape "
            f"{list(space.shape)}: jaxpg.envs.flatten_observation(env) joins its parts into a vector"
        )
    real = isinstance(space, Box)
    if obs.shape != space.shape or not _is(obs, _REAL if real else (jnp.integer,)):
        said = f"a Box of shape {list(space.shape)}" if real else str(space)
        raise ValueError(
            f"Env.{function}: obs is {_said(obs)}; by Env.observation, {said}, it must be "
            f"{'float32' if real else 'int32'} {list(space.shape)}: change one or the other"
        )


def _check_scalar(name, value) -> None:
    kinds, wanted, remedy = (
        (_REAL[:2], "a float32 []", "index it, sum it, or cast it with astype(jnp.float32)")
        if name == "reward"
        else (_REAL[2:], "a bool []", "compare, as in steps >= limit, or cast it with astype(bool)")
    )
    if not hasattr(value, "dtype"):
        raise ValueError(f"Env.step: {name} is a {type(value).__name__}; it must be {wanted}")
    if value.shape or not _is(value, kinds):
        raise ValueError(f"Env.step: {name} is {_said(value)}; it must be {wanted}: {remedy}")


def _check_same(name, before, after) -> None:
    one, other = (jax.tree_util.tree_flatten_with_path(x) for x in (before, after))
    if one[1] != other[1]:
        raise ValueError(
            f"{name} has a different structure after Env.step than after Env.reset: {other[1]}, not {one[1]}"
        )
    for (place, old), (_, new) in zip(one[0], other[0], strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(place)} is {_said(old)} after Env.reset and {_said(new)} after "
                "Env.step; a loop needs one shape and dtype: cast it in reset or in step"
            )


_REAL = (jnp.floating, jnp.integer, jnp.bool_)


def _is(x, kinds) -> bool:
    return any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def _said(x) -> str:
    return f"{x.dtype} {list(x.shape)}"
