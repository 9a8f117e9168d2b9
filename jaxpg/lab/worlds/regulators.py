"""Regulators: the policy and the critic of the linear-quadratic regulator."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Lqr
from jaxpg.lab.exact import lqr
from jaxpg.policies import Gaussian, Network
from jaxpg.types import Array, Params

PARAMS = ("gain", "log_std", "offset")  # k, log sigma and m, in the order of lab.exact.lqr


def gain_policy(std: float | None = None, *, offset: bool = False) -> Network:
    """The policy u ~ Normal(k s + m, sigma^2). Params: those of PARAMS that are not fixed, [1] each.

    std: fixes sigma; None makes it a parameter. Without offset, m is fixed at 0.
    """
    names = [
        name
        for name in PARAMS
        if name != ("log_std" if std else "") and (offset or name != "offset")
    ]

    def init(key):
        del key
        return {name: jnp.zeros(1) for name in names}

    def apply(params, carry, obs, first):
        del first
        fixed = {"log_std": np.log([std or 1.0]), "offset": np.zeros(1)}
        # Scalars as [1, 1, 1]: observations are [T, B, 1].
        k, log_std, m = (
            jnp.asarray({**fixed, **params}[name], obs.dtype).reshape(1, 1, 1) for name in PARAMS
        )
        mean = k * obs + m
        return carry, Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))

    return Network(init, lambda num_lanes: (), apply)


def coefficients(policy: Network, params: Params) -> Array:
    """(k, log sigma, m) [3] of a gain_policy, read from its distributions at s = 0 and s = 1."""
    states = jnp.array([[[0.0], [1.0]]])
    _, found = policy.apply(params, (), states, jnp.zeros((1, 2), bool))
    (zero, one), log_std = found.mean.reshape(2), found.log_std.reshape(2)
    return jnp.stack([one - zero, log_std[0], zero])


def value_critic(regulator: Lqr, params, gamma: float) -> tuple[Network, Params]:
    """A critic with the exact V_t(s) of u ~ Normal(k s + m, sigma^2), for whole episodes.

    params: (k, log sigma, m).
    """

    def apply(params, carry, obs, first):
        row = jnp.broadcast_to(jnp.arange(obs.shape[0])[:, None], first.shape)
        started = jax.lax.cummax(jnp.where(first, row, 0), axis=0)
        step = jnp.minimum(row - started, len(params["value"]) - 1)
        powers = jnp.concatenate([jnp.ones_like(obs), obs, obs**2], axis=-1)
        return carry, (params["value"][step] * powers).sum(axis=-1)

    table = {"value": jnp.asarray(lqr.values(regulator, params, gamma), jnp.result_type(float))}
    return Network(lambda key: table, lambda num_lanes: (), apply), table


def objective(regulator: Lqr, policy: Network, params: Params, gamma: float) -> Array:
    """J of a gain_policy: lqr.objective in JAX, so that it can be differentiated and compiled."""
    k, log_std, m = coefficients(policy, params)
    closed, forced = regulator.state_gain + regulator.action_gain * k, regulator.action_gain * m
    noise = (regulator.action_gain * jnp.exp(log_std)) ** 2 + regulator.process_std**2
    mean = jnp.asarray(regulator.initial_mean, k.dtype)
    square, value = mean**2 + regulator.initial_variance, jnp.zeros((), k.dtype)
    for t in range(regulator.horizon):
        effort = k**2 * square + 2 * k * m * mean + m**2 + jnp.exp(2 * log_std)
        value -= gamma**t * (regulator.state_cost * square + regulator.action_cost * effort)
        square = closed**2 * square + 2 * closed * forced * mean + forced**2 + noise
        mean = closed * mean + forced
    return value
