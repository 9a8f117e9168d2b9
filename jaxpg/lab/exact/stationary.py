"""Stationary: the average reward of an endless chain, its gradient, and what GPOMDP estimates instead.

The horizon and the initial distribution of the Mdp play no part here.
"""

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.tables import Tables, average, tabulate


def stationary_distribution(mdp: Mdp, logits) -> np.ndarray:
    """d [S] with d P_pi = d. Raises ValueError for terminal states and where d is not unique."""
    return _stationary(_endless(mdp, logits))


def average_reward(mdp: Mdp, logits) -> float:
    """eta = sum_s d(s) sum_a pi(a|s) r(s, a). Raises ValueError like stationary_distribution."""
    world = _endless(mdp, logits)
    return float(_stationary(world) @ world.policy_mean(world.reward))


def average_reward_gradient(mdp: Mdp, logits) -> np.ndarray:
    """grad eta = sum_s d(s) sum_a pi u (r - eta + P h) [P], h the differential values.

    See Marbach and Tsitsiklis (2001). Raises ValueError like stationary_distribution.
    """
    world = _endless(mdp, logits)
    stationary = _stationary(world)
    reward, kernel = world.policy_mean(world.reward), average(world.policy, world.transition)
    # (I - P + 1 d^T) h = r - eta picks the h with d^T h = 0.
    system = np.eye(len(kernel)) - kernel + stationary
    return _local(world, stationary, np.linalg.solve(system, reward - stationary @ reward), 1.0)


def gpomdp_gradient(mdp: Mdp, logits, beta) -> np.ndarray:
    """lim E[z_t r_t], z_t = beta z_{t-1} + u_t: sum_s d(s) sum_a pi u Q_beta [P] (Baxter and Bartlett, 2001).

    Q_beta is the value discounted by beta; the bias vanishes as beta -> 1 while the variance grows like
    1 / (1 - beta). Raises ValueError unless 0 <= beta < 1, and like stationary_distribution.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta={beta} must be in [0, 1); the limit 1 is average_reward_gradient")
    world = _endless(mdp, logits)
    kernel = average(world.policy, world.transition)
    value = np.linalg.solve(np.eye(len(kernel)) - beta * kernel, world.policy_mean(world.reward))
    return _local(world, _stationary(world), value, beta)


def _local(world, stationary, value, discount):
    action_value = world.reward + discount * world.successor(value)
    return np.einsum("s,sa,sap,sa->p", stationary, world.policy, world.score, action_value)


def _endless(mdp, logits) -> Tables:
    world = tabulate(mdp, logits)
    if world.terminal.any():
        raise ValueError(
            "an average reward needs an endless chain, but the world has terminal states"
        )
    return world


def _stationary(world):
    kernel = average(world.policy, world.transition)
    balance = np.eye(len(kernel)) - kernel
    if np.linalg.matrix_rank(balance, tol=1e-10) < len(kernel) - 1:
        raise ValueError(
            "the chain has several recurrent classes: its average reward depends on the start"
        )
    system = np.vstack([balance.T, np.ones(len(kernel))])
    return np.linalg.lstsq(system, np.append(np.zeros(len(kernel)), 1.0), rcond=None)[0]
