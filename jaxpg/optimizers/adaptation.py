"""Adaptation: training adjusts hyperparameters by the KL of its own updates.

An adaptation takes (scales, kl, hyperparams) and returns scales; kl is the mean KL per step by which the
last update moved the policy. The scales multiply the hyperparameters of the same names.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxpg.types import Array, Hyperparams

# Bounds, so that many flat updates cannot drive a scale so far that it takes as many to come back.
LOWEST, HIGHEST = 1e-3, 1e3


class Scales(NamedTuple):
    """Factors of hyperparameters, 1 at the start."""

    learning_rate: Array  # [] of the policy
    kl_coef: Array  # []


Adaptation = Callable[[Scales, Array, Hyperparams], Scales]


def initial_scales() -> Scales:
    return Scales(jnp.ones(()), jnp.ones(()))


def fixed(scales: Scales, kl: Array, hyperparams: Hyperparams) -> Scales:
    """Adapt nothing."""
    del kl, hyperparams
    return scales


def kl_penalty(scales: Scales, kl: Array, hyperparams: Hyperparams) -> Scales:
    """kl_coef doubles where kl > 1.5 target_kl, and halves where kl < target_kl / 1.5.

    For the kl_penalised surrogate (Schulman et al., 2017, section 4).
    """
    coef, target = scales.kl_coef, hyperparams.target_kl
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return scales._replace(kl_coef=jnp.clip(coef * factor, LOWEST, HIGHEST))


def learning_rate(scales: Scales, kl: Array, hyperparams: Hyperparams) -> Scales:
    """Divide the policy's learning rate by 1.5 if kl > 2 target_kl; multiply it by 1.5 below target_kl / 2.

    (Schulman et al., 2017, in the form of Rudin et al., 2022.)
    """
    rate, target = scales.learning_rate, hyperparams.target_kl
    factor = jnp.where(kl > 2.0 * target, 1 / 1.5, jnp.where(kl < 0.5 * target, 1.5, 1.0))
    return scales._replace(learning_rate=jnp.clip(rate * factor, LOWEST, HIGHEST))


def scaled(hyperparams: Hyperparams, scales: Scales) -> Hyperparams:
    """The hyperparameters times their scales."""
    return hyperparams._replace(
        learning_rate=hyperparams.learning_rate * scales.learning_rate,
        kl_coef=hyperparams.kl_coef * scales.kl_coef,
    )


ADAPTATIONS = {"fixed": fixed, "kl_penalty": kl_penalty, "learning_rate": learning_rate}
