"""Noise: the gradient noise scale, over batches, over training, and near an optimum."""

from typing import Any

import numpy as np

from jaxpg.envs import Lqr
from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.lab.exact import lqr
from jaxpg.lab.experiments.drawing import caption, label, line, panels, points
from jaxpg.lab.experiments.estimators import batch_moments, coupled, form, true_gradient
from jaxpg.lab.experiments.frame import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    tidy,
    world_of,
)
from jaxpg.lab.experiments.sampling import measure, measurer, powers
from jaxpg.lab.worlds import World, has_exact, table_params
from jaxpg.types import Hyperparams

NEAR = (-0.2, -0.6, -1.0, -1.3, -1.45)  # of the regulator, whose best k is -1.495
UPDATES, STEP = 40, 0.25  # of exact ascent


def noise_scale(settings: Settings, progress: Progress) -> Result:
    """B_simple = tr Cov / |G|^2 (McCandlish et al., 2018): E|G_B - G|^2 / |G|^2 = B_simple / B.

    Over batch sizes, along an exact ascent of J (on tabular policies), and for the linear-quadratic
    regulator, where it diverges as the gradient vanishes at the optimum.
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
    if world.mdp is not None and world.factor is None:
        rows += _over_training(world, settings, progress)
    rows += _near_optimum()
    summary: dict[str, Any] = {
        "noise_scale": {
            r["estimator"]: {
                "measured": r["measured"],
                "low": r["low"],
                "high": r["high"],
                "exact": r["exact"],
            }
            for r in rows
            if r["quantity"] == "noise scale"
        },
        "regulator_noise_to_signal": {
            f"{r['estimator']} k={r['k']:g}": r["exact"] for r in rows if "k" in r
        },
    }
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, world.name))


def _over_batches(world, forms, settings, progress) -> list[dict[str, Any]]:
    sizes = powers(settings.trajectories)
    found = measure(world, forms, key_of(settings), settings.trajectories, sizes, progress)
    truth = true_gradient(world)
    rows = []
    for each in forms:
        measured, known = found[each.name], batch_moments(each, world, 1)
        scale = None if known is None else known.trace / float(known.mean @ known.mean)
        signal = measured.signal().value if truth is None else float(truth @ truth)
        common: dict[str, Any] = {
            "estimator": each.name,
            "trajectories": measured.trajectories,
            "env_steps": measured.env_steps,
            "warning": each.warning or None,
        }
        value = measured.noise_scale()
        if value.low <= 0:
            common["warning"] = "the signal is not clear of the noise: use more trajectories"
        rows.append(estimated(value, quantity="noise scale", exact=scale, **common))
        rows += [
            estimated([x / signal for x in measured.trace(n)], quantity="relative error", batch=n,
                      exact=None if scale is None else scale / n, **common)
            for n in sizes
        ]  # fmt: skip
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
    # Without tables in its baseline, one program serves all parameters.
    plain = [form(name, world) for name in ("total", "rtg")]
    run = measurer(world, plain, settings.trajectories, (1,), progress)
    chosen = set(range(0, updates + 1, updates // (2 if settings.quick else 4)))
    rows = []
    for update, each in enumerate(path):
        there = world._replace(logits=each, params=table_params(each))
        progress(f"exact moments after {update} updates")
        found = run(key_of(settings), there.params) if update in chosen else {}
        value = exact.objective(world.mdp, each, world.gamma)
        for name in ("total", "rtg", "rtg_value", "exact_advantage"):
            moments = form(name, there).exact
            assert moments is not None
            mean, covariance = moments()
            row = {"estimator": name, "update": update, "objective": value, "quantity": "over training",
                   "exact": float(np.trace(covariance) / (mean @ mean))}  # fmt: skip
            if name in found:
                measured = found[name]
                row |= estimated(
                    measured.noise_scale(),
                    trajectories=measured.trajectories,
                    env_steps=measured.env_steps,
                )
            rows.append(row)
    return rows


def _near_optimum() -> list[dict[str, Any]]:
    """Var / |g|^2 of the gradient by k, for the regulator with a fixed standard deviation."""
    regulator, gamma, rows = Lqr(), 0.95, []
    hyperparams = Hyperparams(gamma=gamma)
    start = importance.from_start(importance.on_policy)
    for name, baseline in (("rtg", baselines.none), ("rtg_value", baselines.critic)):
        slots = Estimator(credit.reward_to_go, baseline, start)
        for k in sorted({*np.linspace(-1.49, -0.2, 44).round(3).tolist(), *NEAR}):
            mean, covariance = lqr.moments(regulator, (k, np.log(0.5)), slots, hyperparams)
            rows.append({"estimator": name, "k": k, "quantity": "regulator",
                         "exact": float(covariance[0, 0] / mean[0] ** 2)})  # fmt: skip
    return rows


def _draw(figure, rows, world):
    training = [r for r in rows if r["quantity"] == "over training"]
    axes = panels(figure, 3 if training else 2, width=4.6)
    errors = [r for r in rows if r["quantity"] == "relative error"]
    for index, name in enumerate(dict.fromkeys(r["estimator"] for r in errors)):
        mine = [r for r in errors if r["estimator"] == name]
        n = [r["batch"] for r in mine]
        if mine[0]["exact"] is not None:
            line(
                axes[0],
                n,
                [r["exact"] for r in mine],
                index,
                f"{name}: B_simple = {mine[0]['exact']:.3g}",
            )
        columns = [[r[k] for r in mine] for k in ("measured", "low", "high")]
        text = None if mine[0]["exact"] is not None else name
        points(axes[0], n, *columns, index=index, label=text)
    axes[0].axhline(1.0, color="0.5", linewidth=0.8)
    axes[0].annotate("noise = signal", (max(r["batch"] for r in errors), 1.0), xytext=(0, 3), fontsize=7,
                     textcoords="offset points", ha="right")  # fmt: skip
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    label(axes[0], f"Relative error of a batch's gradient, {world}", "batch size B (trajectories)",
          "E|Ĝ − G|² / |G|²")  # fmt: skip
    for index, name in enumerate(dict.fromkeys(r["estimator"] for r in training)):
        mine = [r for r in training if r["estimator"] == name]
        line(axes[1], [r["update"] for r in mine], [r["exact"] for r in mine], index, name)
        seen = [r for r in mine if "measured" in r]
        if seen:
            points(
                axes[1],
                *([r[k] for r in seen] for k in ("update", "measured", "low", "high")),
                index=index,
            )
    if training:
        axes[1].set_yscale("log")
        label(axes[1], f"Noise grows as learning goes on, {world}", "update of exact ascent",
              "B_simple (trajectories)")  # fmt: skip
    for index, name in enumerate(("rtg", "rtg_value")):
        mine = [r for r in rows if "k" in r and r["estimator"] == name]
        line(axes[-1], [r["k"] for r in mine], [r["exact"] for r in mine], index, name)
    axes[-1].axvline(-1.495288, color="0.5", linewidth=0.8)
    axes[-1].set_yscale("log")
    label(axes[-1], "… and diverges at the optimum: LQR", "gain k (line: the best)",
          "Var / g² of the k-gradient (trajectories)")  # fmt: skip
    caption(figure)


EXPERIMENTS = {
    "noise-scale": Experiment(
        "the gradient noise scale B_simple: over batches, over training, near an optimum",
        noise_scale,
        Settings(trajectories=2**18),
        Settings(trajectories=2**15, quick=True),
        ignores=("repeats",),
    ),
}
