"""Hurts: where subtracting a baseline, or dropping past rewards, raises the variance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.lab.exact import bandits
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, estimated, key_of, tidy
from jaxpg.lab.worlds.world import world as make_world
from jaxpg.stats.figures import BARS, TEXT, caption, interval, label, line, panels
from jaxpg.stats.figures import rows as row_names
from jaxpg.stats.intervals import Estimate, within
from jaxpg.stats.moments import GROUPS, SampleMoments, jackknife, moments_of
from jaxpg.stats.words import words


def never_hurts(settings: Settings, progress: Progress) -> Result:
    """Where a baseline raises the variance: the sigmoid bandit with b = E[r], A with b = J, and C.

    var = p (1-p) ((1-p)(r_1 - b) + p (r_0 - b))^2 is 0 at b* = (1-p) r_1 + p r_0, not at the mean
    p r_1 + (1-p) r_0, nor at 0.
    """
    rewards = (1.0, 0.0)
    grid, chosen = np.linspace(0.01, 0.99, 99), (0.1, 0.3, 0.5, 0.7, 0.9)
    kinds = {
        "b = 0": lambda p: 0.0,
        "b = E[r]": lambda p: p * rewards[0] + (1 - p) * rewards[1],
        "b = b*": lambda p: bandits.sigmoid_optimal_baseline(p, rewards),
    }
    rows: list[dict[str, Any]] = []
    count = settings.trajectories // GROUPS * GROUPS
    if count < 2 * GROUPS:
        raise ValueError(
            f"trajectories={count} is too few for an interval; use {2 * GROUPS} or more"
        )
    cases = _cases(settings, progress)  # first, because it refuses requests that do not fit
    progress("bandit")
    for name, baseline in kinds.items():
        for p in sorted({*grid.round(2).tolist(), *chosen}):
            known = float(bandits.sigmoid_moments(p, rewards, baseline(p)).covariance[0, 0])
            row = {"estimator": name, "probability": p, "quantity": "variance", "exact": known}
            if p in chosen:
                moments = _bandit(key_of(settings), count, p, rewards[0], rewards[1], baseline(p))
                value = within(jackknife(lambda m: m.squares.sum() / (m.count - 1), moments))
                row = {**row, **estimated(value), "trajectories": count, "env_steps": count}
            rows.append(row)
    rows += cases
    at_nine = {r["estimator"]: r["exact"] for r in rows if r.get("probability") == 0.9}
    summary = {
        "bandit_at_0.9": at_nine,
        "cases": {f"{r['world']} {r['estimator']}": r["exact"] for r in rows if "world" in r},
    }
    return Result(tidy(rows), summary, lambda figure: _draw_hurts(figure, rows, kinds, rewards))


@jax.jit
def _bandit_group(key, draws, p, first, second, baseline):
    drawn = jax.random.bernoulli(key, p, draws.shape)
    gradient = jnp.where(drawn, (1 - p) * (first - baseline), -p * (second - baseline))
    return moments_of(gradient[:, None])


def _bandit(key, count, *numbers) -> SampleMoments:
    draws = jnp.zeros(count // GROUPS)
    numbers = tuple(map(jnp.float32, numbers))
    groups = [_bandit_group(jax.random.fold_in(key, g), draws, *numbers) for g in range(GROUPS)]
    return jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *groups)


def _cases(settings, progress) -> list[dict[str, Any]]:
    """Reward to go with a constant on A, and total return against reward to go on C."""
    rows = []
    for name, names in (
        ("A", ("rtg", "rtg_constant", "rtg_value")),
        ("C", ("total", "rtg", "rtg_value")),
    ):
        place = make_world(name, gamma=settings.gamma)
        forms = [form(each, place) for each in names]
        found = measure(place, forms, key_of(settings), settings.trajectories, (1,), progress)
        for each in forms:
            measured = found[each.name]
            row = {"estimator": each.name, "world": name, "quantity": "trace", **measured.counts}
            rows.append(estimated(measured.trace(), exact=each.moments().trace, **row))
    return rows


def _draw_hurts(figure, rows, kinds, rewards):
    axes = panels(figure, 3)
    for index, name in enumerate(kinds):
        mine = where(rows, estimator=name)
        draw_exact(axes[0], mine, "probability", index, name)
        draw_measured(axes[0], mine, "probability", index, name)
    label(axes[0], "Sigmoid bandit, rewards 1 and 0", "p, probability of the better arm",
          "variance of one gradient")  # fmt: skip
    _draw_ratio(axes[1], rewards)
    cases = [r for r in rows if "world" in r]
    place = np.arange(len(cases))
    axes[2].barh(place, [r["exact"] for r in cases], 0.6, **BARS)
    for index, row in enumerate(cases):
        interval(axes[2], Estimate(*(row[c] for c in ("measured", "low", "high"))), index, 0)
        text, reach = f"{row['exact']:#.3g}".rstrip("."), max(row["exact"], row["high"])
        axes[2].annotate(
            text, (reach, index), xytext=(4, 0), textcoords="offset points", va="center"
        )
    row_names(axes[2], [f"{words(r['estimator'])}, {r['world']}" for r in cases])
    axes[2].margins(x=0.2)
    label(axes[2], "A constant hurts on A, reward to go hurts on C", "tr Cov, one trajectory", "",
          legend=False)  # fmt: skip
    caption(figure, "lines and bars: exact; markers: measured, with 95 % intervals")


def _draw_ratio(axis, rewards):
    """Contours of the variance with a baseline b, in units of that without; grey where it is larger."""
    p, b = np.meshgrid(np.linspace(0.02, 0.98, 97), np.linspace(-0.5, 1.5, 101))
    ratio = (
        ((1 - p) * (rewards[0] - b) + p * (rewards[1] - b))
        / ((1 - p) * rewards[0] + p * rewards[1])
    ) ** 2
    axis.contourf(p, b, ratio, levels=[1.0, np.inf], colors=["0.85"])
    drawn = axis.contour(p, b, ratio, levels=[0.1, 1.0, 10.0], colors="0.3", linewidths=0.8)
    places = [(0.25, 0.25), (0.2, 1.05), (0.5, 1.0), (0.25, 0.0), (0.72, 1.16), (0.84, -0.35)]
    axis.clabel(drawn, fmt=lambda x: f"×{x:g}", fontsize=TEXT, manual=places)
    line(axis, p[0], p[0], 1, "b = E[r]")
    line(axis, p[0], 1 - p[0], 2, "b = b*")
    axis.grid(False)
    label(axis, "Variance in units of that at b = 0; grey: a baseline hurts",
          "p, probability of the better arm", "baseline b")  # fmt: skip


EXPERIMENTS = {
    "never-hurts": Experiment(
        "where a baseline or reward to go raises the variance: bandit, A and C",
        never_hurts,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("env", "estimators", "policy", "checkpoint", "repeats"),
    ),
}
