"""Baselines: the exact minimisers of the trace, and the moments with a baseline per parameter.

The functions phi_{t,s} = c_t u_t 1(s_t = s) are uncorrelated across (t, s), parameter by parameter
(martingale differences), so every least-squares baseline is a ratio of sums of the same two arrays:
E[G_p phi_p] and E[phi_p^2] (Greensmith et al., 2004).
"""

from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.estimators import credit as credits
from jaxpg.estimators import describe
from jaxpg.lab.exact.recursions import Coefficients, paired, whole
from jaxpg.lab.exact.tables import (
    Moments,
    Tables,
    action_values,
    discounts,
    gradients_ahead,
    tabulate,
    visits,
)


class OptimalBaselines(NamedTuple):
    """The minimiser of tr Cov of each kind; 0 where the trace does not depend on it."""

    scalar: float  # one number
    per_parameter: np.ndarray  # [P]
    per_time: np.ndarray  # [H]
    per_time_per_parameter: np.ndarray  # [H, P]
    per_state_time: np.ndarray  # [H, S]
    local: np.ndarray  # [H, S] E[|u|^2 psi | s] / E[|u|^2 | s]: ignores the terms between steps
    peters_schaal: np.ndarray  # [H, P] optimal for each reward alone (Peters and Schaal, 2008)


def optimal_baselines(mdp: Mdp, logits, credit, gamma) -> OptimalBaselines:
    """b* = E[G phi] / E[phi^2] of G = sum_t c_t u_t psi_t, for one number, per time, state or parameter.

    credit: total_return (c_t = 1) or reward_to_go (c_t = gamma^t). Tables of [H, P] are for
    control_variate_moments, the one of [H, S] for baselines.tabulated. peters_schaal is for reward_to_go.
    Raises ValueError for another credit.
    """
    return minimisers(tabulate(mdp, logits), credit, gamma)


def minimisers(world: Tables, credit, gamma) -> OptimalBaselines:
    """`optimal_baselines` for given tables."""
    total = _is_total(credit)
    covariance, variance, expected = projections(world, total, gamma)

    def ratio(axes):
        return _ratio(covariance.sum(axes), variance.sum(axes))

    size = np.einsum("sa,sap,sap->s", world.policy, world.score, world.score)
    credited = np.einsum("sa,sap,sap,tsa->ts", world.policy, world.score, world.score, expected)
    return OptimalBaselines(
        scalar=float(ratio((0, 1, 2))),
        per_parameter=ratio((0, 1)),
        per_time=ratio((1, 2)),
        per_time_per_parameter=ratio(1),
        per_state_time=ratio(2),
        local=_ratio(credited, np.broadcast_to(size, credited.shape)),
        peters_schaal=_peters_schaal(world, gamma),
    )


def control_variate_moments(mdp: Mdp, logits, credit, gamma, baseline) -> Moments:
    """sum_t c_t u_t (psi_t - b_t) elementwise, with a baseline per parameter: [P] or [H, P].

    c_t = 1 for total_return and gamma^t for reward_to_go. A baseline fixed before the data is unbiased.
    Raises ValueError for another credit.
    """
    return controlled(tabulate(mdp, logits), credit, gamma, baseline)


def controlled(world: Tables, credit, gamma, baseline) -> Moments:
    """`control_variate_moments` for given tables."""
    total = _is_total(credit)
    start = 1.0 if total else discounts(gamma, world.horizon)[:, None, None]
    table = np.broadcast_to(baseline, (world.horizon, world.score.shape[-1]))
    shift = np.asarray(start)[..., None] * table[:, None, None, :]
    c = Coefficients(world.reward, float(gamma), world.variance, step=start, shift=shift)
    return (whole if total else paired)(world, c)


def _is_total(credit) -> bool:
    if credit not in (credits.total_return, credits.reward_to_go):
        raise ValueError(
            f"optimal baselines are known for total_return and reward_to_go, not {describe(credit)}"
        )
    return credit is credits.total_return


def projections(world: Tables, total, gamma):
    """E[G phi] and E[phi^2] [H, S, P], and E[psi_t | s, a] [H, S, A].

    E[G phi_t] has three terms: the step's own score; the earlier ones, with their sum Z_t known at s_t;
    and the later ones, which the action changes only through E[G_{t+1} | s_{t+1}].
    """
    pi, score, start = world.policy, world.score, discounts(gamma, world.horizon)
    weight = np.ones_like(start) if total else start
    _, action_value = action_values(world, gamma)
    visited, before = visits(world), _scores_before(world)
    ahead = gradients_ahead(world, action_value, start)
    past = _rewards_before(world, gamma) if total else np.zeros_like(visited)
    size = np.einsum("sa,sap,sap->sp", pi, score, score)
    covariance, variance = [], []
    for t, c in enumerate(weight):
        d, q = visited[t][:, None], action_value[t]
        own = d * np.einsum("sa,sap,sap,sa->sp", pi, score, score, q)
        earlier = before[t] * np.einsum("sa,sap,sa->sp", pi, score, q)
        later = d * np.einsum("sa,sap,sap->sp", pi, score, world.successor(ahead[t + 1]))
        covariance.append(c * (start[t] * (own + earlier) + later + past[t][:, None] * size))
        variance.append(c**2 * d * size)
    scale = start if total else np.ones_like(start)
    expected = scale[:, None, None] * action_value + _ratio(past, visited)[:, :, None]
    return np.stack(covariance), np.stack(variance), expected


def _scores_before(world):
    """E[sum_{k<t} u_k 1(s_t = s)] [H, S, P]."""
    visited, rows = visits(world), [np.zeros(world.score.shape[::2])]
    for t in range(world.horizon - 1):
        own = visited[t][:, None, None] * world.score
        flow = world.policy[..., None] * (rows[-1][:, None] + own)
        rows.append(np.einsum("sap,sax->xp", flow, world.transition))
    return np.stack(rows)


def _rewards_before(world, gamma):
    """E[sum_{k<t} gamma^k r_k 1(s_t = s)] [H, S]."""
    visited, rows = visits(world), [np.zeros_like(world.initial)]
    for t in range(world.horizon - 1):
        flow = rows[-1][:, None] + gamma**t * visited[t][:, None] * world.reward
        rows.append(np.einsum("sa,sax->x", world.policy * flow, world.transition))
    return np.stack(rows)


def _peters_schaal(world, gamma):
    """b_k = E[Z_k^2 gamma^k r_k] / E[Z_k^2], Z_k = sum_{t<=k} u_t, as baselines of R_t discounted from t."""
    pi, score, start = world.policy, world.score, discounts(gamma, world.horizon)
    visited, first = visits(world), _scores_before(world)
    second, rows = np.zeros(score.shape[::2]), []
    for t in range(world.horizon):
        d = visited[t][:, None, None]
        square = second[:, None] + 2 * first[t][:, None] * score + d * score**2
        reward = np.einsum("sa,sap,sa->p", pi, square, world.reward)
        rows.append(start[t] * _ratio(reward, np.einsum("sa,sap->p", pi, square)))
        second = np.einsum("sa,sap,sax->xp", pi, square, world.transition)
    from_now_on = np.cumsum(np.stack(rows)[::-1], axis=0)[::-1]
    return _ratio(from_now_on, np.broadcast_to(start[:, None], from_now_on.shape))


def _ratio(numerator, denominator):
    positive = denominator > 0.0
    return np.where(positive, numerator / np.where(positive, denominator, 1.0), 0.0)
