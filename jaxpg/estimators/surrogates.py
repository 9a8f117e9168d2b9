"""Surrogates: what is differentiated? And the reductions: a mean over what?

A surrogate takes (log_prob, advantage, trajectory, hyperparams) and returns the gain [T, B] to ascend;
log_prob is the current policy's, trajectory.log_prob the behaviour's. A reduction takes (gain, mask).
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax.numpy as jnp

from jaxpg.types import Array, Hyperparams, Trajectory

Surrogate = Callable[[Array, Array, Trajectory, Hyperparams], Array]
Reduce = Callable[[Array, Array], Array]


def score(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """log pi(a|s) A: weighted maximum likelihood, the log-derivative trick."""
    del trajectory, hyperparams
    return log_prob * advantage


def ratio(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """rho A with rho = pi(a|s)/beta(a|s) (Kakade and Langford, 2002)."""
    del hyperparams
    return jnp.exp(log_prob - trajectory.log_prob) * advantage


def clipped(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """min(rho A, clip(rho, 1-eps, 1+eps) A) (Schulman et al., 2017).

    The gradient is 0 exactly where A > 0 and rho > 1+eps, or A < 0 and rho < 1-eps.
    """
    rho = jnp.exp(log_prob - trajectory.log_prob)
    near = jnp.clip(rho, 1.0 - hyperparams.clip_eps, 1.0 + hyperparams.clip_eps)
    return jnp.minimum(rho * advantage, near * advantage)


def kl_penalised(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """rho A - kl_coef (rho - 1 - log rho) (Schulman et al., 2017).

    Under the behaviour, rho - 1 - log rho is a non-negative unbiased estimate of KL(beta || pi).
    """
    log_rho = log_prob - trajectory.log_prob
    rho = jnp.exp(log_rho)
    return rho * advantage - hyperparams.kl_coef * (rho - 1.0 - log_rho)


def standardised(surrogate: Surrogate) -> Surrogate:
    """The surrogate of (A - mean A) / std A over the steps of the (mini)batch.

    Biased, and in the scale of the batch: it makes step sizes alike between tasks.
    """
    return partial(_standardised, surrogate)


def _standardised(surrogate, log_prob, advantage, trajectory, hyperparams):
    advantage = _unit_scale(advantage, trajectory.mask)
    return surrogate(log_prob, advantage, trajectory, hyperparams)


def unwrapped(surrogate: Surrogate, advantage: Array, mask: Array) -> tuple[Surrogate, Array]:
    """A standardised surrogate as the one inside and the advantages that it would see; others as they are.

    So that a batch can be standardised as a whole and differentiated in parts.
    """
    if not is_standardised(surrogate):
        return surrogate, advantage
    return cast(partial, surrogate).args[0], _unit_scale(advantage, mask)


def is_standardised(surrogate: Surrogate) -> bool:
    return isinstance(surrogate, partial) and surrogate.func is _standardised


def _unit_scale(advantage, mask):
    mean = per_step(advantage, mask)
    spread = jnp.sqrt(per_step((advantage - mean) ** 2, mask))
    return (advantage - mean) / (spread + 1e-8)


def per_episode(gain: Array, mask: Array) -> Array:
    """Sum over steps, mean over the B episodes: the gradient is that of J."""
    return jnp.where(mask, gain, 0.0).sum() / mask.shape[1]


def per_step(gain: Array, mask: Array) -> Array:
    """Mean over the steps that count: long episodes weigh more; the PPO habit."""
    return jnp.where(mask, gain, 0.0).sum() / jnp.maximum(mask.sum(), 1)
