"""Optimizers as functions of the hyperparameters, so that every number in them is traced.

`adam(hyperparams)` is called inside the update: the numbers may be tracers, and the structure of the
optimizer's state does not depend on them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxpg.types import Array, Hyperparams

Optimizer = Callable[[Hyperparams], optax.GradientTransformation]
Schedule = Callable[[Array], Array]


def sgd(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Plain ascent or descent, after clipping by global norm."""
    return _clipped(hyperparams, optax.sgd(hyperparams.learning_rate))


def momentum(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum 0.9 (Polyak, 1964), after clipping by global norm."""
    return _clipped(hyperparams, optax.sgd(hyperparams.learning_rate, momentum=0.9))


def rmsprop(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """RMSProp (Hinton, 2012) with decay 0.99 and eps 1e-5, after clipping by global norm."""
    return _clipped(hyperparams, optax.rmsprop(hyperparams.learning_rate, decay=0.99, eps=1e-5))


def adam(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with eps 1e-5, after clipping by global norm."""
    return _clipped(hyperparams, optax.adam(hyperparams.learning_rate, eps=1e-5))


def adamw(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam with decoupled decay of the weight matrices (Loshchilov and Hutter, 2019)."""
    rate, decay = hyperparams.learning_rate, hyperparams.weight_decay
    return _clipped(hyperparams, optax.adamw(rate, eps=1e-5, weight_decay=decay, mask=_matrices))


def lion(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Lion (Chen et al., 2023): steps by sign, so a third to a tenth of Adam's learning rate."""
    rate, decay = hyperparams.learning_rate, hyperparams.weight_decay
    return _clipped(hyperparams, optax.lion(rate, weight_decay=decay, mask=_matrices))


def muon(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024): orthogonalised momentum for weight matrices, Adam for the rest."""
    rate, decay = hyperparams.learning_rate, hyperparams.weight_decay
    orthogonalised = optax.contrib.muon(rate, weight_decay=decay, weight_decay_mask=_matrices)
    return _clipped(hyperparams, orthogonalised)


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


OPTIMIZERS = {
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "momentum": momentum,
    "muon": muon,
    "rmsprop": rmsprop,
    "sgd": sgd,
}
SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}
BATCH_SCALINGS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


def _clipped(hyperparams, optimizer):
    return optax.chain(optax.clip_by_global_norm(hyperparams.max_grad_norm), optimizer)


def _matrices(params):
    # Decay is for weights: biases, log standard deviations and statistics of observations keep theirs.
    return jax.tree.map(lambda x: x.ndim >= 2, params)
