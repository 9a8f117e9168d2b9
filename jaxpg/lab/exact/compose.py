"""Compose: from the slots of an Estimator to the coefficients of the exact recursions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.estimators import Estimator, Slot, describe, facts_of
from jaxpg.lab.exact.recursions import Coefficients, paired, whole
from jaxpg.lab.exact.tables import Moments, Tables, action_values, discounts, tabulate
from jaxpg.types import Hyperparams


class _Factors(NamedTuple):
    """The factors of an importance slot at (t, s, a); its step weight is step_t prod carry."""

    step: Any
    carry: Any = 1.0
    trace: Any = 1.0
    weighted: bool = False  # whether the whole episode's ratio multiplies everything


def moments(
    mdp: Mdp,
    logits,
    estimator: Estimator,
    hyperparams: Hyperparams,
    behaviour_logits=None,
    *,
    critic=None,
) -> Moments:
    """Exact mean and covariance of one whole episode's gradient under an Estimator of slots.

    logits, behaviour_logits: [O, A]; parameters are flattened state-major. critic: V(s) [S] or
    V_t(s) [H, S] for `value` and `next_value`; if a slot reads a critic and none is given, the exact
    values of `logits`. Raises ValueError naming a slot that the recursions do not cover.
    """
    return composed(tabulate(mdp, logits, behaviour_logits), estimator, hyperparams, critic)


def composed(world: Tables, estimator: Estimator, hyperparams: Hyperparams, critic=None) -> Moments:
    """`moments` for given tables."""
    coefficients, weighted = compose(world, estimator, hyperparams, critic)
    recursion = whole if describe(estimator.credit) == "total_return" else paired
    mean, covariance = recursion(world, coefficients, weighted)
    scale = _reduction(world, estimator.reduce)
    return Moments(scale * mean, scale**2 * covariance)


def compose(
    world: Tables, estimator: Estimator, hyperparams: Hyperparams, critic=None
) -> tuple[Coefficients, bool]:
    """The coefficients of an estimator's recursion, and whether the episode's ratio multiplies it all."""
    gamma = float(hyperparams.gamma)
    factors = _importance(estimator.importance, world, gamma)
    value = _critic(world, estimator, gamma, critic)
    baseline = _baseline(estimator.baseline, world, value)
    c = _credit(estimator.credit, world, hyperparams, factors.trace, value)
    c = c._replace(step=factors.step, shift=factors.step * baseline, carry=factors.carry)
    return _surrogate(estimator.surrogate, world, hyperparams, c, factors), factors.weighted


def _critic(world, estimator, gamma, critic):
    """V_t(s) [H, S]; 0 after the episode's end, and everywhere if no slot reads a critic."""
    if critic is None:
        asked = any(facts_of(x).reads_critic for x in (estimator.credit, estimator.baseline))
        value = action_values(world, gamma)[0][:-1] if asked else np.zeros(1)
    else:
        value = np.asarray(critic, np.float64)
    shape = (world.horizon, len(world.initial))
    if value.shape not in ((1,), shape, shape[1:]):
        raise ValueError(
            f"critic has shape {value.shape}; steps and states need {shape} or {shape[1:]}"
        )
    return np.where(world.terminal, 0.0, np.broadcast_to(value, shape))


def _credit(slot, world, hyperparams, trace, value):
    """psi_t = r_t + gamma Y_{t+1} with Y_t = V_t + lambda c_t (psi_t - V_t)."""
    lambdas = {
        "unit": 0.0,
        "reward_to_go": 1.0,
        "total_return": 1.0,
        "lambda_return": float(hyperparams.lambda_),
    }
    lambda_ = _entry(lambdas, slot, "credit")
    if describe(slot) == "unit":
        return Coefficients(reward=1.0, decay=0.0)
    mix = lambda_ * np.broadcast_to(trace, world.ratio.shape)
    return Coefficients(
        reward=world.reward,
        decay=float(hyperparams.gamma),
        variance=world.variance,
        offset=(1.0 - mix) * value[:, :, None],
        trace=mix,
    )


def _baseline(slot, world, value):
    """b_t(s) [H, S, 1], or a number."""
    table: dict[str, Callable] = {
        "none": lambda: 0.0,
        "constant": lambda b: float(b),
        "tabulated": lambda table: _by_step(table, world)[:, :, None],
        "critic": lambda: value[:, :, None],
    }
    return _entry(table, slot, "baseline")(*slot.arguments)


def _by_step(table, world):
    rows = np.minimum(np.arange(world.horizon), len(table) - 1)
    return np.asarray(table, np.float64)[rows][:, world.observation]


def _importance(slot, world, gamma) -> _Factors:
    rho = world.ratio
    table: dict[str, Callable] = {
        "on_policy": lambda: _Factors(1.0),
        "one_step": lambda: _Factors(rho),
        "trajectory": lambda: _Factors(1.0, weighted=True),
        "prefix": lambda: _Factors(rho, carry=rho),
        "per_decision": lambda: _Factors(rho, carry=rho, trace=rho),
        "truncated": lambda top: _Factors(np.minimum(rho, top), trace=np.minimum(rho, top)),
        "from_start": lambda inner: _from_start(_importance(inner, world, gamma)),
        "capped": lambda inner, top: _bounded(inner, lambda step: np.minimum(step, top)),
        "dropped_above": lambda inner, top: _bounded(inner, lambda step: step * (step <= top)),
    }

    def _from_start(factors):
        start = discounts(gamma, world.horizon)[:, None, None]
        return factors._replace(step=factors.step * start)

    def _bounded(inner, bound):
        factors = _importance(inner, world, gamma)
        if factors.weighted or np.ndim(factors.carry):  # a bound on a product of ratios
            raise _refusal("importance", slot)
        return factors._replace(step=bound(factors.step))

    return _entry(table, slot, "importance")(*slot.arguments)


def _surrogate(slot, world, hyperparams, c, factors) -> Coefficients:
    """Multiply u (step psi - shift) by the surrogate's slope, 1 or rho, and subtract the penalty's term."""
    if float(hyperparams.entropy_coef) != 0.0:
        raise ValueError(
            f"entropy_coef={hyperparams.entropy_coef} is not covered by the recursions; use 0, or "
            "lab.enumeration for a small world"
        )
    name = describe(slot)
    if name == "score":
        return c
    rho, live = world.ratio, ~world.terminal
    if name == "clipped":
        epsilon, seen = float(hyperparams.clip_eps), rho[live]
        if (np.abs(seen - 1.0) > epsilon).any():
            raise ValueError(
                f"clipped with clip_eps={epsilon} cuts ratios from {seen.min():.3g} to {seen.max():.3g}: "
                "which ones depends on the sign of a sampled advantage, so no recursion covers it; use "
                "exact.surrogate_moments (known advantages) or lab.enumeration for a small world"
            )
    elif name == "kl_penalised":
        if factors.weighted or np.ndim(factors.carry):
            raise ValueError(
                "kl_penalised adds a penalty that products of ratios do not multiply, which no recursion "
                "covers; use on_policy or one_step, or lab.enumeration for a small world"
            )
        penalty = float(hyperparams.kl_coef) * (rho - 1.0)
        return c._replace(step=rho * c.step, shift=rho * c.shift + penalty)
    elif name != "ratio":
        raise _refusal("surrogate", slot)
    return c._replace(step=rho * c.step, shift=rho * c.shift)


def _reduction(world, slot) -> float:
    if describe(slot) == "per_episode":
        return 1.0
    if describe(slot) == "per_step" and not world.terminal.any():
        return 1.0 / world.horizon
    raise _refusal("reduction", slot)


def _entry(table, slot, kind):
    """The formula of a slot value, found by its name; a user's own function has none."""
    if not isinstance(slot, Slot) or slot.name not in table:
        raise _refusal(kind, slot)
    return table[slot.name]


def _refusal(kind, slot) -> ValueError:
    return ValueError(
        f"no exact recursion covers the {kind} {describe(slot)}; lab.enumeration does, for a small world"
    )
