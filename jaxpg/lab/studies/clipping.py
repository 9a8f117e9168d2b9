"""Clipping: the clipped surrogate against the unclipped one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.estimators import Estimator, credit, surrogates
from jaxpg.lab import exact
from jaxpg.lab.exact.tables import softmax
from jaxpg.lab.measure.samples import roll
from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.forms import Form, known_advantage, value_tables_of_actions
from jaxpg.lab.studies.importance import lag_rows, measured_lags, measured_result
from jaxpg.lab.studies.lags import PILOT, Lag, lag_of
from jaxpg.lab.studies.rows import draw_measured, where
from jaxpg.lab.studies.sampling import source_of
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, key_of, tidy
from jaxpg.lab.worlds.world import World
from jaxpg.stats.figures import caption, label, legend, line, panels
from jaxpg.stats.words import words
from jaxpg.types import Hyperparams

MOST_JUMPS = 48


def clipping(settings: Settings, progress: Progress) -> Result:
    """Bias and variance of the clipped against the unclipped surrogate, with known advantages.

    Clipping stops steps outside 1 +- eps (Schulman et al., 2017): it bounds the variance and adds bias,
    because it cuts the steps that have moved furthest, not the tail of the noise.
    """
    lag = lag_of(settings)
    numbers = lag.world.hyperparams
    epsilons = (None, *sorted({0.1, 0.2, 0.3, float(numbers.clip_eps)}))
    lags = (0.5, 1.0, 1.5) if settings.quick else (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    if not lag.world.is_tabular:
        if settings.quick:  # few trajectories would still count at the largest lag
            lags = lags[:-1]
        centred = _centred_returns(lag, settings)
        forms = [_clipped(centred, epsilon, numbers) for epsilon in epsilons]
        return measured_result(lag, forms, lags, settings, progress)
    jumps = _jumps(lag, epsilons)
    grid = sorted({*np.linspace(0.0, 1.5, 31).round(3).tolist(), *lags, *jumps})
    advantages = known_advantage(value_tables_of_actions(lag.world, lag.behaviour))
    forms = [_clipped(advantages, epsilon, numbers) for epsilon in epsilons]
    found = measured_lags(lag, forms, lags, settings, progress)
    rows = []
    for x in grid:
        there = lag.at(x)
        for epsilon, each in zip(epsilons, forms, strict=True):
            policies = there.logits, lag.behaviour
            moments = exact.surrogate_moments(
                there.mdp, *policies, there.gamma, clip_eps=epsilon, from_start=False
            )
            share = {"fraction_clipped": _fraction(lag, there, epsilon)}
            measured = found[x][each.name] if x in lags else None
            rows += lag_rows(each.name, x, moments, gradient(there), measured, **share)
    names = [each.name for each in forms]
    summary = {}
    for name in names:
        for x in lags:
            bias, trace = where(rows, estimator=name, lag=x)
            summary[f"{name} at lag {x:g}"] = {
                "bias": bias["exact"] ** 0.5,
                "trace": trace["exact"],
                "fraction_clipped": trace["fraction_clipped"],
            }
    return Result(
        tidy(rows), summary, lambda figure: _draw_clipping(figure, rows, names, lag.world.name)
    )


def _centred_returns(lag: Lag, settings):
    """A credit: reward to go minus its mean at each step, from separate episodes of the behaviour."""
    world, key = lag.at(0.0), jax.random.fold_in(key_of(settings), 2)
    source = source_of(world, form("rtg", world), key)
    trajectory = jax.jit(partial(roll, source, 0, PILOT))()
    hyperparams = world.hyperparams
    psi = credit.reward_to_go(jnp.ones(trajectory.mask.shape), trajectory, hyperparams)
    # An ended episode has no reward to go, and does not count.
    alive = np.asarray(trajectory.mask)
    mean = np.where(alive, psi, 0.0).sum(axis=1) / np.maximum(alive.sum(axis=1), 1)

    def centred(trace, trajectory, hyperparams):
        return credit.reward_to_go(trace, trajectory, hyperparams) - mean[:, None]

    return centred


def _clipped(advantages, epsilon, numbers: Hyperparams) -> Form:
    surrogate = surrogates.ratio if epsilon is None else surrogates.clipped
    hyperparams = numbers._replace(clip_eps=1e9 if epsilon is None else epsilon)
    name = "unclipped" if epsilon is None else f"clipped_{epsilon:g}"
    estimator = Estimator(advantages, surrogate=surrogate)
    return Form(name, estimator, hyperparams, None, off_policy=True)


def _jumps(lag: Lag, epsilons) -> list[float]:
    """The lags on both sides of every step of the curves, where clipping begins to stop an action.

    None in a world where actions are stopped one after the other at too many lags to see steps.
    """
    observation = np.asarray(lag.world.mdp.observation)
    fine = np.linspace(0.0, 1.5, 1501).round(3)
    policies = [softmax(lag.behaviour + x * lag.step)[observation] for x in fine]
    ratio = np.stack(policies) / policies[0]
    advantage = value_tables_of_actions(lag.world, lag.behaviour)[:, observation]
    up, down = (advantage > 0).any(axis=0), (advantage < 0).any(axis=0)
    found: set[float] = set()
    for each in filter(None, epsilons):
        stopped = ((ratio > 1 + each) & up) | ((ratio < 1 - each) & down)
        changed = np.flatnonzero((stopped[1:] != stopped[:-1]).any(axis=(1, 2)))
        found |= {*fine[changed].tolist(), *fine[changed + 1].tolist()}
    return sorted(found) if len(found) <= MOST_JUMPS else []


def _fraction(lag: Lag, there: World, epsilon) -> float:
    """The share of the behaviour's steps where clipping stops the gradient."""
    if epsilon is None:
        return 0.0
    observation = np.asarray(there.mdp.observation)
    behaviour, target = (softmax(x)[observation] for x in (lag.behaviour, there.logits))
    advantage = value_tables_of_actions(lag.world, lag.behaviour)[:, observation]
    ratio = target / behaviour
    stopped = np.where(advantage > 0, ratio > 1 + epsilon, (advantage < 0) & (ratio < 1 - epsilon))
    alive = exact.occupancy(there.mdp, lag.behaviour) * ~np.asarray(there.mdp.terminal, bool)
    return float(np.einsum("ts,sa,tsa->", alive, behaviour, stopped) / alive.sum())


def _draw_clipping(figure, rows, names, world):
    axes = panels(figure, 3)
    columns = (
        ("squared_bias", "Squared bias", "|E g − ∇J|²", "exact"),
        ("trace", "Variance", "tr Cov, one trajectory", "exact"),
        ("trace", "Steps that clipping stops", "fraction of steps", "fraction_clipped"),
    )
    caption(figure)
    for axis, (quantity, text, unit, field) in zip(axes, columns, strict=True):
        for index, name in enumerate(names):
            mine = where(rows, estimator=name, quantity=quantity)
            line(axis, [r["lag"] for r in mine], [r[field] for r in mine], index, words(name))
            if field == "exact":
                draw_measured(axis, mine, "lag", index, words(name))
        label(axis, f"{text}, {world}", "lag: behaviour + lag × step", unit, legend=False)
    legend(figure)


EXPERIMENTS = {
    "clipping": Experiment(
        "the clipped surrogate against the unclipped one: bias, variance, steps stopped",
        clipping,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("estimators", "repeats"),
    ),
}
