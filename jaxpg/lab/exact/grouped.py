"""Grouped: exact moments of estimators that compare G episodes from one start.

With the total return as credit, a group's gradient is sum_i a_i(R_1..R_G, T_1..T_G) U_i, where U = sum_t u_t.
Given the start, episodes are independent, so it needs only the law of a class (R, T) and the mean and second
moment of U in it. A recursion over steps gives them, and a sum over multisets of classes the moments.

A batch of M groups is sum_m X_m / sum_m D_m, where D_m is what a group adds to the divisor: 1, or its steps
for a mean over steps, or nothing if it is dropped. Groups are independent, so the law of D, with the moments
of X given D, gives the batch's.

>>> world = jaxpg.lab.exact.bandits.bandit([0.0, 1.0])
>>> row = jaxpg.training.algorithm.algorithm("rloo", 2)
>>> moments(world, np.zeros((1, 2)), row.estimator, Hyperparams(), 2).mean.tolist()
[-0.25, 0.25]
>>> row = jaxpg.training.algorithm.algorithm("dapo", 2)  # keeps the one group in two that differs
>>> for count in (1, 2, 20):
...     print(moments(world, np.zeros((1, 2)), row.estimator, Hyperparams(), 2, count).mean.round(3))
[-0.25  0.25]
[-0.375  0.375]
[-0.5  0.5]
>>> found = causes(world, np.zeros((1, 2)), row.estimator, Hyperparams(), 2, 20)
>>> [(cause, float(change[1].round(3))) for cause, change in found.items() if change.any()]
[('own_sample', -0.125), ('std', 0.125), ('dropping', 0.25)]
>>> round(arcsine_slope(0.5, 2), 3)
1.0
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

from jaxpg.envs import Mdp
from jaxpg.estimators import Estimator, Slot, credit, describe, surrogates
from jaxpg.lab.exact.enumeration import LIMIT
from jaxpg.lab.exact.episodes import DIGITS, Class, Laws, Slope, laws
from jaxpg.lab.exact.tables import Moments, gradient
from jaxpg.types import Hyperparams

WRAPPERS = ("group_scaled", "episode_scaled", "dropping")


def moments(
    mdp: Mdp,
    logits,
    estimator: Estimator,
    hyperparams: Hyperparams,
    group_size: int,
    num_groups: int = 1,
    behaviour_logits=None,
) -> Moments:
    """Exact mean and covariance of the gradient of a batch of M groups; parameters are flattened state-major.

    Off-policy, ratios are to behaviour_logits. Raises ValueError naming a slot that is not covered, for
    reward noise, for an entropy bonus, and for more than LIMIT multisets of classes.
    """
    if float(hyperparams.entropy_coef) != 0.0:
        raise ValueError(f"entropy_coef={hyperparams.entropy_coef} is not covered; use 0")
    if describe(estimator.credit) != "total_return":
        raise ValueError(
            f"groups are exact with the credit total_return, not {describe(estimator.credit)}; "
            "lab.enumeration covers it in a small world"
        )
    _known({"on_policy": None}, estimator.importance, "importance")
    found = _sides(mdp, logits, estimator.surrogate, hyperparams, behaviour_logits)
    return moments_of(found, estimator, group_size, mdp.horizon, num_groups)


def moments_of(
    sides: list[Laws], estimator: Estimator, group_size: int, horizon: int, num_groups: int = 1
) -> Moments:
    """`moments` from the laws of a world, which are the same for every estimator and size.

    sides: on-policy one, with slope 1; else the laws of positive advantages and of the others.
    """
    if num_groups > 1 and "episode_scaled" in describe(estimator.surrogate):
        raise _refusal("surrogate", estimator.surrogate)
    parts: dict[int, _Part] = {}
    for (p, found), *others in zip(*sides, strict=True):
        both = found + [each for _, other in others for each in other]
        for d, part in _of_start(both, len(found), estimator, group_size, horizon).items():
            weighed = _Part(*(p * x for x in part))
            parts[d] = weighed if d not in parts else _Part(*map(np.add, parts[d], weighed))
    return _of_batch(parts, num_groups)


class _Part(NamedTuple):
    """Groups with one divisor: their probability, and with it the moments of X."""

    mass: Any
    mean: Any  # [P]
    second: Any  # [P, P]


def _of_start(both: list[Class], count: int, estimator, size, horizon) -> dict[int, _Part]:
    """The groups from one start, by what they add to the divisor of a batch.

    both: the classes for positive advantages, then those for others where they differ.
    """
    sums: dict[int, list] = {}
    for weight, members in multisets(both[:count], size):
        a, d = weights(estimator, [both[i] for i in members], horizon)
        if len(both) > count:
            members = np.where(a > 0, members, np.asarray(members) + count)
        total = np.bincount(members, a, len(both))
        new = weight, weight * total, weight * np.bincount(members, a**2, len(both))
        new = *new, weight * np.outer(total, total)
        sums[d] = [x + y for x, y in zip(sums[d], new, strict=True)] if d in sums else [*new]
    means = np.stack([each.mean for each in both])
    # a_i^2 E[U U^T] for an episode with itself, a_i a_j E[U] E[U]^T for two of them.
    own = np.stack([each.second - np.outer(each.mean, each.mean) for each in both])
    return {
        d: _Part(mass, mean @ means, np.tensordot(square, own, 1) + means.T @ crossed @ means)
        for d, (mass, mean, square, crossed) in sums.items()
    }


def _of_batch(parts: dict[int, _Part], num_groups: int) -> Moments:
    """The moments of sum_m X_m / sum_m D_m over M independent groups; 0 where every group is dropped."""
    top = max(parts)
    law = np.array([parts[d].mass if d in parts else 0.0 for d in range(top + 1)])
    rest, before = _convolved(law, num_groups - 1), _convolved(law, num_groups - 2)
    mean, second = 0.0, 0.0
    for d, part in parts.items():
        mean = mean + num_groups * part.mean * _mean_inverse(rest, d, 1)
        second = second + num_groups * part.second * _mean_inverse(rest, d, 2)
        for e, other in parts.items() if num_groups > 1 else ():
            pair = num_groups * (num_groups - 1) * _mean_inverse(before, d + e, 2)
            second = second + pair * np.outer(part.mean, other.mean)
    mean, second = np.asarray(mean), np.asarray(second)
    return Moments(mean, second - np.outer(mean, mean))


def _convolved(law, count) -> np.ndarray:
    """The law of the sum of `count` independent divisors."""
    total = np.ones(1)
    for _ in range(count):
        total = np.convolve(total, law)
    return total


def _mean_inverse(law, more, power) -> float:
    """E (D + more)^-power; X is 0 where all is dropped."""
    divisor = np.arange(len(law)) + float(more)
    return float(law @ np.where(divisor > 0, np.maximum(divisor, 1.0) ** -power, 0.0))


def multisets(found: list[Class], size: int) -> Iterator[tuple[float, list[int]]]:
    """Every multiset of classes with its probability. Raises ValueError for more than LIMIT."""
    count = math.comb(len(found) + size - 1, size)
    if count > LIMIT:
        raise ValueError(
            f"there are {count} multisets of {size} among {len(found)} classes of return and length, more "
            f"than {LIMIT}; make the group or the world smaller"
        )
    log = np.log([each.probability for each in found])
    for members in combinations_with_replacement(range(len(found)), size):
        repeats = np.bincount(members, minlength=len(found))
        ways = math.factorial(size) / math.prod(math.factorial(n) for n in repeats)
        yield ways * math.exp(repeats @ log), list(members)


def weights(estimator: Estimator, group: list[Class], horizon: int) -> tuple[np.ndarray, int]:
    """a_i [G] of a group from the slots of an estimator, and what the group adds to the batch's divisor."""
    returns = np.array([each.returns for each in group])
    lengths = np.array([each.length for each in group], float)
    centred = returns - _baseline(estimator.baseline, returns)
    advantage, drops = _scaled(estimator.surrogate, centred, describe(estimator.reduce))
    divisors = {
        "per_episode": (len(group), 1),
        "per_row": (len(group) * horizon, 1),
        "per_length": (len(group) * lengths, 1),
        "per_step": (1.0, int(lengths.sum())),
    }
    divisor, adds = _known(divisors, estimator.reduce, "reduction")
    silent = drops and not advantage.any()
    return advantage / divisor, 0 if silent else adds


def _baseline(slot, returns):
    name, size = describe(slot), len(returns)
    others = (returns.sum() - returns) / max(size - 1, 1)
    table = {
        "none": 0.0,
        f"grouped(leave_one_out, {size})": others,
        f"grouped(batch_mean, {size})": returns.mean(),
    }
    return slot.arguments[0] if name.startswith("constant") else _known(table, slot, "baseline")


def _scaled(slot, advantage, reduce) -> tuple[np.ndarray, bool]:
    """The advantages as wrappers of the surrogate scale them, and whether groups of zeros are dropped."""
    if not isinstance(slot, Slot):
        raise _refusal("surrogate", slot)
    if slot.name in ("group_scaled", "episode_scaled"):
        advantage, drops = _scaled(slot.arguments[0], advantage, reduce)
        spread = advantage.std()
        equal = spread <= 10.0**-DIGITS * max(np.abs(advantage).max(), 1.0)
        return (np.zeros_like(advantage) if equal else advantage / spread), drops
    if slot.name == "dropping":
        if slot.arguments[1] != (reduce == "per_step"):
            raise _refusal("surrogate", slot)
        return _scaled(slot.arguments[0], advantage, reduce)[0], True
    return advantage, False


def _sides(mdp, logits, slot, hyperparams, behaviour_logits) -> list[Laws]:
    slopes = _slopes(slot, hyperparams, behaviour_logits is None)
    gamma = float(hyperparams.gamma)
    return [laws(mdp, logits, gamma, behaviour_logits, slope) for slope in slopes]


def _slopes(slot, hyperparams, on_policy) -> list[Slope | None]:
    """The slopes of the surrogate in log pi by the ratio, for positive advantages and for others.

    One side where both are alike, as they all are where every ratio is 1.
    """
    _, slot = _unwrapped(slot)
    low, high = float(hyperparams.clip_eps), float(hyperparams.clip_eps_high)
    apart = partial(_below, 1 + high), partial(_above, 1 - low)
    table: dict[str, list[Slope | None]] = {
        "score": [None],
        "ratio": [Slope(lambda rho: rho)],
        "clipped": [Slope(partial(_below, 1 + low)), Slope(partial(_above, 1 - low))],
        "clipped_apart": [Slope(each) for each in apart],
        "sequence_clipped": [Slope(each, of_episode=True) for each in apart],
        "weighted_score": [Slope(lambda rho: np.minimum(rho, 1 + high))],
    }
    if on_policy and isinstance(slot, Slot) and slot.name in table:
        return [None]
    return _known(table, slot, "surrogate")


def _unwrapped(slot) -> tuple[list[Slot], Any]:
    """The wrappers of a surrogate, the outermost first, and the surrogate inside."""
    found = []
    while isinstance(slot, Slot) and slot.name in WRAPPERS:
        found.append(slot)
        slot = slot.arguments[0]
    return found, slot


def _below(top, rho):
    return np.where(rho <= top, rho, 0.0)


def _above(bottom, rho):
    return np.where(rho >= bottom, rho, 0.0)


def _known(table, slot, kind):
    if describe(slot) not in table:
        raise _refusal(kind, slot)
    return table[describe(slot)]


def _refusal(kind, slot):
    return ValueError(
        f"no exact group moments cover the {kind} {describe(slot)}; lab.enumeration does, for a small world"
    )


def causes(
    mdp: Mdp,
    logits,
    estimator: Estimator,
    hyperparams: Hyperparams,
    group_size: int,
    num_groups: int = 1,
    behaviour_logits=None,
) -> dict[str, np.ndarray]:
    """E g - grad J [P] as the sum of what each part of a row changes, put on one after the other.

    From the gradient of J: stale_data (the behaviour's episodes, with ratios by step), own_sample (the
    baseline), std (scales of advantages), length (the reduction), dropping, clip (the surrogate in place of
    the ratio). The order matters to the parts, not to their sum. Raises ValueError as `moments` does.
    """
    wrappers, _ = _unwrapped(estimator.surrogate)

    def wrapped(names) -> Any:
        inner = surrogates.ratio
        for slot in reversed(wrappers):
            if slot.name in names:
                inner = slot._replace(arguments=(inner, *slot.arguments[1:]))
        return inner

    plain = Estimator(credit.total_return, surrogate=surrogates.ratio)
    compared = plain._replace(baseline=estimator.baseline)
    scaled = compared._replace(surrogate=wrapped(WRAPPERS[:2]))
    reduced = scaled._replace(reduce=estimator.reduce)
    dropped = reduced._replace(surrogate=wrapped(WRAPPERS))
    stages = {
        "stale_data": plain,
        "own_sample": compared,
        "std": scaled,
        "length": reduced,
        "dropping": dropped,
        "clip": estimator,
    }
    given = hyperparams, behaviour_logits
    sides = own = _sides(mdp, logits, surrogates.ratio, *given)
    if behaviour_logits is not None:
        own = _sides(mdp, logits, estimator.surrogate, *given)
    before, found = gradient(mdp, logits, float(hyperparams.gamma)), {}
    for cause, stage in stages.items():
        laws_of = own if stage is estimator else sides
        after = moments_of(laws_of, stage, group_size, mdp.horizon, num_groups).mean
        found[cause], before = after - before, after
    return found


def arcsine_slope(success: float, group_size: int) -> float:
    """h(p) with E g = h(p) grad p for GRPO's group with rewards 0 and 1, whose rate of success is p.

    h(p) = E sqrt(K (G - K)) / (G p (1 - p)), K ~ Binomial(G, p): the mean is the gradient of h's integral,
    which tends to 2 arcsin(sqrt p) as G grows. A start at p = 1/2 thus counts least.
    """
    k = np.arange(group_size + 1)
    spread = binom.pmf(k, group_size, success) @ np.sqrt(k * (group_size - k))
    return float(spread / (group_size * success * (1 - success)))
