"""Gaussian: closed forms for Gaussian actions."""

import math
from typing import NamedTuple

from jaxpg.lab.exact.weights import WeightMoments


class ClippedActionGradients(NamedTuple):
    """d/dmu E[clip(a)] of a Gaussian action that the environment clips."""

    true: float  # estimated by the score at the sampled action
    at_clipped: float  # estimated, wrongly, by the score at the clipped action


def gaussian_chain(shift, horizon) -> WeightMoments:
    """Moments of W between unit Gaussian policies with means delta apart at each of T steps.

    log W ~ Normal(-T delta^2 / 2, T delta^2) and E[W^2] = exp(T delta^2): the effective sample size falls
    exponentially in T.
    """
    exponent = horizon * shift**2
    return WeightMoments(1.0, math.exp(exponent), math.exp(-exponent), -exponent / 2, exponent)


def clipped_action_gradients(mean, std, low=-1.0, high=1.0) -> ClippedActionGradients:
    """d/dmu E[clip(a, low, high)] for a ~ Normal(mu, sigma^2): P(low < a < high), and the wrong answer.

    The wrong one is E[clip(a) (clip(a) - mu)] / sigma^2.
    """
    below, above = (low - mean) / std, (high - mean) / std
    inside = normal_cdf(above) - normal_cdf(below)
    # With a = mu + sigma x: E[x; inside] and E[x^2; inside].
    first = _density(below) - _density(above)
    second = inside + below * _density(below) - above * _density(above)
    moment = mean * std * first + std**2 * second
    edges = low * (low - mean) * normal_cdf(below) + high * (high - mean) * normal_cdf(-above)
    return ClippedActionGradients(inside, (moment + edges) / std**2)


def normal_cdf(x) -> float:
    """P(X < x) of a unit normal, accurate in the lower tail."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _density(x):
    return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
