"""Staleness: how fast the surrogate of old data goes wrong as the policy moves away from it."""

import numpy as np

from jaxpg.lab import exact
from jaxpg.lab.exact.tables import softmax
from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.importance import distance, measured_lags
from jaxpg.lab.studies.lags import Lag, lag_of
from jaxpg.lab.studies.pairs import norm
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, estimated, tidy
from jaxpg.lab.worlds.world import World
from jaxpg.stats.figures import caption, label, panels


def stale(settings: Settings, progress: Progress) -> Result:
    """Error of the surrogate at a policy alpha away from its data: slope 1 for gradients, 2 for values.

    The surrogate L has the right value and gradient at alpha = 0 (Kakade and Langford, 2002), so J - L
    starts with the square and the gradients differ from the first order on.
    """
    lag = lag_of(settings)
    name, lags = "is_step", np.geomspace(1e-3, 1.0, 13)
    chosen = [lags[-1], lags[-3]] if settings.quick else list(lags[-5:][::-1])
    each = form(name, lag.at(1.0))
    if not lag.world.is_tabular:
        return _stale_measured(lag, each, chosen, settings, progress)
    found = measured_lags(lag, [each], chosen, settings, progress)
    rows = []
    for x in lags:
        there = lag.at(float(x))
        common, known = {"estimator": name, "lag": float(x)}, form(name, there).moments()
        row = common | {"quantity": "gradient error", "warning": "biased"}
        row["exact"] = norm(known.mean - gradient(there))
        if x in found:
            measured = found[x][name]
            # The interval of the error runs between the roots of the ends of its square's interval.
            value = [np.sqrt(max(v, 0.0)) for v in measured.bias(gradient(there))]
            row |= estimated(value, **measured.counts)
        rows += [row, common | {"quantity": "objective gap", "exact": abs(_gap(lag, there))}]
    slopes = {name: _slope(rows, name) for name in ("gradient error", "objective gap")}
    return Result(
        tidy(rows),
        {"slopes": slopes},
        lambda figure: _draw_stale(figure, rows, slopes, lag.world.name),
    )


def _stale_measured(lag: Lag, each, lags, settings, progress) -> Result:
    """The surrogate's gradient against the mean of on-policy rewards to go."""
    aim = form("rtg", lag.at(1.0))
    found = measured_lags(lag, [each, aim], lags, settings, progress)
    rows = []
    for x in lags:
        measured = found[x][each.name]
        value = [np.sqrt(max(v, 0.0)) for v in distance(measured, found[x][aim.name])]
        row = {"estimator": each.name, "lag": float(x), "warning": "biased", **measured.counts}
        rows.append(estimated(value, quantity="distance to on-policy", **row))
    summary = {"horizon": lag.world.env.horizon}
    slopes = {"distance to on-policy": None}
    return Result(
        tidy(rows), summary, lambda figure: _draw_stale(figure, rows, slopes, lag.world.name)
    )


def _slope(rows, quantity) -> float:
    """The slope of the logarithms over two decades of small lags."""
    small = [r for r in where(rows, quantity=quantity) if r["lag"] <= 0.11]
    x, y = np.log([[r["lag"], r["exact"]] for r in small]).T
    return float(np.polyfit(x, y, 1)[0])


def _gap(lag: Lag, there: World) -> float:
    """J - L with L = J_beta + E_beta[sum_t gamma^t rho_t A_t], A the behaviour's advantages."""
    world = lag.world
    gamma, mdp = world.gamma, world.mdp
    value, action_value = exact.values(mdp, lag.behaviour, gamma)
    target = softmax(there.logits)
    visits = exact.occupancy(mdp, lag.behaviour) * gamma ** np.arange(mdp.horizon)[:, None]
    visits = visits * ~np.asarray(mdp.terminal, bool)
    advantage = action_value - value[:-1, :, None]
    gain = np.einsum("ts,sa,tsa->", visits, target[np.asarray(mdp.observation)], advantage)
    start = exact.objective(mdp, lag.behaviour, gamma)
    return float(exact.objective(mdp, there.logits, gamma) - start - gain)


def _draw_stale(figure, rows, slopes, world):
    (axis,) = panels(figure)
    units = {"gradient error": "|E g − ∇J|", "objective gap": "|J − L|",
             "distance to on-policy": "|E g − E g on-policy|"}  # fmt: skip
    for index, (quantity, slope) in enumerate(slopes.items()):
        mine = where(rows, quantity=quantity)
        text = units[quantity] + ("" if slope is None else f": slope {slope:.3f}")
        draw_exact(axis, mine, "lag", index, text)
        draw_measured(axis, mine, "lag", index, text)
    axis.set_xscale("log")
    axis.set_yscale("log")
    label(axis, f"The surrogate's error on stale data, {world}",
          "lag α: policy = behaviour + α × step", "error")  # fmt: skip
    caption(figure)


EXPERIMENTS = {
    "stale": Experiment(
        "how fast the surrogate goes wrong on stale data: slope 1 for gradients, 2 for values",
        stale,
        Settings(trajectories=2**20),
        Settings(trajectories=2**16, quick=True),
        ignores=("estimators", "repeats"),
    ),
}
