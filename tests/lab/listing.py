"""Every trajectory of a small world as NumPy arrays, so that an expectation is a sum over all of them."""

from itertools import product
from typing import NamedTuple

import numpy as np


class Listing(NamedTuple):
    """Trajectories of the behaviour; scores and ratios are the policy's. Steps after an end count 0."""

    p: np.ndarray  # [N] probability of the trajectory
    s: np.ndarray  # [H, N]
    a: np.ndarray  # [H, N]
    alive: np.ndarray  # [H, N]
    reward: np.ndarray  # [H, N]
    rho: np.ndarray  # [H, N] policy / behaviour, 1 after an end
    scores: np.ndarray  # [S, A, P] grad log pi(a|s)
    u: np.ndarray  # [H, N, P] scores of the actions taken
    pi: np.ndarray  # [S, A]
    start: np.ndarray  # [H, 1] gamma^t
    to_go: np.ndarray  # [H, N] discounted from t


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def listing(mdp, logits, gamma, behaviour=None) -> Listing:
    horizon, (num_states, num_actions) = mdp.horizon, mdp.reward.shape
    pi = softmax(logits)[mdp.observation]
    beta = pi if behaviour is None else softmax(behaviour)[mdp.observation]
    pairs = np.array(list(product(range(num_states * num_actions), repeat=horizon))).T
    s, a = pairs // num_actions, pairs % num_actions
    alive = ~np.logical_or.accumulate(mdp.terminal[s], axis=0)
    # An ended path stays where it is and takes action 0, so that it is listed once.
    acted = np.where(alive, beta[s, a], a == 0).prod(axis=0)
    stayed = s[1:] == s[:-1]
    moved = np.where(alive[:-1], mdp.transition[s[:-1], a[:-1], s[1:]], stayed).prod(axis=0)
    p = mdp.initial[s[0]] * acted * moved
    p, s, a, alive = p[p > 0], s[:, p > 0], a[:, p > 0], alive[:, p > 0]
    reward = np.where(alive, mdp.reward[s, a], 0.0)
    rho = np.where(alive, (pi / beta)[s, a], 1.0)
    scores = np.zeros((num_states, num_actions, *logits.shape))
    for state, observed in enumerate(mdp.observation):
        scores[state, :, observed] = np.eye(num_actions) - pi[state]
    scores = scores.reshape(num_states, num_actions, -1)
    u = scores[s, a] * alive[..., None]
    start = gamma ** np.arange(horizon)[:, None]
    return Listing(p, s, a, alive, reward, rho, scores, u, pi, start, ahead(reward, gamma))


def ahead(x, decay):
    """sum_{k>=t} decay_{t+1} ... decay_k x_k [H, N]; decay is a number or [H, N]."""
    decay, found = np.broadcast_to(decay, x.shape), x.copy()
    for t in reversed(range(len(x) - 1)):
        found[t] += decay[t + 1] * found[t + 1]
    return found


def moments(each: Listing, g):
    """The mean and covariance of a gradient estimate [N, P]."""
    mean = each.p @ g
    return mean, (each.p[:, None] * (g - mean)).T @ (g - mean)


def weighted(each: Listing, weight):
    """sum_t weight_t u_t [N, P]; weight: [H, N]."""
    return (each.u * weight[..., None]).sum(axis=0)


def given_state(each: Listing, x):
    """E[x_t | s_t = s] [H, S] of x [H, N], over trajectories still alive; 0 where there are none."""
    return given_action(each._replace(a=0 * each.a), x)[..., 0]


def given_action(each: Listing, x):
    """E[x_t | s_t = s, a_t = a] [H, S, A]."""
    horizon, (num_states, num_actions) = len(each.s), each.pi.shape
    t = np.arange(horizon)[:, None] + 0 * each.s
    mass, total = np.zeros((2, horizon, num_states, num_actions))
    np.add.at(mass, (t, each.s, each.a), each.p * each.alive)
    np.add.at(total, (t, each.s, each.a), each.p * each.alive * x)
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)


def along(each: Listing, table):
    """b_t(s_t) [H, N] of a table [H, S], or b_t(s_t, a_t) of one [H, S, A]; 0 after an end."""
    t = np.arange(len(each.s))[:, None]
    found = table[t, each.s] if table.ndim == 2 else table[t, each.s, each.a]
    return np.where(each.alive, found, 0.0)


def least(each: Listing, g, functions):
    """The numbers b [K] that minimise E|g - sum_k b_k f_k|^2, for g [N, P] and functions f [K, N, P]."""
    root = np.sqrt(each.p)[:, None]
    columns = (functions * root).reshape(len(functions), -1).T
    return np.linalg.lstsq(columns, (g * root).reshape(-1), rcond=1e-10)[0]


def least_by_parameter(each: Listing, g, functions):
    """The same for each parameter separately [K, P]."""
    found = [least(each, g[:, [i]], functions[..., [i]]) for i in range(g.shape[1])]
    return np.stack(found, axis=1)


def in_state(each: Listing, x):
    """x_t 1(s_t = s) [H S, N, P] of x [H, N, P]: the functions of a baseline per time and state."""
    found = [x * (each.s == s)[..., None] for s in range(len(each.pi))]
    return np.stack(found, axis=1).reshape(-1, *x.shape[1:])
