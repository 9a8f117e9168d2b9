"""Discounting: the effect of dropping gamma^t from the gradient."""

from itertools import product

import numpy as np

from jaxpg.estimators import Estimator, importance
from jaxpg.lab import exact
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.pairs import norm, paired, squares
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    stated_row,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import World, coordinates
from jaxpg.stats import figures
from jaxpg.stats.intervals import NOT_RESOLVED, Estimate, within
from jaxpg.stats.moments import SampleMoments, jackknife, jackknife_ratio

GAMMAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
NO_GRADIENT = "biased, and the gradient of no function (Nota and Thomas, 2020)"
NOISE = "at small gamma the gradient is not clear of the noise: use more trajectories"


def discount(settings: Settings, progress: Progress) -> Result:
    """Dropping gamma^t: the bias, the change of direction, and that no function has this gradient."""
    world = world_of(settings)
    gammas = GAMMAS
    if settings.checkpoint is not None and world.gamma < 1:
        gammas = tuple(sorted({*GAMMAS, world.gamma}))
    forms = {each: _discounted(world, *each) for each in product(gammas, (True, False))}
    measured = measure(
        world, list(forms.values()), key_of(settings), settings.trajectories, progress=progress
    )
    known = {g: discount_bias(world, g) for g in gammas} if world.is_tabular else {}
    rows = []
    for gamma in gammas:
        true, other = (measured[forms[gamma, start].name] for start in (True, False))
        pairs = paired(true.levels[1], other.levels[1])
        exact_ = known.get(gamma, {})
        for quantity, function in (("relative_bias", _relative), ("cosine", _cosine)):
            row = {"estimator": "without_start", "quantity": quantity, "gamma": gamma}
            row |= {"exact": exact_.get(quantity), **other.counts}
            value = function(pairs)
            warning = NO_GRADIENT if np.isfinite(value.value) else NOISE
            rows.append(estimated(value, **row, warning=warning))
        for name, warning in (("without_start", NO_GRADIENT), ("from_start", "")) if known else ():
            row = {"estimator": name, "quantity": "asymmetry", "gamma": gamma, "warning": warning}
            rows.append(row | {"exact": exact_[f"asymmetry_{name}"]})
    found = {r["gamma"]: stated_row(r) for r in where(rows, quantity="relative_bias")}
    summary = {"relative_bias": found, "exact": known}
    return Result(tidy(rows), summary, lambda figure: _draw_discount(figure, rows))


def discount_bias(world: World, gamma: float) -> dict[str, float]:
    """Bias and cosine of E[sum_t u_t R_t] to grad J = E[sum_t gamma^t u_t R_t], and their asymmetries.

    The asymmetry is that of the Jacobian in the logits, 0 for the gradient of any function.
    """

    def field(start):
        return lambda logits: exact.gradient(world.mdp, logits, gamma, from_start=start)

    each = (exact.Moments(field(x)(world.logits), np.eye(world.logits.size)) for x in (True, False))
    true, other = (coordinates(world, moments).mean for moments in each)
    return {
        "bias": norm(other - true),
        "relative_bias": norm(other - true) / norm(true),
        "cosine": float(other @ true) / norm(true) / norm(other),
        "asymmetry_without_start": asymmetry(field(False), world.logits),
        "asymmetry_from_start": asymmetry(field(True), world.logits),
    }


def asymmetry(field, point, step: float = 1e-5) -> float:
    """|K - K^T| / |K| of the Jacobian K of a field [P] at a point, by central differences."""
    flat = np.asarray(point, np.float64).reshape(-1)
    ends = [
        [field((flat + sign * step * e).reshape(np.shape(point))) for sign in (1, -1)]
        for e in np.eye(len(flat))
    ]
    jacobian = np.stack([(up - down) / (2 * step) for up, down in ends], axis=1)
    return norm(jacobian - jacobian.T) / norm(jacobian)


def _discounted(world, gamma, from_start) -> Form:
    slot = importance.from_start(importance.on_policy) if from_start else importance.on_policy
    name = f"{'from' if from_start else 'without'}_start_{gamma:g}"
    return Form(name, Estimator(importance=slot), world.hyperparams._replace(gamma=gamma), None)


def _relative(pairs: SampleMoments) -> Estimate:
    """|E(other - one)| / |E one|, the root of a ratio of unbiased squares."""
    square = jackknife_ratio(lambda m: squares(m)[2], lambda m: squares(m)[0], pairs)
    return Estimate(*(float(np.sqrt(np.maximum(x, 0.0))) for x in square))


def _cosine(pairs: SampleMoments) -> Estimate:
    """The cosine by polarisation, <x, y> = (|x|^2 + |y|^2 - |y - x|^2) / 2, each square unbiased."""

    def cosine(m):
        one, other, difference = squares(m)
        return (one + other - difference) / (2 * np.sqrt(one * other))

    if min(jackknife(lambda m, i=i: squares(m)[i], pairs).low for i in (0, 1)) <= 0:
        return Estimate(np.nan, np.nan, np.inf)
    return within(jackknife(cosine, pairs), -1.0, 1.0)


def _draw_discount(figure, rows):
    exact_rows = where(rows, quantity="asymmetry")
    axes = figures.panels(figure, 3 if exact_rows else 2)
    titles = {
        "relative_bias": ("Bias of dropping γ^t", "|E g − ∇J| / |∇J|"),
        "cosine": ("Direction", "cosine of E g to ∇J"),
    }
    for axis, (quantity, (title, y)) in zip(axes, titles.items(), strict=False):
        found = where(rows, quantity=quantity)
        gammas = [r["gamma"] for r in found]
        draw_exact(axis, found, "gamma", 0)
        draw_measured(axis, found, "gamma", 0)
        figures.label(axis, title, "discount γ per step", y, legend=False)
        axis.set_xlim(gammas[0] - 0.03, 1.0)  # even if only a few could be measured
        lost = {g for g, r in zip(gammas, found, strict=True) if np.isnan(r["measured"])}
        if lost:
            text = f"{NOT_RESOLVED} at {len(lost)} of {len(gammas)} values of γ"
            axis.annotate(text, (0.5, 0.02), xycoords="axes fraction", ha="center")
    for i, (name, label) in enumerate(
        {"without_start": "without γ^t", "from_start": "with γ^t"}.items()
    ):
        if draw_exact(axes[2], where(exact_rows, estimator=name), "gamma", i, label):
            figures.label(axes[2], "Is it the gradient of a function?", "discount γ per step",
                          "|K − Kᵀ| / |K| of its Jacobian K (0: yes)")  # fmt: skip
    figures.caption(figure)


EXPERIMENTS = {
    "discount": Experiment(
        "dropping gamma^t from the gradient: relative bias, cosine, and the curl of the update",
        discount,
        Settings(trajectories=2**20),
        Settings(trajectories=2**14, quick=True),
        ignores=("estimators", "repeats", "gamma"),
    ),
}
