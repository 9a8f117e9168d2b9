"""The ladder of estimators, and the bias and variance of generalised advantages."""

import time
from typing import Any

import jax
import numpy as np

from jaxpg.lab.experiments.drawing import COLOURS, label, line, panels, points
from jaxpg.lab.experiments.estimators import (
    Form,
    batch_moments,
    coupled,
    form,
    gradient,
    lambda_form,
)
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
from jaxpg.lab.experiments.importance import QUICK_STEPS, REFERENCE, distance
from jaxpg.lab.experiments.sampling import Measured, group_size, measure, need_effective
from jaxpg.lab.worlds import World, has_exact, lifted
from jaxpg.policies import actor_critic

LADDER = (
    "total", "total_constant", "total_optimal", "rtg", "rtg_constant", "rtg_optimal", "rtg_time",
    "rtg_value", "rtg_optimal_state", "gae_0.95", "gae_0.5", "exact_advantage", "all_action",
)  # fmt: skip
SHORT = (
    "total", "rtg", "rtg_constant", "rtg_time_mean", "rtg_value", "gae_0.95", "gae_0.5",
    "exact_advantage", "all_action",
)  # fmt: skip
MEASURED = ("total", "total_mean", "rtg", "rtg_time_mean")
BATCH = 64  # of estimators that couple trajectories


def ladder(settings: Settings, progress: Progress) -> Result:
    """N tr Cov of each estimator's batch mean, its squared bias and B_simple = N tr Cov / |E g|^2."""
    world = world_of(settings)
    names = settings.estimators or _default(world)
    forms = [form(name, world) for name in names]
    measured = _measured(world, forms, settings, progress)
    truth = gradient(world) if has_exact(world) else None
    rows = []
    for each in forms:
        progress(f"exact moments of {each.name}")
        rows += _rung(world, each, measured.get(each.name), truth)
    table = tidy(rows)
    return Result(table, _numbers(rows), lambda figure: _draw_ladder(figure, names, rows, world))


def _default(world: World) -> tuple[str, ...]:
    if world.mdp is not None:
        return LADDER if len(world.mdp.initial) <= 8 else SHORT
    return (*MEASURED, "rtg_value", "gae_0.95") if world.critic is not None else MEASURED


def _measured(world, forms, settings, progress) -> dict[str, Measured]:
    sampled = [each for each in forms if each.estimator is not None]
    alone = [each for each in sampled if not coupled(each)]
    together = [each for each in sampled if coupled(each)]
    key, found = key_of(settings), {}
    group_size(settings.trajectories, BATCH if together else 1)  # refuses before anything is run
    if alone:
        found |= measure(world, alone, key, settings.trajectories, (1,), progress)
    if together:
        found |= measure(world, together, key, settings.trajectories, (BATCH,), progress)
    for name, each in found.items():
        need_effective(each, name)
    return found


def _rung(world: World, each: Form, measured: Measured | None, truth) -> list[dict[str, Any]]:
    """Rows of one estimator: trace, squared bias and noise scale, per trajectory."""
    size = BATCH if coupled(each) else 1
    known = batch_moments(each, world, size)
    trace = None if known is None else size * known.trace
    exact_values = {
        "trace": trace,
        "squared_bias": None if known is None or truth is None else _square(known.mean - truth),
        "noise_scale": None if known is None or trace is None else trace / _square(known.mean),
    }
    values: dict[str, Any] = {}
    if measured is not None:
        values = {"trace": [size * x for x in measured.trace(size)]}
        values["noise_scale"] = measured.noise_scale(size)
        if truth is not None:
            values["squared_bias"] = measured.bias(lifted(world, truth), size)
    # Where the bias is known to be 0, a warning that it may not be says nothing.
    harmless = exact_values["squared_bias"] == 0
    warning = None if harmless else each.warning or None
    common = {"estimator": each.name, "batch": size, "warning": warning}
    if measured is not None:
        common |= {"trajectories": measured.trajectories, "env_steps": measured.env_steps}
    return [
        {**common, "quantity": name, "exact": exact_values[name]}
        | (estimated(values[name]) if name in values else {})
        for name in exact_values
        if name in values or exact_values[name] is not None
    ]


def _numbers(rows) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        one = {"measured": row.get("measured"), "exact": row["exact"]}
        found.setdefault(row["quantity"], {})[row["estimator"]] = one
    return found


def _draw_ladder(figure, names, rows, world):
    axes = panels(figure, 2, width=5.2, height=0.9 + 0.32 * max(len(names), 5))
    titles = {
        "trace": ("Variance of one trajectory's gradient", "tr Cov (per trajectory)"),
        "noise_scale": ("Trajectories until noise equals signal", "B_simple (trajectories)"),
    }  # fmt: skip
    for axis, (quantity, (title, unit)) in zip(axes, titles.items(), strict=True):
        _bars(axis, names, [row for row in rows if row["quantity"] == quantity])
        label(
            axis, f"{title}, {world.name}", unit, "", legend=quantity == "trace", loc="lower right"
        )
        axis.grid(False, axis="y")
    axes[1].set_yticklabels([])


def _bars(axis, names, rows):
    place = {name: -i for i, name in enumerate(names)}
    has_exact = [row for row in rows if row["exact"] is not None]
    axis.barh(
        [place[row["estimator"]] for row in has_exact], [row["exact"] for row in has_exact], 0.62,
        color="0.82", edgecolor="0.45", linewidth=0.6, label="exact",
    )  # fmt: skip
    seen = [row for row in rows if row.get("measured") is not None]
    if seen:
        middle = np.array([row["measured"] for row in seen])
        error = np.array(
            [[row["measured"] - row["low"], row["high"] - row["measured"]] for row in seen]
        ).T
        axis.errorbar(
            middle, [place[row["estimator"]] for row in seen], xerr=np.maximum(error, 0), fmt="o",
            color=COLOURS[0], markerfacecolor="white", markersize=5, capsize=2.5, linewidth=1.0,
            label="measured, 95 %",
        )  # fmt: skip
    biased = {row["estimator"] for row in rows if row["warning"]}
    axis.set_yticks(list(place.values()), [f"{n} (biased)" if n in biased else n for n in place])
    axis.set_ylim(-len(names) + 0.4, 0.6)
    shown = [row["exact"] if row["exact"] is not None else row["measured"] for row in rows]
    if min(shown) > 0 and max(shown) > 50 * min(shown):
        axis.set_xscale("log")
    for row, value in zip(rows, shown, strict=True):
        reach = max(value, row.get("high") or value)
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        where = reach, place[row["estimator"]]
        axis.annotate(
            text, where, xytext=(6, 0), textcoords="offset points", fontsize=8, va="center"
        )
    axis.margins(x=0.15)


def _square(x) -> float:
    square = float((x**2).sum())
    return square if square > 1e-20 else 0.0  # rounding is no bias


QUALITY, OFFSET = 0.5, 0.3  # of the critic V̂ = quality V + offset
BATCHES = (1, 10, 100, 1_000, 10_000, 100_000)


def gae(settings: Settings, progress: Progress) -> Result:
    """Squared bias + tr Cov / N of generalised advantages against lambda, for a wrong critic.

    The critic is 0.5 V + 0.3. The best lambda grows with N, because only the variance falls with it.
    """
    world = world_of(settings)
    chosen = [0.0, 0.5, 0.9, 1.0] if settings.quick else [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0]
    if world.mdp is None:
        return _gae_measured(world, chosen, settings, progress)
    truth = gradient(world)
    started, grid = time.perf_counter(), np.linspace(0.0, 1.0, 101)
    lambda_form(world, 0.5, QUALITY, OFFSET).exact()  # type: ignore[misc]
    if time.perf_counter() - started > 0.1:
        grid = np.linspace(0.0, 1.0, 11)
    progress(f"exact moments at {len(grid)} values of lambda")
    curve = [lambda_form(world, float(x), QUALITY, OFFSET).exact() for x in grid]  # type: ignore[misc]
    trace = np.array([m.trace for m in curve])
    bias = np.array([_square(m.mean - truth) for m in curve])
    forms = [lambda_form(world, x, QUALITY, OFFSET) for x in chosen]
    found = measure(world, forms, key_of(settings), settings.trajectories, (1,), progress)
    rows = _gae_rows(world, truth, grid, bias, trace, dict(zip(chosen, forms, strict=True)), found)
    best = {str(n): float(grid[np.argmin(bias + trace / n)]) for n in BATCHES}
    summary = {
        "critic": {"quality": QUALITY, "offset": OFFSET},
        "best_lambda_by_batch": best,
        "bias": {
            f"{x:g}": float(np.sqrt(b)) for x, b in zip(grid, bias, strict=True) if x in chosen
        },
    }
    return Result(
        tidy(rows), summary, lambda figure: _draw_gae(figure, grid, bias, trace, rows, world)
    )


def _gae_measured(world, chosen, settings, progress) -> Result:
    """The trace and the distance to the mean of rewards to go, with the world's critic or a new one."""
    if settings.quick:
        world = world._replace(env=world.env._replace(horizon=min(world.env.horizon, QUICK_STEPS)))
    kind = "trained" if world.critic is not None else "untrained"
    if world.critic is None:
        critic = actor_critic(world.env, settings.policy or "mlp").critic
        assert critic is not None
        params = critic.init(jax.random.fold_in(key_of(settings), 1))
        world = world._replace(critic=critic, critic_params=params)
    aim, forms = form("rtg", world), {x: lambda_form(world, x) for x in chosen}
    key = key_of(settings)
    found = measure(world, [aim, *forms.values()], key, settings.trajectories, (1,), progress)
    rows = []
    for x, each in forms.items():
        seen = found[each.name]
        values = {REFERENCE: distance(seen, found[aim.name]), "trace": seen.trace()}
        rows += [
            estimated(value, estimator="gae", quantity=name, trajectories=seen.trajectories,
                      env_steps=seen.env_steps, warning=each.warning or None, **{"lambda": x})
            for name, value in values.items()
        ]  # fmt: skip
    summary = {"critic": kind, "horizon": world.env.horizon}
    return Result(tidy(rows), summary, lambda figure: _draw_gae_measured(figure, rows, world))


def _draw_gae_measured(figure, rows, world):
    axes = panels(figure, 2)
    for index, (axis, name, title) in enumerate(
        zip(axes, ("trace", REFERENCE), ("tr Cov", "|E g − E g of rewards to go|²"), strict=True)
    ):
        seen = [r for r in rows if r["quantity"] == name]
        points(
            axis,
            *([r[k] for r in seen] for k in ("lambda", "measured", "low", "high")),
            index=index,
        )
        label(axis, f"Generalised advantages, {world.name}", "λ", f"{title}, one trajectory",
              legend=False)  # fmt: skip


def _gae_rows(world, truth, grid, bias, trace, forms, found):
    rows = []
    for x, b, v in zip(grid, bias, trace, strict=True):
        measured = found.get(forms[x].name) if x in forms else None
        common: dict[str, Any] = {"estimator": "gae", "lambda": float(x)}
        common["warning"] = None if x == 1.0 else "biased where the critic is wrong"
        values: dict[str, Any] = {"squared_bias": None, "trace": None}
        if measured is not None:
            common |= {"trajectories": measured.trajectories, "env_steps": measured.env_steps}
            values = {
                "squared_bias": measured.bias(lifted(world, truth)),
                "trace": measured.trace(),
            }
        for name, value in (("squared_bias", b), ("trace", v)):
            row = {**common, "quantity": name, "exact": float(value)}
            rows.append(row | (estimated(values[name]) if values[name] is not None else {}))
    return rows


def _draw_gae(figure, grid, bias, trace, rows, world):
    axes = panels(figure, 2)
    for index, (name, values, text) in enumerate(
        (("squared_bias", bias, "squared bias"), ("trace", trace, "tr Cov"))
    ):
        seen = [r for r in rows if r["quantity"] == name and r.get("measured") is not None]
        line(axes[0], grid, values, index, f"{text} (exact)")
        columns = [[r[k] for r in seen] for k in ("lambda", "measured", "low", "high")]
        points(axes[0], *columns, index=index, label=f"{text.split(',')[0]} (measured, 95 %)")
    axes[0].set_yscale("symlog", linthresh=1e-3)
    label(axes[0], f"Bias falls and variance rises with λ, {world.name}", "λ",
          "squared gradient, one trajectory", loc=(0.02, 0.56))  # fmt: skip
    for index, n in enumerate((1, 100, 1_000, 10_000, 100_000)):
        total = bias + trace / n
        line(axes[1], grid, total, index, f"N = {n:,}")
        i = int(np.argmin(total))
        axes[1].plot(grid[i], total[i], "o", color=COLOURS[index], markersize=6)
    axes[1].set_yscale("log")
    axes[1].set_ylim(top=axes[1].get_ylim()[1] * 30)
    label(axes[1], "Mean squared error of a batch; dots mark the best λ", "λ", "squared bias + tr Cov / N",
          ncols=2, loc="upper right")  # fmt: skip


EXPERIMENTS = {
    "ladder": Experiment(
        "variance, bias and noise scale of every estimator, side by side",
        ladder,
        Settings(trajectories=2**18),
        Settings(trajectories=2**15, quick=True),
        ignores=("repeats",),
    ),
    "gae": Experiment(
        "bias against variance of generalised advantages over lambda, and the best lambda per batch",
        gae,
        Settings(trajectories=2**18),
        Settings(trajectories=2**15, quick=True),
        ignores=("estimators", "repeats"),
    ),
}
