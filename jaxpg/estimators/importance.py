"""Importance: whose data is it?

A slot takes (log_ratio, trajectory, hyperparams) and returns Weights: `step` multiplies the advantage
and `trace` enters the credit recursion. log_ratio [T, B] = log pi(a_t|s_t) - log beta(a_t|s_t), 0 where
masked, is kept in log space until the last line.

>>> log_ratio = jnp.log(jnp.array([[2.0], [0.5], [3.0]]))  # one episode of three steps
>>> for weights in (on_policy, one_step, trajectory, per_decision, prefix, truncated(1.0)):
...     step, trace = weights(log_ratio, None, None)
...     print(describe(weights), step.ravel().round(2), trace.ravel().round(2))
on_policy [1. 1. 1.] [1. 1. 1.]
one_step [2.  0.5 3. ] [1. 1. 1.]
trajectory [3. 3. 3.] [1. 1. 1.]
per_decision [2. 1. 3.] [2.  0.5 3. ]
prefix [2. 1. 3.] [1. 1. 1.]
truncated(1.0) [1.  0.5 1. ] [1.  0.5 1. ]
>>> [x(one_step, 2.0)(log_ratio, None, None).step.ravel().tolist() for x in (capped, dropped_above)]
[[2.0, 0.5, 2.0], [2.0, 0.5, 0.0]]
>>> print(from_start(one_step)(log_ratio, None, Hyperparams(gamma=0.5)).step.ravel().round(2))
[2.   0.25 0.75]
>>> mask = jnp.ones((3, 2), bool)
>>> both = Trajectory(*[mask] * 10)
>>> print(self_normalised(one_step)(log_ratio * jnp.array([[1.0, -1.0]]), both, None).step[0].round(2))
[1.5999999  0.39999998]
>>> print(jnp.exp(mixture(jnp.log(jnp.array([[[0.5]], [[0.1]]])), mask[:1, :1])).round(2))
[[0.29999998]]
>>> type(on_policy(log_ratio, None, None)) is Weights
True
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxpg.estimators.slot import Slot, describe, facts_of, slot
from jaxpg.types import Array, Hyperparams, Trajectory


class Weights(NamedTuple):
    step: Array  # [T, B]
    trace: Array  # [T, B]


Importance = Callable[[Array, Trajectory, Hyperparams], Weights]


@slot(corrects=False)
def on_policy(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step = trace = 1: the data is the policy's own."""
    del trajectory, hyperparams
    return Weights(jnp.ones_like(log_ratio), jnp.ones_like(log_ratio))


@slot()
def one_step(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step = rho_t, trace = 1.

    Biased for the gradient of J at pi, because states and returns stay the behaviour's; exact for the
    surrogate objective that PPO and TRPO ascend.
    """
    del trajectory, hyperparams
    return Weights(jnp.exp(log_ratio), jnp.ones_like(log_ratio))


@slot(whole_episodes=True)
def trajectory(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step_t = W = prod_k rho_k over the whole episode, trace = 1 (Kahn and Marshall, 1953).

    Unbiased on whole episodes for every unbiased credit; the variance of W grows exponentially in T.
    """
    del trajectory, hyperparams
    return Weights(jnp.exp(_whole(log_ratio)), jnp.ones_like(log_ratio))


@slot(whole_episodes=True)
def per_decision(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step_t = prod_{k<=t} rho_k, trace = rho: only ratios up to a reward multiply it (Precup et al., 2000).

    sum_t u_t sum_{k>=t} gamma^(k-t) r_k prod_{j<=k} rho_j, every ratio once; unbiased on whole episodes.
    With a critic's values this is the doubly robust form (Jiang and Li, 2016).
    """
    del trajectory, hyperparams
    return Weights(jnp.exp(_so_far(log_ratio)), jnp.exp(log_ratio))


@slot(whole_episodes=True)
def prefix(log_ratio: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Weights:
    """step_t = prod_{k<=t} rho_k, trace = 1: states as pi visits them, returns as beta earns them.

    Biased for the gradient of J at pi, to first order in the distance of pi and beta; whole episodes.
    """
    del trajectory, hyperparams
    return Weights(jnp.exp(_so_far(log_ratio)), jnp.ones_like(log_ratio))


def truncated(ceiling: float) -> Importance:
    """step_t = trace_t = min(rho_t, ceiling): V-trace with both ceilings equal (Espeholt et al., 2018).

    Bounds the weights at the cost of a bias. Raises ValueError unless ceiling > 0.
    """
    if not ceiling > 0:
        raise ValueError(f"truncated(ceiling={ceiling}) must be positive; V-trace uses 1")
    return Slot(_truncated, "truncated", (ceiling,))


def _truncated(ceiling, log_ratio, trajectory, hyperparams):
    weight = jnp.exp(jnp.minimum(log_ratio, math.log(ceiling)))
    return Weights(weight, weight)


def capped(importance: Importance, ceiling: float) -> Importance:
    """step = min(step, ceiling): with `one_step` by token, with `trajectory` by sequence (Yao et al., 2025).

    For data of a sampler that is not the trainer. Biased; unlike `truncated`, credit is not weighted.
    Raises ValueError unless ceiling > 0.
    """
    return _bounded("capped", importance, ceiling)


def dropped_above(importance: Importance, ceiling: float) -> Importance:
    """step = step where it is at most the ceiling, else 0: masked importance sampling, by token or sequence.

    Raises ValueError unless ceiling > 0.
    """
    return _bounded("dropped_above", importance, ceiling)


def _bounded(name, importance, ceiling):
    if not ceiling > 0:
        raise ValueError(f"{name}: ceiling={ceiling} must be positive; try 2")
    bound = {"capped": jnp.minimum, "dropped_above": lambda x, top: jnp.where(x <= top, x, 0.0)}
    function = partial(_bound, bound[name])
    return Slot(function, name, (importance, ceiling), facts_of(importance))


def _bound(bound, importance, ceiling, log_ratio, trajectory, hyperparams):
    weights = importance(log_ratio, trajectory, hyperparams)
    return weights._replace(step=bound(weights.step, ceiling))


def self_normalised(importance: Importance) -> Importance:
    """step_{t,i} = W_{t,i} / mean_j W_{t,j}: weights relative to the batch, none above N.

    Consistent, with a bias O(1/N), and invariant to the scale of W; an episode that has ended keeps the
    weight it ended with. Weights are not differentiated here: for the gradient of sum_i W_i R_i / sum_i W_i,
    including its normaliser, add the baseline `weighted_mean`.
    Raises ValueError unless importance is trajectory, prefix or one_step.
    """
    if describe(importance) not in _LOG_STEP:
        raise ValueError(
            f"self_normalised cannot wrap {describe(importance)}; it wraps "
            "trajectory, prefix or one_step, and from_start goes outside"
        )
    facts = facts_of(importance)._replace(couples=True, min_lanes=2)
    return Slot(_self_normalised, "self_normalised", (importance,), facts)


def _self_normalised(importance, log_ratio, trajectory, hyperparams):
    # A lane in which no step counts is not an episode: dropped data has no share.
    present = trajectory.mask.any(axis=0, keepdims=True)
    log_step = jnp.where(present, _LOG_STEP[describe(importance)](log_ratio), -jnp.inf)
    share = jax.nn.softmax(log_step, axis=1)
    return Weights(share * present.sum(), jnp.ones_like(log_ratio))


def _whole(log_ratio):
    return jnp.broadcast_to(log_ratio.sum(axis=0, keepdims=True), log_ratio.shape)


def _so_far(log_ratio):
    return jnp.cumsum(log_ratio, axis=0)


_LOG_STEP = {
    "trajectory": _whole,
    "prefix": _so_far,
    "one_step": lambda log_ratio: log_ratio,
}


def from_start(importance: Importance) -> Importance:
    """step_t times gamma^t: the exact gradient of the discounted return, on whole episodes.

    Without it, early and late states count alike, which for gamma < 1 is not the gradient of any function
    (Nota and Thomas, 2020).
    """
    facts = facts_of(importance)._replace(whole_episodes=True)
    return Slot(_from_start, "from_start", (importance,), facts)


def _from_start(importance, log_ratio, trajectory, hyperparams):
    weights = importance(log_ratio, trajectory, hyperparams)
    time = jnp.arange(log_ratio.shape[0], dtype=log_ratio.dtype)[:, None]
    return weights._replace(step=weights.step * hyperparams.gamma**time)


def mixture(log_probs: Array, mask: Array, counts: Sequence[int] | None = None) -> Array:
    """The log-probabilities [T, B] of q = sum_k c_k beta_k, from those of each behaviour [K, T, B].

    c_k = counts_k / sum counts, by default 1/K. Step by step
    log q(a_t | history) = log sum_k c_k exp sum_{j<=t} log beta_k - the same up to t-1. With it as
    `trajectory.log_prob`, every importance slot weights by the density of the mixture, which stays finite
    where one behaviour never does what another did and 1/beta_k would be infinite (Veach and Guibas, 1995;
    Levine and Koltun, 2013). Unbiased when behaviour k gathered a share c_k of the episodes.
    """
    chex.assert_equal_shape([*log_probs, mask])
    so_far = jnp.cumsum(jnp.where(mask[None], log_probs, 0.0), axis=1)
    counts = counts or [1] * log_probs.shape[0]
    shares = jnp.array([count / sum(counts) for count in counts], log_probs.dtype)
    density = jax.nn.logsumexp(so_far, axis=0, b=shares[:, None, None])
    return jnp.diff(density, axis=0, prepend=jnp.zeros_like(density[:1]))


IMPORTANCES = {
    "per_decision": per_decision,
    "trajectory": trajectory,
    "prefix": prefix,
    "one_step": one_step,
    "truncated": truncated(1.0),
    "normalised_trajectory": self_normalised(trajectory),
    "normalised_prefix": self_normalised(prefix),
    "normalised_one_step": self_normalised(one_step),
}
