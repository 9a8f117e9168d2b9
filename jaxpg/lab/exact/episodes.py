"""Episodes: from one start, in classes of equal return and length, with the moments of their scores.

>>> world = jaxpg.lab.exact.bandits.bandit([0.0, 1.0])
>>> [(c.returns, float(c.probability)) for c in classes(world, np.zeros((1, 2)), 0, 1.0)]
[(0.0, 0.5), (1.0, 0.5)]
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.tables import tabulate

DIGITS = 12  # returns that agree to this many are one class


class Slope(NamedTuple):
    """The slope c of a surrogate in log pi, by the ratio rho of a step or s of the whole episode."""

    by_ratio: Callable[[np.ndarray], np.ndarray]
    of_episode: bool = False  # by s = (prod_t rho_t)^(1/T)


class Class(NamedTuple):
    """The episodes from one start with one return and one length."""

    returns: float
    length: int
    probability: float
    mean: np.ndarray  # [P] of U = sum_t c(rho_t) u_t, or c(s) sum_t u_t
    second: np.ndarray  # [P, P] of U


Laws = list[tuple[float, list[Class]]]  # of every start: its probability, and the classes from it


def laws(mdp: Mdp, logits, gamma: float, behaviour_logits=None, slope: Slope | None = None) -> Laws:
    """The probability of every start, and the classes of episodes from it."""
    initial = tabulate(mdp, logits).initial
    return [
        (float(initial[start]), classes(mdp, logits, int(start), gamma, behaviour_logits, slope))
        for start in np.flatnonzero(initial)
    ]


def classes(
    mdp: Mdp, logits, start: int, gamma: float, behaviour_logits=None, slope: Slope | None = None
) -> list[Class]:
    """The classes of the behaviour's episodes from a start, by a recursion over (state, return so far).

    slope: c in U, 1 unless given; one of whole episodes keeps apart paths of different ratios until they end.
    Raises ValueError for a world with reward noise, whose returns are no finite set.
    """
    world = tabulate(mdp, logits, behaviour_logits)
    if np.asarray(world.variance).any():
        raise ValueError("reward noise gives a continuum of returns; set it to 0")
    scores, num_params = world.score, world.score.shape[-1]
    log_ratio = np.zeros_like(world.ratio)
    if slope is not None and not slope.of_episode:
        scores = slope.by_ratio(world.ratio)[:, :, None] * scores
    elif slope is not None:
        log_ratio = np.log(world.ratio, where=world.behaviour > 0, out=log_ratio)
    nothing = _Sums(1.0, np.zeros(num_params), np.zeros((num_params,) * 2))
    running = {(int(start), 0.0, 0.0): nothing}
    ended: dict[tuple[float, int], _Sums] = {}
    for t in range(world.horizon):
        following: dict = {}
        for (state, so_far, log_so_far), sums in running.items():
            for action in np.flatnonzero(world.behaviour[state]):
                taken = sums.then(scores[state, action], world.behaviour[state, action])
                returns = round(so_far + gamma**t * world.reward[state, action], DIGITS)
                log = round(log_so_far + log_ratio[state, action], DIGITS)
                for after in np.flatnonzero(world.transition[state, action]):
                    part = taken.times(world.transition[state, action, after])
                    if world.terminal[after] or t == world.horizon - 1:
                        if slope is not None and slope.of_episode:
                            part = part.scaled(float(slope.by_ratio(np.exp(log / (t + 1)))))
                        _add(ended, (returns, t + 1), part)
                    else:
                        _add(following, (int(after), returns, log), part)
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

    def scaled(self, factor) -> "_Sums":
        """With factor U in place of U."""
        return _Sums(self.mass, factor * self.mean, factor**2 * self.second)

    def times(self, probability) -> "_Sums":
        return _Sums(*(probability * x for x in self))


def _add(table, key, sums):
    before = table.get(key)
    table[key] = (
        sums if before is None else _Sums(*(a + b for a, b in zip(before, sums, strict=True)))
    )
