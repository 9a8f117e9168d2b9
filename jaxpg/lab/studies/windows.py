"""Windows of an auto-reset stream: biases that the loss does not show."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.estimators import baselines
from jaxpg.lab.measure.samples import gradient_samples
from jaxpg.lab.studies import streams
from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.pairs import grouped
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import source_of
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
from jaxpg.lab.worlds.world import World, lifted
from jaxpg.stats import figures
from jaxpg.stats.moments import Estimate, jackknife, jackknife_ratio

WINDOWS = {
    "per_environment": "mean per environment",
    "pooled": "pooled over environments",
    "partial_as_full": "cut episodes counted as full",
    "unmasked": "reward-to-go across resets",
}
BIASED = "biased: {} (Glynn and Heidelberger, 1990)"
SHORT = "short episodes complete more often"
POOLED_LENGTH, POOLED_SIZES = 8, (1, 2, 4, 16, 64)


def windows(settings: Settings, progress: Progress) -> Result:
    """The gradient from windows of L steps of an auto-reset stream, by several ways of averaging them."""
    own = settings.env == streams.LONG_SHORT
    world = streams.long_short() if own else world_of(settings)
    horizon = world.env.horizon
    lengths = (2, 4, 8, 16, 24) if own else [max(1, int(horizon * f)) for f in (0.5, 1, 2, 4)]
    k_truth, k_windows = jax.random.split(key_of(settings))
    direction, truth = _true_direction(world, k_truth, settings.trajectories)
    progress(f"{settings.trajectories} windows of up to {max(lengths)} steps of {world.name}")
    measured = streams.measure_windows(world, direction, k_windows, settings.trajectories, lengths)
    rows = [truth]
    for length, lanes in zip(lengths, measured, strict=True):
        rows += _window_rows(lanes, length, streams.exact_windows(length) if own else {})
    if own:
        rows += _pooled_rows(measured[lengths.index(POOLED_LENGTH)])
    table = tidy(rows)
    pooled = where(rows, estimator="pooled", quantity="gradient", num_envs=None)
    true = truth["exact"] if truth["exact"] is not None else truth["measured"]
    summary: dict[str, Any] = {
        "true_gradient": true,
        "pooled_bias": {
            r["steps"]: stated(Estimate(*(r[k] - true for k in ("measured", "low", "high"))))
            for r in pooled
        },
    }
    return Result(table, summary, lambda figure: _draw_windows(figure, rows, true, own))


def _true_direction(world: World, key, num_trajectories):
    """The unit vector of the gradient of J, like world.params, and a row with the gradient along it."""
    flat, unravel = ravel_pytree(world.params)
    row = {"estimator": "whole_episodes", "quantity": "gradient", "steps": world.env.horizon}
    number = min(num_trajectories, SAMPLED // flat.size)
    row |= {"num_envs": None, "trajectories": number if not world.is_tabular else None}
    if world.is_tabular:
        vector = lifted(world, gradient(world))
        size = float(np.linalg.norm(vector))
        return unravel(jnp.asarray(vector / size, flat.dtype)), row | {"exact": size}
    source = source_of(world, form("rtg", world), key)
    others = source.estimator._replace(baseline=baselines.leave_one_out)
    source = source._replace(estimator=others)
    sample = jax.jit(lambda key: gradient_samples(source._replace(key=key), number))
    vector, rows = (np.asarray(sample(k), np.float64) for k in jax.random.split(key))
    unit = vector.mean(axis=0) / np.linalg.norm(vector.mean(axis=0))
    estimate = jackknife(lambda m: m.mean[0], grouped((rows @ unit)[:, None]))
    return unravel(jnp.asarray(unit, flat.dtype)), estimated(estimate, **row, exact=None)


def _window_rows(lanes: streams.Lanes, length, known):
    own = np.divide(
        lanes.completed, lanes.ends, out=np.zeros_like(lanes.ends), where=lanes.ends > 0
    )
    full = lanes.started / lanes.starts
    columns = [own, full, lanes.unmasked, lanes.completed, lanes.returns, lanes.ends]
    moments = grouped(np.stack(columns, axis=1))
    common = {"steps": length, "num_envs": None, "trajectories": len(own)}
    common |= {"env_steps": len(own) * length}
    quantities = {
        "per_environment": ("gradient", 0, ""),
        "pooled": ("gradient", 3, SHORT),
        "partial_as_full": ("gradient", 1, "a cut episode's return is incomplete"),
        "unmasked": ("gradient", 2, "the gradient of the reward per window"),
        "pooled_return": ("return", 4, SHORT),
    }  # fmt: skip
    rows = []
    for name, (quantity, place, why) in quantities.items():
        if lanes.ends.sum() == 0:
            continue

        def mean(m, place=place):
            return m.mean[place]

        value = jackknife(mean, moments)
        if name.startswith("pooled"):
            value = jackknife_ratio(mean, lambda m: m.mean[5], moments)
        row = {"estimator": name, "quantity": quantity, "exact": known.get(name), **common}
        rows.append(estimated(value, **row, warning=BIASED.format(why) if why else ""))
    return rows


def _pooled_rows(lanes: streams.Lanes):
    rows = []
    for size in POOLED_SIZES:
        whole = len(lanes.ends) // size * size
        gain, count = (
            x[:whole].reshape(-1, size).sum(axis=1) for x in (lanes.completed, lanes.ends)
        )
        estimate = jackknife(lambda m: m.mean[0], grouped((gain / count)[:, None]))
        row = {
            "estimator": "pooled",
            "quantity": "gradient",
            "steps": POOLED_LENGTH,
            "num_envs": size,
        }
        row |= {"trajectories": whole, "env_steps": whole * POOLED_LENGTH}
        known, warning = streams.exact_pooled(POOLED_LENGTH, size), BIASED.format(SHORT)
        rows.append(estimated(estimate, exact=known, warning=warning, **row))
    return rows


def _draw_windows(figure, rows, true, own):
    axes = figures.panels(figure, 2)
    for i, (name, label) in enumerate(WINDOWS.items()):
        found = where(rows, estimator=name, num_envs=None)
        draw_exact(axes[0], found, "steps", i, label)
        draw_measured(axes[0], found, "steps", i, label)
    axes[0].axhline(true, color="0.3", linewidth=0.8)
    axes[0].annotate("true gradient", (rows[1]["steps"], true), va="bottom")
    axes[0].set_xscale("log", base=2)
    figures.label(
        axes[0], "Windows of an auto-reset stream", "window length (environment steps)",
        "gradient along ∇J (return)",
    )  # fmt: skip
    if own:
        found = [r for r in rows if r["num_envs"]]
        draw_exact(axes[1], found, "num_envs", 1)
        draw_measured(axes[1], found, "num_envs", 1)
        title = f"Pooled completed episodes, {POOLED_LENGTH} steps"
        figures.label(
            axes[1], title, "environments pooled", "gradient along ∇J (return)", legend=False
        )
    else:
        draw_measured(axes[1], where(rows, quantity="return"), "steps", 1, "pooled")
        title = "Mean return of the completed episodes"
        figures.label(axes[1], title, "window length (environment steps)", "return")
    axes[1].set_xscale("log", base=2)
    figures.caption(figure)


SAMPLED = 2**27  # numbers in the sampled gradients that estimate an unknown direction

EXPERIMENTS = {
    "windows": Experiment(
        "windows of an auto-reset stream: which averages are biased by episode length, and by how much",
        windows,
        Settings(env=streams.LONG_SHORT, trajectories=2**20),
        Settings(env=streams.LONG_SHORT, trajectories=2**15, quick=True),
        ignores=("estimators", "repeats", "gamma"),
    ),
}
