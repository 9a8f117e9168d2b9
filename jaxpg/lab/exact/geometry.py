"""Geometry: the Fisher matrix, the natural gradient and the trust-region step, exactly."""

from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.tables import gradient, objective, tabulate, visits


class TrustRegionStep(NamedTuple):
    """A natural-gradient step to the edge of the quadratic trust region, and where it leads."""

    step: np.ndarray  # [P]
    mean_kl: float  # the true divergence after it, per step of the episode
    objective: float  # J there


def fisher(mdp: Mdp, logits) -> np.ndarray:
    """F = E[U U^T] = sum_t E[u_t u_t^T] [P, P], of the whole episode (Kakade, 2002).

    Singular for tabular softmax: one null direction per observation. TRPO's average over steps is F / H.
    """
    world = tabulate(mdp, logits)
    weight = visits(world).sum(axis=0)[:, None] * world.policy
    return np.einsum("sa,sap,saq->pq", weight, world.score, world.score, optimize=True)


def natural_gradient(mdp: Mdp, logits, gamma) -> np.ndarray:
    """F^+ grad J [P], the minimum-norm natural gradient (Kakade, 2002).

    It is also the regression of R on U with an intercept (Peters and Schaal, 2008).
    """
    return np.linalg.pinv(fisher(mdp, logits), rcond=1e-12, hermitian=True) @ gradient(
        mdp, logits, gamma
    )


def trpo_step(mdp: Mdp, logits, gamma, max_kl) -> TrustRegionStep:
    """sqrt(2 max_kl / g^T K^+ g) K^+ g with K = F / H, before any line search (Schulman et al., 2015).

    Raises ValueError where the gradient is 0, because then no direction is better than another.
    """
    natural, true = natural_gradient(mdp, logits, gamma), gradient(mdp, logits, gamma)
    length = float(natural @ true)
    if not length > 0:
        raise ValueError("the gradient is 0: there is no direction to step in")
    step = np.sqrt(2.0 * max_kl / (mdp.horizon * length)) * mdp.horizon * natural
    after = np.asarray(logits, np.float64) + step.reshape(np.shape(logits))
    return TrustRegionStep(step, mean_kl(mdp, logits, after), objective(mdp, after, gamma))


def mean_kl(mdp: Mdp, logits, after) -> float:
    """(1/H) sum_t E KL(pi(.|s_t) || pi'(.|s_t)) on states of pi; steps after an episode's end count 0."""
    old, new = tabulate(mdp, logits), tabulate(mdp, after)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.where(old.policy > 0, np.log(old.policy) - np.log(new.policy), 0.0)
    divergence = np.where(old.terminal, 0.0, (old.policy * log_ratio).sum(axis=1))
    return float((visits(old) @ divergence).mean())
