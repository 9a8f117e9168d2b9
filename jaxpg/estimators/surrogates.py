"""Surrogates: what is differentiated? Reductions: what is the mean over?

A surrogate takes (log_prob, advantage, trajectory, hyperparams) and returns the gain [T, B] to ascend;
log_prob is the current policy's, trajectory.log_prob the behaviour's. A reduction takes (gain, mask).

>>> rho, advantage, mask = jnp.array([[1.0, 1.5]]), jnp.array([[1.0, 2.0]]), jnp.ones((1, 2), bool)
>>> trajectory = Trajectory(*[mask] * 10)._replace(log_prob=jnp.zeros((1, 2)))
>>> given = jnp.log(rho), advantage, trajectory, Hyperparams(clip_eps=0.2)
>>> for x in (score, ratio, clipped, kl_penalised, standardised(ratio)):
...     print(x.name, x(*given)[0].round(2))
score [0.   0.81]
ratio [1. 3.]
clipped [1.        2.3999999]
kl_penalised [1.        2.9099998]
standardised [-1.   1.5]
>>> for x in (clipped_apart, sequence_clipped, weighted_score):
...     print(x.name, x(*given)[0].round(2))
clipped_apart [1.   2.56]
sequence_clipped [1.   2.56]
weighted_score [0.   1.04]
>>> [float(x(advantage, mask)) for x in (per_episode, per_step, per_length, per_row)]
[1.5, 1.5, 1.5, 1.5]
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpg.devices import totals
from jaxpg.estimators.slot import Clips, Slot, facts_of, slot
from jaxpg.types import Array, Hyperparams, Trajectory

Surrogate = Callable[[Array, Array, Trajectory, Hyperparams], Array]
Reduce = Callable[[Array, Array], Array]


@slot(corrects=False)
def score(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """log pi(a|s) A: weighted maximum likelihood, the log-derivative trick."""
    del trajectory, hyperparams
    return log_prob * advantage


@slot()
def ratio(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """rho A with rho = pi(a|s)/beta(a|s) (Kakade and Langford, 2002)."""
    del hyperparams
    return jnp.exp(log_prob - trajectory.log_prob) * advantage


def _outside(kept: Callable, root: bool = False) -> Clips:
    def outside(log_ratio, mask, hyperparams):
        rho = _root(log_ratio, mask) if root else jnp.exp(log_ratio)
        low, high = kept(hyperparams)
        return (rho < low) | (rho > high)

    return outside


def _alike(hyperparams):
    return 1.0 - hyperparams.clip_eps, 1.0 + hyperparams.clip_eps


def _apart(hyperparams):
    return 1.0 - hyperparams.clip_eps, 1.0 + hyperparams.clip_eps_high


def _below(hyperparams):
    return 0.0, 1.0 + hyperparams.clip_eps_high


def _root(log_ratio, mask):
    """(prod_t rho_t)^(1/T) of each lane, at all its steps."""
    total = jnp.where(mask, log_ratio, 0.0).sum(axis=0, keepdims=True)
    length = jnp.maximum(mask.sum(axis=0, keepdims=True), 1)
    return jnp.exp(jnp.broadcast_to(total / length, log_ratio.shape))


@slot(clips=_outside(_alike))
def clipped(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """min(rho A, clip(rho, 1-eps, 1+eps) A) (Schulman et al., 2017).

    The gradient is 0 exactly where A > 0 and rho > 1+eps, or A < 0 and rho < 1-eps.
    """
    rho = jnp.exp(log_prob - trajectory.log_prob)
    return _clipped(rho, advantage, _alike(hyperparams))


@slot(clips=_outside(_apart))
def clipped_apart(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """min(rho A, clip(rho, 1-clip_eps, 1+clip_eps_high) A) (Yu et al., 2025)."""
    rho = jnp.exp(log_prob - trajectory.log_prob)
    return _clipped(rho, advantage, _apart(hyperparams))


@slot(whole_episodes=True, by_lane=True, clips=_outside(_apart, root=True))
def sequence_clipped(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """min(s A, clip(s, 1-clip_eps, 1+clip_eps_high) A), s = (prod_t rho_t)^(1/T) (Zheng et al., 2025)."""
    root = _root(log_prob - trajectory.log_prob, trajectory.mask)
    return _clipped(root, advantage, _apart(hyperparams))


def _clipped(rho, advantage, kept):
    return jnp.minimum(rho * advantage, jnp.clip(rho, *kept) * advantage)


@slot(clips=_outside(_below))
def weighted_score(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """min(rho, 1+clip_eps_high) A log pi(a|s), with a constant weight: CISPO (MiniMax, 2025).

    Unlike a clipped ratio, a truncated weight leaves every step a gradient.
    """
    rho = jax.lax.stop_gradient(jnp.exp(log_prob - trajectory.log_prob))
    return jnp.minimum(rho, _below(hyperparams)[1]) * advantage * log_prob


@slot()
def kl_penalised(
    log_prob: Array, advantage: Array, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """rho A - kl_coef (rho - 1 - log rho) (Schulman et al., 2017).

    Under the behaviour, rho - 1 - log rho is a non-negative unbiased estimate of KL(beta || pi).
    """
    log_rho = log_prob - trajectory.log_prob
    rho = jnp.exp(log_rho)
    return rho * advantage - hyperparams.kl_coef * (rho - 1.0 - log_rho)


def standardised(surrogate: Surrogate) -> Slot:
    """The surrogate of (A - mean A) / std A over the steps of the (mini)batch.

    Biased, and relative to the batch's scale, so step sizes are alike across tasks. Advantages that are
    equal up to rounding become 0. A minibatch needs at least two steps, or its gradient is always 0.
    """
    facts = facts_of(surrogate)._replace(couples=True, splits=True, rescale=_unit_scale)
    return Slot(_standardised, "standardised", (surrogate,), facts)


def _standardised(surrogate, log_prob, advantage, trajectory, hyperparams):
    advantage = _unit_scale(advantage, jnp.zeros_like(advantage), trajectory.mask)
    return surrogate(log_prob, advantage, trajectory, hyperparams)


def _unit_scale(advantage, resolution, mask):
    total, rounding, count = totals(mask, advantage, resolution**2, jnp.ones_like(advantage))
    count = jnp.maximum(count, 1)
    mean = total / count
    centred = advantage - mean
    spread = jnp.sqrt(totals(mask, centred**2)[0] / count)
    # The rounding in the advantages themselves, and that of subtracting their mean.
    rounding = jnp.sqrt(rounding / count)
    rounding = rounding + 4 * jnp.finfo(advantage.dtype).eps * jnp.abs(mean)
    resolved = spread > rounding
    return jnp.where(resolved, centred / jnp.where(resolved, spread, 1.0), 0.0)


@slot(linear=True, averages="lanes", whole_episodes=True)
def per_episode(gain: Array, mask: Array) -> Array:
    """Sum over steps, mean over the B episodes: the gradient is that of J."""
    return jnp.where(mask, gain, 0.0).sum() / mask.shape[1]


@slot(linear=True, averages="lanes", whole_episodes=True)
def per_length(gain: Array, mask: Array) -> Array:
    """Mean over the steps of each episode, then over the B episodes (Shao et al., 2024).

    Biased where lengths differ: a step of a short episode weighs more, whatever its advantage.
    """
    total = jnp.where(mask, gain, 0.0).sum(axis=0) / jnp.maximum(mask.sum(axis=0), 1)
    return total.sum() / mask.shape[1]


@slot(linear=True, averages="lanes", whole_episodes=True)
def per_row(gain: Array, mask: Array) -> Array:
    """Sum over steps, divided by the B episodes and the T rows of the batch, a constant (Liu et al., 2025).

    The gradient is that of J, over the longest length.
    """
    return jnp.where(mask, gain, 0.0).sum() / mask.size


@slot(linear=True, averages="steps", ignores_lanes=True, couples=True)
def per_step(gain: Array, mask: Array) -> Array:
    """Mean over the steps that count, as PPO usually takes it: long episodes weigh more."""
    return jnp.where(mask, gain, 0.0).sum() / jnp.maximum(mask.sum(), 1)
