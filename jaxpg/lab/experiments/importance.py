"""Importance: what weighting another policy's data costs, and what leaving the weights out costs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.lab import exact
from jaxpg.lab.exact import Moments
from jaxpg.lab.experiments.drawing import caption, label, line, panels, plain_logarithms, points
from jaxpg.lab.experiments.estimators import (
    form,
    gradient,
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
from jaxpg.lab.experiments.pairs import paired, squares
from jaxpg.lab.experiments.sampling import Measured, measurer, need_effective, source_of
from jaxpg.lab.samples import log_probs, roll
from jaxpg.lab.streaming import Estimate, jackknife
from jaxpg.lab.worlds import World, table_params

FORMS = ("is_total", "is_pdis", "is_first_order", "is_marginal", "is_step")
LAGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
REFERENCE = "squared_distance_to_on_policy"  # of means, in place of a bias where no truth is known
SPREAD = 0.5  # of an episode's log weight at lag 1, to first order, where the step is random
PILOT = 256  # episodes that scale it
QUICK_STEPS = 50  # of an episode, in a quick run where no answers are exact


class Lag(NamedTuple):
    """A behaviour policy, and the way from it to the policy to improve: target = behaviour + lag step."""

    world: World
    behaviour: Any  # [O, A] logits, or a network's parameters where the world has no tables
    step: Any  # likewise

    def at(self, lag: float) -> World:
        """The world whose policy is ahead of its data by a lag."""
        moved = jax.tree.map(lambda x, step: x + lag * step, self.behaviour, self.step)
        if self.world.mdp is None:
            return self.world._replace(params=moved, behaviour_params=self.behaviour)
        return self.world._replace(
            logits=moved,
            params=table_params(moved),
            behaviour_logits=self.behaviour,
            behaviour_params=table_params(self.behaviour),
        )


def lag_of(settings: Settings) -> Lag:
    """The world's own behaviour policy at lag 0 and its policy at 1; or one step up the gradient.

    A network steps in a random direction, and its world is measured only.
    """
    world = measured_world(settings)
    if world.mdp is None:
        return _random_lag(world, settings)
    if world.behaviour_logits is not None:
        return Lag(world, world.behaviour_logits, world.logits - world.behaviour_logits)
    up = exact.gradient(world.mdp, world.logits, world.gamma).reshape(world.logits.shape)
    return Lag(world, world.logits, up / max(np.abs(up).max(), 1e-12))


def measured_world(settings: Settings) -> World:
    """The world, without the tables of a network; short episodes where it has none and time is short."""
    world = world_of(settings)
    if world.mdp is not None and world.factor is None:
        return world
    if settings.quick:
        world = world._replace(env=world.env._replace(horizon=min(world.env.horizon, QUICK_STEPS)))
    return world._replace(mdp=None, logits=None, factor=None, basis=None)


def _random_lag(world: World, settings: Settings) -> Lag:
    """A random direction, so long that at lag 1 an episode's log weight spreads by SPREAD."""
    walk, draw = jax.random.split(jax.random.fold_in(key_of(settings), 1))
    flat, unravel = ravel_pytree(world.params)
    step = unravel(jax.random.normal(draw, flat.shape, flat.dtype))
    source = source_of(world, form("rtg", world), walk)

    @jax.jit
    def spread(params, step):
        trajectory = roll(source, 0, PILOT)
        _, change = jax.jvp(log_probs(source, trajectory), (params,), (step,))
        return jnp.sqrt((change.sum(axis=0) ** 2).mean())

    size = SPREAD / spread(world.params, step)
    return Lag(world, world.params, jax.tree.map(lambda x: size * x, step))


def importance(settings: Settings, progress: Progress) -> Result:
    """Bias and variance of six importance-sampled forms against the lag of the data's policy.

    At lag 0 all weights are 1. Whole-episode and per-decision weights stay unbiased and grow noisy; those
    that leave ratios out stay calm and drift.
    """
    lag = lag_of(settings)
    tables = lag.world.mdp is not None
    names = settings.estimators or tuple(n for n in FORMS if tables or n != "is_marginal")
    lags = LAGS[::2] if settings.quick else LAGS
    forms = [form(name, lag.at(1.0)) for name in names]
    for each in forms:
        if not each.off_policy:
            raise ValueError(f"{each.name} takes no other policy's data; use {', '.join(FORMS)}")
    if not tables:
        return measured_result(lag, forms, lags, settings, progress)
    found = measured_lags(lag, [each for each in forms if each.estimator], lags, settings, progress)
    rows = []
    small = lag.behaviour.size <= 16
    for x in sorted({*lags, *(np.linspace(0.0, 1.5, 13).tolist() if small else ())}):
        progress(f"exact moments at lag {x:g}")
        there = lag.at(x)
        for name in names:
            moments = form(name, there).exact
            assert moments is not None
            rows += lag_rows(name, x, moments(), gradient(there), found.get(x, {}).get(name))
    weights = exact.weight_moments(lag.world.mdp, lag.at(1.0).logits, lag.behaviour)
    at_one = {
        row["estimator"] + " " + row["quantity"]: row["exact"] for row in rows if row["lag"] == 1
    }
    summary = {"weights_at_lag_1": weights._asdict(), "exact_at_lag_1": at_one}
    title = lag.world.name
    return Result(tidy(rows), summary, lambda figure: _draw_lags(figure, rows, names, title))


def measured_lags(lag, forms, lags, settings, progress) -> dict[float, dict[str, Measured]]:
    """lag -> name -> measured, by one program whose parameters move."""
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
    """Traces and distances to the mean of on-policy rewards to go, where no answer is exact."""
    aim = form("rtg", lag.at(1.0))
    found = measured_lags(lag, [*forms, aim], lags, settings, progress)
    rows = [
        row
        for x in lags
        for each in forms
        for row in _seen_rows(each, x, found[x][each.name], found[x][aim.name])
    ]
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


def _seen_rows(each, x, measured: Measured, on_policy: Measured) -> list[dict]:
    common = {
        "estimator": each.name,
        "lag": float(x),
        "warning": each.warning if x and each.warning else None,
        "trajectories": measured.trajectories,
        "env_steps": measured.env_steps,
        "effective_sample_size": measured.effective_sample_size,
    }
    values = {REFERENCE: distance(measured, on_policy), "trace": measured.trace()}
    return [estimated(value, quantity=name, **common) for name, value in values.items()]


def distance(measured: Measured, on_policy: Measured) -> Estimate:
    """|E g - E g'|^2 for two forms, unbiased, with the interval of their difference."""
    return jackknife(lambda m: squares(m)[2], paired(on_policy.levels[1], measured.levels[1]))


def lag_rows(name, x, moments: Moments, truth, measured: Measured | None, **more) -> list[dict]:
    """Rows of the squared bias and the trace at a lag."""
    bias = float(((moments.mean - truth) ** 2).sum())
    bias = bias if bias > 1e-20 else 0.0  # rounding is no bias
    common: dict[str, Any] = {"estimator": name, "lag": float(x), **more}
    common["warning"] = f"biased by {bias**0.5:.3g}" if bias else None
    values: dict[str, Any] = {"squared_bias": None, "trace": None}
    if measured is not None:
        common |= {
            "trajectories": measured.trajectories,
            "env_steps": measured.env_steps,
            "effective_sample_size": measured.effective_sample_size,
        }
        values = {"squared_bias": measured.bias(truth), "trace": measured.trace()}
    known = {"squared_bias": bias, "trace": moments.trace}
    return [
        {**common, "quantity": k, "exact": known[k]} | (estimated(v) if v is not None else {})
        for k, v in values.items()
    ]


def _draw_lags(figure, rows, names, title, other="squared_bias"):
    axes = panels(figure, 2)
    known = other == "squared_bias"
    for axis, quantity, text, unit in (
        (axes[0], "trace", "Variance", "tr Cov, one trajectory"),
        (axes[1], other, "Squared bias" if known else "Distance to the on-policy mean",
         "|E g − ∇J|²" if known else "|E g − E g on-policy|²"),
    ):  # fmt: skip
        for index, name in enumerate(names):
            mine = [r for r in rows if r["estimator"] == name and r["quantity"] == quantity]
            if known:
                line(axis, [r["lag"] for r in mine], [r["exact"] for r in mine], index, name)
            seen = [r for r in mine if r.get("measured") is not None]
            columns = [[r[k] for r in seen] for k in ("lag", "measured", "low", "high")]
            points(axis, *columns, index=index, label=None if known else name)
        label(axis, f"{text}, {title}", "lag: policy = behaviour + lag · step", unit,
              legend=axis is axes[0])  # fmt: skip
    plain_logarithms(axes[0])
    if known:
        caption(figure)
        axes[1].set_ylim(*_clear([r for r in rows if r["quantity"] == other]))


def _clear(rows):
    """Limits by the exact curves, so that the noise of unbiased forms does not hide the biased ones."""
    top = 1.3 * max(max(r["exact"] for r in rows), 1e-6)
    return -0.35 * top, top


def stale(settings: Settings, progress: Progress) -> Result:
    """Error of the surrogate at a policy alpha away from its data: slope 1 for gradients, 2 for values.

    The surrogate L has the right value and gradient at alpha = 0 (Kakade and Langford, 2002), so J - L
    starts with the square and the gradients differ from the first order on.
    """
    lag = lag_of(settings)
    name, lags = "is_step", np.geomspace(1e-3, 1.0, 13)
    chosen = [lags[-1], lags[-3]] if settings.quick else list(lags[-5:][::-1])
    each = form(name, lag.at(1.0))
    if lag.world.mdp is None:
        return _stale_measured(lag, each, chosen, settings, progress)
    found = measured_lags(lag, [each], chosen, settings, progress)
    rows = []
    for x in lags:
        there = lag.at(float(x))
        moments = form(name, there).exact
        assert moments is not None
        error, gap = np.linalg.norm(moments().mean - gradient(there)), abs(_gap(lag, there))
        rows.append({"estimator": name, "lag": float(x), "quantity": "gradient error",
                     "exact": float(error), "warning": "biased"})  # fmt: skip
        if x in found:
            measured = found[x][name]
            # A square root bends an interval; its ends are those of the square.
            value = [np.sqrt(max(v, 0.0)) for v in measured.bias(gradient(there))]
            rows[-1] |= estimated(
                value, trajectories=measured.trajectories, env_steps=measured.env_steps
            )
        rows.append({"estimator": name, "lag": float(x), "quantity": "objective gap",
                     "exact": float(gap)})  # fmt: skip
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
        rows.append(estimated(
            value, estimator=each.name, lag=float(x), quantity="distance to on-policy", warning="biased",
            trajectories=measured.trajectories, env_steps=measured.env_steps,
        ))  # fmt: skip
    summary = {"horizon": lag.world.env.horizon}
    slopes = {"distance to on-policy": None}
    return Result(
        tidy(rows), summary, lambda figure: _draw_stale(figure, rows, slopes, lag.world.name)
    )


def _slope(rows, quantity) -> float:
    """Of the logarithms, over two decades of small lags."""
    small = [r for r in rows if r["quantity"] == quantity and r["lag"] <= 0.11]
    x, y = np.log([[r["lag"], r["exact"]] for r in small]).T
    return float(np.polyfit(x, y, 1)[0])


def _gap(lag: Lag, there: World) -> float:
    """J - L with L = J_beta + E_beta[sum_t gamma^t rho_t A_t], A the behaviour's advantages."""
    world = lag.world
    gamma, mdp = world.gamma, world.mdp
    value, action_value = exact.values(mdp, lag.behaviour, gamma)
    target = np.exp(there.logits - np.logaddexp.reduce(there.logits, axis=1, keepdims=True))
    visits = exact.occupancy(mdp, lag.behaviour) * gamma ** np.arange(mdp.horizon)[:, None]
    visits = visits * ~np.asarray(mdp.terminal, bool)
    advantage = action_value - value[:-1, :, None]
    gain = np.einsum("ts,sa,tsa->", visits, target[np.asarray(mdp.observation)], advantage)
    start = exact.objective(mdp, lag.behaviour, gamma)
    return float(exact.objective(mdp, there.logits, gamma) - start - gain)


def _draw_stale(figure, rows, slopes, world):
    (axis,) = panels(figure, width=6.2, height=4.4)
    units = {"gradient error": "|E g − ∇J|", "objective gap": "|J − L|",
             "distance to on-policy": "|E g − E g on-policy|"}  # fmt: skip
    for index, (quantity, slope) in enumerate(slopes.items()):
        mine = [r for r in rows if r["quantity"] == quantity]
        if slope is not None:
            text = f"{units[quantity]}, exact: slope {slope:.3f}"
            line(axis, [r["lag"] for r in mine], [r["exact"] for r in mine], index, text)
        seen = [r for r in mine if r.get("measured") is not None]
        if seen:
            columns = [[r[k] for r in seen] for k in ("lag", "measured", "low", "high")]
            points(axis, *columns, index=index, label=f"{units[quantity]}, measured, 95 %")
    axis.set_xscale("log")
    axis.set_yscale("log")
    label(axis, f"The surrogate's error on stale data, {world}",
          "lag α: policy = behaviour + α · step", "error")  # fmt: skip


EXPERIMENTS = {
    "importance": Experiment(
        "six ways to weigh another policy's data: bias and variance against the lag",
        importance,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("repeats",),
    ),
    "stale": Experiment(
        "how fast the surrogate goes wrong on stale data: slope 1 for gradients, 2 for values",
        stale,
        Settings(trajectories=2**20),
        Settings(trajectories=2**16, quick=True),
        ignores=("estimators", "repeats"),
    ),
}
