"""Regulated: the gradient noise scale of a linear-quadratic regulator, and what it predicts for batches.

Only the gain is learned, so the noise scale tr C / G^2 is also the one for a curved objective.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Lqr
from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab.exact import lqr
from jaxpg.lab.measure.samples import gradient_samples
from jaxpg.lab.studies import critical
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.rows import draw_exact, draw_measured, intervals, where
from jaxpg.lab.studies.sampling import source_of
from jaxpg.lab.studies.study import Progress, Settings, estimated, key_of
from jaxpg.lab.worlds.regulators import objective
from jaxpg.lab.worlds.world import regulator_world
from jaxpg.stats.figures import bounds, caption, label, line, panels, points
from jaxpg.stats.intervals import Estimate, mean_interval, ratio
from jaxpg.stats.words import words
from jaxpg.types import Hyperparams

NEAR = (-0.2, -0.6, -1.0, -1.3, -1.45)  # gains; the best is -1.495
BEST_GAIN, GAMMA = -1.495288, 0.95
GAIN = -1.4  # of the single step: near the optimum, so that J is close to quadratic
RUNS = 64


def near_optimum() -> list[dict[str, Any]]:
    """Var / |g|^2 of the gradient by k, with a fixed standard deviation."""
    rows, hyperparams = [], Hyperparams(gamma=GAMMA)
    start = importance.from_start(importance.on_policy)
    for name, baseline in (("rtg", baselines.none), ("rtg_value", baselines.critic)):
        slots = Estimator(credit.reward_to_go, baseline, start)
        for k in sorted({*np.linspace(-1.49, -0.2, 44).round(3).tolist(), *NEAR}):
            mean, covariance = lqr.moments(Lqr(), (k, np.log(0.5)), slots, hyperparams)
            rows.append({"estimator": name, "k": k, "quantity": "regulator",
                         "exact": float(covariance[0, 0] / mean[0] ** 2)})  # fmt: skip
    return rows


def one_step(settings: Settings, progress: Progress) -> tuple[list[dict[str, Any]], float]:
    """The gain in J of a step along a batch's gradient, as a share of a noiseless step's, and B.

    With each step at its best learning rate, the share is 1 / (1 + B / N) if J is quadratic: half at N = B.
    """
    world = regulator_world(gain=GAIN, gamma=GAMMA, fixed_std=True)
    found = form("rtg_value", world)
    regulator = world.regulator
    mean, covariance = found.moments()
    scale = float(covariance[0, 0] / mean[0] ** 2)
    count = 2**17 if settings.quick else 2**19
    progress(f"{count:,} gradients of a regulator")
    gradients = jax.jit(
        lambda key: gradient_samples(source_of(world, found, key), count)
    )(key_of(settings))  # fmt: skip

    @jax.jit
    def gained(rates, gradients):
        """[R, M]: J after a step of each rate along each gradient, less J before it."""

        def at(gain):
            return objective(regulator, world.policy, {"gain": gain[None]}, GAMMA)

        steps = jnp.reshape(rates, (-1, 1)) * gradients[None]
        return jax.vmap(jax.vmap(at))(GAIN + steps) - at(jnp.float32(GAIN))

    rates = np.geomspace(1e-3, 3.0, 160)
    best = float(gained(rates, jnp.asarray(mean)).max())
    rows = []
    for size in dict.fromkeys(max(1, round(scale * 2.0**p)) for p in range(-4, 5, 2)):
        means = gradients[: count // size * size].reshape(-1, size).mean(axis=1)
        rate = rates[np.asarray(gained(rates, means).mean(axis=1)).argmax()]
        shares = np.asarray(gained(rate, means)[0], np.float64) / best
        shown = mean_interval(shares, (-np.inf, 1.0))
        rows.append(estimated(shown, estimator="rtg_value", quantity="progress of one step", batch=size,
                              exact=1 / (1 + scale / size), trajectories=means.size * size,
                              env_steps=means.size * size * Lqr().horizon))  # fmt: skip
    return rows, scale


def hyperbola(
    settings: Settings, progress: Progress
) -> tuple[list[dict[str, Any]], critical.Law | None]:
    """Updates S and trajectories E to a target J, in units of the least of each, at the best rates."""
    settings = settings._replace(env="LQR", policy=None, repeats=32 if settings.quick else RUNS)
    world = critical.curved_world()
    grid = critical.grid_of(settings)
    rows, _, trials = critical.train_to_target(world, grid, settings, progress)
    fronts = where(rows, quantity="updates_at_best_rate")
    law = critical.law_of(fronts, trials, settings.seed)
    if law is None:
        return [], None
    rows = []
    for row in fronts:
        size, steps = row["batch"], Estimate(row["measured"], row["low"], row["high"])
        rest = {c: row[c] for c in ("estimator", "batch", "trajectories", "env_steps", "warning")}
        for quantity, top, least in (
            ("updates / least", steps, law.least_updates),
            ("trajectories / least", Estimate(*(size * x for x in steps)), law.least_trajectories),
        ):
            value = ratio(top, least, Estimate(*(x / least.value for x in top)))
            rows.append(estimated(value, quantity=quantity, **rest))
    return rows, law


def draw(figure, rows, scale, law: critical.Law | None) -> None:
    """Three panels: the noise near the optimum, the progress of one step, and time against data."""
    axes = panels(figure, 2 if law is None else 3)
    _draw_near_optimum(axes[0], rows)
    _draw_one_step(axes[1], rows, scale)
    if law is not None:
        draw_hyperbola(axes[2], rows, law)
    caption(figure)


def _draw_near_optimum(axis, rows) -> None:
    for index, name in enumerate(("rtg", "rtg_value")):
        draw_exact(axis, where(rows, estimator=name, quantity="regulator"), "k", index, words(name))
    axis.axvline(BEST_GAIN, color="0.5", linewidth=0.8)
    axis.set_yscale("log")
    label(axis, "Noise diverges at the optimum: LQR", "gain k (line: the best)",
          "Var / g² of the k-gradient (trajectories)")  # fmt: skip


def _draw_one_step(axis, rows, scale) -> None:
    mine = where(rows, quantity="progress of one step")
    size = np.geomspace(min(r["batch"] for r in mine), max(r["batch"] for r in mine), 50)
    line(axis, size, 1 / (1 + scale / size), 0, "1 / (1 + B_simple / B)")
    draw_measured(axis, mine, "batch", 0, "1 / (1 + B_simple / B)")
    axis.axvline(scale, color="0.5", linewidth=0.8)
    axis.axhline(0.5, color="0.5", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.03)
    label(axis, f"Half the progress at B = B_simple = {scale:.3g}: LQR", "batch size B (trajectories)",
          "share of a noiseless step's gain")  # fmt: skip


def draw_hyperbola(axis, rows, law: critical.Law) -> None:
    time, data = (where(rows, quantity=f"{name} / least") for name in ("updates", "trajectories"))
    excess = np.geomspace(0.02, 60, 80)
    line(axis, 1 + 1 / excess, 1 + excess, 0, "(S/S_min − 1) (E/E_min − 1) = 1")
    # For a ratio that is not resolved, draw the bound.
    x, y = (
        [r["low"] if np.isnan(r["measured"]) else r["measured"] for r in each]
        for each in (data, time)
    )
    text = f"B {critical.said(law.critical_batch)}"
    points(axis, x, *intervals(time), index=0, label=text)
    bounds(axis, y, Estimate(*intervals(data)), 0, across=True)
    for each, *place in zip(data, x, y, strict=True):
        if np.isfinite(place).all():
            text = f"{each['batch']}"
            axis.annotate(text, place, xytext=(6, 3), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_yscale("log")
    label(axis, "Time against data, by batch size: LQR",
          "trajectories, E / E_min", "updates, S / S_min")  # fmt: skip
