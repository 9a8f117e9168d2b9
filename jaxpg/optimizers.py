"""Optimizers as functions of the hyperparameters, so that every number in them is traced.

`adam(hyperparams)` is called inside the update: the numbers may be tracers, and the structure of the
optimizer's state does not depend on them.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from jaxpg.types import Array, Hyperparams

Optimizer = Callable[[Hyperparams], optax.GradientTransformation]
Schedule = Callable[[Array], Array]


def sgd(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Plain ascent or descent, after clipping by global norm."""
    return _clipped(hyperparams, optax.sgd(hyperparams.learning_rate))


def adam(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with eps 1e-5, after clipping by global norm."""
    return _clipped(hyperparams, optax.adam(hyperparams.learning_rate, eps=1e-5))


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


OPTIMIZERS = {"adam": adam, "sgd": sgd}
SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}


def _clipped(hyperparams, optimizer):
    return optax.chain(optax.clip_by_global_norm(hyperparams.max_grad_norm), optimizer)
