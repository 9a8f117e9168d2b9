"""Groups: estimators that compare episodes from one start, at equal numbers of episodes."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxpg.envs.tokens import Tokens, skilled_logits, tokens_mdp
from jaxpg.estimators import Estimator, baselines, credit, groups, importance, surrogates
from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration, grouped
from jaxpg.lab.exact.tables import Moments
from jaxpg.lab.measure.samples import Source
from jaxpg.lab.measure.statistics import gradient_statistics
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
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
from jaxpg.lab.worlds.world import World, tabular_world
from jaxpg.stats.figures import caption, label, panels
from jaxpg.training.algorithm import GROUP_ROWS

TOKENS, SIZES = "tokens", Tokens(3, 3, 3)
SPREAD = 2.0  # of the skill from prompt to prompt: some are hard
SKILLS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
EPISODES = 64  # of the batch that all are compared at
CHECKED = ("rloo", "grpo", "dapo")  # measured too where all are exact
LISTED = ("optimal_token", "optimal_per_time")  # exact where all groups can be listed
MOST = 100_000  # groups that are listed
# dr_grpo and own_sample differ from rloo by a factor, and all_steps is nearly dapo.
DRAWN = ("rloo", "grpo", "dapo", "no_baseline", "std", "length")
TRACE, COSINE, SCALE = "noise_to_signal", "cosine", "length_of_mean"


class Point(NamedTuple):
    """A policy, and its rate of success where rewards are 0 and 1."""

    world: World
    success: float
    laws: list[tuple[float, list[grouped.Class]]]  # () without tables


def group_estimators(size: int) -> dict[str, Estimator]:
    """The rows that compare groups, and each cause of a bias alone: REINFORCE with one change."""
    total = Estimator(credit.total_return)
    mean = total._replace(baseline=groups.grouped(baselines.batch_mean, size))
    own = total._replace(baseline=groups.grouped(baselines.leave_one_out, size))
    scaled = groups.group_scaled(surrogates.score, size)
    causes = {
        "no_baseline": total,
        "own_sample": mean,
        "std": own._replace(surrogate=scaled),
        "length": own._replace(reduce=surrogates.per_length),
        "all_steps": own._replace(reduce=surrogates.per_step),
    }
    start = importance.from_start(importance.on_policy)
    for name in LISTED:
        causes[name] = Estimator(
            baseline=groups.grouped(getattr(baselines, name), size), importance=start
        )
    # gspo and cispo equal grpo and dapo where data is the policy's own, as it is here.
    rows = {name: GROUP_ROWS[name](size).estimator for name in ("rloo", "grpo", "dr_grpo", "dapo")}
    return rows | causes


def group_study(settings: Settings, progress: Progress) -> Result:
    """Bias and variance of every row against the size of the group and the rate of success.

    Noise to signal is tr Cov g / |E g|^2 of a batch of 64 episodes; the cosine is that of E g with grad J.
    """
    sizes = (2, 4) if settings.quick else (2, 4, 8)
    points = _points(settings)
    middle = points[len(points) // 2]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        progress(f"groups of {size}")
        for point in [middle] if size != sizes[-1] else points:
            measured = LISTED if point is middle else ()
            measured += CHECKED if point is middle and size == sizes[0] else ()
            rows += _rows(point, size, settings, measured)
    summary = {
        name: {
            quantity: found[0]["exact"] if found[0]["exact"] is not None else found[0]["measured"]
            for quantity in (TRACE, COSINE, SCALE)
            if (found := where(rows, estimator=name, quantity=quantity, group_size=sizes[0]))
        }
        for name in group_estimators(2)
    }
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, sizes[-1]))


def _points(settings) -> list[Point]:
    if settings.env != TOKENS:
        world = world_of(settings)
        known = world.is_tabular and not world.is_projected
        return [Point(world, float("nan"), _laws(world) if known else [])]
    mdp = tokens_mdp(SIZES)
    gamma = 1.0 if settings.gamma is None else settings.gamma
    skills = SKILLS[::2] if settings.quick else SKILLS
    found = []
    for skill in skills:
        logits = skilled_logits(SIZES, skill, SPREAD)
        world = tabular_world(TOKENS, mdp, logits, gamma=gamma)
        found.append(Point(world, float(exact.objective(mdp, logits, 1.0)), _laws(world)))
    return found


def _laws(world: World) -> list[tuple[float, list[grouped.Class]]]:
    return grouped.laws(world.mdp, world.logits, world.gamma)


def _rows(
    point: Point, size: int, settings: Settings, measured: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    world, rows = point.world, []
    truth = exact.gradient(world.mdp, world.logits, world.gamma) if point.laws else None
    for name, estimator in group_estimators(size).items():
        common = {"estimator": name, "group_size": size, "success": point.success}
        known = _moments(point, name, estimator, size)
        exactly = {} if known is None else _quantities(known, size, truth)
        measures = name in measured or not point.laws
        seen = _measured(world, estimator, size, settings, truth) if measures else {}
        for quantity in (TRACE, COSINE, SCALE):
            if quantity in exactly or quantity in seen:
                rows.append(
                    {**common, "quantity": quantity, "exact": exactly.get(quantity)}
                    | seen.get(quantity, {})
                )
    return rows


def _moments(point: Point, name: str, estimator: Estimator, size: int) -> Moments | None:
    world = point.world
    if not point.laws:
        return None
    if name not in LISTED:
        return grouped.moments_of(point.laws, estimator, size, world.env.horizon)
    if math.comb(enumeration.count_trajectories(world.mdp) + size - 1, size) > MOST:
        return None
    return enumeration.group_moments(world.mdp, world.logits, estimator, world.hyperparams, size)


def _quantities(moments: Moments, size: int, truth) -> dict[str, float]:
    length = np.linalg.norm(moments.mean)
    if length < 1e-12:  # every episode succeeds, or none
        return {}
    return {
        TRACE: float(moments.trace * size / EPISODES / length**2),
        COSINE: float(moments.mean @ truth / length / np.linalg.norm(truth)),
        SCALE: float(length / np.linalg.norm(truth)),
    }


def _measured(world, estimator, size, settings, truth) -> dict[str, dict[str, Any]]:
    source = Source(
        world.env, world.policy, estimator, world.params, key_of(settings), world.hyperparams,
        group_size=size,
    )  # fmt: skip
    count = settings.trajectories // size * size
    found = gradient_statistics(source, count, reference=truth, batch_size=size)
    cost = {"trajectories": count, "env_steps": found.num_steps}
    rows = {TRACE: estimated([size / EPISODES * x for x in found.noise_scale], **cost)}
    if found.cosine is not None:
        rows[COSINE] = estimated(found.cosine, **cost)
    return rows


def _draw(figure, rows, size):
    axes = panels(figure, 2, 2, width=4.6, height=3.4)
    middle = sorted({r["success"] for r in rows if np.isfinite(r["success"])})
    drawn = (
        (TRACE, "group_size", "Noise to signal", f"tr Cov g / |E g|², {EPISODES} episodes"),
        (COSINE, "group_size", "Direction of the mean", "cosine of E g and ∇J"),
        (TRACE, "success", f"Noise to signal, G = {size}", f"tr Cov g / |E g|², {EPISODES} episodes"),
        (COSINE, "success", f"Direction of the mean, G = {size}", "cosine of E g and ∇J"),
    )  # fmt: skip
    for axis, (quantity, across, title, unit) in zip(axes, drawn, strict=True):
        for index, name in enumerate(DRAWN):
            mine = where(rows, estimator=name, quantity=quantity)
            if across == "success":
                mine = [r for r in mine if r["group_size"] == size]
            elif middle:
                mine = [r for r in mine if r["success"] == middle[len(middle) // 2]]
            shown = sorted(mine, key=lambda r, across=across: r[across])
            draw_exact(axis, shown, across, index, name)
            if across == "group_size":
                draw_measured(axis, shown, across, index)
        if quantity == TRACE:
            axis.set_yscale("log")
        title_x = "episodes per start, G" if across == "group_size" else "rate of success"
        label(axis, title, title_x, unit, legend=False)
    lines, names_drawn = axes[0].get_legend_handles_labels()
    figure.legend(
        lines, names_drawn, loc="outside upper center", ncols=6, frameon=False, fontsize=8
    )
    caption(figure)


EXPERIMENTS = {
    "groups": Experiment(
        "bias and variance of rloo, grpo, dr_grpo and dapo against group size and rate of success",
        group_study,
        Settings(env=TOKENS),
        Settings(env=TOKENS, quick=True, trajectories=2**14),
        ignores=("estimators", "repeats", "trajectories"),
    ),
}
