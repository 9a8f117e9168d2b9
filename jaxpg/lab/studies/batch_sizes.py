"""Batches: how the variance and the direction of a gradient change with their size."""

from typing import Any

import numpy as np

from jaxpg.lab import exact
from jaxpg.lab.studies.estimators import batch_moments, coupled, form, true_gradient
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.measured import Measured, need_effective
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import group_size, measure, powers
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    stated,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import World, has_exact
from jaxpg.stats.figures import caption, label, legend, line, panels
from jaxpg.stats.moments import GROUPS, Estimate, SampleMoments, merge_groups, quantile
from jaxpg.stats.words import words

REFERENCE_SEED = 1 << 20  # added to the seed, so that the reference gradient has its own episodes


def batch_size(settings: Settings, progress: Progress) -> Result:
    """tr Cov of the mean over N trajectories against N: a line of slope -1 on logarithmic axes.

    A flatter one means that batches share something: random keys, or a critic fitted to all of them.
    """
    world, forms = _chosen(settings, ("total", "rtg", "rtg_value"), ("total", "rtg"))
    found = _by_size(world, forms, settings, progress)
    rows, summary = [], {}
    for each in forms:
        sizes = sorted(found[each.name])
        for n in sizes:
            rows.append(_trace_row(world, each, found[each.name][n], n))
        slope, intercept = _slope([(n, found[each.name][n]) for n in sizes])
        one = batch_moments(each, world, 1) if each.exact is not None else None
        summary[each.name] = {
            "slope": stated(slope),
            "trace_at_one": stated(intercept),
            **({} if one is None else {"exact_trace_at_one": one.trace}),
        }
        if slope.low > -0.95:
            rows[-1]["warning"] = f"slope {slope.value:.3f} > -0.95: batches share something"
    return Result(
        tidy(rows), summary, lambda figure: _draw_sizes(figure, forms, rows, world, summary)
    )


def _chosen(settings, with_tables, without) -> tuple[World, list[Form]]:
    world = world_of(settings)
    names = settings.estimators or (with_tables if has_exact(world) else without)
    forms = [form(name, world) for name in names]
    for each in forms:
        if each.estimator is None:
            raise ValueError(f"{each.name} has only exact moments and cannot be sampled")
    return world, forms


def _by_size(world, forms, settings, progress, reference=None) -> dict[str, dict[int, Measured]]:
    """name -> N -> measured: one program for all N, or one for each N where batches are coupled."""
    key, count = key_of(settings), settings.trajectories
    found: dict[str, dict[int, Measured]] = {}
    alone = [each for each in forms if not coupled(each)]
    if alone:
        sizes = powers(count)
        measured = measure(world, alone, key, count, sizes, progress, reference)
        found |= {name: dict.fromkeys(sizes, each) for name, each in measured.items()}
    together = [each for each in forms if coupled(each)]
    for n in powers(count, first=2) if together else ():
        measured = measure(world, together, key, count, (n,), progress, reference)
        for name, each in measured.items():
            found.setdefault(name, {})[n] = each
    for name, levels in found.items():
        need_effective(next(iter(levels.values())), name)
    return {each.name: found[each.name] for each in forms}


def _trace_row(world, each, measured, n) -> dict[str, Any]:
    known = batch_moments(each, world, n)
    return estimated(
        measured.trace(n),
        estimator=each.name,
        batch=n,
        batches=GROUPS * group_size(measured.trajectories, n) // n,
        quantity="trace of the mean",
        exact=None if known is None else known.trace,
        warning=each.warning or None,
        **measured.counts,
    )


def _slope(levels: list[tuple[int, Measured]]) -> tuple[Estimate, Estimate]:
    """Slope and value at N = 1 of the log-log line, weighted by precision; jackknife over groups."""
    x = np.log([float(n) for n, _ in levels])
    # The relative variance of a trace falls with the number of batches, which falls with N.
    weight = np.exp(-x)

    def fit(without):
        y = []
        for n, measured in levels:
            kept = SampleMoments(*(np.delete(each, without, axis=0) for each in measured.levels[n]))
            whole = merge_groups(kept)
            y.append(np.log(whole.squares.sum() / (whole.count - 1)))
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weight)) if len(x) > 1 else (np.nan, y[0])
        return np.array([slope, np.exp(intercept)])

    value = fit([])
    left = np.array([fit([g]) for g in range(GROUPS)])
    error = np.sqrt((GROUPS - 1) / GROUPS * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
    half = quantile(0.95, GROUPS) * error
    one, other = (
        Estimate(*map(float, each)) for each in zip(value, value - half, value + half, strict=True)
    )
    return one, other


def _draw_sizes(figure, forms, rows, world, summary):
    (axis,) = panels(figure)
    for index, each in enumerate(forms):
        mine = where(rows, estimator=each.name)
        slope = summary[each.name]["slope"].get("value", np.nan)
        name = f"{words(each.name)}: slope {slope:.3f}".replace("-", "−")
        draw_exact(axis, mine, "batch", index, name)
        draw_measured(axis, mine, "batch", index, name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    label(axis, f"Variance of the batch gradient falls as 1/N, {world.name}",
          "batch size N (trajectories)", "tr Cov of the batch mean")  # fmt: skip
    caption(figure)


def cosine(settings: Settings, progress: Progress) -> Result:
    """Mean cosine of a batch's gradient to the truth and to another batch's, against N.

    The cosine is near sqrt(N / B_simple) while it is small, and 1 - cos falls as 1/N once it is large.
    Lines take batch means as Gaussian. Without exact answers, the truth is a mean of as many others.
    """
    world, forms = _chosen(settings, ("total", "rtg_value"), ("total", "rtg"))
    rows: list[dict[str, Any]] = []
    warning = None
    truth = true_gradient(world)
    if truth is None:
        key_settings = settings._replace(seed=settings.seed + REFERENCE_SEED)
        other = measure(
            world, forms[-1:], key_of(key_settings), settings.trajectories, (1,), progress
        )
        truth = other[forms[-1].name].mean
        warning = "truth is itself a mean of as many trajectories"
    found = _by_size(world, forms, settings, progress, truth)
    for each in forms:
        for n, measured in sorted(found[each.name].items()):
            known = batch_moments(each, world, n)
            lines = (None, None) if known is None else exact.cosine(known)
            common = {"estimator": each.name, "batch": n, "warning": each.warning or warning}
            common |= measured.counts
            names = "to truth", "between batches"
            for name, value, clt in zip(names, measured.cosine(n), lines, strict=True):
                rows.append(estimated(value, quantity=name, exact=clt, **common))
    summary = {
        each.name: {
            row["quantity"] + f", N = {row['batch']}": row["measured"]
            for row in where(rows, estimator=each.name)
        }
        for each in forms
    }
    return Result(tidy(rows), summary, lambda figure: _draw_cosine(figure, forms, rows, world))


def _draw_cosine(figure, forms, rows, world):
    axes = panels(figure, 2)
    truth = "the true gradient" if has_exact(world) else "a reference gradient"
    for axis, quantity, text in (
        (axes[0], "to truth", f"Cosine to {truth}"),
        (axes[1], "between batches", "Cosine between two batches"),
    ):
        for index, each in enumerate(forms):
            mine = where(rows, estimator=each.name, quantity=quantity)
            n = [row["batch"] for row in mine]
            if all(row["exact"] is not None for row in mine):
                line(axis, *_limit(each, world, n, quantity), index, words(each.name))
            draw_measured(axis, mine, "batch", index, words(each.name))
        axis.set_xscale("log", base=2)
        axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.03)
        label(axis, f"{text}, {world.name}", "batch size N (trajectories)", "mean cosine",
              legend=False)  # fmt: skip
    legend(figure)
    caption(figure, "lines: Gaussian batch means; markers: measured, with 95 % intervals")


def _limit(each, world, sizes, quantity):
    """The central-limit curve between the measured sizes; coupled batches have exact moments only at them."""
    place = ("to truth", "between batches").index(quantity)
    dense = sizes if coupled(each) else np.geomspace(min(sizes), max(sizes), 33)
    known = [batch_moments(each, world, n) for n in dense]
    return dense, [None if m is None else exact.cosine(m)[place] for m in known]


EXPERIMENTS = {
    "batch-size": Experiment(
        "the variance of a batch's gradient against its size: slope -1",
        batch_size,
        Settings(trajectories=2**20),
        Settings(trajectories=2**16, quick=True),
        ignores=("repeats",),
    ),
    "cosine": Experiment(
        "cosine of a batch's gradient to the truth and to another batch's, against its size",
        cosine,
        Settings(trajectories=2**20),
        Settings(trajectories=2**15, quick=True),
        ignores=("repeats",),
    ),
}
