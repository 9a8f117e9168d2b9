"""Scaling: rewards in units of their returns' deviation, so that no learning rate depends on their own.

>>> scaled(jaxpg.training.data.stream).name
'scaled(stream)'
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.estimators.credit import UNROLL
from jaxpg.policies.normalisation import Statistics, merged
from jaxpg.training.data import Data
from jaxpg.types import Array, Trajectory


class Returns(NamedTuple):
    """Statistics of the discounted returns of all steps so far, and the running ones [B] of a stream."""

    statistics: Statistics
    running: Array


def scaled(data: Data) -> Data:
    """`data` with rewards divided by the standard deviation of G_t = r_t + gamma G_{t-1} within an episode.

    The deviation is over all steps so far, the batch included: one number for all advantages of an update,
    which leaves the direction of their gradient alone. Values are learnt in these units. Metrics of episodes
    and evaluations keep the environment's. Raises ValueError for data with demonstrations, whose rewards are
    no sample of the policy's (Engstrom et al., 2020).
    """
    if data.demonstrations:
        raise ValueError(
            f"rewards are scaled by the policy's own returns, not by those of {data.name}; leave "
            "normalise_rewards out"
        )

    def init(task, params, key):
        zeros = jnp.zeros(1, jnp.result_type(float))
        returns = Returns(Statistics(zeros[0], zeros, zeros), jnp.zeros(task.num_envs, zeros.dtype))
        return data.init(task, params, key), returns

    def gather(task, moment, state):
        inner, (statistics, running) = state
        inner, found = data.gather(task, moment, inner)
        sums = discounted(found.new, running, moment.hyperparams.gamma)
        statistics = merged(statistics, sums.reshape(-1, 1), found.new.mask.ravel())
        variance = statistics.squares[0] / jnp.maximum(statistics.seen, 1.0)
        scale = jnp.where(variance > 0.0, jnp.sqrt(variance), 1.0)
        trajectory = found.trajectory._replace(reward=found.trajectory.reward / scale)
        found = found._replace(
            trajectory=trajectory, metrics=found.metrics | {"reward_scale": scale}
        )
        return (inner, Returns(statistics, sums[-1])), found

    return data._replace(name=f"scaled({data.name})", init=init, gather=gather, inner=None)


def discounted(trajectory: Trajectory, running: Array, gamma: Array | float) -> Array:
    """G_t [T, B] of every step, begun anew with each episode; running: those before the first row, [B]."""

    def step(before, inputs):
        reward, first = inputs
        now = reward + gamma * jnp.where(first, 0.0, before)
        return now, now

    inputs, unroll = (trajectory.reward, trajectory.first), UNROLL.get(backend(), 1)
    return jax.lax.scan(step, running, inputs, unroll=unroll)[1]
