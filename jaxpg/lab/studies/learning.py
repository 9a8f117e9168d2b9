"""Learning: how far a few seeds can be trusted, with the other experiments on training."""

import jax
import numpy as np

from jaxpg.lab.studies import ascent, critical
from jaxpg.lab.studies.rows import intervals, where
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    tidy,
    world_of,
)
from jaxpg.lab.studies.training import NO_CLIP, adam_rate, best_objective, learner, replaced
from jaxpg.lab.worlds.world import Checkpoint, has_exact
from jaxpg.optimizers import OPTIMIZERS, adam
from jaxpg.stats import figures
from jaxpg.stats.intervals import Estimate, bootstrap
from jaxpg.stats.reliability import (
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from jaxpg.stats.words import words
from jaxpg.training.algorithm import Algorithm, algorithm

COUNTS = ("num_epochs", "num_minibatches", "critic_epochs", "critic_minibatches")


def seeds(settings: Settings, progress: Progress) -> Result:
    """Many seeds of several algorithms: interquartile mean, profile and probability of improvement."""
    names = _names(settings)
    worlds = [world_of(settings._replace(env=env), whole=True) for env in settings.env.split(",")]
    num_updates, num_envs = (50 if settings.quick else 200), _batch(settings)
    curves, steps_taken = {}, {}
    for world in worlds:
        numbers = world.hyperparams
        if settings.checkpoint is None:
            rate = adam_rate(world)
            numbers = numbers._replace(
                learning_rate=rate, critic_learning_rate=rate, max_grad_norm=NO_CLIP
            )
        for index, name in enumerate(names):
            progress(f"{settings.repeats} runs of {name} on {world.name}")
            row = algorithm(name)
            if settings.checkpoint is not None:
                row = _as_the_run(row, settings.checkpoint.origin["config"])
            steps = None if row.data.whole_episodes else max(8, world.env.horizon)
            run = learner(world, row, num_envs=num_envs, num_updates=num_updates, num_steps=steps)
            keys = jax.random.split(jax.random.fold_in(key_of(settings), index), settings.repeats)
            curves[name, world.name], steps = run(keys, numbers)
            steps_taken[name] = steps_taken.get(name, 0.0) + steps.sum(axis=0)
    curves = _normalised(worlds, names, curves)
    rows = _curve_rows(curves, names, num_envs, steps_taken)
    finals = {
        name: curves[name][:, :, -max(1, num_updates // 10) :].mean(axis=-1) for name in names
    }
    rows += list(_final_rows(finals, num_envs * num_updates))
    summary = {
        r["estimator"]: {"iqm": [r["measured"], r["low"], r["high"]]}
        for r in where(rows, quantity="iqm_final")
    }
    summary["improvement"] = {
        f"{r['estimator']} over {r['other']}": [r["measured"], r["low"], r["high"]]
        for r in where(rows, quantity="probability_of_improvement")
    }
    return Result(tidy(rows), summary, lambda figure: _draw_seeds(figure, rows, names))


def _names(settings: Settings) -> tuple[str, ...]:
    return settings.estimators or (QUICK_NAMES if settings.quick else NAMES)


def _replaces(settings: Settings, checkpoint: Checkpoint) -> list[str]:
    """The settings that differ from the run's: batches, schedule, and each row's epochs and minibatches."""
    config, said = checkpoint.origin["config"], []
    run = algorithm(config["algorithm"])
    for name in _names(settings):
        row = algorithm(name)
        for count in COUNTS:
            own = getattr(row, count)
            theirs = getattr(run, count) if config[count] is None else config[count]
            if own != theirs and (row.critic_optimizer or not count.startswith("critic")):
                said.append(f"{count} {own} of {name}, not the run's {theirs}")
    return [*replaced(checkpoint, _batch(settings), unlimited=False), *said]


def _batch(settings: Settings) -> int:
    return 8 if settings.quick else 16


def _as_the_run(row: Algorithm, config) -> Algorithm:
    """The row with the run's optimizer, unless the row is a natural gradient's."""
    chosen = OPTIMIZERS[config["optimizer"]]
    policy = chosen if row.policy_optimizer is adam else row.policy_optimizer
    return row._replace(policy_optimizer=policy, critic_optimizer=row.critic_optimizer and chosen)


def _normalised(worlds, names, curves):
    """Scores [R, K, U] per name: 0 is the start and 1 the best possible J, or the best seen."""
    by_world = {}
    for world in worlds:
        everything = np.stack([curves[name, world.name] for name in names])
        everything = np.where(np.isnan(everything), np.nanmean(everything[..., 0]), everything)
        low = everything[..., 0].mean()
        high = everything.max() if not has_exact(world) else best_objective(world)
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


def _draw_seeds(figure, rows, names):
    axes = figures.panels(figure, 3)
    for i, name in enumerate(names):
        for axis, quantity, x in ((axes[0], "iqm", "update"), (axes[1], "profile", "threshold")):
            found = where(rows, estimator=name, quantity=quantity)
            at = [r[x] for r in found]
            figures.line(axis, at, [r["measured"] for r in found], i, words(name))
            figures.band(axis, at, *intervals(found)[1:], i)
    titles = (
        ("Interquartile mean", "updates", "normalised J (0 start, 1 best)"),
        ("Performance profile", "normalised J, τ", "share of runs above τ"),
    )
    for axis, title in zip(axes, titles, strict=False):
        figures.label(axis, *title, legend=False)
    pairs = where(rows, quantity="probability_of_improvement")
    pairs = [r for r in pairs if names.index(r["estimator"]) > names.index(r["other"])]
    figures.improvement(axes[2], [
        (words(r["estimator"]), words(r["other"]), Estimate(r["measured"], r["low"], r["high"]))
        for r in pairs
    ])  # fmt: skip
    if not pairs:
        axes[2].annotate("one algorithm:\nnone to compare it with", (0.5, 0.5), ha="center",
                         xycoords="axes fraction")  # fmt: skip
    figures.legend(figure)
    figures.caption(figure, "bands and bars: 95 % bootstrap intervals over seeds")


NAMES = ("reinforce", "reinforce_to_go", "reinforce_baseline")
QUICK_NAMES = ("reinforce", "reinforce_baseline")

EXPERIMENTS = {
    **critical.EXPERIMENTS,
    "seeds": Experiment(
        "how far seeds can be trusted: interquartile means, profiles, probability of improvement",
        seeds,
        Settings(env="A,T", repeats=32),
        Settings(env="A", repeats=32, quick=True),
        ignores=("trajectories",),
        replaces=_replaces,
    ),
    **ascent.EXPERIMENTS,
}
