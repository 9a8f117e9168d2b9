"""Where the variance of one episode's gradient comes from, and how it grows with the horizon."""

from functools import partial
from textwrap import fill
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.estimators import credit
from jaxpg.lab import exact
from jaxpg.lab.measure.samples import roll, rows_of, weigh
from jaxpg.lab.studies.estimators import available, form
from jaxpg.lab.studies.forms import value_tables
from jaxpg.lab.studies.pairs import grouped
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import check_episodes, measure, options_for, source_of
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
from jaxpg.lab.worlds.world import World, at_horizon, num_params
from jaxpg.stats import figures
from jaxpg.stats.intervals import Estimate, within
from jaxpg.stats.moments import SampleMoments, jackknife
from jaxpg.stats.words import words

PARTS = {"initial": "initial state", "action": "actions", "transition": "transitions, reward noise"}
SPLIT = {"trajectory": "what follows", "action": "the action", "state": "the state"}
HATCHES, FILLS = ("", "////", "...."), ("0.55", "0.8", "white")
UNIT = "tr Cov of one gradient (return²)"
PER_START = 8  # episodes from each initial state, where the variance is split by it


def total_variance(settings: Settings, progress: Progress) -> Result:
    """The law of total variance: which random draws the trace comes from, and which a baseline can change."""
    world = world_of(settings)
    names = settings.estimators or tuple(
        n
        for n in ("rtg", "rtg_constant", "rtg_value", "rtg_optimal_state")
        if n in available(world)
    )
    forms = [form(name, world) for name in names]
    k_total, k_split = jax.random.split(key_of(settings))
    measured = measure(world, forms, k_total, settings.trajectories, progress=progress)
    rows, summary = [], {}
    starts = split_by_start(world, forms, k_split, settings.trajectories)
    for each, (start, rest) in zip(forms, starts, strict=True):
        known = decompositions(world, each.name) if not world.is_projected else {}
        found = measured[each.name]
        total, initial = (known.get(("doob", part, None)) for part in ("total", "initial"))
        others = None if total is None or initial is None else total - initial
        common = {"estimator": each.name, "quantity": "trace", "warning": each.warning}
        common |= found.counts
        for part, estimate, value in (
            ("total", found.trace(), total), ("initial", start, initial), ("rest", rest, others),
        ):  # fmt: skip
            rows.append(estimated(estimate, component=part, exact=value, **common))
        for (split, part, step), value in known.items():
            rows.append({"estimator": each.name, "quantity": split, "component": part, "step": step,
                         "exact": value, "warning": each.warning})  # fmt: skip
        summary[each.name] = {f"{k[0]}_{k[1]}": v for k, v in known.items() if k[2] is None}
        summary[each.name]["measured_trace"] = stated(found.trace())
    table = tidy(rows)
    return Result(table, summary, lambda figure: _draw_total(figure, rows, names))


def decompositions(world: World, name: str) -> dict[tuple, float]:
    """(decomposition, part, step or None for the sum) -> part of the trace; {} if it is not known.

    They cover reward-to-go with a baseline of state and time: Doob's by random draw, and the one at a
    single state and action (Tucker et al., 2018).
    """
    if not world.is_tabular or name not in _BASELINES:
        return {}
    baseline = _BASELINES[name](world)
    doob = exact.doob_decomposition(world.mdp, world.logits, world.gamma, baseline)
    single = exact.tucker_decomposition(world.mdp, world.logits, world.gamma, baseline)
    known = {("doob", "initial", None): doob.initial, ("doob", "total", None): doob.total}
    for part in ("action", "transition"):
        by_step = getattr(doob, part)
        known["doob", part, None] = float(by_step.sum())
        known |= {("doob", part, t): float(x) for t, x in enumerate(by_step)}
    known |= {("tucker", part, None): value for part, value in single._asdict().items()}
    return known | {("tucker", "total", None): single.total}


def split_by_start(world: World, forms, key, num_trajectories) -> list[tuple[Estimate, Estimate]]:
    """Traces of Var(E[g|s_0]) and E[Var(g|s_0)], from PER_START episodes per drawn initial state."""
    num_starts = num_trajectories // PER_START
    check_episodes(20 * (num_params(world) + 1) * len(forms) / PER_START, num_trajectories)
    size = max(1, min(num_starts, 2**22 // (PER_START * num_params(world)), 2**11))

    # One rollout serves all forms: a world has one critic, and forms without it ignore it.
    reader = next((f for f in forms if f.critic is not None), forms[0])

    work = num_trajectories * world.env.horizon

    @partial(jax.jit, compiler_options=options_for(work))
    @partial(jax.vmap, in_axes=(None, 0))
    def of_start(key, index):
        k_start, k_episodes = jax.random.split(jax.random.fold_in(key, index))
        frozen = world.env._replace(reset=lambda _: world.env.reset(k_start))
        whole = roll(source_of(world, reader, k_episodes)._replace(env=frozen), 0, PER_START)
        return [_mean_and_spread(source_of(world, each, key), whole) for each in forms]

    chunks = [of_start(key, start + np.arange(size)) for start in range(0, num_starts, size)]

    def between(m: SampleMoments):
        return m.squares[:-1].sum() / (m.count - 1) - m.mean[-1] / PER_START

    columns = [
        grouped(np.concatenate([np.asarray(x) for x in each])) for each in zip(*chunks, strict=True)
    ]
    return [
        (within(jackknife(between, m)), within(jackknife(lambda m: m.mean[-1], m))) for m in columns
    ]


def _mean_and_spread(source, trajectory):
    """The mean gradient of some episodes and the trace of their covariance, [P + 1]."""
    rows = rows_of(source, weigh(source, trajectory))
    return jnp.append(rows.mean(axis=0), rows.var(axis=0, ddof=1).sum())


def horizon(settings: Settings, progress: Progress) -> Result:
    """How the trace grows with the length of the episode."""
    base = world_of(settings)
    rows = []
    grid = QUICK_HORIZONS if settings.quick else HORIZONS
    cuts = not base.is_regulator and (not base.is_tabular or base.is_projected)
    if cuts:
        # Such a world can be cut short but not extended.
        grid = sorted({min(steps, base.env.horizon) for steps in grid})
    for index, steps in enumerate(grid):
        world = at_horizon(base, steps)
        growing = QUICK_GROWING if settings.quick else GROWING
        names = settings.estimators or tuple(n for n in growing if n in available(world))
        forms = [form(name, world) for name in names]
        sampled = [f for f in forms if f.estimator is not None]
        key = jax.random.fold_in(key_of(settings), index)
        found = {}
        # Long episodes are slow to sample, and exact answers show the trend.
        if steps <= MEASURED_UP_TO or not any(f.exact for f in forms):
            progress(f"horizon {steps}")
            found = measure(world, sampled, key, settings.trajectories)
        for each in forms:
            row = {"estimator": each.name, "horizon": steps, "quantity": "trace"}
            row["exact"] = each.exact().trace if each.exact else None
            row["warning"] = each.warning
            if each.name in found:
                one = found[each.name]
                row |= estimated(one.trace(), **one.counts)
                row["warning"] = "; ".join(x for x in (each.warning, one.warning) if x)
            if cuts and steps < base.env.horizon and each.name == "rtg_value":
                # The critic still counts the rewards beyond the cut.
                row["warning"] = "; ".join(x for x in (row["warning"], CRITIC_OF_WHOLE) if x)
            rows.append(row)
    slopes = growth(rows)
    return Result(
        tidy(rows), {"slopes": slopes}, lambda figure: _draw_horizon(figure, rows, slopes)
    )


def growth(rows) -> dict[str, float]:
    """Exponents of the trace between the last two horizons, exact where known."""
    exponents = {}
    for name in dict.fromkeys(r["estimator"] for r in rows):
        found = [r for r in where(rows, estimator=name) if _value(r) is not None][-2:]
        # A trace that may be 0 has no logarithm.
        if (
            len(found) == 2
            and min(r["low"] if r["exact"] is None else r["exact"] for r in found) > 0
        ):
            (x, y), (x1, y1) = ((r["horizon"], _value(r)) for r in found)
            exponents[name] = float(np.log(y1 / y) / np.log(x1 / x))
    return exponents


def _value(row) -> Any:
    return row["exact"] if row["exact"] is not None else row.get("measured")


def _draw_total(figure, rows, names):
    known = [r for r in rows if r["quantity"] in ("doob", "tucker")]
    axes = figures.panels(figure, 3 if known else 1)
    measured = where(rows, quantity="trace")
    if not known:
        parts = {"initial": "initial state", "rest": "all that follows"}
        _bars(axes[0], measured, names, parts, "measured")
    else:
        doob, tucker = where(known, quantity="doob", step=None), where(known, quantity="tucker")
        _bars(axes[0], doob, names, PARTS, "exact")
        _bars(axes[1], tucker, names, SPLIT, "exact")
        _by_step(axes[2], known, names)
    for i, row in enumerate(where(measured, component="total")):
        total = Estimate(row["measured"], row["low"], row["high"])
        figures.interval(axes[0], total, i, 7, None if i else "measured total, 95 %")
    for axis, title in zip(
        axes, ("One episode, by random draw", "One state and action"), strict=False
    ):
        figures.label(axis, title if known else "Law of total variance", UNIT, "")


def _bars(axis, rows, names, parts, column):
    left = np.zeros(len(names))
    for i, (part, text) in enumerate(parts.items()):
        found = {r["estimator"]: r[column] for r in rows if r["component"] == part}
        width = np.array([found.get(name, 0.0) for name in names])
        axis.barh(np.arange(len(names)), width, 0.6, left=left, label=text, hatch=HATCHES[i],
                  color=FILLS[i], edgecolor="0.2", linewidth=0.6)  # fmt: skip
        left += np.maximum(width, 0.0)
    named = (
        axis.get_subplotspec().colspan.start == 0
    )  # else the panel to the left has the same rows
    figures.rows(axis, [fill(words(name), 16) if named else "" for name in names])


def _by_step(axis, known, names):
    shown = [name for name in ("rtg", "rtg_value") if name in names] or list(names[:2])
    # The transitions' part is the same for every baseline.
    series = [(name, "action", f"{words(name)}: actions") for name in shown]
    series.append((shown[0], "transition", "any: transitions, reward noise"))
    for i, (name, part, label) in enumerate(series):
        found = where(known, estimator=name, component=part)
        draw_exact(axis, [r for r in found if r["step"] is not None], "step", i, label)
        axis.lines[-1].set_marker(figures.MARKERS[i])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(0)
    figures.label(axis, "By step", "step in the episode", "part of tr Cov (return²)")


def _draw_horizon(figure, rows, slopes):
    (axis,) = figures.panels(figure)
    for i, name in enumerate(dict.fromkeys(r["estimator"] for r in rows)):
        found = where(rows, estimator=name)
        text = f"{words(name)}: {slopes[name]:.2f}" if name in slopes else words(name)
        draw_exact(axis, [r for r in found if r["exact"]], "horizon", i, text)
        draw_measured(axis, found, "horizon", i, text)
    axis.set_xscale("log")
    if any(r["exact"] or r.get("measured") for r in rows):  # unless all rewards were 0
        axis.set_yscale("log")
    steps = sorted({r["horizon"] for r in rows})
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.minorticks_off()
    title = "Growth with the horizon; named: exponent between the last two"
    figures.label(axis, title, "horizon (environment steps)", UNIT)
    figures.caption(figure)


_BASELINES = {
    "rtg": lambda world: 0.0,
    "rtg_constant": lambda world: exact.objective(world.mdp, world.logits, world.gamma),
    "rtg_value": lambda world: value_tables(world)[1],
    "rtg_optimal_state": lambda world: (
        exact.optimal_baselines(
            world.mdp, world.logits, credit.reward_to_go, world.gamma
        ).per_state_time
    ),
}
CRITIC_OF_WHOLE = "its critic values whole episodes, not those cut here"
GROWING = ("total", "rtg", "rtg_value", "exact_advantage", "is_total", "is_pdis", "is_step")
QUICK_GROWING = ("total", "rtg", "rtg_value", "exact_advantage", "is_pdis")
HORIZONS, QUICK_HORIZONS, MEASURED_UP_TO = (5, 10, 20, 50, 100), (5, 20, 50), 20

EXPERIMENTS = {
    "total-variance": Experiment(
        "the law of total variance: initial state, actions, transitions; what a baseline can change",
        total_variance,
        Settings(trajectories=2**20),
        Settings(trajectories=2**15, quick=True),
        ignores=("repeats",),
    ),
    "horizon": Experiment(
        "the trace against the length of the episode, on and off policy",
        horizon,
        Settings(trajectories=2**18),
        Settings(trajectories=2**13, quick=True),
        ignores=("repeats",),
    ),
}
