"""Importance: whose data is it?

A slot takes (log_ratio, trajectory, hyperparams) and returns Weights: `step` multiplies the advantage
and `trace` enters the credit recursion. log_ratio [T, B] = log pi(a_t|s_t) - log beta(a_t|s_t), 0 where
masked, is kept in log space until the last line.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from jaxpg.types import Array, Hyperparams, Trajectory


class Weights(NamedTuple):
    step: Array  # [T, B]
    trace: Array  # [T, B]


Importance = Callable[[Array, Trajectory, Hyperparams], Weights]


def on_policy(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step = trace = 1: the data is the policy's own."""
    del trajectory, hyperparams
    return Weights(jnp.ones_like(log_ratio), jnp.ones_like(log_ratio))


def one_step(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step = rho_t, trace = 1.

    Biased for the gradient of J at pi, because states and returns stay the behaviour's; exact for the
    surrogate objective that PPO and TRPO ascend.
    """
    del trajectory, hyperparams
    return Weights(jnp.exp(log_ratio), jnp.ones_like(log_ratio))


def from_start(importance: Importance) -> Importance:
    """step_t times gamma^t: the exact gradient of the discounted return, on whole episodes.

    Without it states count alike however late they are visited, which for gamma < 1 is not the gradient
    of any function (Nota and Thomas, 2020).
    """
    return partial(_from_start, importance)


def _from_start(importance, log_ratio, trajectory, hyperparams):
    weights = importance(log_ratio, trajectory, hyperparams)
    time = jnp.arange(log_ratio.shape[0], dtype=log_ratio.dtype)[:, None]
    return weights._replace(step=weights.step * hyperparams.gamma**time)
