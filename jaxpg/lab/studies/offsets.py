"""Offsets: the effect of a constant added to every reward, with and without a baseline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxpg.estimators import Estimator, Slot, baselines, credit
from jaxpg.lab.exact import bandits
from jaxpg.lab.exact.baselines import minimisers
from jaxpg.lab.exact.compose import composed
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure
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
from jaxpg.lab.worlds.world import tables
from jaxpg.stats.figures import COLOURS, broken_at_zero, caption, label, panels
from jaxpg.stats.moments import moments_of

OFFSETS = (0.0, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6)
REWARDS = (1.0, -1.0)  # of the two arms, before the offset
HALF = 0.5
ZERO = 0.03  # where a logarithmic axis of offsets shows 0


def offset(settings: Settings, progress: Progress) -> Result:
    """Adding kappa to every return: tr(kappa) = tr(0) + 2 kappa E[|U|^2 R] + kappa^2 E|U|^2 without baseline.

    With the best constant, nothing changes. Also, for the bandit that pays 10^6 +- 1: how often a batch
    of N points the wrong way, and how well float32 computes its variance.
    """
    world = world_of(settings)
    traces = _exact_traces if world.is_tabular else _measured_traces
    rows, summary = traces(world, settings, progress)
    progress("signs and precision of the bandit")
    rows += _signs(settings) + _precisions(settings)
    big = bandits.sigmoid_moments(HALF, [1e6 + r for r in REWARDS])
    summary |= {
        "bandit_variance_at_1e6": float(big.covariance[0, 0]),
        "bandit_wrong_sign_at_1e6": bandits.wrong_sign_probability(big, 10**6),
    }
    return Result(tidy(rows), summary, lambda figure: _draw_offset(figure, rows, world.name))


def _exact_traces(world, settings, progress) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    best = minimisers(tables(world), credit.total_return, world.gamma).scalar
    # Adding kappa to the return and subtracting b is subtracting b - kappa.
    named = {f"none, {k:g}": ("none", k, -k) for k in OFFSETS} | {
        "optimal": ("optimal", None, best)
    }
    hyperparams = world.hyperparams
    forms = [
        Form(name, Estimator(credit.total_return, baselines.constant(b)), hyperparams, None)
        for name, (_, _, b) in named.items()
    ]
    found = measure(world, forms, key_of(settings), settings.trajectories, (1,), progress)
    rows: list[dict[str, Any]] = []
    for each in forms:
        kind, k, _ = named[each.name]
        known = composed(tables(world), each.sampled, hyperparams).trace
        measured = found[each.name]
        row = {"estimator": kind, "batch": 1, "quantity": "trace", **measured.counts}
        rows += [
            estimated(measured.trace(), offset=kappa, exact=known, **row)
            for kappa in (OFFSETS if k is None else (k,))
        ]
    return rows, {"optimal_constant": best, "quadratic": _quadratic(world)}


def _measured_traces(world, settings, progress) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Add kappa to every reward of the episode, so that its length counts too."""
    hyperparams = world.hyperparams
    forms = [
        Form(f"none, {k:g}", Estimator(Slot(_raised, "raised", (k,))), hyperparams, None)
        for k in OFFSETS
    ]
    found = measure(world, forms, key_of(settings), settings.trajectories, (1,), progress)
    row = {"estimator": "none", "batch": 1, "quantity": "trace"}
    rows = [
        estimated(found[each.name].trace(), offset=kappa, **row, **found[each.name].counts)
        for kappa, each in zip(OFFSETS, forms, strict=True)
    ]
    return rows, {"horizon": world.env.horizon}


def _raised(kappa, trace, trajectory, hyperparams):
    """The total return with every reward kappa higher."""
    reward = jnp.where(trajectory.mask, trajectory.reward + kappa, 0.0)
    return credit.total_return(trace, trajectory._replace(reward=reward), hyperparams)


def _quadratic(world) -> dict[str, float]:
    """tr(0), E[|U|^2 R] and E|U|^2, determined by three traces."""
    hyperparams, found = world.hyperparams, tables(world)

    def trace(kappa):
        slots = Estimator(credit.total_return, baselines.constant(-kappa))
        return composed(found, slots, hyperparams).trace

    here, above, below = (trace(k) for k in (0.0, 1.0, -1.0))
    return {
        "trace": here,
        "cross": (above - below) / 4,
        "score_square": (above + below) / 2 - here,
    }


def _signs(settings) -> list[dict[str, Any]]:
    """How often the mean over N has the wrong sign: at 10^6 +- 1 and at +- 1, without a baseline."""
    rng, rows = np.random.default_rng(settings.seed), []
    repeats = max(settings.repeats, 64) * 64
    for kappa in (1e6, 10.0, 0.0):
        for n in (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000):
            # Only how often each arm was drawn matters to the mean.
            first = rng.binomial(n, HALF, repeats).astype(float)
            mean = first * HALF * (kappa + 1) - (n - first) * HALF * (kappa - 1)
            wrong = (mean < 0).sum()
            # Jeffreys' interval.
            low, high = stats.beta.ppf([0.025, 0.975], wrong + 0.5, repeats - wrong + 0.5)
            low, high = (0.0 if wrong == 0 else low), (1.0 if wrong == repeats else high)
            # Wrong where first (kappa + 1) < (n - first) (kappa - 1).
            edge = n * (kappa - 1) / (2 * kappa) if kappa else 0.0
            known = float(stats.binom.cdf(np.ceil(edge) - 1, n, HALF))
            rows.append(estimated(
                (wrong / repeats, low, high), estimator="none", offset=kappa, batch=n,
                quantity="wrong sign", exact=known, trajectories=n * repeats, env_steps=n * repeats,
            ))  # fmt: skip
    return rows


def _precisions(settings) -> list[dict[str, Any]]:
    """The variance of the bandit's reward (1, whatever the offset) by three formulas."""
    draws = np.random.default_rng(settings.seed).integers(0, 2, 2**16) * 2.0 - 1.0
    naive = jax.jit(lambda x: (x**2).mean() - x.mean() ** 2)
    shifted = jax.jit(lambda x: moments_of(x[:, None]).squares[0] / (x.size - 1))
    rows = []
    for kappa in OFFSETS:
        x = jnp.asarray(draws + kappa, jnp.float32)
        with np.errstate(all="ignore"):
            answers = {
                "E x² − (E x)², float32": abs(float(naive(x))),
                "shifted sums, float32": float(shifted(x)),
                "shifted sums, float64": float((draws + kappa).var(ddof=1)),
            }
        for name, value in answers.items():
            bad = abs(value - 1) > 0.05
            rows.append({
                "estimator": name, "offset": kappa, "quantity": "variance of the reward",
                "measured": value, "exact": 1.0, "trajectories": len(draws), "env_steps": len(draws),
                "warning": "cancellation: wrong" if bad else None,
            })  # fmt: skip
    return rows


def _draw_offset(figure, rows, world):
    axes, known = panels(figure, 3), False
    for index, (kind, text) in enumerate((("none", "no baseline"), ("optimal", "best constant"))):
        mine = _placed(where(rows, estimator=kind, quantity="trace"))
        known |= draw_exact(axes[0], mine, "place", index, text)
        draw_measured(axes[0], mine, "place", index, text)
    axes[0].set_yscale("log")
    added = "the return" if known else "every reward"
    label(axes[0], f"Variance of REINFORCE, {world}", f"offset κ added to {added}",
          "tr Cov, one trajectory")  # fmt: skip
    for index, kappa in enumerate((1e6, 10.0, 0.0)):
        mine = where(rows, quantity="wrong sign", offset=kappa)
        draw_exact(axes[1], mine, "batch", index, f"κ = {kappa:,.0f}")
        draw_measured(axes[1], mine, "batch", index, f"κ = {kappa:,.0f}")
    axes[1].set_xscale("log")
    label(axes[1], "Batches that point the wrong way, bandit κ ± 1", "batch size N (pulls)",
          "probability")  # fmt: skip
    found = _placed(where(rows, quantity="variance of the reward"))
    for index, name in enumerate(dict.fromkeys(r["estimator"] for r in found)):
        mine = where(found, estimator=name)
        axes[2].plot([r["place"] for r in mine], [np.maximum(r["measured"] or np.nan, 1e-3) for r in mine],
                     label=name, marker="osD"[index], markersize=7 - 2 * index, markerfacecolor="white",
                     linestyle=("--", "-", ":")[index], color=COLOURS[index])  # fmt: skip
    axes[2].set_yscale("log")
    label(
        axes[2],
        "Computed variance of κ ± 1 (truth: 1)",
        "offset κ of the reward",
        "variance",
    )
    for axis in (axes[0], axes[2]):
        broken_at_zero(axis, ZERO)
    caption(figure)


def _placed(rows):
    """The rows by offset, 0 at ZERO, and after it a row without values, so that no line leads across."""
    found = [row | {"place": row["offset"] or ZERO} for row in rows]
    breaks = [row | {"place": np.sqrt(ZERO), "exact": np.nan, "measured": None} for row in found
              if not row["offset"]]  # fmt: skip
    return sorted([*found, *breaks], key=lambda row: row["place"])


EXPERIMENTS = {
    "offset": Experiment(
        "a constant added to every reward: variance, wrong signs and float32, up to 10^6",
        offset,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("estimators",),
    ),
}
