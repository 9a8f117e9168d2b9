"""Weights: the exact moments of a whole episode's importance weight W = prod_t rho_t."""

from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.tables import action_values, average, squared_returns, tabulate


class WeightMoments(NamedTuple):
    """Moments of W under the behaviour."""

    mean: float  # E[W], 1 whenever the behaviour has support
    square: float  # E[W^2] = 1 + chi^2, the exponential of the Renyi divergence of order 2
    ess_fraction: float  # E[W]^2 / E[W^2], the limit of the effective sample size over N
    log_mean: float  # E[log W]
    log_variance: float  # Var[log W]


def weight_moments(mdp: Mdp, logits, behaviour_logits) -> WeightMoments:
    """Moments of W = prod_t pi(a_t|s_t) / beta(a_t|s_t) over whole episodes of the behaviour.

    Raises ValueError where the behaviour has no support.
    """
    world = tabulate(mdp, logits, behaviour_logits)
    mean, square = (world.initial @ mass_ahead(world, k)[0] for k in (1, 2))
    with np.errstate(divide="ignore"):
        log_ratio = np.where(world.terminal[:, None], 0.0, np.log(world.ratio))
    # log W is the return of a world that pays log rho.
    paid = world._replace(
        policy=world.behaviour, reward=log_ratio, variance=np.zeros_like(log_ratio)
    )
    log_mean = float(world.initial @ action_values(paid, 1.0)[0][0])
    log_square = float(world.initial @ squared_returns(paid, 1.0)[0][0])
    log_variance = log_square - log_mean**2
    return WeightMoments(
        float(mean), float(square), float(mean**2 / square), log_mean, log_variance
    )


def mass_ahead(world, power) -> np.ndarray:
    """E[(prod_{k>=t} rho_k)^power | s_t] [H+1, S] under the behaviour."""
    rows = [np.ones(len(world.initial))]
    for _ in range(world.horizon):
        measure = world.behaviour * world.ratio**power
        rows.append(average(measure, world.successor(rows[-1])))
    return np.stack(rows[::-1])


def weight_growth(mdp: Mdp, logits, behaviour_logits) -> float:
    """lim (1/H) log E[W^2]: the logarithm of the spectral radius of sum_a pi^2 / beta P."""
    world = tabulate(mdp, logits, behaviour_logits)
    kernel = average(world.behaviour * world.ratio**2, world.transition)
    return float(np.log(np.abs(np.linalg.eigvals(kernel)).max()))
