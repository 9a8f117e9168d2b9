"""One equation: g = grad reduce_t [ surrogate(log pi(a_t|s_t), w_t (psi_t - b_t)) ], in five slots.

>>> mdp, numbers = jaxpg.lab.exact.bandits.bandit([0.0, 1.0]), Hyperparams()
>>> policy = jaxpg.policies.tabular(jaxpg.envs.Discrete(1), jaxpg.envs.Discrete(2))
>>> params = policy.init(None)
>>> trajectory = jaxpg.lab.enumeration.enumerate_trajectories(mdp, np.zeros((1, 2))).trajectory
>>> check_lanes(trajectory, trajectory.log_prob)
>>> batch = assess(Estimator(), masked(trajectory), trajectory.log_prob, numbers)
>>> gradient = jax.grad(lambda theta: objective(Estimator(), policy, theta, (), batch, numbers)[0])
>>> gradient(params)["logits"].tolist(), trajectory.action.tolist()
([[-0.25, 0.25]], [[0, 1]])
>>> weight = coefficients(Estimator(), trajectory.log_prob, batch, numbers)
>>> lane_gradients(policy, params, trajectory, weight).mean(axis=0).tolist()
[-0.25, 0.25]
>>> group_size_of(Estimator(baseline=jaxpg.estimators.groups.grouped(baselines.leave_one_out, 4)))
4
>>> estimator, scaled = rescaled(Estimator(surrogate=surrogates.standardised(surrogates.score)), batch)
>>> isinstance(scaled, Batch), scaled.advantage.tolist()
(True, [[-1.0, 1.0]])
"""

from functools import partial
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxpg.estimators import baselines, credit, importance, surrogates
from jaxpg.estimators.baselines import Baseline
from jaxpg.estimators.credit import Credit
from jaxpg.estimators.importance import Importance
from jaxpg.estimators.slot import Slot, facts_of
from jaxpg.estimators.surrogates import Reduce, Surrogate
from jaxpg.policies import Distribution, Network
from jaxpg.types import Array, Carry, Hyperparams, Params, Trajectory


class Estimator(NamedTuple):
    """Five independent choices; the defaults are the plainest unbiased ones."""

    credit: Credit = credit.reward_to_go
    baseline: Baseline = baselines.none
    importance: Importance = importance.on_policy
    surrogate: Surrogate = surrogates.score
    reduce: Reduce = surrogates.per_episode


class Batch(NamedTuple):
    """A trajectory and what else the objective needs, with gradients stopped."""

    trajectory: Trajectory
    advantage: Array  # [T, B] step weight times (psi - b)
    resolution: Array  # [T, B] the size that rounding may give an advantage of 0
    target: Array  # [T, B] psi, what a critic regresses on


def assess(
    estimator: Estimator,
    trajectory: Trajectory,
    log_prob: Array,
    hyperparams: Hyperparams,
    policy: Network | None = None,
    params: Params = None,
) -> Batch:
    """log-ratio -> importance -> credit -> baseline -> advantage; the one place that stops gradients.

    trajectory: zero where steps do not count, as rollouts return it; `masked` makes any other one so.
    log_prob: [T, B] under the policy to improve (trajectory.log_prob itself when on-policy).
    policy, params: read only by baselines that weight by scores; lanes must then be whole episodes.
    """
    check_lanes(trajectory, log_prob)
    log_ratio = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0)
    weights = estimator.importance(log_ratio, trajectory, hyperparams)
    psi = estimator.credit(weights.trace, trajectory, hyperparams)
    scores = baselines.Scores(
        weights.step, partial(_inner, policy, params), partial(_square, policy, params)
    )
    baseline = estimator.baseline(psi, scores, trajectory, hyperparams)
    advantage = jnp.where(trajectory.mask, weights.step * (psi - baseline), 0.0)
    # Sums over T steps carry rounding that grows with the root of T.
    rounding = 4 * jnp.finfo(psi.dtype).eps * len(psi) ** 0.5
    resolution = rounding * jnp.abs(weights.step) * (jnp.abs(psi) + jnp.abs(baseline))
    scale = facts_of(estimator.surrogate).scale
    if scale is not None:
        advantage = scale(advantage, resolution, trajectory.mask)
    return jax.lax.stop_gradient(Batch(trajectory, advantage, resolution, psi))


def group_size_of(estimator: Estimator) -> int:
    """How many episodes from one start the estimator compares; 1 if it asks for no groups."""
    return max(facts_of(value).group_size for value in estimator)


def masked(trajectory: Trajectory) -> Trajectory:
    """Put zeros where steps do not count: an environment that has ended may have left NaN there.

    Masking a NaN only after a product is too late for the gradient, because 0 x NaN is NaN.
    """
    check_lanes(trajectory)

    def kept(x):
        mask = trajectory.mask.reshape(trajectory.mask.shape + (1,) * (x.ndim - 2))
        return jnp.where(mask, x, jnp.zeros_like(x))

    return jax.tree.map(kept, trajectory)


def check_lanes(trajectory: Trajectory, *others: Array) -> None:
    """Raises AssertionError unless every field begins with the mask's [T, B], and the others are [T, B]."""
    chex.assert_tree_shape_prefix(trajectory, trajectory.mask.shape)
    chex.assert_equal_shape([trajectory.mask, *others])


def rescaled(estimator: Estimator, batch: Batch) -> tuple[Estimator, Batch]:
    """Rescale the batch's advantages as a wrapped surrogate does, and unwrap the estimator's surrogate.

    A batch can thus be rescaled as a whole and differentiated in parts.
    """
    rescale = facts_of(estimator.surrogate).rescale
    if rescale is None:
        return estimator, batch
    advantage = rescale(batch.advantage, batch.resolution, batch.trajectory.mask)
    wrapper = cast(Slot, estimator.surrogate)  # only a wrapper has a rescale
    inside = estimator._replace(surrogate=wrapper.arguments[0])
    return rescaled(inside, batch._replace(advantage=advantage))


def objective(
    estimator: Estimator,
    policy: Network,
    params: Params,
    carry: Carry,
    batch: Batch,
    hyperparams: Hyperparams,
) -> tuple[Array, tuple[Array, Distribution]]:
    """The objective to ascend, reduce(surrogate + entropy bonus), and (log_prob, distribution).

    carry: the policy's carry at the first row of the batch.
    """
    estimator, batch = rescaled(estimator, batch)
    trajectory = batch.trajectory
    _, distribution = policy.apply(params, carry, trajectory.obs, trajectory.first)
    log_prob = distribution.log_prob(trajectory.action)
    # Masked rows hold no real action: cut them before anything multiplies them (0 * NaN is NaN).
    log_prob = jnp.where(trajectory.mask, log_prob, trajectory.log_prob)
    gain = estimator.surrogate(log_prob, batch.advantage, trajectory, hyperparams)
    gain = gain + hyperparams.entropy_coef * distribution.entropy()
    return estimator.reduce(gain, trajectory.mask), (log_prob, distribution)


def coefficients(
    estimator: Estimator, log_prob: Array, batch: Batch, hyperparams: Hyperparams
) -> Array:
    """w = B d reduce / d log pi(a|s) [T, B]: the objective's gradient is mean_i sum_t w_{t,i} u_{t,i}."""
    check_lanes(batch.trajectory, log_prob, batch.advantage)
    estimator, batch = rescaled(estimator, batch)
    mask = batch.trajectory.mask

    def total(log_prob):
        gain = estimator.surrogate(log_prob, batch.advantage, batch.trajectory, hyperparams)
        return mask.shape[1] * estimator.reduce(gain, mask)

    return jax.grad(total)(log_prob)


def lane_gradients(policy: Network, params: Params, trajectory: Trajectory, weight: Array) -> Array:
    """sum_t weight_{t,i} grad log pi(a_{t,i}|s_{t,i}) for each episode i, flattened: [B, P]."""
    check_lanes(trajectory, weight)

    def of_one(lane, weight):
        _, pull = jax.vjp(lambda theta: _lane_log_probs(policy, theta, lane), params)
        return ravel_pytree(pull(weight)[0])[0]

    return jax.vmap(of_one, in_axes=1)(trajectory, jnp.where(trajectory.mask, weight, 0.0))


def _inner(policy, params, trajectory, step, psi):
    _check_policy(policy)
    weight = jnp.where(trajectory.mask, step, 0.0)

    # One trajectory at a time: a backward pass for sum_k w_k psi_k grad log pi_k, then a forward-mode
    # pass for its inner product with every step's score.
    def of_one(lane, cotangent):
        def log_probs(theta):
            return _lane_log_probs(policy, theta, lane)

        _, pull = jax.vjp(log_probs, params)
        return jax.jvp(log_probs, (params,), pull(cotangent))[1]

    return weight * jax.vmap(of_one, in_axes=1, out_axes=1)(trajectory, weight * psi)


def _square(policy, params, trajectory, step):
    _check_policy(policy)
    carry = policy.initial_carry(trajectory.mask.shape[1])
    _, distribution = policy.apply(params, carry, trajectory.obs, trajectory.first)
    score = jax.grad(lambda given: given.log_prob(trajectory.action).sum())(distribution)
    squares = jax.tree.map(lambda x: (x**2).reshape(*step.shape, -1).sum(axis=-1), score)
    return step**2 * sum(jax.tree.leaves(squares))


def _check_policy(policy):
    if policy is None:
        raise ValueError(
            "this baseline weights by scores: assess needs the policy and its parameters"
        )


def _lane_log_probs(policy, params, lane):
    """log pi(a_t|s_t) [T] of one whole episode, its fields [T, ...]."""
    lane = jax.tree.map(lambda x: x[:, None], lane)
    _, distribution = policy.apply(params, policy.initial_carry(1), lane.obs, lane.first)
    return jnp.where(lane.mask, distribution.log_prob(lane.action), 0.0)[:, 0]
