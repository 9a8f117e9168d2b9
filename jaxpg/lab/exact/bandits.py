"""Bandits: one decision. The softmax bandit is an Mdp of one state; the sigmoid one has one parameter."""

from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.gaussian import normal_cdf
from jaxpg.lab.exact.tables import Moments


class SelfNormalised(NamedTuple):
    """Exact moments of sum_i w_i f_i / sum_i w_i over N draws."""

    mean: float
    variance: float
    bias: float
    leading_bias: float  # -E[w^2 (f - mu)] / N


def bandit(rewards, variances=None) -> Mdp:
    """The softmax bandit: one state, one step, [A] mean rewards, [A] variances of Gaussian noise.

    Every exact function applies: grad_k J = pi_k (r_k - J), F = diag(pi) - pi pi^T. With two logits that
    differ by theta, it is the sigmoid bandit written in two parameters.
    """
    rewards = np.asarray(rewards, np.float64)
    noise = np.zeros_like(rewards) if variances is None else np.asarray(variances, np.float64)
    one, num_arms = np.ones(1), len(rewards)
    stay = np.ones((1, num_arms, 1))
    return Mdp(one, stay, rewards[None], noise[None], np.zeros(1, bool), np.zeros(1, int), 1)


def sigmoid_moments(probability, rewards, baseline=0.0, variances=(0.0, 0.0)) -> Moments:
    """Moments [1] and [1, 1] of u (r - b), p = sigmoid(theta): u = 1-p for the first arm, else -p.

    mean = p(1-p)(r_1 - r_0); variance p(1-p)((1-p)(r_1-b) + p(r_0-b))^2 without noise: a square, so
    exactly 0 at the optimum even for rewards of 10^6.
    """
    p, (first, second) = probability, np.asarray(rewards, np.float64)
    mean = p * (1 - p) * (first - second)
    spread = p * (1 - p) * ((1 - p) * (first - baseline) + p * (second - baseline)) ** 2
    noise = p * (1 - p) * ((1 - p) * variances[0] + p * variances[1])
    return Moments(np.array([mean]), np.array([[spread + noise]]))


def sigmoid_optimal_baseline(probability, rewards) -> float:
    """b* = (1-p) r_1 + p r_0, which is E[r] = p r_1 + (1-p) r_0 with the probabilities swapped."""
    return float((1 - probability) * rewards[0] + probability * rewards[1])


def wrong_sign_probability(moments: Moments, num_trajectories) -> float:
    """P(the mean over N has the wrong sign) for one parameter, by the central limit theorem."""
    mean, variance = float(moments.mean[0]), float(moments.covariance[0, 0])
    if variance == 0:
        return 0.0
    return normal_cdf(-abs(mean) * np.sqrt(num_trajectories / variance))


def self_normalised_moments(values, target, behaviour, num_draws) -> SelfNormalised:
    """Exact moments of sum_i w_i f_i / sum_i w_i, w = target / behaviour, over all multisets of N draws.

    values, target, behaviour: [A]. Raises ValueError where the behaviour has no support.
    """
    f, p, q = (np.asarray(x, np.float64) for x in (values, target, behaviour))
    if ((p > 0) & (q == 0)).any():
        raise ValueError("importance sampling has no support: behaviour is 0 where target is not")
    ratio = p / np.where(q > 0, q, 1.0)
    counts, log_probability = _multisets(q, num_draws)
    total = counts @ ratio
    estimate = np.divide(counts @ (ratio * f), total, out=np.zeros_like(total), where=total > 0)
    probability, truth = np.exp(log_probability), p @ f
    mean = probability @ estimate
    variance = probability @ (estimate - mean) ** 2
    leading = -(q * ratio**2 * (f - truth)).sum() / num_draws
    return SelfNormalised(float(mean), float(variance), float(mean - truth), float(leading))


def _multisets(q, num_draws):
    """All counts [M, A] that sum to N, and their multinomial log-probabilities [M]."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_draws + 1)))])
    counts = np.zeros((1, 0), int)
    for _ in range(len(q) - 1):
        left = num_draws - counts.sum(axis=1)
        grown = np.repeat(counts, left + 1, axis=0)
        own = np.arange(len(grown)) - np.repeat(np.cumsum(left + 1) - left - 1, left + 1)
        counts = np.concatenate([grown, own[:, None]], axis=1)
    counts = np.concatenate([counts, num_draws - counts.sum(axis=1, keepdims=True)], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.where(counts > 0, counts * np.log(q), 0.0)
    return counts, log_factorial[-1] + (log_q - log_factorial[counts]).sum(axis=1)
