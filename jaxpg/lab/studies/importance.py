"""Importance: the cost of weighting another policy's data, and the cost of leaving the weights out."""

from typing import Any

import numpy as np

from jaxpg.lab import exact
from jaxpg.lab.exact import Moments
from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.lags import Lag, lag_of
from jaxpg.lab.studies.measured import Measured, need_effective
from jaxpg.lab.studies.pairs import paired, squares
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measurer
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    compared,
    estimated,
    key_of,
    tidy,
)
from jaxpg.stats.figures import (
    caption,
    label,
    legend,
    panels,
    symmetric_logarithms,
)
from jaxpg.stats.moments import Estimate, jackknife
from jaxpg.stats.words import words

FORMS = (
    "is_total", "is_pdis", "is_note_literal", "is_first_order", "is_marginal", "is_step",
)  # fmt: skip
OF_TABLES = ("is_marginal", "is_note_literal")
LAGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
REFERENCE = "squared_distance_to_on_policy"  # of means, in place of a bias where no truth is known


def importance(settings: Settings, progress: Progress) -> Result:
    """Bias and variance of six importance-sampled forms against the lag of the data's policy.

    At lag 0 all weights are 1. Whole-episode and per-decision weights stay unbiased and grow noisy; forms
    that leave ratios out stay less noisy and become biased.
    """
    lag = lag_of(settings)
    tables = lag.world.is_tabular
    names = settings.estimators or tuple(n for n in FORMS if tables or n not in OF_TABLES)
    # Without tables, few of the quick run's trajectories would still count at the largest lag.
    lags = LAGS[: None if tables else 5 : 2] if settings.quick else LAGS
    forms = [form(name, lag.at(1.0)) for name in names]
    for each in forms:
        if not each.off_policy:
            raise ValueError(f"{each.name} cannot use other policies' data; use {', '.join(FORMS)}")
    if not tables:
        return measured_result(lag, forms, lags, settings, progress)
    found = measured_lags(lag, [each for each in forms if each.estimator], lags, settings, progress)
    rows = []
    small = lag.behaviour.size <= 16
    for x in sorted({*lags, *(np.linspace(0.0, 1.5, 13).tolist() if small else ())}):
        progress(f"exact moments at lag {x:g}")
        there = lag.at(x)
        for name in names:
            moments = form(name, there).moments()
            rows += lag_rows(name, x, moments, gradient(there), found.get(x, {}).get(name))
    weights = exact.weight_moments(lag.world.mdp, lag.at(1.0).logits, lag.behaviour)
    at_one = {
        row["estimator"] + " " + row["quantity"]: row["exact"] for row in rows if row["lag"] == 1
    }
    summary = {"weights_at_lag_1": weights._asdict(), "exact_at_lag_1": at_one}
    title = lag.world.name
    return Result(tidy(rows), summary, lambda figure: _draw_lags(figure, rows, names, title))


def measured_lags(lag, forms, lags, settings, progress) -> dict[float, dict[str, Measured]]:
    """lag -> name -> measured, by one program called with different parameters."""
    if not forms:
        return {x: {} for x in lags}
    run = measurer(lag.at(1.0), forms, settings.trajectories, (1,), progress)
    found = {}
    for x in lags:
        found[x] = run(key_of(settings), lag.at(x).params)
        for name, each in found[x].items():
            need_effective(each, f"{name} at lag {x:g}")
    return found


def measured_result(lag: Lag, forms, lags, settings, progress) -> Result:
    """Measure traces and distances to the mean of on-policy rewards to go, without exact answers."""
    aim = form("rtg", lag.at(1.0))
    found = measured_lags(lag, [*forms, aim], lags, settings, progress)
    rows = []
    for x in lags:
        for each in forms:
            measured = found[x][each.name]
            common = {"estimator": each.name, "lag": float(x), **measured.counts}
            said = each.warning if x else "", measured.warning
            common["warning"] = "; ".join(filter(None, said)) or None
            common["effective_sample_size"] = measured.effective_sample_size
            values = {REFERENCE: distance(measured, found[x][aim.name]), "trace": measured.trace()}
            rows += [estimated(value, quantity=name, **common) for name, value in values.items()]
    summary = {
        "horizon": lag.world.env.horizon,
        "measured_at_lag_1": {
            f"{r['estimator']} {r['quantity']}": r["measured"] for r in rows if r["lag"] == 1
        },
    }
    names, title = [each.name for each in forms], lag.world.name
    return Result(
        tidy(rows), summary, lambda figure: _draw_lags(figure, rows, names, title, REFERENCE)
    )


def distance(measured: Measured, on_policy: Measured) -> Estimate:
    """|E g - E g'|^2 for two forms, unbiased, with the interval of their difference."""
    pairs = paired(on_policy.levels[1], measured.levels[1])
    return jackknife(lambda m: squares(m)[2], pairs)


def lag_rows(name, x, moments: Moments, truth, measured: Measured | None, **more) -> list[dict]:
    """Rows of the squared bias and the trace at a lag."""
    bias = float(((moments.mean - truth) ** 2).sum())
    bias = bias if bias > 1e-20 else 0.0  # only rounding
    common: dict[str, Any] = {"estimator": name, "lag": float(x), **more}
    common["warning"] = f"biased by {bias**0.5:.3g}" if bias else None
    seen = {}
    if measured is not None:
        common |= {**measured.counts, "effective_sample_size": measured.effective_sample_size}
        common["warning"] = "; ".join(filter(None, (common["warning"], measured.warning))) or None
        seen = {"squared_bias": measured.bias(truth), "trace": measured.trace()}
    return compared({"squared_bias": bias, "trace": moments.trace}, seen, **common)


def _draw_lags(figure, rows, names, title, other="squared_bias"):
    axes = panels(figure, 2)
    known = other == "squared_bias"
    for axis, quantity, text, unit in (
        (axes[0], "trace", "Variance", "tr Cov, one trajectory"),
        (axes[1], other, "Squared bias" if known else "Distance to the on-policy mean",
         "|E g − ∇J|²" if known else "|E g − E g on-policy|²"),
    ):  # fmt: skip
        for index, name in enumerate(names):
            mine = where(rows, estimator=name, quantity=quantity)
            draw_exact(axis, mine, "lag", index, words(name))
            draw_measured(axis, mine, "lag", index, words(name))
        label(axis, f"{text}, {title}", "lag: behaviour + lag × step", unit, legend=False)
    axes[0].set_yscale("log")
    if known:
        symmetric_logarithms(axes[1], 1e-2)
        caption(figure)
    legend(figure)


EXPERIMENTS = {
    "importance": Experiment(
        "six ways to weight another policy's data: bias and variance against the lag",
        importance,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("repeats",),
    ),
}
