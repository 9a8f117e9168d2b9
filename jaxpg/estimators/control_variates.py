"""Per-parameter baselines: control variates on per-trajectory gradients.

They are not numbers subtracted from psi: each parameter has its own, so they change the direction of
every trajectory's gradient, g_i - b * U_i with U_i the score of trajectory i and E U = 0. They need whole
episodes on-policy, and hold [B, P] numbers.

A control variate takes (scores_of, coefficient, trajectory, hyperparams): scores_of(weight [T, B]) gives
sum_t weight_{t,i} grad log pi(a_{t,i}|s_{t,i}) as [B, P], and coefficient [T, B] holds the weights that
give the g_i. It returns the corrected g_i, [B, P].

>>> psi, mask = jnp.array([[1.0, 2.0, 6.0]]), jnp.ones((1, 3), bool)  # one step of three episodes
>>> trajectory = Trajectory(*[mask] * 10)._replace(reward=psi)
>>> for variate in (optimal_per_parameter, peters_schaal):
...     print(variate(lambda weight: weight.T, psi, trajectory, Hyperparams()).ravel())
[-3.  -1.5  4.5]
[-3.  -1.5  4.5]
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxpg.types import Array, Hyperparams, Trajectory

ControlVariate = Callable[[Callable[[Array], Array], Array, Trajectory, Hyperparams], Array]


def optimal_per_parameter(
    scores_of: Callable[[Array], Array],
    coefficient: Array,
    trajectory: Trajectory,
    hyperparams: Hyperparams,
) -> Array:
    """g_i - b_{-i} U_i with b_k = E[g_k U_k] / E[U_k^2], estimated from the other trajectories.

    For the total return b_k = E[U_k^2 R] / E[U_k^2] (Williams, 1992; Greensmith et al., 2004).
    Leave-one-out, so unbiased; 0 where a parameter has no score. Raises ValueError for B < 2.
    """
    chex.assert_equal_shape([coefficient, trajectory.mask])
    del hyperparams
    _check_others(coefficient)
    gradient = scores_of(coefficient)
    score = scores_of(trajectory.mask.astype(coefficient.dtype))
    return gradient - _of_others(gradient * score, score**2) * score


def peters_schaal(
    scores_of: Callable[[Array], Array],
    coefficient: Array,
    trajectory: Trajectory,
    hyperparams: Hyperparams,
) -> Array:
    """sum_k U_{0:k} (gamma^k r_k - b_k) with b_k = E[U_{0:k}^2 gamma^k r_k] / E[U_{0:k}^2], per parameter.

    U_{0:k} is the score of the first k+1 steps; a baseline for every step and parameter (Peters and
    Schaal, 2008), leave-one-out. Replaces the credit: the plain gradient is reward-to-go from the start.
    Costs T backward passes. Raises ValueError for B < 2.
    """
    chex.assert_equal_shape([coefficient, trajectory.mask, trajectory.reward])
    _check_others(coefficient)
    reward = jnp.where(trajectory.mask, trajectory.reward, 0.0)
    time = jnp.arange(reward.shape[0], dtype=reward.dtype)
    reward = reward * (hyperparams.gamma**time)[:, None]
    rows = jnp.arange(reward.shape[0])[:, None]

    def step(total, k):
        # Up to and including step k, as one backward pass: memory stays [B, P], whatever T.
        score = scores_of(jnp.where(trajectory.mask & (rows <= k), 1.0, 0.0))
        weight = reward[k][:, None]
        baseline = _of_others(score**2 * weight, score**2)
        # Episodes that have ended count too: given only the survivors, E U is not 0.
        return total + score * (weight - baseline), None

    start = jnp.zeros_like(scores_of(coefficient))
    return jax.lax.scan(step, start, jnp.arange(reward.shape[0]))[0]


CONTROL_VARIATES = {
    "optimal_per_parameter": optimal_per_parameter,
    "peters_schaal": peters_schaal,
}


def _of_others(numerator: Array, denominator: Array) -> Array:
    numerator, denominator = (x.sum(axis=0, keepdims=True) - x for x in (numerator, denominator))
    positive = denominator > 0.0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def _check_others(coefficient):
    if coefficient.shape[1] < 2:
        raise ValueError(
            "a control variate is estimated from the other episodes: "
            f"num_envs={coefficient.shape[1]} must be at least 2"
        )
