"""Advantages: bias against variance of generalised advantages, and the best lambda for a batch."""

import jax
import numpy as np

from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.forms import lambda_form
from jaxpg.lab.studies.importance import REFERENCE, distance
from jaxpg.lab.studies.pairs import square
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    compared,
    estimated,
    key_of,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import lifted
from jaxpg.policies import actor_critic, init_params
from jaxpg.stats.figures import COLOURS, caption, label, line, panels, symmetric_logarithms

QUALITY, OFFSET = 0.5, 0.3  # of the critic V̂ = quality V + offset
BATCHES = (1, 10, 100, 1_000, 10_000, 100_000)
SMALL = 200  # steps times states of a table whose exact curve takes no time


def gae(settings: Settings, progress: Progress) -> Result:
    """Squared bias + tr Cov / N of generalised advantages against lambda, for a wrong critic.

    The critic is 0.5 V + 0.3. The best lambda grows with N, because only the variance falls with it.
    """
    world = world_of(settings)
    chosen = [0.0, 0.5, 0.9, 1.0] if settings.quick else [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0]
    if settings.checkpoint is not None:
        chosen = sorted({*chosen, float(world.hyperparams.lambda_)})
    if not world.is_tabular:
        return _gae_measured(world, chosen, settings, progress)
    truth, aim = gradient(world), lifted(world, gradient(world))
    size = world.mdp.horizon * len(world.mdp.initial)
    # By the size of the table, not by the clock: the same rows on every machine.
    grid = np.union1d(np.linspace(0.0, 1.0, 101 if size <= SMALL else 11).round(2), chosen)
    progress(f"exact moments at {len(grid)} values of lambda")
    curve = [lambda_form(world, float(x), QUALITY, OFFSET).exact() for x in grid]  # type: ignore[misc]
    trace = np.array([m.trace for m in curve])
    bias = np.array([square(m.mean - truth) for m in curve])
    forms = {x: lambda_form(world, x, QUALITY, OFFSET) for x in chosen}
    found = measure(
        world, list(forms.values()), key_of(settings), settings.trajectories, (1,), progress
    )
    rows = []
    for x, b, v in zip(grid, bias, trace, strict=True):
        common = {"estimator": "gae", "lambda": float(x)}
        common["warning"] = None if x == 1.0 else "biased where the critic is wrong"
        seen = {}
        if x in forms:
            measured = found[forms[x].name]
            common |= measured.counts
            seen = {"squared_bias": measured.bias(aim), "trace": measured.trace()}
        rows += compared({"squared_bias": float(b), "trace": float(v)}, seen, **common)
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
    """Measure the trace and the distance to the mean of rewards to go, with the world's or a new critic."""
    kind = "trained" if world.critic is not None else "untrained"
    if world.critic is None:
        agent = actor_critic(world.env, settings.policy or "mlp")
        params = init_params(agent, jax.random.fold_in(key_of(settings), 1)).critic
        world = world._replace(critic=agent.critic, critic_params=params)
    aim, forms = form("rtg", world), {x: lambda_form(world, x) for x in chosen}
    key = key_of(settings)
    found = measure(world, [aim, *forms.values()], key, settings.trajectories, (1,), progress)
    rows = []
    for x, each in forms.items():
        seen = found[each.name]
        values = {REFERENCE: distance(seen, found[aim.name]), "trace": seen.trace()}
        common = {"estimator": "gae", "lambda": x, "warning": each.warning or None, **seen.counts}
        rows += [estimated(value, quantity=name, **common) for name, value in values.items()]
    summary = {"critic": kind, "horizon": world.env.horizon}
    return Result(tidy(rows), summary, lambda figure: _draw_gae_measured(figure, rows, world))


def _draw_gae_measured(figure, rows, world):
    axes = panels(figure, 2)
    for index, (axis, name, title) in enumerate(
        zip(axes, ("trace", REFERENCE), ("tr Cov", "|E g − E g of rewards to go|²"), strict=True)
    ):
        draw_measured(axis, where(rows, quantity=name), "lambda", index)
        label(axis, f"Generalised advantages, {world.name}", "λ", f"{title}, one trajectory",
              legend=False)  # fmt: skip


def _draw_gae(figure, grid, bias, trace, rows, world):
    axes = panels(figure, 2)
    for index, (name, text) in enumerate((("squared_bias", "squared bias"), ("trace", "tr Cov"))):
        mine = where(rows, quantity=name)
        draw_exact(axes[0], mine, "lambda", index, text)
        draw_measured(axes[0], mine, "lambda", index, text)
    symmetric_logarithms(axes[0], 1e-3)
    label(axes[0], f"Bias falls and variance rises with λ, {world.name}", "λ",
          "squared gradient, one trajectory")  # fmt: skip
    for index, n in enumerate((1, 100, 1_000, 10_000, 100_000)):
        total = bias + trace / n
        line(axes[1], grid, total, index, f"N = {n:,}")
        i = int(np.argmin(total))
        axes[1].plot(grid[i], total[i], "o", color=COLOURS[index])
    axes[1].set_yscale("log")
    label(axes[1], "Mean squared error of a batch; dots mark the best λ", "λ",
          "squared bias + tr Cov / N")  # fmt: skip
    caption(figure)


EXPERIMENTS = {
    "gae": Experiment(
        "bias against variance of generalised advantages over lambda, and the best lambda per batch",
        gae,
        Settings(trajectories=2**18),
        Settings(trajectories=2**15, quick=True),
        ignores=("estimators", "repeats"),
    ),
}
