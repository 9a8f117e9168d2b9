"""Horizons: importance weights of whole episodes against their length."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.lab import exact
from jaxpg.lab.measure.samples import log_probs, roll, trajectory_bytes
from jaxpg.lab.measure.statistics import MIN_EFFECTIVE
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.lags import lag_of
from jaxpg.lab.studies.pairs import grouped
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import check_episodes, group_size, source_of
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, estimated, key_of, tidy
from jaxpg.lab.worlds.world import World, at_horizon
from jaxpg.stats.figures import caption, label, panels
from jaxpg.stats.intervals import Estimate, mean_interval, within
from jaxpg.stats.moments import GROUPS, jackknife
from jaxpg.stats.words import words

SHIFT = 0.3  # between the means of two unit Gaussians, per step
FORMS = ("is_total", "is_pdis", "is_step")


def horizon_is(settings: Settings, progress: Progress) -> Result:
    """Whole-episode weights W against the horizon T: the effective sample shrinks exponentially.

    For Gaussian actions with means delta apart, ESS/N = exp(-T delta^2) and Var log W = T delta^2. In a
    tabular world, (1/T) log E[W^2] tends to log of the spectral radius of sum_a pi^2 / beta P.
    """
    pair = lag_of(settings).at(1.0)
    longest = 50 if settings.quick else 100
    tables = pair.is_tabular
    if not tables:
        longest = min(longest, pair.env.horizon)
    horizons = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if t <= longest]
    size = group_size(settings.trajectories, 2)
    world = at_horizon(pair, longest)
    source = source_of(world, form("is_total", world), key_of(settings))
    # The log weights of both worlds, in 64 bits and twice; and the rollouts of one group.
    each = 32 * len(horizons) + trajectory_bytes(source, 0) / GROUPS
    check_episodes(each, settings.trajectories, "the weights of")
    progress(f"{GROUPS * size:,} episodes of {longest} steps")
    log_weights, steps = _world_log_weights(source, size, horizons)
    walks = _gaussian_log_weights(settings.seed, GROUPS * size, horizons)
    found = {
        "gaussian": (walks, [GROUPS * size * t for t in horizons]),
        world.name: (log_weights, steps),
    }
    rows: list[dict[str, Any]] = []
    for name, columns in found.items():
        for t, log_weight, env_steps in zip(horizons, *columns, strict=True):
            known = exact.gaussian.gaussian_chain(SHIFT, t)
            if name != "gaussian":
                known = _weights(pair, t) if tables else None
            rows += _rows(name, t, log_weight, known, env_steps)
    summary: dict[str, Any] = {"delta": SHIFT, "gaussian_rate": SHIFT**2}
    if not tables:
        return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, world.name, None))
    progress("exact traces")
    for t in horizons:
        for name in settings.estimators or FORMS:
            trace = form(name, at_horizon(pair, t)).moments().trace
            rows.append({"estimator": name, "horizon": t, "quantity": "trace", "exact": trace})
    growth = exact.weight_growth(world.mdp, world.logits, world.table.behaviour_logits)
    summary |= {
        f"{world.name}_growth": growth,
        f"{world.name}_second_moment": {str(t): _weights(pair, t).square for t in horizons},
    }
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, world.name, growth))


def _weights(pair: World, horizon: int):
    world = at_horizon(pair, horizon)
    return exact.weight_moments(world.mdp, world.logits, world.table.behaviour_logits)


def _gaussian_log_weights(seed, count, horizons) -> list[np.ndarray]:
    """log W after each horizon, along the same walks."""
    rng, total, before, rows = np.random.default_rng(seed), np.zeros(count), 0, []
    for t in horizons:
        # The sum of t - before independent steps delta x - delta^2 / 2.
        steps = t - before
        total = total + SHIFT * np.sqrt(steps) * rng.normal(size=count) - steps * SHIFT**2 / 2
        rows.append(total)
        before = t
    return rows


def _world_log_weights(source, size, horizons):
    """log W after each horizon, and the environment steps until then."""

    @jax.jit
    def group(start):
        trajectory = roll(source, start, size)
        log_prob = log_probs(source, trajectory)(source.policy_params)
        log_ratio = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0)
        steps = jnp.cumsum(trajectory.mask.sum(axis=1))
        return tuple(x[np.array(horizons) - 1] for x in (jnp.cumsum(log_ratio, axis=0), steps))

    columns, steps = [], []
    for index in range(GROUPS):
        log_weight, taken = group(index * size)
        columns.append(np.asarray(log_weight, np.float64))
        steps.append(np.asarray(taken))
    return list(np.concatenate(columns, axis=1)), np.sum(steps, axis=0).tolist()


def _rows(name, horizon, log_weight, known, env_steps) -> list[dict[str, Any]]:
    """Effective share of the sample and variance of log W, with intervals over the groups."""
    count = len(log_weight)
    weight = np.exp(log_weight - log_weight.max())
    moments = grouped(np.stack([weight, weight**2], axis=1))
    share = within(jackknife(lambda m: m.mean[0] ** 2 / m.mean[1], moments), 0.0, 1.0)
    warning = None
    if share.value * count < MIN_EFFECTIVE:
        warning = f"ESS {share.value * count:.1f} < {MIN_EFFECTIVE}: no interval"
        share = Estimate(share.value, np.nan, np.nan)
    spread = within(mean_interval(log_weight.reshape(GROUPS, -1).var(axis=1, ddof=1)))
    common = {"estimator": name, "horizon": horizon, "trajectories": count, "env_steps": env_steps}
    return [
        estimated(share, quantity="ESS / N", exact=known and known.ess_fraction,
                  warning=warning, **common),
        estimated(spread, quantity="Var log W", exact=known and known.log_variance, **common),
    ]  # fmt: skip


def _draw(figure, rows, world, growth):
    axes = panels(figure, 2 if growth is None else 3)
    rate = "" if growth is None else f", rate {growth:.3f}"
    names = {"gaussian": f"Gaussian, δ = {SHIFT}", world: world + rate}
    for axis, quantity, title, unit in (
        (axes[0], "ESS / N", "Effective share of the sample", "ESS / N"),
        (axes[1], "Var log W", "Spread of the log weight", "Var log W"),
    ):
        for index, (name, text) in enumerate(names.items()):
            mine = where(rows, estimator=name, quantity=quantity)
            draw_exact(axis, mine, "horizon", index, text)
            draw_measured(axis, mine, "horizon", index, text)
        axis.set_yscale("log")
        if quantity == "Var log W":
            axis.set_xscale("log")
        label(axis, title, "horizon T (steps)", unit)
    caption(figure)
    if growth is None:
        return
    traces = where(rows, quantity="trace")
    for index, name in enumerate(dict.fromkeys(r["estimator"] for r in traces)):
        draw_exact(axes[2], where(traces, estimator=name), "horizon", index, words(name))
    axes[2].set_yscale("log")
    label(
        axes[2], f"Variance of the gradient, {world}", "horizon T (steps)", "tr Cov, one trajectory"
    )


EXPERIMENTS = {
    "horizon-is": Experiment(
        "importance weights of whole episodes degenerate exponentially in their length",
        horizon_is,
        Settings(trajectories=2**17),
        Settings(trajectories=2**14, quick=True),
        ignores=("repeats",),
    ),
}
