"""Actions between bounds, given as real vectors of any size."""

import jax.numpy as jnp
import numpy as np

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Box, check_space, limits


class Squashed(Box):
    """All real vectors u, as elements of a Box without bounds: each is an action of `squashed`."""


def squashed(env: Env) -> Env:
    """The environment that takes a = centre + half * tanh(u), for any real u, instead of an a between bounds.

    half is half the range. A policy's density is that of tanh(u), and found from u: it stays exact where tanh
    is 1 to rounding. u has no entry for one of a that is fixed (low = high). Raises ValueError unless actions
    are real and between finite bounds.

    >>> env = squashed(jaxpg.envs.from_gymnax("Pendulum-v1"))
    >>> env.action.shape, float(env.action.high[0]), isinstance(env.action, Squashed)
    ((1,), inf, True)
    """
    space = env.action
    check_space("Env.action", space)
    if not isinstance(space, Box) or isinstance(space, Squashed):
        raise ValueError(
            "tanh and beta choose real numbers between bounds, but the actions are "
            f"{type(space).__name__}: leave the distribution out"
        )
    low, high = limits(space)
    unbounded = ~(np.isfinite(low) & np.isfinite(high))
    if unbounded.any():
        place = tuple(np.argwhere(unbounded)[0].tolist())
        raise ValueError(
            f"tanh and beta choose between finite bounds, but entry {list(place)} of the action has the "
            f"range {low[place]:g} to {high[place]:g}: use the distribution gaussian"
        )
    free = np.flatnonzero(low < high)
    if not free.size:
        raise ValueError(
            f"every entry of the action is fixed (low = high = {low}): there is nothing to choose"
        )
    centre, half = low / 2 + high / 2, (high / 2 - low / 2).ravel()[free]

    def inner(u):
        parts = jnp.broadcast_to(half, u.shape).astype(u.dtype) * jnp.tanh(u)
        shape = (*u.shape[:-1], low.size)
        moved = jnp.zeros(shape, u.dtype).at[..., free].set(parts)
        whole = moved.reshape(*u.shape[:-1], *low.shape)
        whole += jnp.broadcast_to(centre, whole.shape).astype(u.dtype)
        # Rounding may leave the bounds.
        return jnp.clip(
            whole, jnp.broadcast_to(low, whole.shape), jnp.broadcast_to(high, whole.shape)
        )

    def step(key, state, action):
        return env.step(key, state, inner(action))

    def inside(actor):
        def act(key, obs, carry, first):
            action, carry = actor.step(key, obs, carry, first)
            return inner(action), carry

        return actor._replace(step=act)

    bound = np.full(free.shape, np.inf, np.float32)
    return env._replace(step=step, action=Squashed(-bound, bound), wraps=(env, inside))
