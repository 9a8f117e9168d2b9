"""Schedules: learning rates as functions of the update and of the batch size.

>>> [round(float(x(jnp.array(0.2))), 3) for x in (constant, linear, cosine)], [*SCHEDULES]
([1.0, 0.8, 0.905], ['constant', 'linear', 'cosine'])
>>> float(scheduled(Hyperparams(schedule_updates=4.0), linear, jnp.array(1.0)).learning_rate * 1e3)
0.75
>>> [float(batch_scaled(constant, rule, 64, 16)(jnp.array(0.5))) for rule in BATCH_SCALINGS]
[1.0, 4.0, 2.0]
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxpg.types import Array, Hyperparams

Schedule = Callable[[Array], Array]


def constant(progress: Array) -> Array:
    """1 throughout."""
    return jnp.ones_like(progress)


def linear(progress: Array) -> Array:
    """From 1 down to 0."""
    return 1.0 - progress


def cosine(progress: Array) -> Array:
    """From 1 down to 0 along half a cosine."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def scheduled(hyperparams: Hyperparams, schedule: Schedule, num_updates: Array) -> Hyperparams:
    """Both learning rates times schedule(num_updates / schedule_updates)."""
    factor = schedule(jnp.minimum(num_updates / hyperparams.schedule_updates, 1.0))
    return hyperparams._replace(
        learning_rate=hyperparams.learning_rate * factor,
        critic_learning_rate=hyperparams.critic_learning_rate * factor,
    )


def batch_scaled(schedule: Schedule, rule: str, batch: int, reference: int) -> Schedule:
    """The schedule times (batch / reference)^(0, 1 or 1/2): a learning rate that fits the batch size.

    rule: none; linear, for SGD (Goyal et al., 2017); sqrt, for Adam (Malladi et al., 2022).
    """
    factor = (batch / reference) ** BATCH_SCALINGS[rule]
    return lambda progress: factor * schedule(progress)


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}
BATCH_SCALINGS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}
