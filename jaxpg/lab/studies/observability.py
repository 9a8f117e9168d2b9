"""States that look alike: returns stay unbiased, bootstrapping from what is seen does not."""

from typing import Any

import numpy as np

from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.forms import Form, lambda_form
from jaxpg.lab.studies.measured import Measured
from jaxpg.lab.studies.pairs import norm
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    compared,
    key_of,
    need_exact,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import TABLES, World, tabular_world
from jaxpg.stats import figures
from jaxpg.stats.moments import Estimate

LAMBDAS = (0.0, 0.5, 0.8, 0.95, 1.0)
ALIASES = {"A": (0, 1, 0)}  # elsewhere neighbouring observations are merged two by two


def partial_observability(settings: Settings, progress: Progress) -> Result:
    """States that look alike: lambda-returns with their best critic are biased, returns are not."""
    full = world_of(settings)
    need_exact(full, "partial-observability")
    world = aliased(full)
    forms = [*_lambda_forms(world), form("total", world), form("rtg", world)]
    measured = measure(world, forms, key_of(settings), settings.trajectories, progress=progress)
    true = gradient(world)
    rows: list[dict] = []
    summary: dict[str, Any] = {"observations": len(world.logits), "states": len(world.mdp.initial)}
    for each in forms:
        found = measured[each.name]
        lambda_ = float(each.hyperparams.lambda_) if each.critic is not None else None
        row = {"estimator": each.name, "lambda": lambda_, "warning": _warning(each), **found.counts}
        known = each.moments()
        bias = norm(known.mean - true) / norm(true)
        summary[each.name] = {"relative_bias": bias, "trace": known.trace}
        seen = {"relative_bias": relative_bias(found, true), "trace": found.trace()}
        rows += compared(summary[each.name], seen, **row)
    rows += list(_control(full))
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows))


def aliased(world: World) -> World:
    """The same process seen through fewer observations; logits are those of the first of each group."""
    if world.is_projected:
        raise ValueError("partial-observability compares tables; leave out --policy or use tabular")
    size = len(world.logits)
    groups = np.array(ALIASES.get(world.name, np.arange(size) // 2))
    first = [int(np.flatnonzero(groups == g)[0]) for g in range(groups.max() + 1)]
    observation = groups[np.asarray(world.mdp.observation)]
    mdp = world.mdp._replace(observation=observation)
    return tabular_world(world.name, mdp, world.logits[first], gamma=world.gamma)


def relative_bias(found: Measured, true) -> Estimate:
    """|E g - true| / |true| from the unbiased square; 0 where noise outweighs it."""
    square = found.bias(true)
    value, low, high = (float(np.sqrt(max(x, 0.0))) / norm(true) for x in square)
    return Estimate(value, low, high)


def _lambda_forms(world: World) -> list[Form]:
    """Forms with one critic for all, so that they share their episodes."""
    forms = [lambda_form(world, lambda_) for lambda_ in LAMBDAS]
    return [f._replace(critic_params=forms[0].critic_params) for f in forms]


def _control(full: World):
    """Yield the same rows with every state seen: the critic is exact, and no lambda is biased."""
    true = gradient(full)
    for each in (lambda_form(full, lambda_) for lambda_ in LAMBDAS):
        known, lambda_ = each.moments(), float(each.hyperparams.lambda_)
        row = {"estimator": f"{each.name}_fully_observed", "lambda": lambda_}
        bias = norm(known.mean - true) / norm(true)
        yield from compared({"relative_bias": bias, "trace": known.trace}, {}, **row)


def _warning(each: Form) -> str:
    if each.critic is None or float(each.hyperparams.lambda_) == 1.0:
        return ""
    return "biased: V(o) does not satisfy the Bellman equation"


def _draw(figure, rows):
    axes = figures.panels(figure, 2)
    texts = {
        "relative_bias": ("Bias", "|E g − ∇J| / |∇J|"),
        "trace": ("Variance", "tr Cov of one gradient (return²)"),
    }
    for axis, (quantity, (title, y)) in zip(axes, texts.items(), strict=True):
        rest = where(rows, quantity=quantity)
        partly = [r for r in rest if r.get("measured") is not None and r["lambda"] is not None]
        fully = [r for r in rest if r["estimator"].endswith("_fully_observed")]
        draw_exact(axis, partly, "lambda", 0, "states look alike")
        draw_measured(axis, partly, "lambda", 0, "states look alike")
        draw_exact(axis, fully, "lambda", 1, "all states seen")
        (returns,) = where(rest, estimator="rtg")
        figures.line(axis, [0, 1], [returns["exact"]] * 2, 2, "states look alike, no critic")
        figures.band(axis, [0, 1], [returns["low"]] * 2, [returns["high"]] * 2, 2)
        figures.label(axis, title, "λ of the advantages", y, legend=False)
    figures.legend(figure)
    figures.caption(
        figure, "lines: exact; markers, and the band of no critic: measured, with 95 % intervals"
    )


EXPERIMENTS = {
    "partial-observability": Experiment(
        "states that look alike: returns stay unbiased, bootstrapping from V(o) does not",
        partial_observability,
        Settings(trajectories=2**22),
        Settings(trajectories=2**16, quick=True),
        worlds=TABLES,
        ignores=("estimators", "policy", "repeats"),
    ),
}
