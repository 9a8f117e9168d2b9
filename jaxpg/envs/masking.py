"""Actions that the state allows, shown to the policy at the end of the observation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Box, Discrete, Space, check_space, limits
from jaxpg.types import Array


class Masked(Box):
    """Vectors of an observation's numbers and then, for each action, 1 if it is allowed and 0 if not."""

    inner: Space  # of the observation without the mask
    num_actions: int

    def __new__(cls, inner: Space, num_actions: int):
        """Raises ValueError if this is no space.

        >>> Masked(Discrete(5), 3).shape
        (4,)
        """
        check_space("Env.observation", inner)
        if isinstance(inner, Box):
            low, high = (bound.ravel() for bound in limits(inner))
        else:
            sizes = [inner.n] if isinstance(inner, Discrete) else inner.nvec
            low, high = np.zeros(len(sizes), np.float32), np.array(sizes, np.float32) - 1
        found = super().__new__(
            cls,
            np.concatenate([low, np.zeros(num_actions, np.float32)]),
            np.concatenate([high, np.ones(num_actions, np.float32)]),
        )
        found.inner, found.num_actions = inner, num_actions
        return found

    def split(self, obs: Array) -> tuple[Array, Array]:
        """The observations [..., *inner.shape] and masks [..., A] of vectors [..., N + A]."""
        inner, mask = obs[..., : -self.num_actions], obs[..., -self.num_actions :] > 0
        inner = inner.reshape(*obs.shape[:-1], *self.inner.shape)
        return inner if isinstance(self.inner, Box) else inner.astype(jnp.int32), mask


def with_mask(env: Env, action_mask: Callable[[Any], Array]) -> Env:
    """The environment whose observations end with `action_mask(state)`, bool [A]: the actions allowed there.

    A policy built for it never takes another one. Where nothing is allowed it takes any action with equal
    probability. The state, and with it the mask, belongs to the environment, so `load_policy` keeps this
    wrapper. Raises ValueError for actions that are not Discrete, a mask of another size, and one that allows
    nothing after a reset.

    >>> env = jaxpg.envs.from_gymnax("CartPole-v1")
    >>> right = with_mask(env, lambda state: jnp.array([False, True]))
    >>> right.observation.shape, right.reset(jax.random.key(0))[1][4:].tolist()
    ((6,), [0.0, 1.0])
    >>> isinstance(right.observation, Masked)
    True
    """
    if not isinstance(env.action, Discrete):
        raise ValueError(
            f"a mask allows some of {{0, ..., n-1}}, but the actions are {type(env.action).__name__}; leave "
            "the mask out"
        )
    key, num_actions = jax.random.key(0), env.action.n
    found = jax.eval_shape(lambda key: action_mask(env.reset(key)[0]), key)
    if getattr(found, "shape", None) != (num_actions,) or found.dtype != bool:
        said = f"{found.dtype} {list(found.shape)}" if hasattr(found, "dtype") else repr(found)
        raise ValueError(
            f"the action mask is {said}; for Discrete({num_actions}) it must be bool [{num_actions}]"
        )
    with jax.ensure_compile_time_eval():
        mask = action_mask(env.reset(key)[0])
    # Inside jit, an environment's own numbers may be traced.
    if not isinstance(mask, Tracer) and not np.any(mask):
        raise ValueError(
            f"the action mask allows none of {num_actions} actions after a reset; allow at least one"
        )

    def shown(state, obs):
        dtype = jnp.result_type(obs.dtype, jnp.float32)
        parts = obs.ravel().astype(dtype), action_mask(state).astype(dtype)
        return jnp.concatenate(parts)

    def reset(key):
        state, obs = env.reset(key)
        return state, shown(state, obs)

    def step(key, state, action):
        state, result = env.step(key, state, action)
        return state, result._replace(obs=shown(state, result.obs))

    space = Masked(env.observation, num_actions)
    return Env(reset, step, space, env.action, env.horizon)
