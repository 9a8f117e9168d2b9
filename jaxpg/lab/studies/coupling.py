"""Batches that couple their trajectories, and the choice of the policy that gathers them."""

import jax
import numpy as np
from scipy import optimize

from jaxpg.estimators import Estimator, baselines, credit, importance, surrogates
from jaxpg.lab import exact
from jaxpg.lab.exact import Moments, enumeration
from jaxpg.lab.exact.tables import softmax, squared_returns, tabulate, visits
from jaxpg.lab.studies.estimators import batch_moments, form, gradient
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.pairs import norm
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    need_exact,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import TABLES, World, table_params, tabular_world
from jaxpg.stats import figures
from jaxpg.stats.words import words
from jaxpg.types import Hyperparams

STANDARDISED = "total_standardised"
BANDIT = "bandit"


def coupled(settings: Settings, progress: Progress) -> Result:
    """Own-mean, leave-one-out and standardised batches of N: shrinkage of the mean, and N times the trace."""
    world = world_of(settings)
    names = settings.estimators or ("total_own_mean", "total_mean", "rtg_time_mean", STANDARDISED)
    forms = [_form(name, world) for name in names]
    true = None if not world.is_tabular else gradient(world)
    rows = []
    for index, size in enumerate(QUICK_SIZES if settings.quick else SIZES):
        progress(f"batches of {size}")
        key = jax.random.fold_in(key_of(settings), index)
        found = measure(world, forms, key, settings.trajectories, (size,))
        for each in forms:
            one = found[each.name]
            known = batch_moments(each, world, size)
            row = {"estimator": each.name, "batch": size, "warning": each.warning, **one.counts}
            value = None if known is None else size * known.trace
            trace = (size * x for x in one.trace(size))
            rows.append(estimated(trace, quantity="batch_trace", exact=value, **row))
            if true is not None and true.any():
                value = None if known is None else _share(known.mean, true)
                share = one.estimate(lambda m: _share(m.mean, true), size)
                rows.append(estimated(share, quantity="share", exact=value, **row))
    rows += standardised_bandit()
    limits = {name: _limit(world, name) for name in names}
    summary = {"batch_trace_limit": {k: v for k, v in limits.items() if v is not None}}
    for quantity in ("share", "batch_trace"):
        summary[quantity] = {
            f"{r['estimator']} N={r['batch']}": r["exact"]
            for r in rows
            if r["quantity"] == quantity and r["exact"] is not None
        }
    return Result(tidy(rows), summary, lambda figure: _draw_coupled(figure, rows, names))


def standardised_bandit() -> list[dict]:
    """Exact mean and direction of standardised advantages on a bandit with 3 arms, over all batches of N."""
    mdp, logits = exact.bandits.bandit(REWARDS), np.array([LOGITS])
    true = exact.gradient(mdp, logits, 1.0)
    slots = _STANDARDISED
    rows = []
    for size in (2, 4, 8, 16):
        found = enumeration.moments(mdp, logits, slots, Hyperparams(gamma=1.0), batch_size=size)
        scale = norm(found.mean) / norm(true)
        row = {"estimator": f"{STANDARDISED}_bandit", "batch": size, "warning": _SCALED}
        rows.append(row | {"quantity": "share", "exact": _share(found.mean, true)})
        cosine = float(found.mean @ true) / norm(found.mean) / norm(true)
        rows.append(row | {"quantity": "scale", "exact": scale})
        rows.append(row | {"quantity": "cosine", "exact": cosine})
    return rows


def _form(name, world) -> Form:
    if name != STANDARDISED:
        return form(name, world)
    return Form(name, _STANDARDISED, world.hyperparams, None, warning=_SCALED)


def _share(mean, true) -> float:
    """The component of a mean along the true gradient, as a fraction of it."""
    return float(mean @ true / (true @ true))


def _limit(world, name):
    """The limit of N times the trace as N grows: the trace of one trajectory with the baseline E[psi]."""
    constant = {"total_own_mean": "total_constant", "total_mean": "total_constant",
                "rtg_time_mean": "rtg_time"}  # fmt: skip
    if not world.is_tabular or name not in constant:
        return None
    return form(constant[name], world).moments().trace


_STANDARDISED = Estimator(
    credit.total_return, baselines.batch_mean, surrogate=surrogates.standardised(surrogates.score)
)
_SCALED = "biased: scaled by the batch's own spread, and slightly turned"
SIZES, QUICK_SIZES = (2, 4, 8, 16, 64), (2, 16)
REWARDS, LOGITS = (1.0, 0.7, 0.0), (0.3, -0.2, 0.5)


def _draw_coupled(figure, rows, names):
    texts = {
        "batch_trace": ("N × variance of the batch mean", "N tr Cov (return²)"),
        "share": ("Shrinkage", "⟨E g, ∇J⟩ / |∇J|²"),
    }
    # Without a true gradient there is no share of it.
    texts = {
        k: text
        for k, text in texts.items()
        if any(r["quantity"] == k for r in rows if r["estimator"] in names)
    }
    axes = figures.panels(figure, len(texts) + 1)
    for axis, (quantity, (title, y)) in zip(axes, texts.items(), strict=False):
        for i, name in enumerate(names):
            found = where(rows, estimator=name, quantity=quantity)
            draw_exact(axis, found, "batch", i, words(name))
            draw_measured(axis, found, "batch", i, words(name))
        figures.label(axis, title, "trajectories per batch N", y, legend=False)
    axes[0].set_yscale("log", base=2)
    bandit = [r for r in rows if r["estimator"].endswith("_bandit")]
    for i, (quantity, text) in enumerate(
        {"scale": "|E g| / |∇J|", "cosine": "cosine of E g and ∇J"}.items()
    ):
        draw_exact(axes[-1], where(bandit, quantity=quantity), "batch", i, text)
        axes[-1].lines[-1].set_marker(figures.MARKERS[i])
    figures.label(
        axes[-1], "Standardised advantages, 3 arms, exact", "trajectories per batch N", "ratio"
    )
    figures.legend(figure, axes[:-1])
    figures.caption(figure)
    for axis in axes:
        axis.set_xscale("log", base=2)


def behaviour(settings: Settings, progress: Progress) -> Result:
    """Whose data? Behaviours proportional to pi (|u| |R|)^alpha, alpha = 0 being the policy itself."""
    world = _bandit_world() if settings.env == BANDIT else world_of(settings)
    need_exact(world, "behaviour")
    if world.is_projected:
        raise ValueError(
            "behaviour needs a table of probabilities; leave out --policy or use tabular"
        )
    true, rows = gradient(world), []
    for alpha in np.linspace(0.0, 2.0, 21):
        known = _moments(world, tilted(world, alpha))
        row = {"estimator": "is_pdis", "alpha": float(alpha), "quantity": "trace"}
        rows.append(row | {"exact": known.trace, "bias": norm(known.mean - true)})  # fmt: skip
    for index, alpha in enumerate((0.0, 1.0, 2.0) if settings.quick else (0.0, 0.5, 1.0, 1.5, 2.0)):
        progress(f"behaviour with alpha {alpha}")
        other = acting(world, tilted(world, alpha))
        key = jax.random.fold_in(key_of(settings), index)
        found = measure(other, [form("is_pdis", other)], key, settings.trajectories)["is_pdis"]
        row = next(r for r in rows if np.isclose(r["alpha"], alpha))
        row |= estimated(found.trace(), warning=found.warning, **found.counts)
        row["effective_sample_size"] = found.effective_sample_size
    best = min(rows, key=lambda r: r["exact"])
    lines = {
        "uniform behaviour": _trace(world, np.zeros_like(world.logits)),
        "on policy": rows[0]["exact"],
    }
    if world.logits.size <= SMALL:
        found = best_behaviour(world)
        lines["best table of probabilities"] = _trace(world, found)
    summary = {"best_alpha": best["alpha"], "trace_at_best_alpha": best["exact"]}
    summary["trace"] = {"alpha = 1": rows[10]["exact"], **lines}
    return Result(tidy(rows), summary, lambda figure: _draw_behaviour(figure, rows, lines))


def tilted(world: World, alpha: float) -> np.ndarray:
    """log beta(a|o) [O, A], beta proportional to pi (|u| m)^alpha, m^2 the mean square of the return to go.

    For one decision alpha = 1 minimises the trace over all behaviours: E_beta |rho u r|^2 is then
    (E_pi |u r|)^2, its lower bound by Jensen's inequality.
    """
    found = tabulate(world.mdp, world.logits)
    _, square = squared_returns(found, world.gamma)
    seen = np.eye(len(world.logits))[found.observation]
    visited = visits(found)
    mean_square = np.einsum("ts,tsa,so->oa", visited, square, seen)
    met = np.einsum("ts,so->o", visited, seen)[:, None]
    mean_square = mean_square / np.where(met > 0, met, 1.0)
    policy = softmax(world.logits)
    length = np.sqrt((policy**2).sum(axis=1, keepdims=True) - 2 * policy + 1)  # of e_a - pi
    # A floor keeps the support where an action's return is 0.
    weight = np.maximum(length * np.sqrt(mean_square), FLOOR)
    log_weight = np.log(policy) + alpha * np.log(weight)
    return log_weight - np.log(np.exp(log_weight).sum(axis=1, keepdims=True))


def acting(world: World, log_behaviour: np.ndarray) -> World:
    """The world with another behaviour."""
    return world._replace(
        exact=world.table._replace(behaviour_logits=log_behaviour),
        behaviour_params=table_params(log_behaviour),
    )


def best_behaviour(world: World) -> np.ndarray:
    """The logits [O, A] of the behaviour with the least exact trace, by quasi-Newton from the policy."""
    shape = world.logits.shape

    def cost(flat):
        return np.log(_trace(world, flat.reshape(shape)))

    start = tilted(world, 0.5).reshape(-1)
    return optimize.minimize(cost, start, method="L-BFGS-B").x.reshape(shape)


def _trace(world, logits):
    return _moments(world, logits).trace


def _moments(world, logits) -> Moments:
    slots = Estimator(importance=importance.from_start(importance.per_decision))
    return exact.moments(world.mdp, world.logits, slots, world.hyperparams, logits)


def _bandit_world() -> World:
    """A bandit with a rare arm that pays most, where importance sampling helps."""
    mdp = exact.bandits.bandit(RARE_REWARDS)
    return tabular_world(BANDIT, mdp, np.log([RARE_POLICY]))


def _draw_behaviour(figure, rows, lines):
    (axis,) = figures.panels(figure)
    draw_exact(axis, rows, "alpha", 0, "per-decision weights")
    draw_measured(axis, rows, "alpha", 0, "per-decision weights")
    for i, (text, value) in enumerate(lines.items(), 1):
        figures.line(axis, [0, 2], [value, value], i, text)
    axis.set_yscale("log", base=2)
    figures.label(axis, "Whose data? Per-decision importance sampling",
                  "α of the behaviour, which is proportional to π (|u| |R|)^α",
                  "tr Cov of one gradient (return²)")  # fmt: skip
    figures.caption(figure)


FLOOR = 1e-3
SMALL = 16  # a behaviour with more logits is not optimised
RARE_REWARDS, RARE_POLICY = (0.5, 1.0, 5.0), (0.75, 0.2, 0.05)

EXPERIMENTS = {
    "coupled": Experiment(
        "batches with a common mean or standard deviation: (N-1)/N, and the price of leaving one out",
        coupled,
        Settings(trajectories=2**20),
        Settings(trajectories=2**14, quick=True),
        ignores=("repeats",),
    ),
    "behaviour": Experiment(
        "importance sampling as a gain: behaviours that favour what moves the gradient",
        behaviour,
        Settings(env=BANDIT, trajectories=2**18),
        Settings(env=BANDIT, trajectories=2**14, quick=True),
        worlds=(BANDIT, *TABLES),
        ignores=("estimators", "policy", "repeats"),
    ),
}
