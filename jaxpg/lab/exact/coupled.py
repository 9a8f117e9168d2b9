"""Batches: estimates that couple their trajectories, and the direction of a mean over N."""

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
    return_moments,
    squared_returns,
    tabulate,
    visits,
)


class Cosine(NamedTuple):
    """Expected cosine of a mean over N trajectories, taken as Gaussian (central limit theorem)."""

    to_truth: float  # with the mean of the estimator
    between_batches: float  # with another such mean


def leave_one_out_moments(mdp: Mdp, logits, credit, gamma, num_trajectories) -> Moments:
    """Exact mean and covariance of the batch estimate with the leave_one_out baseline (Kool et al., 2019).

    total_return: Cov = E[U U^T (R-J)^2]/N - (N-2)/(N(N-1)) g g^T + F Var(R)/(N(N-1)).
    reward_to_go (per time, c_t = gamma^t): a U-statistic of order 2,
    Cov = (4(N-2) zeta_1 + 2 zeta_2) / (N(N-1)). The batch_mean baseline has (N-1)/N times the estimate.
    Raises ValueError when N < 2 and for another credit.
    """
    n = num_trajectories
    if n < 2:
        raise ValueError(
            f"leave_one_out compares each trajectory with the others: num_trajectories={n} must be at least 2"
        )
    if credit not in (credits.total_return, credits.reward_to_go):
        raise ValueError(
            "the covariance of leave one out is known for total_return and reward_to_go, not "
            f"{describe(credit)}; lab.enumeration covers small worlds"
        )
    world = tabulate(mdp, logits)
    if credit is credits.total_return:
        return _total(world, gamma, n)
    return _to_go(world, gamma, n)


def _total(world, gamma, n):
    mean, variance = return_moments(world, gamma)
    c = Coefficients(world.reward, float(gamma), world.variance, shift=mean)
    g, covariance = whole(world, c)
    unit = Coefficients(reward=1.0, decay=0.0)
    information = paired(world, unit).covariance
    own, pairs = np.outer(g, g), n * (n - 1)
    return Moments(
        g, (covariance + own) / n - (n - 2) / pairs * own + information * variance / pairs
    )


def _to_go(world, gamma, n):
    """The kernel h = 1/2 sum_t c_t (u_t - u'_t)(R_t - R'_t) of two trajectories, and E[h | one of them]."""
    start, visited = discounts(gamma, world.horizon), visits(world)
    value, _ = action_values(world, gamma)
    mean = (visited * value[:-1]).sum(axis=1)
    variance = (visited * squared_returns(world, gamma)[0][:-1]).sum(axis=1) - mean**2
    c = start[:, None, None]
    centred = Coefficients(
        world.reward, float(gamma), world.variance, step=c, shift=c * mean[:, None, None]
    )
    g, covariance = paired(world, centred)
    information = np.einsum(
        "t,ts,sa,sap,saq->pq",
        start**2 * variance,
        visited,
        world.policy,
        world.score,
        world.score,
        optimize=True,
    )
    later = _influence(world, gamma)
    crossed = np.einsum("t,k,tkp,ktq->pq", start, start, later, later, optimize=True)
    projection = covariance / 4
    kernel = covariance / 2 + information / 2 + crossed / 2
    return Moments(g, (4 * (n - 2) * projection + 2 * kernel) / (n * (n - 1)))


def _influence(world: Tables, gamma):
    """E[u_t R_k] [H, H, P] for every t and k."""
    value, action_value = action_values(world, gamma)
    visited, size = visits(world), world.score.shape[-1]
    influence = np.zeros((world.horizon, world.horizon, size))
    flow = np.zeros((world.horizon, len(world.initial), size))  # E[u_t 1(s_k = s)] for every t < k
    for k in range(world.horizon):
        influence[:k, k] = np.einsum("tsp,s->tp", flow[:k], value[k])
        joint = visited[k][:, None] * world.policy
        own = np.einsum("sa,sap,sa->p", joint, world.score, action_value[k])
        influence[k, : k + 1] = gamma ** np.arange(k, -1, -1)[:, None] * own
        flow[:k] = np.einsum(
            "tsp,sa,sax->txp", flow[:k], world.policy, world.transition, optimize=True
        )
        flow[k] = np.einsum("sa,sap,sax->xp", joint, world.score, world.transition)
    return influence


def cosine(moments: Moments, num_trajectories=1) -> Cosine:
    """E cos(g_N, E g) and E cos(g_N, g'_N) for g_N ~ Normal(mean, covariance / N).

    With m = E[x/|x|] = (2/sqrt(pi)) int_0^inf E[x exp(-v^2 |x|^2)] dv they are m.g/|g| and |m|^2
    (Ilyas et al., 2020, measure both). Raises ValueError where the mean is 0.
    """
    scale, directions = np.linalg.eigh(moments.covariance / num_trajectories)
    mean, scale = directions.T @ moments.mean, np.maximum(scale, 0.0)
    length = np.linalg.norm(mean)
    if length == 0:
        raise ValueError("the expected gradient is 0: it has no direction to compare with")
    # Trapezoids in log v converge geometrically; the integrand lives near v = 1/|x|.
    log_v, width = np.linspace(-40.0, 40.0, 3201, retstep=True)
    v = np.exp(log_v) / np.sqrt(length**2 + scale.sum())
    spread = 1.0 + 2.0 * v[:, None] ** 2 * scale
    log_density = -0.5 * np.log(spread) - v[:, None] ** 2 * mean**2 / spread
    density = np.exp(log_density.sum(axis=1)) * v
    unit = 2.0 / np.sqrt(np.pi) * width * (density[:, None] * mean / spread).sum(axis=0)
    return Cosine(float(unit @ mean / length), float(unit @ unit))
