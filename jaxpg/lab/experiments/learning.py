"""What variance does to learning: batch size against step size, and how far a few seeds can be trusted."""

import jax
import numpy as np
from scipy import optimize, stats

from jaxpg.algorithms import Algorithm, algorithm
from jaxpg.estimators import Estimator
from jaxpg.lab import exact
from jaxpg.lab.experiments import ascent, drawing
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
from jaxpg.lab.experiments.pairs import intervals
from jaxpg.lab.experiments.training import Curves, best_objective, learner
from jaxpg.lab.reliability import (
    bootstrap,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from jaxpg.lab.streaming import Estimate
from jaxpg.lab.worlds import World
from jaxpg.optimizers import sgd
from jaxpg.types import Hyperparams

NO_CLIP = 1e9  # max_grad_norm
FRACTION, QUANTILE = 0.8, 0.9  # of the way to the best J; of the seeds that are there
NOT_REACHED = "not reached by 90 % of the runs at any learning rate"


def large_batch(settings: Settings, progress: Progress) -> Result:
    """SGD to a target J over batch size x learning rate: updates against trajectories, and the best rate."""
    world = world_of(settings)
    sizes, rates = (QUICK_GRID if settings.quick else GRID)[:2]
    num_updates = (QUICK_GRID if settings.quick else GRID)[2]
    slots = Algorithm(Estimator(), policy_optimizer=sgd)
    rows, target = [], np.nan
    for index, size in enumerate(sizes):
        progress(f"{len(rates)} learning rates x {settings.repeats} runs with batches of {size}")
        run = learner(world, slots, num_envs=size, num_updates=num_updates)
        keys = jax.random.split(
            jax.random.fold_in(key_of(settings), index), len(rates) * settings.repeats
        )
        numbers = Hyperparams(
            learning_rate=np.repeat(rates, settings.repeats),
            gamma=world.gamma,
            max_grad_norm=NO_CLIP,
        )
        shape = (len(rates), settings.repeats, num_updates)
        curves = Curves(*(x.reshape(shape) for x in run(keys, numbers)))
        target = _target(world, curves.score) if np.isnan(target) else target
        rows += _grid_rows(curves, target, size, rates)
    fronts = [r for r in rows if r["quantity"] == "updates_at_best_rate"]
    summary = {
        "target": target,
        "critical_batch": None,
        **front_summary(fronts),
        **_scales(world, target),
    }
    return Result(tidy(rows), summary, lambda figure: _draw_batch(figure, rows, fronts, summary))


def updates_to(scores, target) -> np.ndarray:
    """Updates until the score first reaches the target, inf for runs that never do: [...] of [..., U]."""
    there = np.asarray(scores) >= target
    return np.where(there.any(axis=-1), there.argmax(axis=-1), np.inf)


def front_summary(fronts) -> dict:
    """The fit S(N) = S_min (1 + B / N) to updates at the best rate, S_min >= 1 (McCandlish et al., 2018)."""
    found = [r for r in fronts if np.isfinite(r["measured"]) and r["measured"] > 0]
    if len(found) < 3:
        return {}
    size, steps, rate = (
        np.array([r[c] for r in found], float) for c in ("batch", "measured", "rate")
    )

    def model(log_size, log_least, log_critical):
        return log_least + np.log1p(np.exp(log_critical - log_size))

    start = (np.log(steps.min()) + 0.1, np.log(size).mean())
    # No target is reached in less than one update, and no knee shows far outside the sizes tried.
    bounds = ([0.0, np.log(size.min() / 100)], [np.inf, np.log(size.max() * 100)])
    (least, critical), _ = optimize.curve_fit(
        model, np.log(size), np.log(steps), start, bounds=bounds
    )
    exponent = np.polyfit(np.log(size), np.log(rate), 1)[0]
    return {"least_updates": float(np.exp(least)), "critical_batch": float(np.exp(critical)),
            "rate_exponent": float(exponent)}  # fmt: skip


def _target(world: World, scores) -> float:
    if world.mdp is not None:
        start = float(scores[0, 0, 0])
        return start + FRACTION * (best_objective(world.mdp, world.gamma) - start)
    start = np.nanmean(scores[..., 0])
    best = np.nanmax(np.nanmean(scores[..., -5:], axis=(1, 2)))
    return float(start + FRACTION * (best - start))


def _grid_rows(curves, target, size, rates):
    updates = updates_to(curves.score, target)
    # Order statistics: runs that never arrive must not turn an interpolated quantile into nan.
    slow = np.quantile(updates, QUANTILE, axis=1, method="higher")
    common = {"estimator": "rtg", "batch": size, "trajectories": size * curves.score[0].size}
    common["env_steps"] = int(curves.env_steps[0, :, -1].sum())
    rows = []
    for rate, value, runs in zip(rates, slow, updates, strict=True):
        row = {"rate": float(rate), "quantity": "updates", **common}
        warning = "" if np.isfinite(value) else NOT_REACHED
        rows.append(estimated(_quantile_interval(runs, value), **row, warning=warning))
    best = int(np.argmin(slow))
    front = {**rows[best], "quantity": "updates_at_best_rate"}
    more = {**front, "quantity": "trajectories_at_best_rate"}
    more |= {c: size * front[c] for c in ("measured", "low", "high")}
    return [*rows, front, more]


def _quantile_interval(runs, value) -> Estimate:
    """The quantile with the order statistics that enclose it in 95 % of samples."""
    low, high = stats.binom.ppf([0.025, 0.975], len(runs), QUANTILE).astype(int)
    ordered = np.sort(runs)
    low, high = ordered[max(low - 1, 0)], ordered[min(high, len(runs) - 1)]
    return Estimate(value, float(low), float(high))


def _scales(world: World, target: float) -> dict:
    """Exact noise scales [trajectories] at the start, and where exact ascent reaches the target."""
    if world.mdp is None or world.factor is not None:
        return {}
    path = ascent.ascend(world, "sgd", 400).reshape(-1, *world.logits.shape)
    there = (exact.objective(world.mdp, logits, world.gamma) >= target for logits in path)
    last = next((i for i, reached in enumerate(there) if reached), len(path) - 1)
    scales = {}
    for name, logits in (("start", path[0]), ("target", path[last])):
        known = exact.moments(world.mdp, logits, Estimator(), Hyperparams(gamma=world.gamma))
        square = float(known.mean @ known.mean)
        scales[f"noise_scale_at_{name}"] = known.trace / square if square > 0 else None
    return scales


def seeds(settings: Settings, progress: Progress) -> Result:
    """Many seeds of several algorithms: interquartile mean, profile and probability of improvement."""
    names = settings.estimators or (QUICK_NAMES if settings.quick else NAMES)
    worlds = [world_of(settings._replace(env=env)) for env in settings.env.split(",")]
    num_updates, num_envs = (50, 8) if settings.quick else (200, 16)
    numbers = Hyperparams(learning_rate=0.05, critic_learning_rate=0.05, max_grad_norm=NO_CLIP)
    curves, steps_taken = {}, {}
    for world in worlds:
        for index, name in enumerate(names):
            progress(f"{settings.repeats} runs of {name} on {world.name}")
            row = algorithm(name)
            steps = None if row.episodic else max(8, world.env.horizon)
            run = learner(world, row, num_envs=num_envs, num_updates=num_updates, num_steps=steps)
            keys = jax.random.split(jax.random.fold_in(key_of(settings), index), settings.repeats)
            curves[name, world.name], steps = run(keys, numbers._replace(gamma=world.gamma))
            steps_taken[name] = steps_taken.get(name, 0.0) + steps.sum(axis=0)
    curves = _normalised(worlds, names, curves)
    rows = _curve_rows(curves, names, num_envs, steps_taken)
    finals = {
        name: curves[name][:, :, -max(1, num_updates // 10) :].mean(axis=-1) for name in names
    }
    rows += list(_final_rows(finals, num_envs * num_updates))
    summary = {r["estimator"]: {"iqm": [r["measured"], r["low"], r["high"]]} for r in rows
               if r["quantity"] == "iqm_final"}  # fmt: skip
    summary["improvement"] = {
        f"{r['estimator']} over {r['other']}": [r["measured"], r["low"], r["high"]]
        for r in rows
        if r["quantity"] == "probability_of_improvement"
    }
    return Result(tidy(rows), summary, lambda figure: _draw_seeds(figure, rows, names))


def _normalised(worlds, names, curves):
    """[R, K, U] per name: 0 is the start and 1 the best possible J, or the best seen."""
    by_world = {}
    for world in worlds:
        everything = np.stack([curves[name, world.name] for name in names])
        everything = np.where(np.isnan(everything), np.nanmean(everything[..., 0]), everything)
        low = everything[..., 0].mean()
        high = everything.max() if world.mdp is None else best_objective(world.mdp, world.gamma)
        by_world[world.name] = (everything - low) / (high - low)
    return {
        name: np.stack([by_world[world.name][i] for world in worlds], axis=1)
        for i, name in enumerate(names)
    }


def _curve_rows(curves, names, num_envs, steps_taken):
    rows = []
    for name in names:
        num_updates = curves[name].shape[-1]
        for update in np.unique(np.linspace(0, num_updates - 1, 12).astype(int)):
            estimate = bootstrap(interquartile_mean, curves[name][:, :, update], num_resamples=500)
            rows.append(
                estimated(estimate, estimator=name, quantity="iqm", update=int(update),
                          trajectories=int(update) * num_envs * curves[name][..., 0].size,
                          env_steps=int(steps_taken[name][update]))
            )  # fmt: skip
    return rows


def _final_rows(finals, trajectories):
    thresholds = np.linspace(0.0, 1.0, 41)
    for name, scores in finals.items():
        estimate = bootstrap(interquartile_mean, scores)
        yield estimated(estimate, estimator=name, quantity="iqm_final", trajectories=trajectories)
        profile = bootstrap(lambda x: performance_profile(x, thresholds), scores, num_resamples=500)
        for limit, *values in zip(thresholds, *map(np.asarray, profile), strict=True):
            yield estimated(values, estimator=name, quantity="profile", threshold=float(limit))
    for one in finals:
        for other in finals:
            if one != other:
                estimate = bootstrap(
                    probability_of_improvement, finals[one], finals[other], num_resamples=500
                )
                yield estimated(
                    estimate, estimator=one, other=other, quantity="probability_of_improvement"
                )


def _draw_batch(figure, rows, fronts, summary):
    axes = drawing.panels(figure, columns=3, width=4.6)
    grid = [r for r in rows if r["quantity"] == "updates"]
    for i, size in enumerate(dict.fromkeys(r["batch"] for r in grid)):
        found = [r for r in grid if r["batch"] == size and np.isfinite(r["measured"])]
        drawing.points(axes[0], [r["rate"] for r in found], *_drawable(found), i, f"N = {size}")
    drawing.label(axes[0], "Updates to the target", "learning rate of SGD", "updates, 90 % of runs")
    found = [r for r in fronts if np.isfinite(r["measured"])]
    sizes = np.array([r["batch"] for r in found])
    steps, low, high = _drawable(found)
    drawing.points(axes[1], steps * sizes, steps, low, high, 0, "best rate for each N")
    if summary.get("critical_batch"):
        many = np.geomspace(sizes.min(), sizes.max(), 50)
        curve = summary["least_updates"] * (1 + summary["critical_batch"] / many)
        drawing.line(axes[1], many * curve, curve, 0, f"fit, B = {summary['critical_batch']:.3g}")
    drawing.label(
        axes[1], "Time against data", "trajectories to the target", "updates to the target"
    )
    rates = [r["rate"] for r in found]
    drawing.points(axes[2], sizes, rates, rates, rates, 0, "measured")
    first = found[0]["rate"] / sizes[0]
    drawing.line(axes[2], sizes, first * sizes, 1, "linear")
    drawing.line(axes[2], sizes, found[0]["rate"] * np.sqrt(sizes / sizes[0]), 2, "square root")
    drawing.label(
        axes[2], "Best learning rate", "trajectories per update $N$", "learning rate of SGD"
    )
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)


def _drawable(rows):
    """measured, low and high for a logarithmic axis: no 0, and no bar up to runs that never arrive."""
    measured, low, high = (np.maximum(column, 0.5) for column in intervals(rows))
    return measured, low, np.where(np.isfinite(high), high, measured)


def _draw_seeds(figure, rows, names):
    axes = drawing.panels(figure, columns=3, width=4.8)
    for i, name in enumerate(names):
        for axis, quantity, x in ((axes[0], "iqm", "update"), (axes[1], "profile", "threshold")):
            found = [r for r in rows if (r["estimator"], r["quantity"]) == (name, quantity)]
            at = [r[x] for r in found]
            drawing.line(axis, at, [r["measured"] for r in found], i, name)
            axis.fill_between(at, [r["low"] for r in found], [r["high"] for r in found],
                              color=drawing.COLOURS[i], alpha=0.15, linewidth=0)  # fmt: skip
    drawing.label(axes[0], "Interquartile mean", "updates", "normalised J (0 start, 1 best)")
    drawing.label(
        axes[1], "Performance profile", r"normalised J $\tau$", r"fraction of runs above $\tau$"
    )
    pairs = [r for r in rows if r["quantity"] == "probability_of_improvement"]
    pairs = [r for r in pairs if names.index(r["estimator"]) > names.index(r["other"])]
    for i, row in enumerate(pairs):
        x = row["measured"]
        error = np.maximum([[x - row["low"]], [row["high"] - x]], 0.0)
        axes[2].errorbar([x], [i], xerr=error, fmt=drawing.MARKERS[i], color=drawing.COLOURS[i],
                         markerfacecolor="white", capsize=3)  # fmt: skip
    texts = [f"{r['estimator']}\nover {r['other']}" for r in pairs]
    axes[2].set_yticks(range(len(pairs)), texts, fontsize=8)
    axes[2].set_ylim(-0.6, len(pairs) - 0.4)
    axes[2].set_xlim(0, 1)
    axes[2].axvline(0.5, color="0.3", linewidth=0.8)
    drawing.label(axes[2], "Probability of improvement", "P(better)", "", legend=False)


NAMES = ("reinforce", "reinforce_to_go", "reinforce_baseline")
QUICK_NAMES = ("reinforce", "reinforce_baseline")
# Batch sizes, learning rates, updates.
GRID = ((1, 4, 16, 64, 256), 2.0 ** np.arange(-6, 6), 300)
QUICK_GRID = ((1, 6, 36), 2.0 ** np.arange(-2, 4), 50)

EXPERIMENTS = {
    "large-batch": Experiment(
        "batch size against learning rate: updates and trajectories to a target J",
        large_batch,
        Settings(repeats=256),
        Settings(repeats=32, quick=True),
    ),
    "seeds": Experiment(
        "how far seeds can be trusted: interquartile means, profiles, probability of improvement",
        seeds,
        Settings(env="A,T", repeats=32),
        Settings(env="A", repeats=32, quick=True),
    ),
    **ascent.EXPERIMENTS,
}
