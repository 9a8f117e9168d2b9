"""Grouped: exact moments of estimators that compare G episodes from one start.

With the total return as credit, a group's gradient is sum_i a_i(R_1..R_G, T_1..T_G) U_i, where U = sum_t u_t.
Given the start, episodes are independent, so it needs only the law of a class (R, T) and the mean and second
moment of U in it. A recursion over steps gives them, and a sum over multisets of classes the moments.

>>> world = jaxpg.lab.exact.bandits.bandit([0.0, 1.0])
>>> row = jaxpg.training.algorithm.algorithm("rloo", 2)
>>> moments(world, np.zeros((1, 2)), row.estimator, Hyperparams(), 2).mean.tolist()
[-0.25, 0.25]
>>> [(c.returns, float(c.probability)) for c in classes(world, np.zeros((1, 2)), 0, 1.0)]
[(0.0, 0.5), (1.0, 0.5)]
>>> round(arcsine_slope(0.5, 2), 3)
1.0
"""

import math
from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from jaxpg.envs import Mdp
from jaxpg.estimators import Estimator, Slot, describe
from jaxpg.lab.exact.enumeration import LIMIT, over_starts
from jaxpg.lab.exact.tables import Moments, Tables, tabulate
from jaxpg.types import Hyperparams

DIGITS = 12  # returns that agree to this many are one class


class Class(NamedTuple):
    """The episodes from one start with one return and one length."""

    returns: float
    length: int
    probability: float
    mean: np.ndarray  # [P] of U
    second: np.ndarray  # [P, P] of U


def moments(
    mdp: Mdp, logits, estimator: Estimator, hyperparams: Hyperparams, group_size: int
) -> Moments:
    """Exact mean and covariance of one group's gradient, on-policy; parameters are flattened state-major.

    Raises ValueError naming a slot that is not covered, for reward noise, for an entropy bonus, and for more
    than LIMIT multisets of classes.
    """
    if float(hyperparams.entropy_coef) != 0.0:
        raise ValueError(f"entropy_coef={hyperparams.entropy_coef} is not covered; use 0")
    if describe(estimator.credit) != "total_return":
        raise ValueError(
            f"groups are exact with the credit total_return, not {describe(estimator.credit)}; "
            "lab.enumeration covers it in a small world"
        )
    return moments_of(
        laws(mdp, logits, float(hyperparams.gamma)), estimator, group_size, mdp.horizon
    )


def laws(mdp: Mdp, logits, gamma: float) -> list[tuple[float, list[Class]]]:
    """The probability of every start, and the classes of episodes from it."""
    initial = tabulate(mdp, logits).initial
    return [
        (float(initial[start]), classes(mdp, logits, int(start), gamma))
        for start in np.flatnonzero(initial)
    ]


def moments_of(
    known: list[tuple[float, list[Class]]], estimator: Estimator, group_size: int, horizon: int
) -> Moments:
    """`moments` from the laws of a world, which are the same for every estimator and size."""
    return over_starts(
        [(p, _of_start(found, estimator, group_size, horizon)) for p, found in known]
    )


def _of_start(found: list[Class], estimator, size, horizon) -> Moments:
    mean, square, crossed = np.zeros(len(found)), np.zeros(len(found)), 0.0
    for weight, members in multisets(found, size):
        chosen = [found[i] for i in members]
        a = weights(estimator, chosen, horizon)
        total = np.bincount(members, a, len(found))
        mean += weight * total
        square += weight * np.bincount(members, a**2, len(found))
        crossed = crossed + weight * np.outer(total, total)
    means = np.stack([each.mean for each in found])
    whole = mean @ means
    # a_i^2 E[U U^T] for an episode with itself, a_i a_j E[U] E[U]^T for two of them.
    own = sum(
        s * (each.second - np.outer(each.mean, each.mean))
        for s, each in zip(square, found, strict=True)
    )
    return Moments(whole, own + means.T @ crossed @ means - np.outer(whole, whole))


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


def weights(estimator: Estimator, group: list[Class], horizon: int) -> np.ndarray:
    """a_i [G] of a group, from the slots of an estimator at its data's own policy, where every ratio is 1."""
    returns = np.array([each.returns for each in group])
    lengths = np.array([each.length for each in group], float)
    advantage = _scaled(estimator.surrogate, returns - _baseline(estimator.baseline, returns), 1)
    divisors = {
        "per_episode": len(group),
        "per_row": len(group) * horizon,
        "per_length": len(group) * lengths,
        "per_step": lengths.sum(),
    }
    return advantage / _known(divisors, estimator.reduce, "reduction")


def _baseline(slot, returns):
    name, size = describe(slot), len(returns)
    others = (returns.sum() - returns) / max(size - 1, 1)
    table = {
        "none": 0.0,
        f"grouped(leave_one_out, {size})": others,
        f"grouped(batch_mean, {size})": returns.mean(),
    }
    return slot.arguments[0] if name.startswith("constant") else _known(table, slot, "baseline")


def _scaled(slot, advantage, share):
    """The advantages as wrappers of the surrogate scale them; all surrogates have slope 1 at ratio 1."""
    if not isinstance(slot, Slot):
        raise _refusal("surrogate", slot)
    if slot.name in ("group_scaled", "episode_scaled"):
        advantage = _scaled(slot.arguments[0], advantage, share)
        spread = advantage.std()
        equal = spread <= 10.0**-DIGITS * max(np.abs(advantage).max(), 1.0)
        return np.zeros_like(advantage) if equal else advantage / spread
    if slot.name == "dropping":  # a group alone is kept, or has no gradient
        return _scaled(slot.arguments[0], advantage, share)
    if slot.name in (
        "score",
        "ratio",
        "clipped",
        "clipped_apart",
        "sequence_clipped",
        "weighted_score",
    ):
        return advantage
    raise _refusal("surrogate", slot)


def _known(table, slot, kind):
    if describe(slot) not in table:
        raise _refusal(kind, slot)
    return table[describe(slot)]


def _refusal(kind, slot):
    return ValueError(
        f"no exact group moments cover the {kind} {describe(slot)}; lab.enumeration does, for a small world"
    )


def classes(mdp: Mdp, logits, start: int, gamma: float) -> list[Class]:
    """The classes of episodes from a start, by a recursion over (state, return so far).

    Raises ValueError for a world with reward noise, whose returns are no finite set.
    """
    world = tabulate(mdp, logits)
    if np.asarray(world.variance).any():
        raise ValueError("reward noise gives a continuum of returns; set it to 0")
    num_params = world.behaviour.shape[1] * (int(np.max(world.observation)) + 1)
    scores = _scores(world, num_params)
    running = {(int(start), 0.0): _Sums(1.0, np.zeros(num_params), np.zeros((num_params,) * 2))}
    ended: dict[tuple[float, int], _Sums] = {}
    for t in range(world.horizon):
        following: dict = {}
        for (state, so_far), sums in running.items():
            for action in np.flatnonzero(world.behaviour[state]):
                taken = sums.then(scores[state, action], world.behaviour[state, action])
                returns = round(so_far + gamma**t * world.reward[state, action], DIGITS)
                for after in np.flatnonzero(world.transition[state, action]):
                    part = taken.times(world.transition[state, action, after])
                    if world.terminal[after] or t == world.horizon - 1:
                        _add(ended, (returns, t + 1), part)
                    else:
                        _add(following, (int(after), returns), part)
        running = following
    return [
        Class(float(returns), length, sums.mass, sums.mean / sums.mass, sums.second / sums.mass)
        for (returns, length), sums in sorted(ended.items())
    ]


class _Sums(NamedTuple):
    """Probability of some paths, and with it the sums of U and of U U^T over them."""

    mass: float
    mean: np.ndarray
    second: np.ndarray

    def then(self, score, probability) -> "_Sums":
        crossed = np.outer(self.mean, score)
        second = self.second + crossed + crossed.T + self.mass * np.outer(score, score)
        return _Sums(self.mass, self.mean + self.mass * score, second).times(probability)

    def times(self, probability) -> "_Sums":
        return _Sums(*(probability * x for x in self))


def _add(table, key, sums):
    before = table.get(key)
    table[key] = (
        sums if before is None else _Sums(*(a + b for a, b in zip(before, sums, strict=True)))
    )


def _scores(world: Tables, num_params: int) -> np.ndarray:
    """grad log pi(a|s) of tabular logits: [S, A, P]."""
    num_states, num_actions = world.behaviour.shape
    found = np.zeros((num_states, num_actions, num_params // num_actions, num_actions))
    for state in range(num_states):
        own = found[state, :, world.observation[state]]
        own += np.eye(num_actions) - world.behaviour[state]
    return found.reshape(num_states, num_actions, num_params)


def arcsine_slope(success: float, group_size: int) -> float:
    """h(p) with E g = h(p) grad p for GRPO's group with rewards 0 and 1, whose rate of success is p.

    h(p) = E sqrt(K (G - K)) / (G p (1 - p)), K ~ Binomial(G, p): the mean is the gradient of h's integral,
    which tends to 2 arcsin(sqrt p) as G grows. A start at p = 1/2 thus counts least.
    """
    k = np.arange(group_size + 1)
    spread = binom.pmf(k, group_size, success) @ np.sqrt(k * (group_size - k))
    return float(spread / (group_size * success * (1 - success)))
