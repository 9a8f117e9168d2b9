"""Baselines: what is subtracted?

A slot takes (psi, scores, trajectory, hyperparams) and returns b [T, B]. `scores` describes the weighted
scores g_t = step_t grad log pi(a_t|s_t) that b will multiply; it costs nothing unless a baseline uses it.

>>> psi, nothing = jnp.array([[1.0, 2.0, 6.0]]), (None, None, None)  # one step of three episodes
>>> [b(psi, *nothing).ravel().tolist() for b in (none, batch_mean, leave_one_out, constant(2.0))]
[[0.0, 0.0, 0.0], [3.0, 3.0, 3.0], [4.0, 3.5, 1.5], [2.0, 2.0, 2.0]]
>>> mask, zeros = jnp.array([[True, True, False]]), jnp.zeros((1, 3), int)
>>> trajectory = Trajectory(*[zeros] * 7, mask, value=psi, next_value=psi)
>>> scores = Scores(jnp.array([[1.0, 1.0, 2.0]]), lambda lanes, step, psi: psi, lambda lanes, step: step)
>>> given = psi, scores, trajectory, Hyperparams(normaliser_coef=0.5)
>>> [b(*given).ravel().tolist() for b in (time_mean, weighted_mean, critic, regularised(critic))]
[[2.0, 1.0, 1.5], [3.75, 3.75, 3.75], [1.0, 2.0, 6.0], [0.5, 1.5, 5.5]]
>>> [b(*given).ravel().tolist() for b in (optimal_constant, optimal_per_time, optimal_token)]
[[4.0, 3.5, 1.5], [4.0, 3.5, 1.5], [1.5, 1.5, 1.5]]
>>> tabulated([[7.0]])(*given).ravel().tolist()
[7.0, 7.0, 7.0]
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.devices import across, shards
from jaxpg.estimators.slot import Slot, facts_of, slot
from jaxpg.types import Array, Hyperparams, Trajectory


class Scores(NamedTuple):
    """The weighted scores g_t of trajectories, which are never stored; of any of their lanes."""

    step: Array  # [T, B] their weights
    # (trajectory, step, psi) -> g_t . sum_k psi_k g_k, all [T, B]
    inner: Callable[[Trajectory, Array, Array], Array]
    # (trajectory, step) -> |g_t|^2 [T, B], g_t in the parameters of the distribution, not of the network
    square: Callable[[Trajectory, Array], Array]


Baseline = Callable[[Array, Scores, Trajectory, Hyperparams], Array]


@slot()
def none(psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams) -> Array:
    """b = 0."""
    del scores, trajectory, hyperparams
    return jnp.zeros_like(psi)


def constant(value: float) -> Baseline:
    """b = value, known before the data. Unbiased; it may also raise the variance."""
    return Slot(_constant, "constant", (value,))


def _constant(value, psi, scores, trajectory, hyperparams):
    del scores, trajectory, hyperparams
    return jnp.full_like(psi, value)


def tabulated(table: Array | np.ndarray) -> Baseline:
    """b_t = table[step in the episode, observation], with a table [H, O] known before the data.

    Observations are Discrete. Steps from H on read the last row. Raises ValueError unless it has two axes.
    """
    table = np.asarray(table)
    if table.ndim != 2:
        raise ValueError(
            f"tabulated takes a table [steps, observations], got shape {table.shape}; for a b(s) without "
            "time write table[None, :]"
        )
    return Slot(_tabulated, "tabulated", (table,))


def _tabulated(table, psi, scores, trajectory, hyperparams):
    del scores, hyperparams
    row = jnp.broadcast_to(jnp.arange(psi.shape[0])[:, None], psi.shape)
    started = jax.lax.cummax(jnp.where(trajectory.first, row, 0), axis=0)
    step = jnp.minimum(row - started, table.shape[0] - 1)
    return jnp.asarray(table, psi.dtype)[step, trajectory.obs]


@slot(couples=True, splits=True, min_lanes=2)
def batch_mean(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_t = (1/N) sum_j psi_{t,j}, including the trajectory that it is subtracted from.

    Biased: the expected gradient is exactly (N-1)/N of the true one, because the estimate is (N-1)/N
    times that of leave_one_out, sample by sample.
    """
    del scores, trajectory, hyperparams
    return jnp.broadcast_to(_total(psi) / _lanes(psi), psi.shape)


@slot(couples=True, splits=True, min_lanes=2)
def leave_one_out(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_{t,i} = (1/(N-1)) sum_{j != i} psi_{t,j}, independent of trajectory i, so unbiased.

    An episode that has ended counts with its credit at t: 0 to go, or its total return (Kool et al., 2019).
    Raises ValueError when N < 2.
    """
    del scores, trajectory, hyperparams
    _check_others(psi, "leave_one_out")
    return (_total(psi) - psi) / (_lanes(psi) - 1)


@slot(couples=True, splits=True, min_lanes=2)
def time_mean(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_{t,i} = mean of psi_{t,j} over the other trajectories still running at t; 0 where there is none.

    Unbiased like leave_one_out, and closer to the running episodes' psi where lengths differ.
    Raises ValueError when N < 2.
    """
    del scores, hyperparams
    _check_others(psi, "time_mean")
    running = trajectory.mask.astype(psi.dtype)
    alive = jnp.where(trajectory.mask, psi, 0.0)
    total, count = _total((alive, running))
    return (total - alive) / jnp.maximum(count - running, 1.0)


@slot(couples=True, splits=True, min_lanes=2)
def weighted_mean(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_t = sum_j w_{t,j} psi_{t,j} / sum_j w_{t,j} over all trajectories, with the step weights w.

    Differentiating a normaliser subtracts this: with the total return and self_normalised(trajectory)
    weights the estimate is exactly the gradient of sum_i W_i R_i / sum_i W_i (Levine and Koltun, 2013).
    Its bias is O(1/N), like that objective's.
    """
    del trajectory, hyperparams
    total, weight = _total((scores.step * psi, scores.step))
    return jnp.broadcast_to(total / weight, psi.shape)


def regularised(baseline: Baseline) -> Baseline:
    """b - normaliser_coef: with self-normalised weights, adds normaliser_coef grad log sum_i W_i.

    Keeps the policy where the samples have density (Levine and Koltun, 2013, equation 4).
    """
    return Slot(_regularised, "regularised", (baseline,), facts_of(baseline))


def _regularised(baseline, psi, scores, trajectory, hyperparams):
    return baseline(psi, scores, trajectory, hyperparams) - hyperparams.normaliser_coef


@slot(couples=True, splits=True, min_lanes=2)
def optimal_constant(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_i estimates b* = E[sum_t g_t psi_t . sum_t g_t] / E|sum_t g_t|^2 from the other trajectories.

    For the total return this is E[|U|^2 R] / E[|U|^2] (Weaver and Tao, 2001; Greensmith et al., 2004).
    Leave-one-out, so unbiased; as N grows, it minimises the trace over constants.
    Raises ValueError when N < 2.
    """
    del hyperparams
    _check_others(psi, "optimal_constant")
    inner = partial(scores.inner, trajectory, scores.step)
    numerator, denominator = (
        inner(x).sum(axis=0, keepdims=True) for x in (psi, jnp.ones_like(psi))
    )
    return jnp.broadcast_to(_ratio_of_others(numerator, denominator), psi.shape)


@slot(couples=True, splits=True, min_lanes=2)
def optimal_per_time(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_{t,i} estimates b*_t = E[G . g_t] / E|g_t|^2 from the other trajectories, G = sum_k g_k psi_k.

    The scores of different steps are orthogonal in expectation, so the optimum decouples over t, and
    E|g_t|^2 = E[g_t . sum_k g_k] needs no norm of a single step. Leave-one-out, so unbiased; noisy for
    few trajectories. Raises ValueError when N < 2.
    """
    del hyperparams
    _check_others(psi, "optimal_per_time")
    inner = partial(scores.inner, trajectory, scores.step)
    return _ratio_of_others(inner(psi), inner(jnp.ones_like(psi)))


@slot(couples=True, splits=True, min_lanes=2, whole_episodes=True)
def optimal_token(
    psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams
) -> Array:
    """b_t = sum_j W_{t,j} psi_{t,j} / sum_j W_{t,j}, W_t = sum_{k<=t} |g_k|^2, over j running at t.

    The optimal token baseline as published (Li et al., 2026): norms of scores in the distribution's own
    parameters, added up from the start, need no backward pass. Biased, as its own trajectory is included: one
    that runs alone has advantage 0. `optimal_per_time` is unbiased, and estimates the b_t of least trace.
    Raises ValueError when N < 2.
    """
    del hyperparams
    _check_others(psi, "optimal_token")
    square = jnp.where(trajectory.mask, scores.square(trajectory, scores.step), 0.0)
    energy = jnp.where(trajectory.mask, jnp.cumsum(square, axis=0), 0.0)
    total, weighted = _total((energy, energy * psi))
    return jnp.broadcast_to(weighted / jnp.where(total > 0.0, total, 1.0), psi.shape)


@slot(reads_critic=True)
def critic(psi: Array, scores: Scores, trajectory: Trajectory, hyperparams: Hyperparams) -> Array:
    """b_t = V(s_t), the critic's value when the data was gathered."""
    del psi, scores, hyperparams
    return trajectory.value


def _lanes(psi):
    return psi.shape[1] * shards()


def _total(tree):
    """Sums over the lanes, on whichever device they are: [T, 1] each."""
    return across(jax.tree.map(lambda x: x.sum(axis=1, keepdims=True), tree))


def _check_others(psi, name):
    if _lanes(psi) < 2:
        raise ValueError(
            f"{name} compares each episode with the others: num_envs={_lanes(psi)} must be at least 2"
        )


def _ratio_of_others(numerator, denominator):
    both = numerator, denominator
    numerator, denominator = jax.tree.map(jnp.subtract, _total(both), both)
    positive = denominator > 0.0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
