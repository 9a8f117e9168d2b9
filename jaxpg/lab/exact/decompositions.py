"""Decompositions: where the variance of a gradient estimate comes from, by the law of total variance."""

from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.tables import (
    action_values,
    discounts,
    gradients_ahead,
    squared_returns,
    tabulate,
    visits,
)


class DoobDecomposition(NamedTuple):
    """Parts of tr Cov of one episode's estimate, by the random draw that they come from."""

    initial: float  # s_0
    action: np.ndarray  # [H] a_t
    transition: np.ndarray  # [H] s_{t+1} and the reward noise

    @property
    def total(self) -> float:
        return float(self.initial + self.action.sum() + self.transition.sum())


class TuckerDecomposition(NamedTuple):
    """Parts of the trace of u (R_t - b) at one (s_t, a_t), t uniform (Tucker et al., 2018)."""

    trajectory: float  # E[|u|^2 Var(R_t | s, a)]: what happens afterwards
    action: float  # E_s Var_a[(Q - b) u]: all that a baseline can change
    state: float  # Var_s(E_a[Q u])

    @property
    def total(self) -> float:
        return self.trajectory + self.action + self.state


def doob_decomposition(
    mdp: Mdp, logits, gamma, baseline=None, *, from_start=True
) -> DoobDecomposition:
    """tr Cov of sum_t c_t u_t (R_t - b_t(s_t)) as a sum over the martingale differences of E[G | past].

    baseline: a number, or [H, S]; V unless given. c_t = gamma^t, or 1 with from_start=False.
    """
    world = tabulate(mdp, logits)
    value, action_value = action_values(world, gamma)
    b = np.broadcast_to(value[:-1] if baseline is None else baseline, value[:-1].shape)
    weight = discounts(gamma if from_start else 1.0, world.horizon)
    ahead = gradients_ahead(world, action_value, weight)
    visited, score = visits(world), world.score
    before, square = np.zeros_like(ahead[0]), np.zeros_like(world.initial)
    action, transition = [], []
    for t in range(world.horizon):
        own = weight[t] * score
        # The action reveals rewards that credit earlier scores (gain), its own and later ones (now).
        now = own * (action_value[t] - b[t][:, None])[..., None]
        now = now + world.successor(ahead[t + 1]) - ahead[t][:, None]
        gain = (action_value[t] - value[t][:, None])[..., None]
        parts = square[:, None] * gain[..., 0] ** 2 + _norm(now) * visited[t][:, None]
        parts = parts + 2 * ((before[:, None] * gain * now).sum(-1))
        action.append(world.policy_mean(parts).sum())
        # The same for s_{t+1} and the reward noise, given (s_t, a_t).
        joint = before[:, None] + visited[t][:, None, None] * own
        joint_square = square[:, None] + 2 * (before[:, None] * own).sum(-1)
        joint_square = joint_square + visited[t][:, None] * _norm(own)
        parts = joint_square * (world.variance + gamma**2 * _variance(world, value[t + 1]))
        parts = parts + 2 * gamma * (joint * _covariance(world, value[t + 1], ahead[t + 1])).sum(-1)
        spread = _variance(world, ahead[t + 1]).sum(-1)
        transition.append(world.policy_mean(parts + visited[t][:, None] * spread).sum())
        # The scores so far, discounted to the next step.
        flow = gamma * world.policy[..., None] * joint
        before = np.einsum("sap,sax->xp", flow, world.transition)
        square = np.einsum("sa,sax->x", gamma**2 * world.policy * joint_square, world.transition)
    start = world.initial @ _norm(ahead[0]) - _norm(world.initial @ ahead[0])
    return DoobDecomposition(float(start), np.stack(action), np.stack(transition))


def tucker_decomposition(mdp: Mdp, logits, gamma, baseline=None) -> TuckerDecomposition:
    """The trace of u_t (R_t - b_t(s_t)) at a uniform t, split into randomness after, in and before a_t.

    baseline: a number, or [H, S]; V unless given. Steps after an episode's end count, with score 0.
    """
    world = tabulate(mdp, logits)
    value, action_value = action_values(world, gamma)
    b = np.broadcast_to(value[:-1] if baseline is None else baseline, value[:-1].shape)
    weight = visits(world) / world.horizon
    noise = squared_returns(world, gamma)[1] - action_value**2
    size = _norm(world.score)
    mean = np.einsum("sa,tsa,sap->tsp", world.policy, action_value, world.score)
    around = np.einsum("sa,tsa,sa->ts", world.policy, (action_value - b[:, :, None]) ** 2, size)
    return TuckerDecomposition(
        float(np.einsum("ts,sa,sa,tsa->", weight, world.policy, size, noise)),
        float((weight * (around - _norm(mean))).sum()),
        float((weight * _norm(mean)).sum() - _norm(np.einsum("ts,tsp->p", weight, mean))),
    )


def _norm(x):
    return np.square(x).sum(axis=-1)


def _variance(world, x):
    """Var[x(s') | s, a] [S, A, ...]."""
    return world.successor(np.square(x)) - np.square(world.successor(x))


def _covariance(world, value, x):
    """Cov[value(s'), x(s') | s, a] [S, A, P]."""
    mean = world.successor(value)[..., None] * world.successor(x)
    return world.successor(value[:, None] * x) - mean
