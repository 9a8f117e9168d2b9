"""Critical batches: train to a target at many batch sizes, and fit the law of updates against data.

With a batch of N, an update gains 1 / (1 + B / N) of a noiseless one's gain, and its best learning rate is
that fraction of the noiseless one's (McCandlish et al., 2018). So the rate grows linearly, then like a
square root around N = B, then levels off; and updates S and trajectories E to a target obey

    (S / S_min - 1) (E / E_min - 1) = 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.lab import exact
from jaxpg.lab.studies import ascent, training
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.forms import regulator_hessian
from jaxpg.lab.studies.rows import intervals, where
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
from jaxpg.lab.worlds.world import REGULATOR, World, has_exact, regulator_world
from jaxpg.optimizers import sgd
from jaxpg.stats import figures
from jaxpg.stats.intervals import Estimate, ratio, told, unresolved
from jaxpg.training.algorithm import Algorithm

SHARE = 0.9  # of the runs that must be at the target at the same time
NOT_REACHED = "not reached by 90 % of the runs at {} learning rate"
NO_END = "no upper end: the share of the runs was never clear of 90 %"
FEW_SIZES = "no law: fewer than 3 batch sizes reached the target"
RESAMPLES = 400
KNEES = 2**10  # tried in one pass of a fit


class Grid(NamedTuple):
    sizes: Sequence[int]  # trajectories per update, ascending
    rates: np.ndarray  # ascending, by a factor
    num_updates: int  # at most, for the smallest batch
    fraction: float  # of the way from the start to the best J


class Trial(NamedTuple):
    """The runs with one batch size."""

    size: int
    rates: np.ndarray  # [K]
    there: np.ndarray  # [K, R, U] bool: at the target before each update


class Fit(NamedTuple):
    """S = S_min (1 + B / N) and rate = rate_max / (1 + B' / N): numbers, or arrays of resamples."""

    least_updates: Any
    critical_batch: Any
    largest_rate: Any
    rate_knee: Any  # B': here the exponent of the rate in N is one half


class Law(NamedTuple):
    """A fit with 95 % intervals, or with a bound for what the data do not resolve, see `ratio`."""

    fit: Fit
    least_updates: Estimate
    least_trajectories: Estimate  # S_min B
    critical_batch: Estimate
    largest_rate: Estimate
    rate_knee: Estimate

    def stated(self) -> dict[str, Any]:
        """The estimates as a JSON-able dictionary."""
        return {name: stated(getattr(self, name)) for name in self._fields[1:]}


def large_batch(settings: Settings, progress: Progress) -> Result:
    """SGD to a target J over batch size x learning rate: updates against trajectories, and the best rate."""
    world = curved_world(settings.gamma) if _curved(settings) else world_of(settings, whole=True)
    grid = grid_of(settings)
    if not has_exact(world):
        grid = grid._replace(rates=grid.rates * training.small_rate(world, key_of(settings)))
    rows, target, trials = train_to_target(world, grid, settings, progress)
    fronts = where(rows, quantity="updates_at_best_rate")
    law = law_of(fronts, trials, settings.seed)
    scales = noise_scales(world, target)
    summary = {
        "target": target,
        **({"reason": FEW_SIZES} if law is None else law.stated()),
        **scales,
    }
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, fronts, law, scales))


def curved_world(gamma: float | None = None) -> World:
    """The regulator with a gain and an offset to learn: a stiff and a soft direction around an optimum."""
    gamma = 1.0 if gamma is None else gamma
    return regulator_world(gain=0.0, offset=-1.0, gamma=gamma, fixed_std=True)


def grid_of(settings: Settings) -> Grid:
    """The grid for the regulator, with a target close to the optimum, or for any other world."""
    if _curved(settings):
        sizes = (4, 32, 256) if settings.quick else (4, 16, 64, 256, 1024)
        rates = 2.0 ** np.arange(-8, 0) if settings.quick else 2.0 ** np.arange(-9, 0, 0.5)
        return Grid(sizes, rates, 300, 0.9)
    if settings.quick:
        return Grid((1, 6, 36), 2.0 ** np.arange(-2, 4), 50, 0.8)
    return Grid((1, 4, 16, 64, 256), 2.0 ** np.arange(-6, 6), 300, 0.8)


def train_to_target(
    world: World, grid: Grid, settings: Settings, progress: Progress
) -> tuple[list[dict[str, Any]], float, list[Trial]]:
    """A row per batch size and learning rate tried, two more per best rate; the target; the runs."""
    slots = Algorithm(form("rtg", world).sampled, policy_optimizer=sgd)
    rates, num_updates, target, rows = grid.rates, grid.num_updates, np.nan, []
    trials = []
    for index, size in enumerate(grid.sizes):
        progress(f"{len(rates)} learning rates × {settings.repeats} runs with batches of {size}")
        run = training.learner(
            world, slots, num_envs=size, num_updates=num_updates, per_repeat=len(rates)
        )
        count = len(rates) * settings.repeats
        keys = jax.random.split(jax.random.fold_in(key_of(settings), index), count)
        repeated = np.repeat(rates, settings.repeats)
        numbers = world.hyperparams._replace(learning_rate=repeated, max_grad_norm=training.NO_CLIP)
        shape = len(rates), settings.repeats, num_updates
        curves = training.Curves(*(x.reshape(shape) for x in run(keys, numbers)))
        target = _target(world, curves.score, grid.fraction) if np.isnan(target) else target
        rows += _grid_rows(curves, target, size, rates)
        trials.append(Trial(size, rates, curves.score >= target))
        best = rows[-1]
        if np.isfinite(best["updates"]):
            # A larger batch needs fewer updates, and its best rate grows at most in proportion.
            grown = max(grid.sizes[index + 1 :][:1], default=size) / size
            near = (grid.rates >= best["rate"] / 2) & (grid.rates <= best["rate"] * grown)
            rates = grid.rates[near]
            num_updates = min(num_updates, int(1.5 * best["updates"]) + 10)
    return rows, target, trials


def updates_to(scores, target) -> Estimate:
    """Updates until 90 % of the runs [R, U] are at the target at the same time; inf if they never are.

    At the same time, because noise carries every run across the target now and then.
    """
    share = (np.asarray(scores) >= target).mean(axis=0)
    # The share of R runs has a binomial error; so has the time at which it crosses 90 %.
    error = 1.96 * np.sqrt(SHARE * (1 - SHARE) / len(scores))
    return Estimate(
        *(_first(share >= level) for level in (SHARE, SHARE - error, min(SHARE + error, 1.0)))
    )


def fitted(fronts) -> Fit | None:
    """Fit rows of updates at the best rate by least squares of logarithms; None with fewer than 3."""
    found = [r for r in fronts if np.isfinite(r["measured"]) and r["measured"] > 0]
    if len(found) < 3:
        return None
    size, steps, rate = (
        np.array([r[c] for r in found], float) for c in ("batch", "measured", "rate")
    )
    return _fit(size, steps, rate)[0]


def law_of(fronts, trials: Sequence[Trial], seed: int = 0) -> Law | None:
    """The fit with percentile intervals from resampled runs, drawn separately for each learning rate.

    S = S_min + E_min / N, so B = E_min / S_min is a ratio, and so is B' of the two numbers in 1 / rate.
    If the data do not show that a curve levels off, its S_min or 1 / rate_max may be 0.
    """
    found = fitted(fronts)
    if found is None:
        return None
    sizes = np.array([float(trial.size) for trial in trials])
    drawn, levels = _fit(sizes, *_drawn(trials, np.random.default_rng(seed)))

    def around(number, level=True):
        values = number(drawn)
        low, high = np.nanquantile([np.where(level, values, 0.0), values], [0.025, 0.975], axis=1)
        return Estimate(float(number(found)), float(low[0]), float(high[1]))

    data = around(lambda fit: fit.least_updates * fit.critical_batch)
    least = around(lambda fit: fit.least_updates, levels[0])
    slope = around(lambda fit: fit.rate_knee / fit.largest_rate)
    flattest = around(lambda fit: 1 / fit.largest_rate, levels[1])
    return Law(
        found,
        least,
        data,
        ratio(data, least, around(lambda fit: fit.critical_batch)),
        ratio(Estimate(1.0, 1.0, 1.0), flattest, around(lambda fit: fit.largest_rate)),
        ratio(slope, flattest, around(lambda fit: fit.rate_knee)),
    )


def _drawn(trials: Sequence[Trial], rng) -> tuple[np.ndarray, np.ndarray]:
    """Updates at the best rate, and that rate, of runs drawn with replacement: [RESAMPLES, S] each.

    Both are jittered within their resolution: one update, and the gap between neighbouring rates.
    """
    columns = []
    factor = max((t.rates[1] / t.rates[0] for t in trials if len(t.rates) > 1), default=2.0)
    for _, rates, there in trials:
        num_runs = there.shape[1]
        chances, shape = np.full(num_runs, 1 / num_runs), (RESAMPLES, len(rates))
        weight = rng.multinomial(num_runs, chances, shape).astype(np.float32) / num_runs
        share = np.einsum("zkr,kru->zku", weight, there.astype(np.float32), optimize=True)
        reached = share >= SHARE - 1e-5
        steps = np.where(reached.any(axis=-1), reached.argmax(axis=-1), np.inf)
        best = steps.argmin(axis=1)
        finer = rng.uniform(-0.5, 0.5, (2, RESAMPLES))
        columns.append(
            (steps[np.arange(RESAMPLES), best] + finer[0], rates[best] * factor ** finer[1])
        )
    steps, rates = (np.stack(each, axis=1) for each in zip(*columns, strict=True))
    return steps, rates


def _fit(size, steps, rate) -> tuple[Fit, Any]:
    """Fit updates and rates [..., S], and say whether each levels off; inf updates do not count."""
    # No target is reached in less than one update.
    least, critical, low = _knee(size, steps, steps, 1.0)
    smallest, knee, flat = _knee(size, 1 / rate, steps, 0.0)
    return Fit(least, critical, 1 / smallest, knee), (low, flat)


def _knee(size, values, steps, floor) -> tuple[Any, Any, Any]:
    """Fit a >= floor and B in values = a (1 + B / N), [...] each, and say whether the data resolve both.

    Least squares of logarithms over a grid of B, then a finer one; B far beyond the sizes is not resolved.
    """
    counts = np.isfinite(steps) & (steps > 0)
    target = np.log(np.where(counts, values, 1.0))[..., None, :]
    number = counts.sum(axis=-1)[..., None, None]
    weight = np.where(number > 1, counts[..., None, :], np.nan) / np.maximum(number, 1)
    least = np.log(floor) if floor else -np.inf
    low, high = np.log(size.min() / 100), np.log(size.max() * 10)
    span, knees = (high - low) / (KNEES - 1), np.linspace(low, high, KNEES)

    def best_of(knees):
        rise = np.log1p(np.exp(knees[..., None]) / size)
        level = np.maximum((weight * (target - rise)).sum(axis=-1), least)
        cost = (weight * (target - rise - level[..., None]) ** 2).sum(axis=-1)
        best = cost.argmin(axis=-1)[..., None]
        return (
            np.take_along_axis(np.broadcast_to(x, cost.shape), best, axis=-1)[..., 0]
            for x in (knees, level)
        )

    knee, _ = best_of(knees)
    nearer = knee[..., None] + span * np.linspace(-1, 1, KNEES)
    knee, log_a = best_of(np.minimum(nearer, high))
    return np.exp(log_a), np.exp(knee), (knee < high - span) & ~(log_a <= least + 1e-9)


def noise_scales(world: World, target: float) -> dict[str, Any]:
    """Exact noise scales [trajectories] at the start, and where exact ascent reaches the target.

    They are tr C / |G|^2 and, where the Hessian H is known, tr HC / G^T H G, the one in the law.
    """
    if not has_exact(world) or world.is_projected:
        return {}
    scales = {}
    for name, there in (("start", world), ("target", _on_target(world, target))):
        found = form("rtg", there).moments()
        square = float(found.mean @ found.mean)
        if square == 0.0:  # noise alone
            continue
        scales[f"noise_scale_at_{name}"] = found.trace / square
        if there.is_regulator:
            hessian = regulator_hessian(there)
            curvature = float(found.mean @ hessian @ found.mean)
            scales[f"curved_noise_scale_at_{name}"] = (
                float(np.trace(hessian @ found.covariance)) / curvature
            )
    return scales


def _curved(settings: Settings) -> bool:
    return settings.env == REGULATOR and settings.policy is None


def _first(there) -> float:
    return float(there.argmax()) if there.any() else np.inf


def _target(world: World, scores, fraction) -> float:
    if has_exact(world):
        start = float(scores[0, 0, 0])
        return start + fraction * (training.best_objective(world) - start)
    start = np.nanmean(scores[..., 0])
    best = np.nanmax(np.nanmean(scores[..., -5:], axis=(1, 2)))
    if not best > start:
        raise ValueError(
            f"no learning rate tried on {world.name} improves on the start, a return of {start:.4g}; "
            "begin with an earlier checkpoint"
        )
    return float(start + fraction * (best - start))


def _on_target(world: World, target: float) -> World:
    """The world with the parameters at which exact ascent first reaches the target."""
    if world.is_regulator:
        value = jax.jit(jax.value_and_grad(training.objective_of(world)))
        params = world.params
        for _ in range(2000):
            score, slope = value(params)
            if score >= target:
                break
            params = jax.tree.map(lambda x, g: x + 0.02 * g, params, slope)
        return world._replace(params=params)
    path = ascent.ascend(world, "sgd", 400).reshape(-1, *world.logits.shape)
    there = (exact.objective(world.mdp, logits, world.gamma) >= target for logits in path)
    last = next((i for i, reached in enumerate(there) if reached), len(path) - 1)
    return world._replace(exact=world.table._replace(logits=path[last]))


def _grid_rows(curves, target, size, rates):
    common = {"estimator": "rtg", "batch": size, "trajectories": size * curves.score[0].size}
    common["env_steps"] = int(curves.env_steps[0, :, -1].sum())
    rows = []
    for rate, scores in zip(rates, curves.score, strict=True):
        value = updates_to(scores, target)
        row = {"rate": float(rate), "updates": value.value, "quantity": "updates", **common}
        endless = None if np.isfinite(value.high) else NO_END
        row["warning"] = endless if np.isfinite(value.value) else NOT_REACHED.format("this")
        rows.append(estimated(value, **row))
    front = {**min(rows, key=lambda r: r["updates"]), "quantity": "updates_at_best_rate"}
    if not np.isfinite(front["updates"]):
        front["warning"] = NOT_REACHED.format("any")
    more = {**front, "quantity": "trajectories_at_best_rate"}
    more |= {c: size * front[c] for c in ("measured", "low", "high")}
    return [*rows, more, front]


def _draw(figure, rows, fronts, law: Law | None, scales):
    axes = figures.panels(figure, 3)
    grid = where(rows, quantity="updates")
    for i, size in enumerate(dict.fromkeys(r["batch"] for r in grid)):
        mine = [r for r in where(grid, batch=size) if np.isfinite(r["measured"])]
        figures.points(axes[0], [r["rate"] for r in mine], *drawable(mine), i, f"N = {size}")
    reached = [r for r in fronts if np.isfinite(r["measured"])]
    sizes = np.array([r["batch"] for r in reached], float)
    steps, low, high = drawable(reached)
    figures.points(axes[1], steps * sizes, steps, low, high, 0, "best rate of each N")
    rates = [r["rate"] for r in reached]
    figures.points(axes[2], sizes, rates, rates, rates, 0, "measured")
    if law is not None:
        found, many = law.fit, np.geomspace(sizes.min(), sizes.max(), 50)
        curve = found.least_updates * (1 + found.critical_batch / many)
        figures.line(axes[1], many * curve, curve, 0, f"fit, B {said(law.critical_batch)}")
        rate = found.largest_rate / (1 + found.rate_knee / many)
        figures.line(axes[2], many, rate, 0, f"fit, knee {said(law.rate_knee)}")
        _guides(axes[2], law, sizes)
    curved = "curved_" if "curved_noise_scale_at_start" in scales else ""
    span = [scales.get(f"{curved}noise_scale_at_{x}") for x in ("start", "target")]
    if None not in span:
        text = f"noise scale: {span[0]:,.0f} to {span[1]:,.0f}"
        axes[2].axvspan(
            min(span), max(span), facecolor="0.85", edgecolor="0.6", zorder=0, label=text
        )
    titles = (
        ("Updates to the target", "learning rate of SGD", "updates, 90 % of runs"),
        ("Time against data", "trajectories to the target", "updates to the target"),
        ("Best learning rate", "trajectories per update N", "learning rate of SGD"),
    )
    for axis, title in zip(axes, titles, strict=True):
        # A logarithmic axis needs at least one point.
        if np.isfinite(np.concatenate([x.get_ydata() for x in axis.get_lines()] or [[]])).any():
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.margins(0.12)  # for arrows
            figures.label(axis, *title)
        else:
            axis.annotate("no batch reached the target", (0.5, 0.5), xycoords="axes fraction",
                          ha="center")  # fmt: skip
            axis.set(xticks=[], yticks=[])
            figures.label(axis, *title, legend=False)


def said(estimate: Estimate) -> str:
    """The text `= 12 [9, 17]`, or that the estimate is not resolved."""
    value, low, high = estimate
    return told(low) if unresolved(estimate) else f"= {value:.3g} [{low:.3g}, {high:.3g}]"


def _guides(axis, law: Law, sizes):
    """Draw linear growth before the knee and square-root growth around it, or the bound of the knee."""
    knee, height = law.fit.rate_knee, law.fit.largest_rate / 2
    if unresolved(law.rate_knee):
        figures.bounds(axis, height, law.rate_knee, 0, across=True)
        return
    before = np.array([sizes.min(), max(knee / 2, sizes.min() * 2)])
    figures.line(axis, before, 2 * height * before / knee, 1, "linear")
    about = knee * np.array([0.35, 3.0])
    figures.line(axis, about, height * np.sqrt(about / knee), 2, "square root")


def drawable(rows):
    """The columns measured, low and high without zeros, for a logarithmic axis."""
    measured, low, high = (np.maximum(column, 0.5) for column in intervals(rows))
    return measured, low, high


def _replaces(settings, checkpoint) -> list[str]:
    return [
        "SGD at the laboratory's learning rates",
        *training.replaced(checkpoint, None, unlimited=True),
    ]


EXPERIMENTS = {
    "large-batch": Experiment(
        "batch size against learning rate: updates and trajectories to a target J, and the knee",
        large_batch,
        Settings(env=REGULATOR, repeats=64),
        Settings(env=REGULATOR, repeats=32, quick=True),
        ignores=("estimators", "trajectories"),
        replaces=_replaces,
    ),
}
