"""Action distributions.

They pass through scan, vmap and jit as arrays, and code that uses them does not ask which one it has;
hence, unlike everything else here, they are NamedTuples with methods.

noise(key) depends only on shapes, so a rollout draws the noise of many steps at once: on a CPU, random
bits for one step at a time cost more than the network.

>>> Categorical(jnp.zeros(4)).entropy().round(3), Gaussian(jnp.zeros(2), jnp.zeros(2)).mode()
(Array(1.386, dtype=float32), Array([0., 0.], dtype=float32))
>>> Bernoulli(jnp.zeros(3)).log_prob(jnp.array([0, 1, 1])).round(3)
Array(-2.079, dtype=float32)
>>> pair = MultiCategorical(jnp.zeros((2, 3)))
>>> pair.sample(jax.random.key(0)).shape
(2,)
"""

from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.devices import backend
from jaxpg.types import Array, Key

# Finite, so that masked entries give zero gradients where -inf would give NaN.
MASKED_LOGIT = -1e9


# Sums over up to this many entries are written out, so that an accelerator fuses them with what stands around
# them. It made a gradient step of two actions 4 % slower on a CPU.
FEW = {"gpu": 16, "tpu": 3}


def _entries(x: Array) -> list[Array] | None:
    """The entries of the last axis, if there are few."""
    size = x.shape[-1]
    return [x[..., i] for i in range(size)] if 0 < size <= FEW.get(backend(), 0) else None


def total(x: Array) -> Array:
    """The sum over the last axis."""
    few = _entries(x)
    return x.sum(-1) if few is None else reduce(jnp.add, few)


def _log_softmax(logits: Array) -> Array | list[Array]:
    """All entries in one array; each apart where there are few, so that none is written beside the others."""
    few = _entries(logits)
    if few is None:
        return jax.nn.log_softmax(logits)
    top = jax.lax.stop_gradient(reduce(jnp.maximum, few))
    shifted = [x - top for x in few]
    log_sum = jnp.log(reduce(jnp.add, map(jnp.exp, shifted)))
    return [x - log_sum for x in shifted]


def _sum(function: Callable[..., Array], *log_probs: Array | list[Array]) -> Array:
    """The sum over actions of a function of their log-probabilities."""
    if isinstance(log_probs[0], list):
        return reduce(jnp.add, map(function, *log_probs))
    return function(*log_probs).sum(-1)


class Categorical(NamedTuple):
    """P(a) = softmax(logits)_a over the last axis."""

    logits: Array  # [..., A]

    def noise(self, key: Key) -> Array:
        """Uniform in [0, 1), shape [...]."""
        return jax.random.uniform(key, self.logits.shape[:-1], self.logits.dtype)

    def draw(self, noise: Array) -> Array:
        """Invert the distribution function: one uniform per draw, not one per action."""
        few = _entries(self.logits)
        # Scaled by the sum of all, so that an action of probability 0 is never drawn.
        if few is None:
            cdf = jnp.cumsum(jax.nn.softmax(self.logits), axis=-1)
            threshold = (noise * cdf[..., -1])[..., None]
            return jnp.sum(threshold >= cdf[..., :-1], axis=-1, dtype=jnp.int32)
        top = reduce(jnp.maximum, few)
        cdf = list(accumulate(jnp.exp(x - top) for x in few))
        above = [(noise * cdf[-1] >= x).astype(jnp.int32) for x in cdf[:-1]]
        return reduce(jnp.add, above, jnp.zeros(noise.shape, jnp.int32))

    def sample(self, key: Key) -> Array:
        """An action."""
        return self.draw(self.noise(key))

    def log_prob(self, action: Array) -> Array:
        """log softmax(logits)_a, shape [...]."""
        log_p = _log_softmax(self.logits)
        if isinstance(log_p, list):
            return reduce(jnp.add, (jnp.where(action == i, x, 0.0) for i, x in enumerate(log_p)))
        # A one-hot product, not a gather: its gradient needs no scatter, slow on accelerators.
        return (jax.nn.one_hot(action, log_p.shape[-1], dtype=log_p.dtype) * log_p).sum(-1)

    def entropy(self) -> Array:
        """-sum_a p_a log p_a, in nats."""
        log_p = _log_softmax(self.logits)
        return -_sum(lambda x: jnp.exp(x) * x, log_p)

    def kl(self, other: "Categorical") -> Array:
        """KL(self || other) = sum_a p_a (log p_a - log q_a), in nats."""
        log_p, log_q = _log_softmax(self.logits), _log_softmax(other.logits)
        return _sum(lambda x, y: jnp.exp(x) * (x - y), log_p, log_q)

    def mode(self) -> Array:
        """The most probable action."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)


class MultiCategorical(NamedTuple):
    """Independent categoricals; rows of shorter ones are padded with MASKED_LOGIT."""

    logits: Array  # [..., D, max A]

    def noise(self, key: Key) -> Array:
        """Uniform in [0, 1), shape [..., D]."""
        return Categorical(self.logits).noise(key)

    def draw(self, noise: Array) -> Array:
        """One draw for each part, shape [..., D]."""
        return Categorical(self.logits).draw(noise)

    def sample(self, key: Key) -> Array:
        """An action."""
        return self.draw(self.noise(key))

    def log_prob(self, action: Array) -> Array:
        """sum_d log p_d(a_d), shape [...]."""
        return total(Categorical(self.logits).log_prob(action))

    def entropy(self) -> Array:
        """The sum over d of the entropies, in nats."""
        return total(Categorical(self.logits).entropy())

    def kl(self, other: "MultiCategorical") -> Array:
        """KL(self || other) = sum_d KL_d, in nats."""
        return total(Categorical(self.logits).kl(Categorical(other.logits)))

    def mode(self) -> Array:
        """The most probable action of each part."""
        return Categorical(self.logits).mode()


class Bernoulli(NamedTuple):
    """Independent switches: P(a_d = 1) = sigmoid(logits_d)."""

    logits: Array  # [..., D]

    def noise(self, key: Key) -> Array:
        """Uniform in [0, 1), shape [..., D]."""
        return jax.random.uniform(key, self.logits.shape, self.logits.dtype)

    def draw(self, noise: Array) -> Array:
        """1 where the noise is below the probability, shape [..., D]."""
        return (noise < jax.nn.sigmoid(self.logits)).astype(jnp.int32)

    def sample(self, key: Key) -> Array:
        """An action."""
        return self.draw(self.noise(key))

    def log_prob(self, action: Array) -> Array:
        """sum_d log p_d(a_d), shape [...]."""
        return total(jnp.where(action > 0, *self._log_p()))

    def entropy(self) -> Array:
        """The sum over d of the entropies, in nats."""
        return -total(_mean(self.logits, *self._log_p()))

    def kl(self, other: "Bernoulli") -> Array:
        """KL(self || other) = sum_d KL_d, in nats."""
        ones, zeros = (p - q for p, q in zip(self._log_p(), other._log_p(), strict=True))
        return total(_mean(self.logits, ones, zeros))

    def mode(self) -> Array:
        """The more probable action of each switch."""
        return (self.logits > 0).astype(jnp.int32)

    def _log_p(self):
        return jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits)


def _mean(logits, of_one, of_zero):
    return jax.nn.sigmoid(logits) * of_one + jax.nn.sigmoid(-logits) * of_zero


class Gaussian(NamedTuple):
    """N(mean, diag exp(2 log_std)) over the last axis, in the units of the action."""

    mean: Array  # [..., D]
    log_std: Array  # [..., D]

    def noise(self, key: Key) -> Array:
        """Standard normal, shape [..., D]."""
        return jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def draw(self, noise: Array) -> Array:
        """mean + std * noise."""
        return self.mean + jnp.exp(self.log_std) * noise

    def sample(self, key: Key) -> Array:
        """An action."""
        return self.draw(self.noise(key))

    def log_prob(self, action: Array) -> Array:
        """-sum_d [ (a-mean)^2/(2 std^2) + log std + log(2 pi)/2 ]; d/dlog std is ((a-mean)/std)^2 - 1."""
        standard = (action - self.mean) * jnp.exp(-self.log_std)
        return -total(0.5 * standard**2 + self.log_std + 0.5 * jnp.log(2 * jnp.pi))

    def entropy(self) -> Array:
        """sum_d [ log std + log(2 pi e)/2 ], in nats."""
        return total(self.log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e))

    def kl(self, other: "Gaussian") -> Array:
        """KL(self || other), in nats."""
        ratio = jnp.exp(2 * (self.log_std - other.log_std))
        shift = ((self.mean - other.mean) * jnp.exp(-other.log_std)) ** 2
        return total(0.5 * (ratio + shift - 1) + other.log_std - self.log_std)

    def mode(self) -> Array:
        """The mean."""
        return self.mean


def gaussian_beside(fixed: np.ndarray) -> type[Gaussian]:
    """A Gaussian over the entries of an action that are NaN in `fixed` [D]; the others keep those values.

    Its actions are whole, [..., D]; its parameters, noise and density cover only the free entries.
    """
    free = np.isnan(fixed)
    index, place = np.flatnonzero(free), np.clip(np.cumsum(free) - 1, 0, None)

    def whole(chosen):
        shape = (*chosen.shape[:-1], len(fixed))
        values = jnp.broadcast_to(jnp.asarray(fixed, chosen.dtype), shape)
        return jnp.where(jnp.broadcast_to(free, shape), chosen[..., place], values)

    class Partial(Gaussian):
        def draw(self, noise):
            return whole(super().draw(noise))

        def log_prob(self, action):
            return super().log_prob(action[..., index])

        def mode(self):
            return whole(super().mode())

    return Partial
