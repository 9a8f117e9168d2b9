"""Groups: estimators that compare episodes from one start, at equal numbers of episodes."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxpg.envs.tokens import Tokens, skilled_logits, tokens_mdp
from jaxpg.estimators import Estimator, baselines, credit, groups, importance, surrogates
from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration, grouped
from jaxpg.lab.exact.episodes import Laws, laws
from jaxpg.lab.exact.tables import Moments
from jaxpg.lab.measure.samples import Source, trajectory_bytes
from jaxpg.lab.measure.statistics import gradient_statistics
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import check_episodes
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
from jaxpg.stats.figures import caption, label, legend, panels
from jaxpg.stats.figures import rows as row_names
from jaxpg.stats.moments import GROUPS
from jaxpg.stats.words import words
from jaxpg.training.algorithm import GROUP_ROWS

TOKENS, SIZES = "tokens", Tokens(3, 3, 3)
SPREAD = 2.0  # of the skill from prompt to prompt: some are hard
SKILLS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
SKILL = 1.0  # where the longest answer varies
EPISODES = 64  # of the batch that all are compared at
CHECKED = ("grpo", "dapo", "optimal_token")  # measured too where all are exact
LISTED = ("optimal_token", "optimal_per_time")  # exact where all groups can be listed
MOST = 100_000  # groups that are listed, or classes of them
# dr_grpo and own_sample differ from rloo by a factor, and all_steps is nearly dapo.
DRAWN = ("rloo", "grpo", "dapo", "no_baseline", "std", "length")
TRACE, COSINE, SCALE = "noise_to_signal", "cosine", "length_of_mean"
ALONG, APART = "bias_along", "bias_size"  # of one cause, in units of |grad J|
HATCHES, FILLS = ("", "////", "....", "xxxx"), ("0.35", "0.75", "white", "0.9")
ROWS = ("rloo", "grpo", "dr_grpo", "dapo")
LIMITS, LIMITED = (1, 2, 4, 5, 6), 4  # longest answers, and the size of the groups compared on them


class Point(NamedTuple):
    """A policy, and its rate of success where rewards are 0 and 1."""

    world: World
    success: float
    laws: Laws  # [] without tables
    limit: int  # the longest answer


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
    return {name: GROUP_ROWS[name](size).estimator for name in ROWS} | causes


def group_study(settings: Settings, progress: Progress) -> Result:
    """Bias and variance of every row against group size, rate of success and the longest answer.

    Noise to signal is tr Cov g / |E g|^2 of a batch of 64 episodes; the cosine is that of E g with grad J.
    The bias of a row is a sum over causes, put on one after the other; bias_along is the part along grad J.
    """
    sizes = (2, 4) if settings.quick else (2, 4, 8)
    points = _points(settings)
    middle = points[len(points) // 2]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        progress(f"groups of {size}")
        for point in [middle] if size != sizes[-1] else points:
            measured = CHECKED if size == sizes[0] else () if settings.quick else LISTED
            measured = measured if point is middle else ()
            rows += _rows(point, size, settings, measured)
            rows += _cause_rows(point, size) if point is middle else []
    if settings.env == TOKENS:
        for limit in LIMITS[::2] if settings.quick else LIMITS:
            progress(f"answers of up to {limit} digits")
            rows += _rows(_tokens(settings, SIZES._replace(length=limit), SKILL), LIMITED, settings)
    summary = {
        name: {
            quantity: found[0]["exact"] if found[0]["exact"] is not None else found[0]["measured"]
            for quantity in (TRACE, COSINE, SCALE)
            if (found := where(rows, estimator=name, quantity=quantity, group_size=sizes[0]))
        }
        for name in group_estimators(2)
    }
    for name in ROWS:
        found = where(rows, estimator=name, quantity=ALONG, group_size=sizes[-1])
        if found:
            summary[f"{name} causes"] = {row["cause"]: row["exact"] for row in found}
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, sizes[-1]))


def _points(settings) -> list[Point]:
    if settings.env == TOKENS:
        skills = SKILLS[::2] if settings.quick else SKILLS
        return [_tokens(settings, SIZES, skill) for skill in skills]
    world = world_of(settings)
    known = world.is_tabular and not world.is_projected
    found = laws(world.mdp, world.logits, world.gamma) if known else []
    return [Point(world, float("nan"), found, world.env.horizon)]


def _tokens(settings: Settings, sizes: Tokens, skill: float) -> Point:
    mdp, logits = tokens_mdp(sizes), skilled_logits(sizes, skill, SPREAD)
    gamma = 1.0 if settings.gamma is None else settings.gamma
    world = tabular_world(TOKENS, mdp, logits, gamma=gamma)
    success = float(exact.objective(mdp, logits, 1.0))
    return Point(world, success, laws(mdp, logits, gamma), sizes.length)


def _rows(
    point: Point, size: int, settings: Settings, measured: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    world, rows = point.world, []
    truth = exact.gradient(world.mdp, world.logits, world.gamma) if point.laws else None
    for name, estimator in group_estimators(size).items():
        common = _common(point, name, size)
        known = _moments(point, name, estimator, size)
        exactly = {} if known is None else _quantities(known, truth)
        measures = name in measured or (known is None and not _listed(point, name))
        seen = _measured(world, estimator, size, settings, truth) if measures else {}
        for quantity in (TRACE, COSINE, SCALE):
            if quantity in exactly or quantity in seen:
                rows.append(
                    {**common, "quantity": quantity, "exact": exactly.get(quantity)}
                    | seen.get(quantity, {})
                )
    return rows


def _common(point: Point, name: str, size: int) -> dict[str, Any]:
    return {
        "estimator": name, "group_size": size, "success": point.success, "limit": point.limit
    }  # fmt: skip


def _cause_rows(point: Point, size: int) -> list[dict[str, Any]]:
    """What each part of a row changes in the mean of a batch, on the policy's own data."""
    if not _summable(point, size):
        return []
    world, rows = point.world, []
    truth = exact.gradient(world.mdp, world.logits, world.gamma)
    square = truth @ truth
    for name in ROWS:
        estimator, numbers = GROUP_ROWS[name](size).estimator, world.hyperparams
        found = grouped.causes(world.mdp, world.logits, estimator, numbers, size, EPISODES // size)
        for cause, change in found.items():
            known = {ALONG: change @ truth / square, APART: np.sqrt(change @ change / square)}
            common = _common(point, name, size) | {"cause": cause}
            rows += [{**common, "quantity": q, "exact": float(x)} for q, x in known.items()]
    return rows


def _listed(point: Point, name: str) -> bool:
    return name in LISTED and bool(point.laws)


def _summable(point: Point, size: int) -> bool:
    """Whether the groups are few enough to sum over, by their returns and lengths."""
    classes = max((len(found) for _, found in point.laws), default=0)
    return bool(point.laws) and math.comb(classes + size - 1, size) <= MOST


def _moments(point: Point, name: str, estimator: Estimator, size: int) -> Moments | None:
    """The moments of a batch of EPISODES."""
    world, count = point.world, EPISODES // size
    if not _listed(point, name):
        if not _summable(point, size):
            return None
        return grouped.moments_of([point.laws], estimator, size, world.env.horizon, count)
    if math.comb(enumeration.count_trajectories(world.mdp) + size - 1, size) > MOST:
        return None
    found = enumeration.group_moments(world.mdp, world.logits, estimator, world.hyperparams, size)
    return Moments(found.mean, found.covariance / count)


def _quantities(moments: Moments, truth) -> dict[str, float]:
    length = np.linalg.norm(moments.mean)
    if length < 1e-12:  # every episode succeeds, or none
        return {}
    return {
        TRACE: float(moments.trace / length**2),
        COSINE: float(moments.mean @ truth / length / np.linalg.norm(truth)),
        SCALE: float(length / np.linalg.norm(truth)),
    }


def _measured(world, estimator, size, settings, truth) -> dict[str, dict[str, Any]]:
    source = Source(
        world.env, world.policy, estimator, world.params, key_of(settings), world.hyperparams,
        group_size=size,
    )  # fmt: skip
    # Like the other experiments, so that a number too large is told at once.
    check_episodes(trajectory_bytes(source, 2) / GROUPS, settings.trajectories)
    count = settings.trajectories // EPISODES * EPISODES
    found = gradient_statistics(source, count, reference=truth, batch_size=EPISODES)
    cost = {"trajectories": count, "env_steps": found.num_steps}
    rows = {TRACE: estimated(found.noise_scale, **cost)}
    if found.cosine is not None:
        rows[COSINE] = estimated(found.cosine, **cost)
    return rows


def _draw(figure, rows, size):
    axes = panels(figure, 6)
    usual = [r for r in rows if r["limit"] == SIZES.length or not np.isfinite(r["success"])]
    middle = sorted({r["success"] for r in usual if np.isfinite(r["success"])})
    at = middle[len(middle) // 2] if middle else None
    one = [r for r in usual if at is None or r["success"] == at]
    # The policy's skill, not its rate of success, is the same for all longest answers.
    limited = [r for r in rows if r["limit"] != SIZES.length] + one
    noise = TRACE, f"tr Cov g / |E g|², {EPISODES} episodes"
    turned = COSINE, "cosine of E g and ∇J"
    drawn = (
        (axes[0], *noise, one, "group_size", "Noise to signal", "episodes per start, G"),
        (axes[1], *turned, one, "group_size", "Direction of the mean", "episodes per start, G"),
        (axes[3], *noise, [r for r in usual if r["group_size"] == size], "success",
         f"Noise to signal, G = {size}", "rate of success"),
        (axes[4], *turned, [r for r in usual if r["group_size"] == size], "success",
         f"Direction of the mean, G = {size}", "rate of success"),
        (axes[5], *turned, [r for r in limited if r["group_size"] == LIMITED], "limit",
         f"Direction of the mean, G = {LIMITED}", "longest answer, digits"),
    )  # fmt: skip
    for axis, quantity, unit, shown, across, title, title_x in drawn:
        for index, name in enumerate(DRAWN):
            mine = where(shown, estimator=name, quantity=quantity)
            mine = sorted(mine, key=lambda r, across=across: r[across])
            draw_exact(axis, mine, across, index, words(name))
            if across == "group_size":
                draw_measured(axis, mine, across, index, words(name))
        if quantity == TRACE:
            axis.set_yscale("log")
        label(axis, title, title_x, unit, legend=False)
    _draw_causes(axes[2], [r for r in one if r["group_size"] == size], size)
    legend(figure, [axes[i] for i in (0, 1, 3, 4, 5)])
    caption(figure)


def _draw_causes(axis, rows, size):
    """Bars of what each cause of a bias adds along the gradient, side by side for the rows."""
    found = where(rows, quantity=ALONG)
    causes = [
        c for c in dict.fromkeys(r["cause"] for r in found) if c not in ("stale_data", "clip")
    ]
    for index, name in enumerate(ROWS):
        width = [where(found, estimator=name, cause=cause) for cause in causes]
        place = np.arange(len(causes)) + 0.2 * (index - 1.5)
        axis.barh(place, [x[0]["exact"] for x in width if x], 0.18, label=words(name), hatch=HATCHES[index],
                  color=FILLS[index], edgecolor="0.2", linewidth=0.6)  # fmt: skip
    row_names(axis, [cause.replace("_", "\n") for cause in causes])
    label(axis, f"Bias by cause, one after the other, G = {size}", "change along ∇J / |∇J|", "")


EXPERIMENTS = {
    "groups": Experiment(
        "bias, its causes and variance of rloo, grpo, dr_grpo, dapo by group size, success and length",
        group_study,
        Settings(env=TOKENS),
        Settings(env=TOKENS, quick=True, trajectories=2**14),
        ignores=("estimators", "repeats"),
    ),
}
