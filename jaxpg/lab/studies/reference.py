"""Reference: which gradient each estimate of the KL to a fixed policy has, as a penalty and in the reward."""

from typing import Any

import numpy as np

from jaxpg.lab.exact import reference
from jaxpg.lab.studies.lags import lag_of
from jaxpg.lab.studies.pairs import norm
from jaxpg.lab.studies.rows import draw_exact, where
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, need_exact, tidy
from jaxpg.stats.figures import label, legend, panels

PLACES = {"penalty": reference.penalty_moments, "reward": reference.reward_moments}
BIAS, TRACE = "relative_bias", "trace"


def estimates(settings: Settings, progress: Progress) -> Result:
    """Bias and variance of the gradients of k1, k2 and k3 against that of the KL, by distance, exactly.

    The truth is the gradient of sum_t gamma^t E KL(pi || ref)(s_t), through the states too. Here a penalty
    counts step t with gamma^t.
    """
    lag = lag_of(settings)
    need_exact(lag.world, "reference")
    distances = np.geomspace(0.01, 2.0, 5 if settings.quick else 17)
    rows: list[dict[str, Any]] = []
    for x in map(float, distances):
        progress(f"lag {x:.2g}")
        there = lag.at(x)
        given = there.mdp, there.logits, lag.behaviour, there.gamma
        truth = reference.kl_gradient(*given)
        for place, moments_of in PLACES.items():
            for estimate in reference.SLOPES:
                name = f"{estimate}_{place}"
                found = moments_of(*given, estimate)
                known = {BIAS: norm(found.mean - truth) / norm(truth), TRACE: found.trace}
                common = {"estimator": name, "lag": x, "kl": reference.kl(*given)}
                common["warning"] = None if name == "k1_reward" else "biased"
                rows += [{**common, "quantity": q, "exact": value} for q, value in known.items()]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    ends = {"near": float(distances[0]), "far": float(distances[-1])}
    summary = {
        name: {
            f"{quantity}_{end}": where(rows, estimator=name, lag=x, quantity=quantity)[0]["exact"]
            for quantity in (BIAS, TRACE)
            for end, x in ends.items()
        }
        for name in names
    }
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, names, lag.world.name))


def _draw(figure, rows, names, world):
    axes = panels(figure, 2)
    shown = (
        (BIAS, f"Bias against ∇KL, {world}", "|E g − ∇KL| / |∇KL|"),
        (TRACE, f"Variance, {world}", "tr Cov, one trajectory"),
    )
    for axis, (quantity, title, unit) in zip(axes, shown, strict=True):
        for index, name in enumerate(names):
            mine = where(rows, estimator=name, quantity=quantity)
            # What is 0 to rounding has no place on a logarithmic axis.
            mine = [row for row in mine if row["exact"] > 1e-12]
            draw_exact(axis, mine, "lag", index, name.replace("_", ", "))
        axis.set_xscale("log")
        axis.set_yscale("log")
        label(axis, title, "lag: reference + lag × step", unit, legend=False)
    legend(figure)


EXPERIMENTS = {
    "reference": Experiment(
        "which gradient the KL estimates k1, k2, k3 have, as a penalty and in the reward",
        estimates,
        Settings(),
        Settings(quick=True),
        ignores=("estimators", "repeats", "trajectories", "seed"),
    ),
}
