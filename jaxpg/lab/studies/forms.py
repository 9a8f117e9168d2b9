"""Forms: how each kind of estimator is built in a world, and its exact moments."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpg.estimators import Estimator, Slot, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.lab.exact import Moments, lqr
from jaxpg.lab.exact.baselines import controlled, minimisers, projections
from jaxpg.lab.exact.compose import composed
from jaxpg.lab.measure.samples import couples
from jaxpg.lab.worlds import regulators
from jaxpg.lab.worlds.world import World, coordinates, step_table, tables
from jaxpg.policies import Network
from jaxpg.types import Array, Hyperparams, Params, Trajectory

TO_GO, TOTAL, LAMBDA = credit.reward_to_go, credit.total_return, credit.lambda_return
Make = Callable[[World], dict[str, Any]]  # the fields of a Form


class Form(NamedTuple):
    """An estimator in a world: slots to sample it with, or only its exact moments, or both."""

    name: str
    estimator: Estimator | None  # None: cannot be computed from data
    hyperparams: Hyperparams
    exact: Callable[[], Moments] | None  # of one trajectory, in worlds.coordinates; None: unknown
    critic: Network | None = None
    critic_params: Params = ()
    off_policy: bool = False
    warning: str = ""  # why its mean is not the gradient of J

    @property
    def sampled(self) -> Estimator:
        """The slots. Raises ValueError for a form that cannot be sampled."""
        if self.estimator is None:
            raise ValueError(f"{self.name} has only exact moments and cannot be sampled")
        return self.estimator

    def moments(self) -> Moments:
        """The moments of one trajectory, in worlds.coordinates. Raises ValueError where they are unknown."""
        if self.exact is None:
            raise ValueError(f"the exact moments of {self.name} are unknown here")
        return self.exact()


def value_tables(world: World) -> tuple[np.ndarray, np.ndarray]:
    """V_t(o) [H, O], the best values given what the policy sees, and the same by state [H, S]."""
    by_state, _ = exact.observation_values(world.mdp, world.logits, world.gamma)
    return by_observation(world, by_state), by_state


def by_observation(world: World, by_state: np.ndarray) -> np.ndarray:
    """The table [H, O, ...] of one [H, S, ...] that is equal for states that look alike."""
    observation = np.asarray(world.mdp.observation)
    table = np.zeros((len(by_state), observation.max() + 1, *by_state.shape[2:]))
    table[:, observation] = by_state
    return table


def value_tables_of_actions(world: World, logits: np.ndarray) -> np.ndarray:
    """A_t(o, a) = Q - V [H, O, A] of a tabular policy, means over the states that look alike."""
    value, action_value = exact.observation_values(world.mdp, logits, world.gamma)
    return by_observation(world, action_value - value[:, :, None])


def known_advantage(table: np.ndarray) -> Slot:
    """psi_t = table[step, observation, action] of [H, O, A]: a credit that data alone cannot give."""
    return Slot(_known_advantage, "known_advantage", (table,))


def _known_advantage(table, trace: Array, trajectory: Trajectory, hyperparams) -> Array:
    del hyperparams
    step = jnp.minimum(jnp.arange(trace.shape[0]), len(table) - 1)
    row = jnp.broadcast_to(step[:, None], trace.shape)
    return jnp.asarray(table, trace.dtype)[row, trajectory.obs, trajectory.action]


def lambda_form(world: World, lambda_: float, quality: float = 1.0, offset: float = 0.0) -> Form:
    """Generalised advantages with the critic quality V + offset, V exact (or the world's own critic)."""
    estimator = Estimator(LAMBDA, baselines.critic, _start(world, importance.on_policy))
    hyperparams = world.hyperparams._replace(lambda_=lambda_)
    name = f"gae_{lambda_:g}"
    exact_critic = world.is_regulator
    biased = "" if lambda_ == 1.0 or exact_critic else "biased where the critic is wrong"
    if not world.is_tabular:
        return Form(name, estimator, hyperparams, None, world.critic, world.critic_params,
                    warning=biased)  # fmt: skip
    table, by_state = (quality * each + offset for each in value_tables(world))
    aliased = len(np.unique(world.mdp.observation)) < len(world.mdp.initial)
    exact_critic = (quality, offset) == (1.0, 0.0) and not aliased
    found = Form(name, estimator, hyperparams, None, step_table(table.shape[1]),
                 {"value": jnp.asarray(table, jnp.result_type(float))},
                 warning="" if exact_critic else biased)  # fmt: skip
    return found._replace(exact=recursion(world, found, by_state))


def _start(world: World, slot):
    """gamma^t, which makes reward-to-go the exact gradient of the discounted return."""
    return slot if world.gamma == 1.0 else importance.from_start(slot)


def recursion(world: World, found: Form, critic=None) -> Callable[[], Moments] | None:
    estimator = found.sampled
    if couples(estimator):
        return None
    if world.is_regulator:
        return partial(_regulated, world, found)
    if critic is None and found.critic is not None:
        return None

    @cache
    def moments() -> Moments:
        if not found.off_policy:
            return composed(tables(world), estimator, found.hyperparams, critic)
        table = exact.moments(
            world.mdp, world.logits, estimator, found.hyperparams, world.table.behaviour_logits
        )
        return coordinates(world, table)

    return moments


def _regulated(world: World, found: Form) -> Moments:
    """Moments of the gradient in the parameters of a regulator's policy."""
    numbers, own = _regulator_params(world)
    mean, covariance = lqr.moments(world.regulator, numbers, found.sampled, found.hyperparams)
    return Moments(mean[own], covariance[np.ix_(own, own)])


def regulator_gradient(world: World) -> np.ndarray:
    """The exact gradient of J in the parameters of a regulator's policy."""
    numbers, own = _regulator_params(world)
    return lqr.gradient(world.regulator, numbers, world.gamma)[own]


def regulator_hessian(world: World) -> np.ndarray:
    """The exact Hessian of J in the parameters of a regulator's policy."""
    numbers, own = _regulator_params(world)
    return lqr.hessian(world.regulator, numbers, world.gamma)[np.ix_(own, own)]


def _regulator_params(world: World) -> tuple[np.ndarray, list[int]]:
    """(k, log sigma, m), and which of them are parameters, in the order of the flattened ones."""
    numbers = np.asarray(regulators.coefficients(world.policy, world.params), np.float64)
    return numbers, [regulators.PARAMS.index(name) for name in sorted(world.params)]


def slots(credit_, baseline: baselines.Baseline = baselines.none, **rest) -> Make:
    """A form with a baseline that needs neither tables nor a critic."""

    def make(world):
        start = importance.on_policy if credit_ is TOTAL else _start(world, importance.on_policy)
        return {"estimator": Estimator(credit_, baseline, start), **rest}

    return make


def known(credit_, baseline_of) -> Make:
    """A form with a baseline computed from the tables: a number, or a table [H, S or 1]."""

    def make(world):
        baseline = np.asarray(baseline_of(world))
        if baseline.ndim:
            shape = (world.mdp.horizon, len(world.mdp.initial))
            table = by_observation(world, np.broadcast_to(baseline, shape))
            return slots(credit_, baselines.tabulated(table))(world)
        return slots(credit_, baselines.constant(float(baseline)))(world)

    return make


def best(credit_, field) -> Callable[[World], np.ndarray]:
    def baseline(world):
        best = getattr(minimisers(tables(world), credit_, world.gamma), field)
        return best[:, None] if field == "per_time" else best

    return baseline


def best_seen(world):
    """b_t(o): the same two sums as for b_t(s), taken over the states that look alike."""
    covariance, variance, _ = projections(tables(world), False, world.gamma)
    seen = np.eye(world.mdp.observation.max() + 1)[world.mdp.observation]
    numerator, denominator = (x.sum(axis=2) @ seen for x in (covariance, variance))
    met = denominator > 0
    best = np.where(met, numerator / np.where(met, denominator, 1.0), 0.0)
    return slots(TO_GO, baselines.tabulated(best))(world)


def objective_value(world):
    return exact.objective(world.mdp, world.logits, world.gamma)


def mean_to_go(world):
    value, _ = exact.values(world.mdp, world.logits, world.gamma)
    return (exact.occupancy(world.mdp, world.logits) * value[:-1]).sum(axis=1)[:, None]


def control_variate(credit_, field) -> Make:
    """A baseline per parameter, which no slot can subtract, so only its exact moments are known."""

    def make(world):
        def moments():
            found = tables(world)
            best = minimisers(found, credit_, world.gamma)
            return controlled(found, credit_, world.gamma, getattr(best, field))

        return {"exact": cache(moments)}

    return make


def value_baseline(world):
    if not world.is_tabular:
        return {"estimator": Estimator(TO_GO, baselines.critic, _start(world, importance.on_policy)),
                "critic": world.critic, "critic_params": world.critic_params}  # fmt: skip
    return slots(TO_GO, baselines.tabulated(value_tables(world)[0]))(world)


def exact_advantage(world):
    def moments():
        place = world.mdp, world.logits, world.gamma
        value, action_value = exact.observation_values(*place)
        b = value[:, :, None]
        found = exact.advantage_moments(*place, baseline=b, action_value=action_value)
        return coordinates(world, found)

    start = _start(world, importance.on_policy)
    table = known_advantage(value_tables_of_actions(world, world.logits))
    return {"estimator": Estimator(table, importance=start), "exact": cache(moments)}


def all_action(world):
    def moments():
        place = world.mdp, world.logits, world.gamma
        _, action_value = exact.observation_values(*place)
        return coordinates(world, exact.all_action_moments(*place, action_value))

    return {"exact": cache(moments)}


def off_policy_form(credit_, slot, warning="") -> Make:
    def make(world):
        start = slot if credit_ is TOTAL else _start(world, slot)
        estimator = Estimator(credit_, baselines.none, start)
        return {"estimator": estimator, "off_policy": True, "warning": warning}

    return make


def named_moments(function, warning) -> Make:
    def make(world):
        def moments():
            found = function(world.mdp, world.logits, world.table.behaviour_logits, world.gamma)
            return coordinates(world, found)

        return {"exact": cache(moments), "off_policy": True, "warning": warning}

    return make
