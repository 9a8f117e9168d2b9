"""Observation normalisation by running statistics, which live in a network's parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.devices import across
from jaxpg.envs import Box, Space
from jaxpg.envs.spaces import encoded_size
from jaxpg.policies.networks import Network
from jaxpg.types import Array

LIMIT = 10.0
SMALLEST_VARIANCE = 1e-8


class Statistics(NamedTuple):
    """Statistics of flattened observations: as vectors they escape weight decay, which is for matrices."""

    seen: Array  # [] how many
    mean: Array  # [D]
    squares: Array  # [D] sum of (x - mean)^2


def normalised(network: Network, observation: Space) -> Network:
    """The network on (obs - mean) / std, clipped to +- 10, over all observations in earlier updates.

    Params: {"network": ..., "statistics": Statistics}. The statistics have gradient 0; `observe` updates
    them, only between updates, so that log-probs at the update equal those at the rollout. Before the first
    update observations pass unscaled. Raises ValueError unless observations are a Box.

    >>> space = Box(-np.ones(2), np.ones(2))
    >>> network = normalised(jaxpg.policies.linear(space, None), space)
    >>> jax.eval_shape(network.init, jax.random.key(0))["statistics"].mean.shape
    (2,)
    """
    if not isinstance(observation, Box):
        raise ValueError(
            f"normalise scales real observations, but these are {type(observation).__name__}; "
            "leave normalise out"
        )
    size = encoded_size(observation)

    def init(key):
        zeros = jnp.zeros(size)
        return {"network": network.init(key), "statistics": Statistics(zeros[0], zeros, zeros)}

    def scaled(params, obs):
        # Statistics are data; the estimator does not differentiate them.
        seen, mean, squares = jax.lax.stop_gradient(params["statistics"])
        std = jnp.sqrt(jnp.maximum(squares / jnp.maximum(seen, 1.0), SMALLEST_VARIANCE))
        mean, scale = (
            jnp.broadcast_to(x.reshape(observation.shape), obs.shape)
            for x in (mean, jnp.where(seen > 0, std, 1.0))
        )
        return jnp.clip((obs - mean) / scale, -LIMIT, LIMIT)

    def on_scaled(function):
        return lambda params, carry, obs, first: function(
            params["network"], carry, scaled(params, obs), first
        )

    def observe(params, obs, mask):
        rows = obs.reshape(-1, size)
        return params | {"statistics": merged(params["statistics"], rows, mask.ravel())}

    features = network.features and on_scaled(network.features)
    return Network(init, network.initial_carry, on_scaled(network.apply), observe, features)


def merged(statistics: Statistics, rows: Array, mask: Array) -> Statistics:
    """Add the observations [N, D] where mask [N] is set (Chan, Golub and LeVeque, 1983).

    Deviations are from the running mean, so float32 loses nothing to a mean far from 0.
    """
    seen, mean, squares = statistics
    keep = mask[:, None]
    deviation = jnp.where(keep, rows - mean[None], 0.0)
    new, shift = across((mask.sum().astype(seen.dtype), deviation.sum(axis=0)))
    total, shift = jnp.maximum(seen + new, 1.0), shift / jnp.maximum(new, 1.0)
    within = jnp.where(keep, deviation - shift[None], 0.0) ** 2
    between = shift**2 * seen * (new / total)
    return Statistics(
        seen + new, mean + shift * (new / total), squares + across(within.sum(axis=0)) + between
    )
