"""Distributions of actions a in (-1, 1), given as u with a = tanh(u); `envs.squashed` gives a its bounds.

Densities and entropies are those of a, in units of half the action's range. They are found from u, so they
are exact, and finite, where a is 1 to rounding.

>>> round(float(Beta(jnp.full(1, 2.0), jnp.full(1, 2.0)).log_prob(jnp.zeros(1))), 3)  # log 3/4
-0.288
>>> round(float(TanhGaussian(jnp.zeros(1), jnp.zeros(1)).entropy()), 3)
0.67
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln, digamma

from jaxpg.policies.distributions import Gaussian, total
from jaxpg.types import Array, Key

# Of the rule for a mean over a standard normal. It is off by 1e-7 at a standard deviation of 1, by 2e-4 at 2.
NODES = 32


class TanhGaussian(Gaussian):
    """tanh of a Gaussian u: log_prob and entropy differ from the Gaussian's, scores and KL do not.

    Its mode is the median: that of the density may lie at both ends.
    """

    def log_prob(self, action: Array) -> Array:
        """log N(u) - sum_d log(1 - tanh(u)^2), shape [...]."""
        return super().log_prob(action) - total(_log_slope(action))

    def entropy(self) -> Array:
        """The Gaussian's, plus E[log(1 - tanh(u)^2)] by a Gauss-Hermite rule of NODES nodes, in nats."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        shape = (*self.mean.shape, NODES)
        nodes, weights = (
            jnp.broadcast_to(jnp.asarray(x, self.mean.dtype), shape)
            for x in (nodes, weights / weights.sum())
        )
        u = self.mean[..., None] + jnp.exp(self.log_std)[..., None] * nodes
        return super().entropy() + total((weights * _log_slope(u)).sum(-1))


def _log_slope(u):
    """log(1 - tanh(u)^2), without the difference."""
    return 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))


class Beta(NamedTuple):
    """(1 + a) / 2 has the density of Beta(alpha, beta) over the last axis (Chou et al., 2017)."""

    alpha: Array  # [..., D]
    beta: Array  # [..., D]

    def sample(self, key: Key) -> Array:
        """An action u = log(X / Y) / 2, where X and Y have the gamma distribution of alpha and of beta."""
        log_x, log_y = jax.random.loggamma(key, jnp.stack(self))
        return (log_x - log_y) / 2

    def log_prob(self, action: Array) -> Array:
        """sum_d [ (alpha-1) log z + (beta-1) log(1-z) - log B(alpha, beta) - log 2 ], z = (1+a)/2."""
        log_z, log_rest = jax.nn.log_sigmoid(2 * action), jax.nn.log_sigmoid(-2 * action)
        return total((self.alpha - 1) * log_z + (self.beta - 1) * log_rest - self._log_size())

    def entropy(self) -> Array:
        """sum_d [ log 2B - (alpha-1) E log z - (beta-1) E log(1-z) ], in nats."""
        mean, rest = self._mean_logs()
        return total(self._log_size() - (self.alpha - 1) * mean - (self.beta - 1) * rest)

    def kl(self, other: "Beta") -> Array:
        """KL(self || other), in nats."""
        mean, rest = self._mean_logs()
        moved = (self.alpha - other.alpha) * mean + (self.beta - other.beta) * rest
        return total(moved + other._log_size() - self._log_size())

    def mode(self) -> Array:
        """u of z = (alpha-1) / (alpha+beta-2); 0 where the density is uniform."""
        least = jnp.finfo(self.alpha.dtype).eps
        above = [jnp.log(jnp.maximum(x - 1, least)) for x in self]
        return (above[0] - above[1]) / 2

    def _log_size(self):
        return _log_beta(self.alpha, self.beta) + jnp.log(2.0)

    def _mean_logs(self):
        """E log z and E log(1-z)."""
        both = digamma(self.alpha + self.beta)
        return digamma(self.alpha) - both, digamma(self.beta) - both


@jax.custom_jvp
def _log_beta(alpha, beta):
    return betaln(alpha, beta)


@_log_beta.defjvp
def _log_beta_jvp(primals, tangents):
    # jax's own derivative is that of an approximation, which from 8 on is off by 1e-9.
    alpha, beta = primals
    both = digamma(alpha + beta)
    slope = (digamma(alpha) - both) * tangents[0] + (digamma(beta) - both) * tangents[1]
    return _log_beta(alpha, beta), slope
