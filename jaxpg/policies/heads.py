"""The last layer of a policy: from its outputs to a distribution over the actions of a space.

>>> found = head(Discrete(3))
>>> found.num_outputs, found.distribution(jnp.zeros(3), found.params).mode().tolist()
(3, 0)
>>> isinstance(found, Head), [*DISTRIBUTIONS]
(True, ['categorical', 'bernoulli', 'gaussian', 'tanh', 'beta'])
"""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Box, Discrete, MultiDiscrete, Space, Squashed, spaces
from jaxpg.policies.bounded import Beta, TanhGaussian
from jaxpg.policies.distributions import (
    MASKED_LOGIT,
    Bernoulli,
    Categorical,
    Gaussian,
    MultiCategorical,
    gaussian_beside,
)
from jaxpg.types import Array, Params

Distribution = Categorical | MultiCategorical | Bernoulli | Gaussian | TanhGaussian | Beta


class Head(NamedTuple):
    num_outputs: int  # of the last dense layer
    distribution: Callable[[Array, Params], Distribution]  # of outputs [..., num_outputs]
    params: dict[str, Array]  # beside that layer's


class Settings(TypedDict, total=False):
    """What a policy's distribution may be told; each has a default in `head`."""

    initial_std: float
    distribution: str | None
    state_dependent_std: bool


def head(
    action: Space,
    initial_std: float = 0.5,
    distribution: str | None = None,
    state_dependent_std: bool = False,
) -> Head:
    """The head for an action space.

    distribution: one of DISTRIBUTIONS; by default the first that fits. initial_std: of a Gaussian, as a
    fraction of half the action range, and of a tanh's u. state_dependent_std: the network puts out log std,
    too. A Beta starts at alpha = beta = 1.69, a standard deviation of 0.48 half ranges.
    Raises ValueError for a distribution or setting that does not fit the space.
    """
    kind = next(x for x in (Squashed, Box, Discrete, MultiDiscrete) if isinstance(action, x))
    fitting = [name for name, builders in DISTRIBUTIONS.items() if kind in builders]
    name = fitting[0] if distribution is None else distribution
    if name not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {name!r}; use one of {', '.join(DISTRIBUTIONS)}")
    if name not in fitting:
        remedy = ", or bound the actions by envs.squashed" if name in SQUASHING else ""
        raise ValueError(
            f"the distribution {name} does not fit actions that are {kind.__name__}; use "
            f"{' or '.join(fitting)}{remedy}"
        )
    if state_dependent_std and name not in ("gaussian", "tanh"):
        raise ValueError(
            f"state_dependent_std is for gaussian and tanh, but the distribution is {name}; leave it out"
        )
    return DISTRIBUTIONS[name][kind](action, initial_std, state_dependent_std)


def _categorical(action: Discrete, *_) -> Head:
    return Head(action.n, lambda x, params: Categorical(x), {})


def _multi_categorical(action: MultiDiscrete, *_) -> Head:
    nvec, widest = action.nvec, max(action.nvec)
    valid = np.arange(widest)[None, :] < np.asarray(nvec)[:, None]

    def multi(x, params):
        logits = x.reshape(*x.shape[:-1], len(nvec), widest)
        return MultiCategorical(
            jnp.where(jnp.broadcast_to(valid, logits.shape), logits, MASKED_LOGIT)
        )

    return Head(len(nvec) * widest, multi, {})


def _bernoulli(action: MultiDiscrete, *_) -> Head:
    if set(action.nvec) != {2}:
        raise ValueError(
            f"the distribution bernoulli is for choices between 2, but the actions are {action}; use "
            "categorical"
        )
    return Head(len(action.nvec), lambda x, params: Bernoulli(x), {})


def _gaussian(action: Box, initial_std, dependent) -> Head:
    if len(action.shape) != 1:
        raise ValueError(f"Gaussian policies need vector actions, got shape {action.shape}")
    low, high = spaces.limits(action)
    free = low < high
    if not free.any():
        raise ValueError(
            f"every entry of the action is fixed (low = high = {low}): there is nothing to choose"
        )
    kind = Gaussian if free.all() else gaussian_beside(np.where(free, np.nan, low))
    low, high = low[free], high[free]
    # The network works in units of half the action range, so one initial std suits every task.
    finite = np.isfinite(low) & np.isfinite(high)
    ends = np.where(finite, low, -1), np.where(finite, high, 1)
    centre = np.where(finite, (ends[0] + ends[1]) / 2, np.clip(np.float32(0), low, high))
    return _normal(kind, centre, (ends[1] - ends[0]) / 2, initial_std, dependent)


def _tanh(action: Squashed, initial_std, dependent) -> Head:
    size = action.shape[0]
    return _normal(TanhGaussian, np.zeros(size), np.ones(size), initial_std, dependent)


def _normal(kind, centre, scale, initial_std, dependent) -> Head:
    size = len(scale)

    def normal(x, params):
        x = x[..., :size]
        mean = jnp.broadcast_to(centre, x.shape) + jnp.broadcast_to(scale, x.shape) * x
        return kind(mean, jnp.broadcast_to(params["log_std"] + np.log(scale), x.shape))

    def dependent_normal(x, params):
        fixed = normal(x, params)
        return fixed._replace(log_std=fixed.log_std + x[..., size:])

    log_std = {"log_std": jnp.full(size, np.log(initial_std), jnp.result_type(float))}
    return Head(2 * size, dependent_normal, log_std) if dependent else Head(size, normal, log_std)


def _beta(action: Squashed, *_) -> Head:
    def beta(x, params):
        # Above 1, the density has one maximum and vanishes at the bounds (Chou et al., 2017).
        return Beta(*(1 + y for y in jnp.split(jax.nn.softplus(x), 2, -1)))

    return Head(2 * action.shape[0], beta, {})


# For each name, the kinds of actions that it is for.
DISTRIBUTIONS: dict[str, dict[type, Callable[..., Head]]] = {
    "categorical": {Discrete: _categorical, MultiDiscrete: _multi_categorical},
    "bernoulli": {MultiDiscrete: _bernoulli},
    "gaussian": {Box: _gaussian},
    "tanh": {Squashed: _tanh},
    "beta": {Squashed: _beta},
}

# Those that act in envs.squashed(env).
SQUASHING = [name for name, builders in DISTRIBUTIONS.items() if Squashed in builders]
