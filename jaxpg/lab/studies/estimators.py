"""The named estimators, with their credits, baselines and weights."""

import difflib
from typing import NamedTuple

import numpy as np

from jaxpg.estimators import baselines, importance
from jaxpg.lab import exact
from jaxpg.lab.exact import Moments
from jaxpg.lab.measure.samples import couples
from jaxpg.lab.studies.forms import (
    TO_GO,
    TOTAL,
    Form,
    Make,
    all_action,
    best,
    best_seen,
    control_variate,
    exact_advantage,
    known,
    lambda_form,
    mean_to_go,
    named_moments,
    objective_value,
    off_policy_form,
    recursion,
    regulator_gradient,
    slots,
    value_baseline,
)
from jaxpg.lab.worlds.world import World, coordinates, has_exact, lifted


class Named(NamedTuple):
    summary: str
    make: Make
    needs: str = ""  # "tables", "behaviour" or "critic"


def form(name: str, world: World) -> Form:
    """The named estimator in a world.

    `gae_X` takes any lambda X. Raises ValueError for an unknown name (with near matches) and for one that
    needs tables, a critic or a behaviour policy that the world does not have.
    """
    named = _find(name)
    if not _available(named, world):
        raise ValueError(
            f"{name} needs {_NEEDS[named.needs]}, which {world.name} does not have; these can be measured "
            f"there: {', '.join(available(world))}"
        )
    fields = {"hyperparams": world.hyperparams, "exact": None, "estimator": None}
    fields |= named.make(world)
    estimator = fields["estimator"]
    if estimator is not None and fields["exact"] is None and has_exact(world):
        fields["exact"] = recursion(world, Form(name, **fields))
    return Form(name, **fields)


def available(world: World) -> list[str]:
    """The names of the estimators that can be measured, or at least computed, in a world."""
    return [name for name, named in ESTIMATORS.items() if _available(named, world)]


def gradient(world: World) -> np.ndarray:
    """The exact gradient of J, in worlds.coordinates."""
    if world.is_regulator:
        return regulator_gradient(world)
    true = exact.gradient(world.mdp, world.logits, world.gamma)
    return coordinates(world, Moments(true, np.zeros((len(true), len(true))))).mean


def true_gradient(world: World) -> np.ndarray | None:
    """The exact gradient of J [P]; None where it is unknown."""
    return lifted(world, gradient(world)) if has_exact(world) else None


def coupled(found: Form) -> bool:
    """Whether a trajectory's gradient depends on the others of its batch."""
    return found.estimator is not None and couples(found.estimator)


def batch_moments(found: Form, world: World, num_trajectories: int) -> Moments | None:
    """Exact moments of the mean over N trajectories, in worlds.coordinates; None where unknown."""
    if found.exact is not None:
        mean, covariance = found.exact()
        return Moments(mean, covariance / num_trajectories)
    credits = {"total_mean": TOTAL, "total_own_mean": TOTAL, "rtg_time_mean": TO_GO}
    ends_early = world.is_tabular and np.any(world.mdp.terminal)
    if not world.is_tabular or found.name not in credits or (ends_early and "time" in found.name):
        return None
    credit_ = credits[found.name]
    mean, covariance = coordinates(
        world,
        exact.leave_one_out_moments(
            world.mdp, world.logits, credit_, world.gamma, num_trajectories
        ),
    )
    own = (num_trajectories - 1) / num_trajectories if found.name == "total_own_mean" else 1.0
    return Moments(own * mean, own**2 * covariance)


def _find(name: str) -> Named:
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    prefix, _, number = name.partition("_")
    if prefix == "gae":
        try:
            lambda_ = float(number)
        except ValueError:
            lambda_ = -1.0
        if not 0.0 <= lambda_ <= 1.0:
            raise ValueError(
                f"unknown estimator {name!r}; gae_X takes a lambda in [0, 1]: gae_0.95"
            )
        return _gae(lambda_)
    near = difflib.get_close_matches(name, ESTIMATORS, n=3, cutoff=0.4) or ESTIMATORS
    raise ValueError(f"unknown estimator {name!r}; did you mean {', '.join(near)}?")


def _gae(lambda_) -> Named:
    return Named(
        f"generalised advantages, lambda = {lambda_:g}",
        lambda world: {
            k: v for k, v in lambda_form(world, lambda_)._asdict().items() if k != "name"
        },
        needs="critic",
    )


def _available(named: Named, world: World) -> bool:
    return {
        "": True,
        "tables": world.is_tabular,
        "behaviour": world.behaviour_params is not None,
        "behaviour tables": world.is_tabular and world.table.behaviour_logits is not None,
        "critic": world.is_tabular or world.critic is not None,
    }[named.needs]


_NEEDS = {
    "tables": "exact answers",
    "behaviour": "a behaviour policy",
    "behaviour tables": "a behaviour policy and exact answers",
    "critic": "a critic (from --checkpoint) or exact values",
}
_LAGS = "biased: returns are still the behaviour's"

ESTIMATORS: dict[str, Named] = {
    "total": Named("total return, no baseline (Williams, 1992)", slots(TOTAL)),
    "total_mean": Named(
        "total return minus the mean of the others (Kool et al., 2019)",
        slots(TOTAL, baselines.leave_one_out),
    ),
    "total_own_mean": Named(
        "total return minus the mean of the batch, itself included",
        slots(TOTAL, baselines.batch_mean, warning="biased: (N-1)/N of the gradient"),
    ),
    "total_constant": Named("total return minus J", known(TOTAL, objective_value), "tables"),
    "total_optimal": Named(
        "total return minus the best constant (Greensmith et al., 2004)",
        known(TOTAL, best(TOTAL, "scalar")), "tables",
    ),
    "total_optimal_parameter": Named(
        "total return minus the best constant of each parameter (Williams, 1992)",
        control_variate(TOTAL, "per_parameter"), "tables",
    ),
    "rtg": Named("reward to go, no baseline", slots(TO_GO)),
    "rtg_constant": Named("reward to go minus J", known(TO_GO, objective_value), "tables"),
    "rtg_optimal": Named(
        "reward to go minus the best constant", known(TO_GO, best(TO_GO, "scalar")), "tables"
    ),
    "rtg_time_mean": Named(
        "reward to go minus the others' mean at the same step", slots(TO_GO, baselines.time_mean)
    ),
    "rtg_optimal_loo": Named(
        "reward to go minus the best constant, estimated from the others",
        slots(TO_GO, baselines.optimal_constant),
    ),
    "rtg_optimal_token": Named(
        "reward to go minus its mean at t, weighted by the scores so far (Li et al., 2026)",
        slots(TO_GO, baselines.optimal_token, warning="biased: its own trajectory is in the baseline"),
    ),
    "rtg_time": Named("reward to go minus its mean at t", known(TO_GO, mean_to_go), "tables"),
    "rtg_optimal_time": Named(
        "reward to go minus the best b_t", known(TO_GO, best(TO_GO, "per_time")), "tables"
    ),
    "rtg_peters_schaal": Named(
        "reward to go, baseline per step and parameter (Peters and Schaal, 2008)",
        control_variate(TO_GO, "peters_schaal"), "tables",
    ),
    "rtg_value": Named("reward to go minus V (Sutton et al., 2000)", value_baseline, "critic"),
    "rtg_optimal_state": Named(
        "reward to go minus the best b_t(s) of what is seen", best_seen, "tables"
    ),
    "gae_0.95": _gae(0.95),
    "gae_0.5": _gae(0.5),
    "gae_0": _gae(0.0),
    "exact_advantage": Named("the exact Q - V in place of returns", exact_advantage, "tables"),
    "all_action": Named("the exact Q of every action, not only the taken one", all_action, "tables"),
    "is_total": Named(
        "whole-episode weights on the total return", off_policy_form(TOTAL, importance.trajectory),
        "behaviour",
    ),
    "is_pdis": Named(
        "per-decision weights (Precup et al., 2000)", off_policy_form(TO_GO, importance.per_decision),
        "behaviour",
    ),
    "is_note_literal": Named(
        "per-decision weights that count the step's own ratio twice",
        named_moments(exact.note_literal_moments, "biased: counts the step's ratio twice"),
        "behaviour tables",
    ),
    "is_first_order": Named(
        "weights of the steps so far only", off_policy_form(TO_GO, importance.prefix, _LAGS), "behaviour"
    ),
    "is_marginal": Named(
        "weights of state and action marginals", named_moments(exact.marginal_moments, _LAGS),
        "behaviour tables",
    ),
    "is_step": Named(
        "the step's own weight, as in PPO and TRPO", off_policy_form(TO_GO, importance.one_step, _LAGS),
        "behaviour",
    ),
}  # fmt: skip
