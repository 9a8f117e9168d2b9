"""LQR: the scalar linear-quadratic regulator with a linear-Gaussian policy, exactly.

Every conditional moment is a polynomial in s of degree at most 6, so its values at 9 nodes determine it,
and 14-point Gauss-Hermite rules integrate it without error. Nodes for states and quadrature points for
actions make the regulator a table that the recursions for an Mdp read as they are.
"""

from typing import NamedTuple

import numpy as np

from jaxpg.estimators import Estimator, baselines, uses
from jaxpg.lab.exact.baselines import OptimalBaselines, controlled, minimisers
from jaxpg.lab.exact.compose import composed
from jaxpg.lab.exact.recursions import Coefficients, paired
from jaxpg.lab.exact.tables import (
    Moments,
    Tables,
    action_values,
    discounts,
    squared_returns,
)
from jaxpg.types import Hyperparams

_NODES, _POINTS = 9, 14


class Regulator(NamedTuple):
    """s' = a s + b u + w, reward -(q s^2 + c u^2); policies are u ~ Normal(k s, sigma^2).

    Their parameters are (k, log sigma). The defaults are the instance of the tests.
    """

    state_gain: float = 1.0
    action_gain: float = 0.5
    process_std: float = 0.1
    initial_mean: float = 1.0
    initial_variance: float = 0.25
    state_cost: float = 1.0
    action_cost: float = 0.1
    horizon: int = 5


def objective(regulator: Regulator, params, gamma) -> float:
    """J = -sum_t gamma^t [(q + c k^2) S_t + c sigma^2] with S_t = E[s_t^2]."""
    return float(_sensitivities(regulator, params, gamma)[0])


def gradient(regulator: Regulator, params, gamma) -> np.ndarray:
    """(dJ/dk, dJ/dlog sigma) [2], by forward sensitivities."""
    return _sensitivities(regulator, params, gamma)[1:]


def fisher(regulator: Regulator, params) -> np.ndarray:
    """diag(sum_t S_t / sigma^2, 2 H) [2, 2], of the whole episode."""
    squares = _squares(regulator, params)[:, 0]
    return np.diag([squares.sum() / np.exp(2 * params[1]), 2.0 * regulator.horizon])


def moments(
    regulator: Regulator, params, estimator: Estimator, hyperparams: Hyperparams
) -> Moments:
    """Exact mean [2] and covariance [2, 2] of one on-policy episode's gradient; a critic is the exact V.

    Raises ValueError naming a slot that the recursions do not cover, tabulated among them.
    """
    if uses(estimator.baseline, baselines.tabulated):
        raise ValueError("tabulated baselines need discrete observations; the regulator has none")
    return composed(_tables(regulator, params), estimator, hyperparams)


def advantage_moments(regulator: Regulator, params, gamma) -> Moments:
    """Of sum_t gamma^t u_t (Q_t - V_t) with the exact values."""
    world = _tables(regulator, params)
    value, action_value = action_values(world, gamma)
    # A quadrature point holds the action and the process noise, which Q averages over.
    noise = _hermite()[1]
    by_action = action_value.reshape(*action_value.shape[:2], _POINTS, _POINTS) @ noise
    advantage = np.repeat(by_action, _POINTS, axis=-1) - value[:-1, :, None]
    start = discounts(gamma, world.horizon)[:, None, None]
    return paired(world, Coefficients(advantage, decay=0.0, step=start))


def optimal_baselines(regulator: Regulator, params, credit, gamma) -> OptimalBaselines:
    """As exact.optimal_baselines; those that depend on the state, local and per_state_time, are nan."""
    best = minimisers(_tables(regulator, params), credit, gamma)
    nothing = np.full_like(best.local, np.nan)
    return best._replace(local=nothing, per_state_time=nothing)


def control_variate_moments(regulator: Regulator, params, credit, gamma, baseline) -> Moments:
    """As exact.control_variate_moments: a baseline per parameter, [2] or [H, 2]."""
    return controlled(_tables(regulator, params), credit, gamma, baseline)


def return_variance(regulator: Regulator, params, gamma) -> float:
    """Var[sum_t gamma^t r_t] of one episode."""
    world = _tables(regulator, params)
    mean = world.initial @ action_values(world, gamma)[0][0]
    return float(world.initial @ squared_returns(world, gamma)[0][0] - mean**2)


def _squares(regulator, params):
    """S_t and its derivatives by k and log sigma [H, 3]."""
    k, variance = params[0], np.exp(2 * params[1])
    closed, gain = regulator.state_gain + regulator.action_gain * k, regulator.action_gain
    row = np.array([regulator.initial_mean**2 + regulator.initial_variance, 0.0, 0.0])
    rows = []
    for _ in range(regulator.horizon):
        rows.append(row)
        forced = [gain**2 * variance + regulator.process_std**2, 2 * closed * gain * row[0], 0.0]
        row = closed**2 * row + np.array([*forced[:2], 2 * gain**2 * variance])
    return np.stack(rows)


def _sensitivities(regulator, params, gamma):
    """J and its derivatives by k and log sigma [3]."""
    k, variance, c = params[0], np.exp(2 * params[1]), regulator.action_cost
    squares = _squares(regulator, params)
    cost = (regulator.state_cost + c * k**2) * squares
    cost += np.stack(
        [
            c * variance + 0 * squares[:, 0],
            2 * c * k * squares[:, 0],
            2 * c * variance + 0 * squares[:, 0],
        ],
        1,
    )
    return -discounts(gamma, regulator.horizon) @ cost


def _hermite():
    """Points and weights of the expectation under a unit normal, exact to degree 27."""
    points, weights = np.polynomial.hermite_e.hermegauss(_POINTS)
    return points, weights / weights.sum()


def _tables(regulator, params) -> Tables:
    """The regulator at nodes s, quadrature points (action noise, process noise) as actions.

    The transition "probabilities" are Lagrange polynomials at the successor: signed, and exact for the
    polynomials that the recursions pass through them.
    """
    k, std = params[0], np.exp(params[1])
    points, weights = _hermite()
    noise, process = (x.reshape(-1) for x in np.meshgrid(points, points, indexing="ij"))
    probability = np.outer(weights, weights).reshape(-1)
    radius = 3.0 * np.sqrt(_squares(regulator, params)[:, 0].max())
    nodes = radius * np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
    s = nodes[:, None]
    action = k * s + std * noise
    after = regulator.state_gain * s + regulator.action_gain * action
    after = after + regulator.process_std * process
    reward = -(regulator.state_cost * s**2 + regulator.action_cost * action**2)
    start = regulator.initial_mean + np.sqrt(regulator.initial_variance) * points
    score = np.stack(np.broadcast_arrays(noise * s / std, noise**2 - 1.0), axis=-1)
    measure = np.broadcast_to(probability, reward.shape)
    return Tables(
        initial=weights @ _lagrange(nodes, start),
        transition=_lagrange(nodes, after),
        reward=reward,
        variance=np.zeros_like(reward),
        terminal=np.zeros(_NODES, bool),
        observation=np.arange(_NODES),
        horizon=regulator.horizon,
        policy=measure,
        behaviour=measure,
        ratio=np.ones_like(reward),
        score=score,
    )


def _lagrange(nodes, x):
    """Values at x [..., K] of the polynomials that are 1 at one node and 0 at the others."""
    rows = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        rows.append(((x[..., None] - others) / (node - others)).prod(axis=-1))
    return np.stack(rows, axis=-1)
