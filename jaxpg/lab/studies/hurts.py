"""Hurts: where subtracting a baseline, or dropping past rewards, raises the variance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.lab.exact import bandits
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.rows import draw_exact, draw_measured, intervals, where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, estimated, key_of, tidy
from jaxpg.lab.worlds.world import world as make_world
from jaxpg.stats.figures import caption, label, panels, points
from jaxpg.stats.intervals import within
from jaxpg.stats.moments import GROUPS, SampleMoments, jackknife, moments_of


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
    axes = panels(figure, 3, width=4.7)
    for index, name in enumerate(kinds):
        mine = where(rows, estimator=name)
        draw_exact(axes[0], mine, "probability", index, name)
        draw_measured(axes[0], mine, "probability", index)
    label(axes[0], "Sigmoid bandit, rewards 1 and 0", "p, probability of the better arm",
          "variance of one gradient", loc="upper center")  # fmt: skip
    p, b = np.meshgrid(np.linspace(0.02, 0.98, 97), np.linspace(-0.5, 1.5, 101))
    ratio = (
        ((1 - p) * (rewards[0] - b) + p * (rewards[1] - b))
        / ((1 - p) * rewards[0] + p * rewards[1])
    ) ** 2
    mesh = axes[1].pcolormesh(p, b, np.clip(np.log10(ratio + 1e-9), -2, 2), cmap="PuOr_r", vmin=-2, vmax=2,
                              shading="auto", rasterized=True)  # fmt: skip
    axes[1].grid(False)
    figure.colorbar(mesh, ax=axes[1], label="log10 variance ratio to b = 0")
    axes[1].plot(p[0], p[0], color="black", linestyle="--", label="b = E[r]")
    axes[1].plot(p[0], 1 - p[0], color="white", linestyle="-.", label="b = b*")
    label(axes[1], "Which baselines help (below 0) or hurt", "p, probability of the better arm",
          "baseline b", legend=False)  # fmt: skip
    axes[1].legend(fontsize=8, loc="upper center", ncols=2, facecolor="0.7", framealpha=1)
    cases = [r for r in rows if "world" in r]
    place = np.arange(len(cases))
    axes[2].bar(
        place, [r["exact"] for r in cases], 0.6, color="0.82", edgecolor="0.45", linewidth=0.6
    )
    points(axes[2], place, *intervals(cases), index=0)
    axes[2].set_xticks(
        place, [f"{r['estimator']}\n{r['world']}" for r in cases], fontsize=7, rotation=20
    )
    axes[2].set_yscale("symlog", linthresh=0.1)
    for x, r in zip(place, cases, strict=True):
        axes[2].annotate(f"{r['exact']:.3g}", (x, max(r["exact"], r["high"])), xytext=(0, 5), ha="center",
                         textcoords="offset points", fontsize=8)  # fmt: skip
    label(axes[2], "A constant hurts on A, reward to go hurts on C", "estimator, world",
          "tr Cov, one trajectory", legend=False)  # fmt: skip
    axes[2].margins(y=0.15)
    caption(figure, "lines and bars: exact; markers: measured, with 95 % intervals")


EXPERIMENTS = {
    "never-hurts": Experiment(
        "where a baseline or reward to go raises the variance: bandit, A and C",
        never_hurts,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("env", "estimators", "policy", "checkpoint", "repeats"),
    ),
}
