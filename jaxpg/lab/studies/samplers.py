"""Samplers: data of a policy that is not the trainer's, because it is older or less precise."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.estimators import Estimator, importance
from jaxpg.lab import exact
from jaxpg.lab.exact import Moments, enumeration
from jaxpg.lab.measure.emulation import ROUNDINGS, emulated
from jaxpg.lab.measure.samples import log_probs, roll
from jaxpg.lab.studies.estimators import form, gradient
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.importance import REFERENCE, distance
from jaxpg.lab.studies.lags import lag_of
from jaxpg.lab.studies.measured import Measured, need_effective
from jaxpg.lab.studies.pairs import square
from jaxpg.lab.studies.precision import HIDDEN, TRAINED, sharpened, wide
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.sampling import group_size, measurer, source_of
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    compared,
    key_of,
    stated_row,
    tidy,
)
from jaxpg.lab.worlds.world import Table, World
from jaxpg.policies import Network, mlp
from jaxpg.stats.figures import caption, label, legend, panels
from jaxpg.stats.intervals import Estimate
from jaxpg.stats.moments import GROUPS, SampleMoments, jackknife
from jaxpg.stats.words import words
from jaxpg.types import Array

CEILING = 2.0
CHOICES = {
    "none": importance.on_policy,
    "token": importance.one_step,
    "token_capped": importance.capped(importance.one_step, CEILING),
    "token_dropped": importance.dropped_above(importance.one_step, CEILING),
    "sequence": importance.trajectory,
    "sequence_capped": importance.capped(importance.trajectory, CEILING),
    "sequence_dropped": importance.dropped_above(importance.trajectory, CEILING),
}
LAGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CHIPS = ("tf32", "bf16")  # the roundings of a sampler; the trainer's is float32
MOST = 20_000  # trajectories that are listed
BIAS, TRACE, SHARE = "squared_bias", "trace", "effective_share"


class Pair(NamedTuple):
    """A world whose data another policy samples, and how the two differ."""

    world: World
    sampler: str  # "older", or the rounding of its products
    lag: float | None


def stale_sampler(settings: Settings, progress: Progress) -> Result:
    """Bias, variance and effective share of the importance choices, by the sampler's age and precision.

    The effective share is (sum w)^2 / (n sum w^2) over steps, with the weights w of the choice. Only the
    weights of whole sequences correct which states the sampler visits, and its later rewards.
    """
    lag = lag_of(settings)
    lags = LAGS[::2] if settings.quick else LAGS
    rows = _rows([Pair(lag.at(x), "older", x) for x in lags], settings, progress)
    for pair in _rounded(lag.world, settings):
        rows += _rows([pair], settings, progress)
    summary: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["lag"] in (None, lags[-1]):
            here = summary.setdefault(f"{row['sampler']}", {})
            here[f"{row['estimator']} {row['quantity']}"] = stated_row(row)
    quantity = BIAS if lag.world.is_tabular else REFERENCE
    draw = partial(_draw, rows=rows, world=lag.world.name, quantity=quantity)
    return Result(tidy(rows), summary, draw)


def _form(name: str, world: World) -> Form:
    slot = CHOICES[name]
    if world.gamma != 1.0:
        slot = importance.from_start(slot)
    warning = "" if name == "sequence" else "biased"
    return Form(
        name, Estimator(importance=slot), world.hyperparams, None, off_policy=True, warning=warning
    )


# Samplers.


def _rounded(world: World, settings: Settings) -> list[Pair]:
    """The world's own network, or one like a trained one, with data of itself at a lower precision."""
    if not world.is_tabular:
        if jax.tree.leaves(world.policy.initial_carry(1)):
            return []  # the products of a recursion cannot be rounded here
        return [_measured_rounding(world, name) for name in CHIPS]
    seen = jnp.arange(int(np.max(world.mdp.observation)) + 1)[None]
    network = mlp(world.env.observation, world.env.action, HIDDEN)
    params = network.init(jax.random.fold_in(key_of(settings), 3))
    if world.logits.shape[1] == 2:
        params = sharpened(network, params, seen, TRAINED)

    def table(network) -> np.ndarray:
        apply = jax.jit(network.apply)
        logits = apply(params, (), seen, jnp.zeros(seen.shape, bool))[1].logits[0]
        return np.asarray(logits, np.float64)

    return [
        Pair(
            world._replace(
                exact=Table(world.mdp, table(network), table(emulated(network, ROUNDINGS[name])))
            ),
            name,
            None,
        )
        for name in CHIPS
    ]


def _measured_rounding(world: World, name: str) -> Pair:
    network = either(world.policy, emulated(world.policy, ROUNDINGS[name]))
    own, other = ({"params": world.params, "other": x} for x in (jnp.zeros(()), jnp.ones(())))
    there = world._replace(policy=network, params=own, behaviour_params=other)
    return Pair(there, name, None)


def either(network: Network, other: Network) -> Network:
    """One of two networks with the same parameters: the other where params["other"] is above 0."""

    def apply(params, carry, obs, first):
        one, two = (x.apply(params["params"], carry, obs, first) for x in (network, other))
        return jax.tree.map(lambda a, b: jnp.where(params["other"] > 0, b, a), one, two)

    return network._replace(apply=apply, observe=None)


# What the choices do with the data.


def _rows(pairs: list[Pair], settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Rows of several samplers of one network."""
    first = pairs[-1].world
    forms = [_form(name, first) for name in CHOICES]
    # Exact answers are enough for samplers that differ by rounding, which no sample resolves.
    samples = pairs[0].lag is not None or not first.is_tabular
    aim = None if first.is_tabular else form("rtg", first)
    gradients = shares = None
    if samples:
        every = forms if aim is None else [*forms, aim]
        gradients = measurer(first, every, settings.trajectories, (1,), progress)
        shares = _share_measurer(first, forms, settings)
    rows: list[dict[str, Any]] = []
    for there, sampler, lag in pairs:
        found = gradients(key_of(settings), there.params) if gradients else {}
        effective = shares(there.params) if shares else {}
        known = exactly(there, forms) if there.is_tabular else {}
        for each in forms:
            moments, share = known.get(each.name, (None, None))
            values, seen = {TRACE: moments and moments.trace, SHARE: share}, {}
            common: dict[str, Any] = {"estimator": each.name, "sampler": sampler, "lag": lag}
            if moments is not None:
                values[BIAS] = square(moments.mean - gradient(there))
                common["warning"] = "biased" if values[BIAS] else None
            elif lag != 0.0:
                common["warning"] = each.warning or None
            if each.name in found:
                one: Measured = found[each.name]
                need_effective(one, f"{each.name}, {sampler}")
                common |= one.counts
                seen = {TRACE: one.trace(), SHARE: effective[each.name]}
                if aim is None:
                    seen[BIAS] = one.bias(gradient(there))
                else:
                    values[REFERENCE], seen[REFERENCE] = None, distance(one, found[aim.name])
            rows += compared(values, seen, **common)
    return rows


def exactly(world: World, forms: list[Form]) -> dict[str, tuple[Moments, float | None]]:
    """The moments of each form, and its effective share, over all trajectories; fewer where they are many."""
    if enumeration.count_trajectories(world.mdp) > MOST:
        return {
            each.name: (
                exact.moments(
                    world.mdp,
                    world.logits,
                    each.sampled,
                    each.hyperparams,
                    world.table.behaviour_logits,
                ),
                None,
            )
            for each in forms
            if each.name not in ("sequence_capped", "sequence_dropped")
        }
    with wide():
        return _listed(world, forms)


def _listed(world, forms):
    mdp, behaviour = world.mdp, world.table.behaviour_logits
    found = enumeration.enumerate_trajectories(mdp, behaviour, reference_logits=world.logits)
    given, answers = found.trajectory, {}
    log_ratio = given.reference - given.log_prob
    for each in forms:
        moments = enumeration.moments(mdp, world.logits, each.sampled, each.hyperparams, behaviour)
        sums = _sums(CHOICES[each.name](log_ratio, given, each.hyperparams).step, given.mask)
        answers[each.name] = moments, float(_share(np.asarray(sums) @ found.probability))
    return answers


def _sums(weight, mask) -> Array:
    """The sums over steps of 1, w and w^2 of each trajectory: [3, N]."""
    terms = jnp.stack([jnp.ones_like(weight), weight, weight**2])
    return jnp.where(mask[None], terms, 0.0).sum(axis=1)


def _share(sums):
    count, first, second = sums
    return first**2 / (count * second)


def _share_measurer(world: World, forms: list[Form], settings: Settings):
    """params -> the effective share of each form, with its interval."""
    per_group = group_size(settings.trajectories, 1)

    @jax.jit
    def group(params, start):
        source = source_of(world._replace(params=params), forms[0], key_of(settings))
        given = roll(source, start, per_group)
        log_prob = log_probs(source, given)(params)
        log_ratio = jnp.where(given.mask, log_prob - given.log_prob, 0.0)
        slots = [CHOICES[each.name](log_ratio, given, each.hyperparams) for each in forms]
        return jnp.stack([_sums(weights.step, given.mask).mean(axis=1) for weights in slots])

    def run(params) -> dict[str, Estimate]:
        groups = [np.asarray(group(params, g * per_group), np.float64) for g in range(GROUPS)]
        sums = np.stack(groups, axis=1)  # [forms, GROUPS, 3]
        return {
            each.name: jackknife(
                lambda m: _share(m.mean), SampleMoments(np.ones(GROUPS), x, np.zeros_like(x))
            )
            for each, x in zip(forms, sums, strict=True)
        }

    return run


def _draw(figure, rows, world, quantity):
    axes = panels(figure, 4, across=2, height=1.8)
    known = quantity == BIAS
    older, chips = (
        [row for row in rows if (row["lag"] is None) == rounded] for rounded in (False, True)
    )
    lags = "lag: sampler + lag × step"
    shown = (
        (quantity, "Squared bias" if known else "Distance to the on-policy mean",
         "|E g − ∇J|²" if known else "|E g − E g on-policy|²"),
        (TRACE, "Variance", "tr Cov, one trajectory"),
        (SHARE, "Effective share of the steps", "(Σ w)² / (n Σ w²)"),
    )  # fmt: skip
    for axis, (name, title, unit) in zip(axes, shown, strict=False):
        for index, choice in enumerate(CHOICES):
            mine = where(older, estimator=choice, quantity=name)
            draw_exact(axis, mine, "lag", index, words(choice))
            draw_measured(axis, mine, "lag", index, words(choice))
        label(axis, f"{title}, {world}", lags, unit, legend=False)
    axes[1].set_yscale("log")
    for index, choice in enumerate(CHOICES):
        mine = where(chips, estimator=choice, quantity=quantity)
        mine = [row | {"place": CHIPS.index(row["sampler"])} for row in mine]
        draw_exact(axes[3], mine, "place", index, words(choice))
        draw_measured(axes[3], mine, "place", index, words(choice))
    if known:
        axes[3].set_yscale("log")
    axes[3].set_xticks(range(len(CHIPS)), CHIPS)
    label(axes[3], f"{shown[0][1]}, {world}", "products of the sampler", shown[0][2], legend=False)
    legend(figure)
    caption(figure)


EXPERIMENTS = {
    "stale-sampler": Experiment(
        "weights for a sampler that is older or less precise: bias, variance, effective share",
        stale_sampler,
        Settings(trajectories=2**18),
        Settings(trajectories=2**14, quick=True),
        ignores=("estimators", "repeats"),
    ),
}
