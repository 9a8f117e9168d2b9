"""One equation: g = grad reduce_t [ surrogate(log pi(a_t|s_t), w_t (psi_t - b_t)) ], in five slots."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxpg.estimators import baselines, credit, importance, surrogates
from jaxpg.estimators.baselines import Baseline
from jaxpg.estimators.credit import Credit
from jaxpg.estimators.importance import Importance
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
    """A trajectory with what the objective needs besides, gradients stopped."""

    trajectory: Trajectory
    advantage: Array  # [T, B] step weight times (psi - b)
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

    log_prob: [T, B] under the policy to improve (trajectory.log_prob itself when on-policy).
    policy, params: only read by the baselines that weigh by scores; lanes must be whole episodes then.
    """
    log_ratio = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0)
    weights = estimator.importance(log_ratio, trajectory, hyperparams)
    psi = estimator.credit(weights.trace, trajectory, hyperparams)
    inner = partial(_score_kernel, policy, params, trajectory, weights.step)
    scores = baselines.Scores(weights.step, inner)
    baseline = estimator.baseline(psi, scores, trajectory, hyperparams)
    advantage = jnp.where(trajectory.mask, weights.step * (psi - baseline), 0.0)
    return jax.lax.stop_gradient(Batch(trajectory, advantage, psi))


def objective(
    estimator: Estimator,
    policy: Network,
    params: Params,
    carry: Carry,
    batch: Batch,
    hyperparams: Hyperparams,
) -> tuple[Array, tuple[Array, Distribution]]:
    """What the policy ascends: reduce(surrogate + entropy bonus), and (log_prob, distribution).

    carry: the policy's carry at the first row of the batch.
    """
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
    mask = batch.trajectory.mask

    def total(log_prob):
        gain = estimator.surrogate(log_prob, batch.advantage, batch.trajectory, hyperparams)
        return mask.shape[1] * estimator.reduce(gain, mask)

    return jax.grad(total)(log_prob)


def lane_gradients(policy: Network, params: Params, trajectory: Trajectory, weight: Array) -> Array:
    """sum_t weight_{t,i} grad log pi(a_{t,i}|s_{t,i}) for each episode i, flattened: [B, P]."""

    def of_one(lane, weight):
        _, pull = jax.vjp(lambda theta: _lane_log_probs(policy, theta, lane), params)
        return ravel_pytree(pull(weight)[0])[0]

    return jax.vmap(of_one, in_axes=1)(trajectory, jnp.where(trajectory.mask, weight, 0.0))


def describe(slot: Any) -> str:
    """A slot value by name: `from_start(one_step)`, `constant(2.0)`."""
    if isinstance(slot, partial):
        inner = ", ".join(describe(x) for x in slot.args)
        return f"{slot.func.__name__.lstrip('_')}({inner})"
    return slot.__name__ if callable(slot) else repr(slot)


def uses(slot: Any, value: Callable) -> bool:
    """Whether a slot value is, or wraps, the given one."""
    if isinstance(slot, partial):
        wrapped = any(uses(x, value) for x in slot.args)
        return wrapped or slot.func.__name__.lstrip("_") == value.__name__
    return slot is value


def _score_kernel(policy, params, trajectory, step, psi):
    if policy is None:
        raise ValueError(
            "this baseline weighs by scores: assess needs the policy and its parameters"
        )
    weight = jnp.where(trajectory.mask, step, 0.0)

    # One trajectory at a time: a backward pass for sum_k w_k psi_k grad log pi_k, then a forward-mode
    # pass for its inner product with every step's score.
    def of_one(lane, cotangent):
        def log_probs(theta):
            return _lane_log_probs(policy, theta, lane)

        _, pull = jax.vjp(log_probs, params)
        return jax.jvp(log_probs, (params,), pull(cotangent))[1]

    return weight * jax.vmap(of_one, in_axes=1, out_axes=1)(trajectory, weight * psi)


def _lane_log_probs(policy, params, lane):
    """log pi(a_t|s_t) [T] of one whole episode, its fields [T, ...]."""
    lane = jax.tree.map(lambda x: x[:, None], lane)
    _, distribution = policy.apply(params, policy.initial_carry(1), lane.obs, lane.first)
    return jnp.where(lane.mask, distribution.log_prob(lane.action), 0.0)[:, 0]
