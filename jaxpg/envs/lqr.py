"""The scalar linear-quadratic regulator: continuous states and actions with exact answers.

>>> from_lqr(Lqr(horizon=8)).horizon
8
>>> check_lqr(Lqr()) == Lqr()
True
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Box
from jaxpg.types import TimeStep


class Lqr(NamedTuple):
    """s' = a s + b u + w with w ~ Normal(0, process_std^2), reward -(q s^2 + c u^2), H steps.

    s_0 ~ Normal(initial_mean, initial_variance). The defaults are the laboratory's instance.
    """

    state_gain: float = 1.0  # a
    action_gain: float = 0.5  # b
    process_std: float = 0.1
    initial_mean: float = 1.0
    initial_variance: float = 0.25
    state_cost: float = 1.0  # q
    action_cost: float = 0.1  # c
    horizon: int = 5


def check_lqr(lqr: Lqr) -> Lqr:
    """Return the regulator; traced fields, except the horizon, pass unchecked.

    Raises ValueError, naming the field, when it is not well formed.
    """
    known = {k: v for k, v in lqr._asdict().items() if not isinstance(v, Tracer)}
    for name, value in known.items():
        if not np.isfinite(value):
            raise ValueError(f"Lqr.{name}={value} must be a finite number")
    for name in ("process_std", "initial_variance"):
        if known.get(name, 0) < 0:
            raise ValueError(f"Lqr.{name}={known[name]} must not be negative")
    if "horizon" not in known or lqr.horizon < 1 or lqr.horizon != int(lqr.horizon):
        raise ValueError(f"Lqr.horizon={lqr.horizon} must be a whole number of steps, at least 1")
    return lqr


def from_lqr(lqr: Lqr) -> Env:
    """The environment of a regulator: observation s and action u are vectors of one number.

    As for an Mdp, the horizon belongs to the process, so reaching it terminates the episode.
    Raises ValueError when the regulator is not well formed.
    """
    lqr = check_lqr(lqr)
    dtype = jnp.result_type(float)
    anywhere = Box(np.full(1, -np.inf, np.float32), np.full(1, np.inf, np.float32))

    def reset(key):
        noise = jax.random.normal(key, (1,), dtype)
        s = lqr.initial_mean + lqr.initial_variance**0.5 * noise
        return (s, jnp.int32(0)), s

    def step(key, state, action):
        s, t = state
        noise = lqr.process_std * jax.random.normal(key, (1,), dtype)
        successor = lqr.state_gain * s + lqr.action_gain * action + noise
        cost = (lqr.state_cost * s**2 + lqr.action_cost * action**2)[0]
        ended = t + 1 >= lqr.horizon
        return (successor, t + 1), TimeStep(successor, -cost, ended, jnp.zeros_like(ended))

    return Env(reset, step, anywhere, anywhere, int(lqr.horizon))
