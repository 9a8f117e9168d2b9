"""Recursions: the exact first two moments of one trajectory's gradient, in polynomial time.

Every estimator that multiplies scores by a kind of return obeys three equations (arguments t, s, a):

    psi_t = reward_t + decay_t Y_{t+1}            what the action is credited with
    Y_t   = offset_t + trace_t psi_t              what the previous step sees of it
    G_t   = u_t (step_t psi_t - shift_t) - drift_t + carry_t G_{t+1}

The moments of (Y, G) given s_t close under them. With carry_t = rho_t, G_t is relative to the weight
so far; with `weighted`, everything is multiplied by W = prod_t rho_t of the whole episode, so that
first moments are taken under beta rho and second ones under beta rho^2, which does not sum to 1.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.tables import Moments, Tables, average, tabulate


class Coefficients(NamedTuple):
    """The coefficients of the equations: numbers or broadcastable to [H, S, A], or as noted."""

    reward: Any
    decay: Any
    variance: Any = 0.0  # of the noise in reward
    offset: Any = 0.0
    trace: Any = 1.0
    step: Any = 1.0
    shift: Any = 0.0  # or one per parameter, [H, S, A, P]
    drift: Any = 0.0  # [H, S, A, P]
    carry: Any = 1.0


def pair_moments(
    mdp: Mdp, logits, coefficients: Coefficients, behaviour_logits=None, *, weighted=False
) -> Moments:
    """Mean [P] and covariance [P, P] of G_0 = sum_t (carry so far) (u_t (step_t psi_t - shift_t) - drift_t).

    O(H S A P^2 + H S^2 P^2). Actions are the behaviour's; scores are the policy's.
    """
    return paired(tabulate(mdp, logits, behaviour_logits), coefficients, weighted)


def paired(world: Tables, coefficients: Coefficients, weighted=False) -> Moments:
    """`pair_moments` for given tables."""
    return _moments(_pair, world, coefficients, weighted)


def whole(world: Tables, coefficients: Coefficients, weighted=False) -> Moments:
    """Like `paired`, with psi_0, the credit of the whole episode, in place of every psi_t."""
    return _moments(_product, world, coefficients, weighted)


def _moments(recursion, world, coefficients, weighted):
    mean, second = recursion(world, coefficients, world.behaviour)
    if weighted:
        mean, _ = recursion(world, coefficients, world.behaviour * world.ratio)
        _, second = recursion(world, coefficients, world.behaviour * world.ratio**2)
    return Moments(mean, second - np.outer(mean, mean))


def _pair(world, coefficients, measure):
    rows = _rows(world, coefficients)
    num_states, num_params = len(world.initial), world.score.shape[-1]
    mass = np.ones(num_states)
    y = yy = np.zeros(num_states)
    g = yg = np.zeros((num_states, num_params))
    gg = np.zeros((num_states, num_params, num_params))
    for t in reversed(range(world.horizon)):
        c = Coefficients(*(x[t] for x in rows))
        n, later_y, later_yy = (world.successor(x) for x in (mass, y, yy))
        later_g, later_yg = world.successor(g), world.successor(yg)
        # E[psi], E[psi^2] and E[psi G'] given (s, a).
        p1 = c.reward * n + c.decay * later_y
        p2 = (c.reward**2 + c.variance) * n + 2 * c.reward * c.decay * later_y
        p2 = p2 + c.decay**2 * later_yy
        pg = _x(c.reward) * later_g + _x(c.decay) * later_yg
        # G = push psi - pull + carry G'.
        push, pull = _x(c.step) * world.score, c.shift * world.score + c.drift
        carried_g, carried_pg = _x(c.carry) * later_g, _x(c.carry) * pg
        y1, y2 = c.offset * n + c.trace * p1, c.offset * p1 + c.trace * p2
        mass = average(measure, n)
        y = average(measure, y1)
        yy = average(measure, c.offset * y1 + c.trace * y2)
        g = average(measure, push * _x(p1) - pull * _x(n) + carried_g)
        y_carried = _x(c.offset) * carried_g + _x(c.trace) * carried_pg
        yg = average(measure, push * _x(y2) - pull * _x(y1) + y_carried)
        half = _outer(measure, push, push * _x(p2 / 2) - pull * _x(p1) + carried_pg)
        half += _outer(measure, pull, pull * _x(n / 2) - carried_g)
        gg = half + half.swapaxes(1, 2) + world.carried(measure * c.carry**2, gg)
    return world.initial @ g, np.tensordot(world.initial, gg, axes=1)


def _product(world, coefficients, measure):
    """G = S psi_0 - B with S_t = push_t + carry S' and B_t = pull_t + carry B'.

    mass[j], first[j], second[j]: E[Y^j], E[Z Y^j] and E[Z Z^T Y^j] of the stacked Z = (S, B).
    """
    rows = _rows(world, coefficients)
    num_states, num_params = len(world.initial), world.score.shape[-1]
    plain = not (np.any(coefficients.shift) or np.any(coefficients.drift))
    size = num_params if plain else 2 * num_params
    mass = [np.ones(num_states), np.zeros(num_states), np.zeros(num_states)]
    first = [np.zeros((num_states, size))] * 3
    second = [np.zeros((num_states, size, size))] * 3
    for t in reversed(range(world.horizon)):
        c = Coefficients(*(x[t] for x in rows))
        if t == 0:
            c = c._replace(offset=np.zeros_like(c.offset), trace=np.ones_like(c.trace))
        powers = _powers(c)
        push = _x(c.step) * world.score
        if not plain:
            push = np.concatenate([push, c.shift * world.score + c.drift], axis=-1)
        m = _mix(powers, [world.successor(x) for x in mass])
        f = _mix(
            [[_x(w * c.carry) for w in row] for row in powers], [world.successor(x) for x in first]
        )
        weight = measure * c.carry**2
        second = [
            sum(world.carried(weight * w, x) for w, x in zip(row, second, strict=False))
            for row in powers
        ]
        for j in range(3):
            half = _outer(measure, push, push * _x(m[j] / 2) + f[j])
            second[j] = second[j] + half + half.swapaxes(1, 2)
        mass = [average(measure, x) for x in m]
        first = [average(measure, push * _x(x) + y) for x, y in zip(m, f, strict=True)]
    mean = [world.initial @ x for x in first]
    square = [np.tensordot(world.initial, x, axes=1) for x in second]
    if plain:
        return mean[1], square[2]
    s, b = slice(None, num_params), slice(num_params, None)
    cross = square[1][s, b]
    return mean[1][s] - mean[0][b], square[2][s, s] - cross - cross.T + square[0][b, b]


def _powers(c):
    """powers[j][k]: Y^j = sum_k powers[j][k] Y'^k in expectation over the reward noise."""
    constant, slope = c.offset + c.trace * c.reward, c.trace * c.decay
    square = constant**2 + c.trace**2 * c.variance
    return [[np.ones_like(constant)], [constant, slope], [square, 2 * constant * slope, slope**2]]


def _mix(powers, later):
    return [sum(w * x for w, x in zip(row, later, strict=False)) for row in powers]


def _outer(weight, left, right):
    """sum_a weight(s, a) left right^T [S, P, P] of left and right [S, A, P]."""
    return (_x(weight) * left).swapaxes(1, 2) @ right


def _x(x):
    return x[..., None]


def _rows(world, coefficients):
    """Every coefficient as [H, S, A], shift and drift as [H, S, A, 1 or P]: views, so free."""
    shape = (world.horizon, *world.reward.shape)

    def spread(name, x):
        x = np.asarray(x, np.float64)
        if x.ndim == 4:
            return np.broadcast_to(x, (*shape, world.score.shape[-1]))
        x = np.broadcast_to(x, shape)
        return x[..., None] if name in ("shift", "drift") else x

    return Coefficients(*map(spread, coefficients._fields, coefficients))
