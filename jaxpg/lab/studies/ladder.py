"""The ladder of estimators: variance, bias and noise scale, side by side."""

from typing import Any

import numpy as np

from jaxpg.lab.studies.estimators import batch_moments, coupled, form, gradient
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.measured import Measured, need_effective
from jaxpg.lab.studies.pairs import square
from jaxpg.lab.studies.rows import intervals, where
from jaxpg.lab.studies.sampling import group_size, measure
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    compared,
    key_of,
    stated_row,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import World, has_exact, lifted
from jaxpg.stats.figures import BARS, COLOURS, bounds, label, legend, panels
from jaxpg.stats.figures import rows as row_names
from jaxpg.stats.intervals import Estimate, told
from jaxpg.stats.words import words

LADDER = (
    "total", "total_constant", "total_optimal", "rtg", "rtg_constant", "rtg_optimal", "rtg_time",
    "rtg_value", "rtg_optimal_state", "gae_0.95", "gae_0.5", "exact_advantage", "all_action",
)  # fmt: skip
SHORT = (
    "total", "rtg", "rtg_constant", "rtg_time_mean", "rtg_value", "gae_0.95", "gae_0.5",
    "exact_advantage", "all_action",
)  # fmt: skip
MEASURED = ("total", "total_mean", "rtg", "rtg_time_mean")
BATCH = 64  # of estimators that couple trajectories


def ladder(settings: Settings, progress: Progress) -> Result:
    """N tr Cov of each estimator's batch mean, its squared bias and B_simple = N tr Cov / |E g|^2."""
    world = world_of(settings)
    names = settings.estimators or _default(world)
    forms = [form(name, world) for name in names]
    measured = _measured(world, forms, settings, progress)
    truth = gradient(world) if has_exact(world) else None
    rows = []
    for each in forms:
        progress(f"exact moments of {each.name}")
        rows += _rung(world, each, measured.get(each.name), truth)
    table = tidy(rows)
    return Result(table, _numbers(rows), lambda figure: _draw_ladder(figure, names, rows, world))


def _default(world: World) -> tuple[str, ...]:
    names = (*MEASURED, "rtg_value", "gae_0.95") if world.critic is not None else MEASURED
    if world.is_tabular:
        names = LADDER if len(world.mdp.initial) <= 8 else SHORT
    own = f"gae_{world.hyperparams.lambda_:g}"  # a run's lambda replaces the usual one
    return tuple(dict.fromkeys(own if name == "gae_0.95" else name for name in names))


def _measured(world, forms, settings, progress) -> dict[str, Measured]:
    sampled = [each for each in forms if each.estimator is not None]
    alone = [each for each in sampled if not coupled(each)]
    together = [each for each in sampled if coupled(each)]
    key, found = key_of(settings), {}
    group_size(settings.trajectories, BATCH if together else 1)  # refuses before anything is run
    if alone:
        found |= measure(world, alone, key, settings.trajectories, (1,), progress)
    if together:
        found |= measure(world, together, key, settings.trajectories, (BATCH,), progress)
    for name, each in found.items():
        need_effective(each, name)
    return found


def _rung(world: World, each: Form, measured: Measured | None, truth) -> list[dict[str, Any]]:
    """Rows of one estimator: trace, noise scale and squared bias, per trajectory."""
    size = BATCH if coupled(each) else 1
    known = batch_moments(each, world, size)
    trace = None if known is None else size * known.trace
    exact_values = {
        "trace": trace,
        "noise_scale": None if known is None or trace is None else trace / square(known.mean),
        "squared_bias": None if known is None or truth is None else square(known.mean - truth),
    }
    values: dict[str, Any] = {}
    if measured is not None:
        values = {"trace": [size * x for x in measured.trace(size)]}
        values["noise_scale"] = measured.noise_scale(size)
        if truth is not None:
            values["squared_bias"] = measured.bias(lifted(world, truth), size)
    # If the bias is known to be 0, a warning of a possible bias would mislead.
    harmless = exact_values["squared_bias"] == 0
    warning = None if harmless else each.warning or None
    common = {"estimator": each.name, "batch": size, "warning": warning}
    if measured is not None:
        common |= measured.counts
    return compared(exact_values, values, **common)


def _numbers(rows) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row["quantity"], {})[row["estimator"]] = stated_row(row)
    return found


def _draw_ladder(figure, names, rows, world):
    axes = panels(figure, 2, height=0.3 + 0.19 * max(len(names), 5))
    titles = {
        "trace": ("Variance of one trajectory's gradient", "tr Cov (per trajectory)"),
        "noise_scale": ("Trajectories until noise equals signal", "noise scale (trajectories)"),
    }  # fmt: skip
    for axis, (quantity, (title, unit)) in zip(axes, titles.items(), strict=True):
        _bars(axis, names, where(rows, quantity=quantity))
        label(axis, f"{title}, {world.name}", unit, "", legend=False)
    legend(figure)


def _bars(axis, names, rows):
    place = {name: i for i, name in enumerate(names)}
    has_exact = [row for row in rows if row["exact"] is not None]
    if has_exact:
        axis.barh(
            [place[row["estimator"]] for row in has_exact], [row["exact"] for row in has_exact], 0.62,
            **BARS, label="exact",
        )  # fmt: skip
    seen = [row for row in rows if row.get("measured") is not None]
    for row in seen:
        known = Estimate(row["measured"], row["low"], row["high"])
        bounds(axis, place[row["estimator"]], known, 0, across=True)
    seen = [row for row in seen if np.isfinite(row["measured"])]
    if seen:
        middle, low, high = map(np.array, intervals(seen))
        error = np.maximum([middle - low, high - middle], 0)
        axis.errorbar(
            middle, [place[row["estimator"]] for row in seen], xerr=error, fmt="o",
            color=COLOURS[0], markerfacecolor="white", capsize=2.0, linewidth=0.9,
            label="measured, with 95 % intervals",
        )  # fmt: skip
    biased = {row["estimator"] for row in rows if row["warning"]}
    texts = [words(n) + (" (biased)" if n in biased else "") for n in place]
    named = (
        axis.get_subplotspec().colspan.start == 0
    )  # else the panel to the left has the same rows
    row_names(axis, texts if named else [""] * len(names))
    shown = [row["exact"] if row["exact"] is not None else row["measured"] for row in rows]
    known = [x if np.isfinite(x) else row["low"] for x, row in zip(shown, rows, strict=True)]
    known = [x for x in known if np.isfinite(x)]
    if min(known, default=0) > 0 and max(known) > 50 * min(known):
        axis.set_xscale("log")
    for row, value in zip(rows, shown, strict=True):
        text, reach = _text(value), max(value, row.get("high") or value)
        if np.isnan(value):
            reach = row["low"] if np.isfinite(row["low"]) else min(known, default=0.0)
            text = told(row["low"])
        elif row["exact"] is not None and np.isinf(reach):
            reach = value
        at = reach, place[row["estimator"]]
        away = (16 if np.isnan(value) else 6, 0)
        axis.annotate(text, at, xytext=away, textcoords="offset points", va="center")
    axis.margins(x=0.22)


def _text(value: float) -> str:
    if value >= 1000:
        return f"{value:.2e}" if value >= 1e6 else f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


EXPERIMENTS = {
    "ladder": Experiment(
        "variance, bias and noise scale of every estimator, side by side",
        ladder,
        Settings(trajectories=2**18),
        Settings(trajectories=2**15, quick=True),
        ignores=("repeats",),
    ),
}
