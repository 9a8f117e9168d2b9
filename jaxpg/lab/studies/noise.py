"""Noise: the gradient noise scale, over batches, over training, and near an optimum."""

from typing import Any

import numpy as np

from jaxpg.lab import exact
from jaxpg.lab.studies import regulated
from jaxpg.lab.studies.critical import FEW_SIZES
from jaxpg.lab.studies.estimators import batch_moments, coupled, form, true_gradient
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure, measurer, powers
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    stated_row,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import World, has_exact, table_params
from jaxpg.stats.figures import caption, label, panels
from jaxpg.stats.intervals import Estimate, ratio
from jaxpg.stats.words import words

UPDATES, STEP = 40, 0.25  # of exact ascent


def noise_scale(settings: Settings, progress: Progress) -> Result:
    """B_simple = tr Cov / |G|^2 (McCandlish et al., 2018): E|G_B - G|^2 / |G|^2 = B_simple / B.

    Over batch sizes, along an exact ascent of J (on tabular policies), and for the linear-quadratic
    regulator: it diverges as the gradient vanishes at the optimum, a batch of B_simple makes half the
    progress of a noiseless step, and the way to a target trades time for data along a hyperbola.
    """
    world = world_of(settings)
    default = ("total", "rtg_value") if has_exact(world) else ("total", "rtg")
    forms = [form(name, world) for name in settings.estimators or default]
    for each in forms:
        if each.estimator is None or coupled(each):
            raise ValueError(
                f"{each.name} has no noise scale of one trajectory to measure; use total or rtg"
            )
    rows = _over_batches(world, forms, settings, progress)
    if world.is_tabular and not world.is_projected:
        rows += _over_training(world, settings, progress)
    rows += regulated.near_optimum()
    steps, scale = regulated.one_step(settings, progress)
    to_target, law = regulated.hyperbola(settings, progress)
    rows += [*steps, *to_target]
    summary: dict[str, Any] = {
        "noise_scale": {r["estimator"]: stated_row(r) for r in where(rows, quantity="noise scale")},
        "regulator_noise_to_signal": {
            f"{r['estimator']} k={r['k']:g}": r["exact"] for r in rows if "k" in r
        },
        "regulator_progress": {
            "noise_scale": scale,
            "at_noise_scale": where(steps, batch=round(scale))[0]["measured"],
        },
        "regulator_hyperbola": {"reason": FEW_SIZES} if law is None else law.stated(),
    }
    return Result(
        tidy(rows),
        summary,
        lambda figure: _draw(figure, rows, world.name),
        {"figure-regulator": lambda figure: regulated.draw(figure, rows, scale, law)},
    )


def _over_batches(world, forms, settings, progress) -> list[dict[str, Any]]:
    sizes = powers(settings.trajectories)
    found = measure(world, forms, key_of(settings), settings.trajectories, sizes, progress)
    truth = true_gradient(world)
    rows = []
    for each in forms:
        measured, known = found[each.name], batch_moments(each, world, 1)
        scale = None if known is None else known.trace / float(known.mean @ known.mean)
        common = {"estimator": each.name, "warning": each.warning or None, **measured.counts}
        value = measured.noise_scale()
        rows.append(estimated(value, quantity="noise scale", exact=scale, **common))
        for n in sizes:
            if truth is None:  # the signal is an estimate too
                error = Estimate(*(x / n for x in measured.noise_scale(n)))
            else:
                signal, trace = Estimate(*[float(truth @ truth)] * 3), measured.trace(n)
                error = ratio(trace, signal, Estimate(*(x / signal.value for x in trace)))
            row = {"quantity": "relative error", "batch": n, **common}
            rows.append(estimated(error, exact=None if scale is None else scale / n, **row))
    return rows


def _over_training(world: World, settings, progress) -> list[dict[str, Any]]:
    """B_simple at every update of an exact ascent, measured at a few."""
    logits, path = np.array(world.logits), []
    step = STEP / max(np.linalg.norm(exact.gradient(world.mdp, logits, world.gamma)), 1e-12)
    updates = UPDATES if logits.size <= 16 else 8
    for _ in range(updates + 1):
        path.append(logits)
        logits = logits + step * exact.gradient(world.mdp, logits, world.gamma).reshape(
            logits.shape
        )
    # Without tables in their baselines, one program serves all parameters.
    plain = [form(name, world) for name in ("total", "rtg")]
    run = measurer(world, plain, settings.trajectories, (1,), progress)
    chosen = set(range(0, updates + 1, updates // (2 if settings.quick else 4)))
    rows = []
    for update, each in enumerate(path):
        there = world._replace(exact=world.table._replace(logits=each), params=table_params(each))
        progress(f"exact moments after {update} updates")
        found = run(key_of(settings), there.params) if update in chosen else {}
        value = exact.objective(world.mdp, each, world.gamma)
        for name in ("total", "rtg", "rtg_value", "exact_advantage"):
            mean, covariance = form(name, there).moments()
            row = {"estimator": name, "update": update, "objective": value, "quantity": "over training",
                   "exact": float(np.trace(covariance) / (mean @ mean))}  # fmt: skip
            if name in found:
                row |= estimated(found[name].noise_scale(), **found[name].counts)
            rows.append(row)
    return rows


def _draw(figure, rows, world):
    training = where(rows, quantity="over training")
    axes = panels(figure, 2 if training else 1)
    _draw_errors(axes[0], where(rows, quantity="relative error"), world)
    if training:
        _draw_training(axes[1], training, world)
    caption(figure)


def _draw_errors(axis, rows, world):
    for index, name in enumerate(dict.fromkeys(r["estimator"] for r in rows)):
        mine = where(rows, estimator=name)
        scale = mine[0]["exact"]  # at a batch of 1
        text = words(name) + (f": {scale:.3g}" if scale else "")
        draw_exact(axis, mine, "batch", index, text)
        draw_measured(axis, mine, "batch", index, text)
    axis.axhline(1.0, color="0.5", linewidth=0.8)
    axis.annotate("noise = signal", (max(r["batch"] for r in rows), 1.0), xytext=(0, 3),
                  textcoords="offset points", ha="right")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    label(axis, f"Relative error of a batch's gradient, {world}; named: noise scale",
          "batch size B (trajectories)", "E|Ĝ − G|² / |G|²")  # fmt: skip


def _draw_training(axis, rows, world):
    for index, name in enumerate(dict.fromkeys(r["estimator"] for r in rows)):
        mine = where(rows, estimator=name)
        draw_exact(axis, mine, "update", index, words(name))
        draw_measured(axis, mine, "update", index, words(name))
    axis.set_yscale("log")
    label(axis, f"Noise grows as learning goes on, {world}", "update of exact ascent",
          "noise scale (trajectories)")  # fmt: skip


EXPERIMENTS = {
    "noise-scale": Experiment(
        "the gradient noise scale B_simple: over batches and training, and the critical batch",
        noise_scale,
        Settings(trajectories=2**18),
        Settings(trajectories=2**15, quick=True),
        ignores=("repeats",),
    ),
}
