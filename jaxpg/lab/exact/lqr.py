"""LQR: the scalar linear-quadratic regulator with a linear-Gaussian policy, exactly.

Every conditional moment is a polynomial in s of degree at most 6, so its values at 9 nodes determine it,
and 14-point Gauss-Hermite rules integrate it without error. With nodes for states and quadrature points
for actions, the regulator becomes a table that the recursions for an Mdp read unchanged.
Policies are u ~ Normal(k s + m, sigma^2); their parameters are (k, log sigma), where m = 0, or
(k, log sigma, m).
"""

import numpy as np

from jaxpg.envs import Lqr
from jaxpg.estimators import Estimator
from jaxpg.lab.exact.baselines import OptimalBaselines, controlled, minimisers
from jaxpg.lab.exact.compose import composed
from jaxpg.lab.exact.recursions import Coefficients, paired
from jaxpg.lab.exact.tables import Moments, Tables, action_values, discounts, return_moments
from jaxpg.types import Hyperparams

_NODES, _POINTS = 9, 14


def objective(regulator: Lqr, params, gamma) -> float:
    """J = -sum_t gamma^t [(q + c k^2) E[s_t^2] + 2 c k m E[s_t] + c (m^2 + sigma^2)]."""
    return float(_objective(regulator, _three(params), gamma))


def gradient(regulator: Lqr, params, gamma) -> np.ndarray:
    """dJ / d(k, log sigma, m) [len(params)], by a step into the complex plane, as J is analytic."""
    three, step = _three(params), 1e-30
    ahead = (three + 1j * step * e for e in np.eye(3)[: len(params)])
    return np.array([np.imag(_objective(regulator, each, gamma)) / step for each in ahead])


def hessian(regulator: Lqr, params, gamma) -> np.ndarray:
    """The second derivatives of J [P, P], by central differences of the gradient."""
    params, step = np.asarray(params, float), 1e-5
    ahead, behind = (
        [gradient(regulator, params + sign * step * e, gamma) for e in np.eye(len(params))]
        for sign in (1, -1)
    )
    return (np.array(ahead) - np.array(behind)) / (2 * step)


def fisher(regulator: Lqr, params) -> np.ndarray:
    """E[U U^T] of the whole episode: sum_t S_t / sigma^2 for k, 2 H for log sigma, H / sigma^2 for m."""
    squares, means = _state_moments(regulator, _three(params))
    precision = np.exp(-2 * params[1])
    cross, steps = precision * means.sum(), regulator.horizon
    of_three = [
        [precision * squares.sum(), 0, cross],
        [0, 2 * steps, 0],
        [cross, 0, precision * steps],
    ]
    return np.array(of_three)[: len(params), : len(params)]


def values(regulator: Lqr, params, gamma) -> np.ndarray:
    """The coefficients of V_t(s) = v_0 + v_1 s + v_2 s^2 at every step [H, 3]."""
    k, log_std, m = _three(params)
    closed, forced = regulator.state_gain + regulator.action_gain * k, regulator.action_gain * m
    noise = (regulator.action_gain * np.exp(log_std)) ** 2 + regulator.process_std**2
    c = regulator.action_cost
    # E[s', s'^2] in powers of s.
    first, second = (
        np.array([forced, closed, 0.0]),
        np.array([forced**2 + noise, 2 * closed * forced, closed**2]),
    )
    cost = np.array(
        [c * (m**2 + np.exp(2 * log_std)), 2 * c * k * m, regulator.state_cost + c * k**2]
    )
    row, rows = np.zeros(3), []
    for _ in range(regulator.horizon):
        ahead = row[0] * np.array([1.0, 0.0, 0.0]) + row[1] * first + row[2] * second
        row = gamma * ahead - cost
        rows.append(row)
    return np.stack(rows[::-1])


def moments(regulator: Lqr, params, estimator: Estimator, hyperparams: Hyperparams) -> Moments:
    """Exact mean [P] and covariance [P, P] of one on-policy episode's gradient; a critic is the exact V.

    Raises ValueError naming a slot that the recursions do not cover, tabulated among them.
    """
    if getattr(estimator.baseline, "name", None) == "tabulated":
        raise ValueError("tabulated baselines need discrete observations; the regulator has none")
    return composed(_tables(regulator, params), estimator, hyperparams)


def advantage_moments(regulator: Lqr, params, gamma) -> Moments:
    """Moments of sum_t gamma^t u_t (Q_t - V_t) with the exact values."""
    world = _tables(regulator, params)
    value, action_value = action_values(world, gamma)
    # A quadrature point is an action with a process noise; Q averages over the noise.
    noise = _hermite()[1]
    by_action = action_value.reshape(*action_value.shape[:2], _POINTS, _POINTS) @ noise
    advantage = np.repeat(by_action, _POINTS, axis=-1) - value[:-1, :, None]
    start = discounts(gamma, world.horizon)[:, None, None]
    return paired(world, Coefficients(advantage, decay=0.0, step=start))


def optimal_baselines(regulator: Lqr, params, credit, gamma) -> OptimalBaselines:
    """Like exact.optimal_baselines, with nan for local and per_state_time, which depend on the state."""
    best = minimisers(_tables(regulator, params), credit, gamma)
    nothing = np.full_like(best.local, np.nan)
    return best._replace(local=nothing, per_state_time=nothing)


def control_variate_moments(regulator: Lqr, params, credit, gamma, baseline) -> Moments:
    """Like exact.control_variate_moments: a baseline per parameter, [P] or [H, P]."""
    return controlled(_tables(regulator, params), credit, gamma, baseline)


def return_variance(regulator: Lqr, params, gamma) -> float:
    """Var[sum_t gamma^t r_t] of one episode."""
    return return_moments(_tables(regulator, params), gamma)[1]


def _three(params):
    """(k, log sigma, m)."""
    if len(params) not in (2, 3):
        raise ValueError(
            f"{len(params)} parameters; a regulator's policy has k, log sigma and perhaps m"
        )
    return np.array([*params, 0.0][:3])


def _state_moments(regulator, three):
    """E[s_t^2] and E[s_t] [H] each."""
    k, log_std, m = three
    closed, forced = regulator.state_gain + regulator.action_gain * k, regulator.action_gain * m
    noise = (regulator.action_gain * np.exp(log_std)) ** 2 + regulator.process_std**2
    mean = regulator.initial_mean
    square, rows = mean**2 + regulator.initial_variance, []
    for _ in range(regulator.horizon):
        rows.append((square, mean))
        square = closed**2 * square + 2 * closed * forced * mean + forced**2 + noise
        mean = closed * mean + forced
    return np.array(rows).T


def _objective(regulator, three, gamma):
    k, log_std, m = three
    squares, means = _state_moments(regulator, three)
    effort = k**2 * squares + 2 * k * m * means + m**2 + np.exp(2 * log_std)
    cost = regulator.state_cost * squares + regulator.action_cost * effort
    return -discounts(gamma, regulator.horizon) @ cost


def _hermite():
    """Points and weights of the expectation under a unit normal, exact to degree 27."""
    points, weights = np.polynomial.hermite_e.hermegauss(_POINTS)
    return points, weights / weights.sum()


def _tables(regulator, params) -> Tables:
    """The regulator with nodes as states and quadrature points (action noise, process noise) as actions.

    The transition "probabilities" are Lagrange polynomials at the successor: signed, and exact for the
    polynomials that the recursions pass through them.
    """
    k, log_std, m = _three(params)
    std = np.exp(log_std)
    points, weights = _hermite()
    noise, process = (x.reshape(-1) for x in np.meshgrid(points, points, indexing="ij"))
    probability = np.outer(weights, weights).reshape(-1)
    radius = 3.0 * np.sqrt(_state_moments(regulator, _three(params))[0].max())
    nodes = radius * np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
    s = nodes[:, None]
    action = k * s + m + std * noise
    after = regulator.state_gain * s + regulator.action_gain * action
    after = after + regulator.process_std * process
    reward = -(regulator.state_cost * s**2 + regulator.action_cost * action**2)
    start = regulator.initial_mean + np.sqrt(regulator.initial_variance) * points
    scores = noise * s / std, noise**2 - 1.0, noise / std
    score = np.stack(np.broadcast_arrays(*scores[: len(params)]), axis=-1)
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
