"""gymnax 1.x environments, without their automatic reset."""

import difflib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib import import_module
from numbers import Real
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpg.envs.env import Env
from jaxpg.envs.narrow import narrow, narrowed
from jaxpg.envs.spaces import Box, Discrete, Space, check_space, limits
from jaxpg.types import TimeStep

# gymnax imports these, which takes nearly two seconds.
_DRAWING = ("matplotlib", "matplotlib.pyplot", "matplotlib.colors", "seaborn")
LEAST, MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
MOST_SIZE = 2**12  # of a constructor's argument, which sets the size of tables


def from_gymnax(environment, params=None, **settings) -> Env:
    """The Env of a gymnax environment, named (`"CartPole-v1"`) or already made.

    settings: fields of the environment's parameters (`max_steps_in_episode=200`) or arguments of its
    constructor (`size=20` for DeepSea). Real-valued actions are clipped to the action space before the
    step, because several environments penalise them unclipped; the policy's log-probability stays that
    of the action as sampled. Where gymnax reports an end as terminated and truncated, termination wins.
    Parameters may be traced, so that each replica of a `vmap` has an environment of its own. A policy cannot
    see action bounds that depend on them: it treats actions as unbounded, and the step clips them.
    Raises ValueError for an unknown name (with near matches), a setting that is unknown or invalid, a
    traced one that decides a shape, or a data set that could not be fetched.

    >>> env = from_gymnax("CartPole-v1", max_steps_in_episode=9)
    >>> env.observation.shape, env.action, env.horizon
    ((4,), Discrete(n=2), 9)
    """
    # Values that are not traced stay concrete, even inside jit.
    with narrow(), jax.ensure_compile_time_eval():
        environment, params = resolve(environment, params, settings)
        with _refused(environment.name, settings):
            observed, taken = (
                environment.observation_space(params),
                environment.action_space(params),
            )
            observation = _space(observed, f"{environment.name}'s observation space")
            action = _space(taken, f"{environment.name}'s action space")
    bounds = ()
    if isinstance(action, Box):
        pairs = zip((taken.low, taken.high), action, strict=True)
        bounds = [x if _traced(x) else known for x, known in pairs]

    @narrow()
    def reset(key):
        obs, state = environment.reset_env(key, params)
        return jax.tree.map(_strong, state), _observed(obs, observation)

    @narrow()
    def step(key, state, chosen):
        chosen = jnp.asarray(chosen, jnp.float32 if isinstance(action, Box) else jnp.int32)
        if isinstance(action, Box):
            chosen = jnp.clip(chosen, *bounds)
        obs, after, reward, terminated, _ = environment.step_env(key, state, chosen, params)
        # Some environments widen a dtype in a step: hold them to the reset's.
        after = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, state)
        truncated = jnp.asarray(environment.is_truncated(after, params), bool)
        terminated = jnp.asarray(terminated, bool)
        reward = jnp.asarray(reward, jnp.float32)
        obs = _observed(obs, observation)
        return after, TimeStep(obs, reward, terminated, truncated & ~terminated)

    env = Env(reset, step, observation, action, int(params.max_steps_in_episode))
    if settings:
        with _refused(environment.name, settings):
            jax.eval_shape(lambda: _one_step(env))
    return env


def _one_step(env):
    key = jax.random.key(0)
    kind = jnp.float32 if isinstance(env.action, Box) else jnp.int32
    with jax.numpy_rank_promotion("allow"):  # Swimmer relies on it
        return env.step(key, env.reset(key)[0], jnp.zeros(env.action.shape, kind))


@contextmanager
def _refused(name, settings):
    """Turn whatever an environment raises into one line that says its settings do not work."""
    try:
        yield
    except Exception as error:
        if not settings:
            raise
        said = ", ".join(f"{k}={v}" for k, v in settings.items())
        why = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{name} does not run with {said}: {why}") from error


def resolve(environment, params, settings):
    """The environment and its parameters, with the settings applied. Raises ValueError."""
    if isinstance(environment, str):
        environment, params, settings = _make(environment, settings)
    elif params is None:
        params = environment.default_params
    known = {f.name: getattr(params, f.name) for f in fields(params)}
    for name in settings:
        if name not in known:
            raise ValueError(
                f"{environment.name} has no setting {name!r}; its parameters are {', '.join(known)}"
            )
    params = params.replace(**_checked(environment.name, settings, known))
    params = jax.tree.map(narrowed, params)
    steps = params.max_steps_in_episode
    if _traced(steps):
        raise ValueError(
            f"{environment.name}: max_steps_in_episode is traced, but it is the longest episode, a shape; "
            "give a number"
        )
    if not (1 <= steps < 2**31 and steps % 1 == 0):
        raise ValueError(
            f"{environment.name}: max_steps_in_episode={steps} must be a whole number of at least 1, and "
            f"below {2**31}"
        )
    return environment, params


def _checked(environment, settings, defaults):
    """The settings, each a number of the kind of its default. Raises ValueError."""
    checked = {}
    for name, value in settings.items():
        default = defaults[name]
        number = isinstance(value, Real) and not isinstance(value, bool) and _held(value)
        holds, kind = {
            bool: (isinstance(value, bool) or (number and value in (0, 1)), "true or false"),
            int: (number and value % 1 == 0, "a whole number"),
            float: (number, "a number that float32 holds"),
        }.get(type(default), (True, ""))
        if not holds and not isinstance(value, jax.Array):
            raise ValueError(f"{environment}: {name}={value} must be {kind}, as {default} is")
        checked[name] = type(default)(value) if kind and isinstance(value, Real) else value
    return checked


def _held(value: Any) -> bool:
    """Whether float32 holds the number, neither as 0 nor as infinity."""
    return value == 0 or LEAST <= abs(value) <= MOST


def _make(name, settings):
    gymnax = _gymnax()  # takes a second, so only when one of its environments is made
    if name not in gymnax.registered_envs:
        near = difflib.get_close_matches(name, gymnax.registered_envs, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see jaxpg.envs.gymnax_names()"
        raise ValueError(f"unknown environment {name!r}; {hint}")
    try:
        environment, params = gymnax.make(name)
    except OSError as error:
        raise ValueError(f"{name} needs a data set that could not be fetched: {error}") from error
    # Settings that are not parameters go to the constructor, if it accepts them.
    accepted = inspect.signature(type(environment)).parameters
    for_make = {k: v for k, v in settings.items() if not hasattr(params, k) and k in accepted}
    traced = [k for k, v in for_make.items() if _traced(v)]
    if traced:
        raise ValueError(
            f"{name}: {traced[0]} is traced, but it is an argument of the constructor; give a number"
        )
    if for_make:
        checked = _checked(name, for_make, {k: accepted[k].default for k in for_make})
        for k, v in checked.items():
            if isinstance(v, int) and v > MOST_SIZE and "seed" not in k:
                raise ValueError(f"{name}: {k}={v} must be at most {MOST_SIZE}: it is a shape")
        with _refused(name, for_make):
            environment, params = gymnax.make(name, **checked)
    return environment, params, {k: v for k, v in settings.items() if k not in for_make}


def gymnax_names() -> list[str]:
    """The names of all registered gymnax environments.

    >>> "CartPole-v1" in gymnax_names()
    True
    """
    return list(_gymnax().registered_envs)


def _space(space, name) -> Space:
    kind = type(space).__name__
    if 0 in (*space.shape, getattr(space, "n", 1)):
        raise ValueError(f"a {kind} space of shape {space.shape} is empty")
    if kind == "Discrete":
        found = Discrete(int(space.n))
    elif kind == "Box":
        low = -np.inf if _traced(space.low) else np.asarray(space.low, np.float32)
        high = np.inf if _traced(space.high) else np.asarray(space.high, np.float32)
        found = Box(*(np.broadcast_to(np.float32(x), space.shape) for x in (low, high)))
    else:
        raise ValueError(f"{name} is a {kind}; jaxpg knows Discrete, Box and MultiDiscrete")
    check_space(name, found)
    return Box(*limits(found)) if isinstance(found, Box) else found


def _traced(x) -> bool:
    return isinstance(x, Tracer)


def _observed(obs, space):
    return jnp.asarray(obs, jnp.int32 if isinstance(space, Discrete) else jnp.float32)


def _strong(x):
    return jnp.asarray(x, jnp.asarray(x).dtype)


class _Later(ModuleType):
    """A stand-in for a module, which is imported at its first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by the import system
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


@narrow()  # gymnax makes arrays when it is imported
def _gymnax() -> Any:
    """The gymnax package, imported at the first call, without the libraries it draws with."""
    if "gymnax" not in sys.modules:
        # A version that needs those libraries at import is imported with them.
        with _drawing_later(), suppress(ImportError):
            import_module("gymnax")
    return import_module("gymnax")


@contextmanager
def _drawing_later() -> Iterator[None]:
    """Give stand-ins to imports inside this block, and restore sys.modules after it."""
    if "matplotlib" in sys.modules:
        yield
        return
    later = {name: _Later(name) for name in _DRAWING if name not in sys.modules}
    for name, module in later.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(later[parent], child, module)
    sys.modules.update(later)
    try:
        yield
    finally:
        for name, module in later.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
