"""Improvement: from an assessed batch to new parameters, in epochs of minibatch steps."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxpg.devices import concurrently
from jaxpg.estimators import coefficients, lane_gradients, objective, surrogates
from jaxpg.estimators.estimator import Batch
from jaxpg.policies import Agent, AgentCarry, AgentParams
from jaxpg.training.accumulation import critic_gradient, gradient_of
from jaxpg.training.algorithm import Algorithm
from jaxpg.types import Array, Hyperparams, Key, Metrics, Params, Trajectory

# At most this many lanes of a step stay together in a minibatch.
GROUP = 64


def optimizers(
    algorithm: Algorithm, hyperparams: Hyperparams
) -> tuple[optax.GradientTransformationExtraArgs, optax.GradientTransformation]:
    """The policy's and the critic's optimizer with these hyperparameters."""
    critic = algorithm.critic_optimizer
    # Optimizers read `learning_rate`, so the critic's gets its own under that name.
    for_critic = hyperparams._replace(learning_rate=hyperparams.critic_learning_rate)
    return (
        optax.with_extra_args_support(algorithm.policy_optimizer(hyperparams)),
        critic(for_critic) if critic else optax.identity(),
    )


def improve(
    agent: Agent,
    algorithm: Algorithm,
    layout: str,
    params: AgentParams,
    opt_state: Any,
    batch: Batch,
    carry: AgentCarry,
    hyperparams: Hyperparams,
    key: Key,
    k_rollout: Key | None = None,
    *,
    recall: Callable[[AgentParams, Key | None, Array], Trajectory] | None = None,
) -> tuple[AgentParams, Any, Metrics]:
    """Update the policy and the critic in epochs of the same minibatches, then the critic alone.

    Neither reads the other's new parameters, so the two may run side by side.
    layout: what a minibatch is made of, "steps" or "lanes". recall: (params, k_rollout, index) -> lanes of
    the batch's trajectory, where it is rolled out again instead of kept.
    """
    if layout == "steps":
        # Without memory and with a mean over steps, steps may be arranged in any way.
        batch, carry = _in_groups(batch, algorithm), AgentCarry((), ())
    policy_optimizer, critic_optimizer = optimizers(algorithm, hyperparams)
    policy_step = partial(
        _policy_step,
        agent.policy,
        algorithm,
        layout,
        recall and partial(recall, params, k_rollout),
        policy_optimizer,
        hyperparams,
    )
    critic_step = partial(_critic_step, agent.critic, critic_optimizer, hyperparams)
    axis = 0 if layout == "steps" else 1
    parts = algorithm.num_minibatches

    def epochs(step, state, data, key, num_epochs, parts):
        """Step on every minibatch of every epoch; metrics are means over all of them."""

        def epoch(state, key):
            if parts == 1:
                return step(state, data)
            order = jax.random.permutation(key, batch.advantage.shape[axis]).reshape(parts, -1)

            def on(state, places):
                batch, carry = data
                minibatch = (
                    jax.tree.map(lambda x: jnp.take(x, places, axis, mode="clip"), batch),
                    jax.tree.map(lambda x: x[places], carry),
                )
                return step(state, minibatch)

            state, metrics = jax.lax.scan(on, state, order)
            return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

        state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, num_epochs))
        return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    def of_policy(params, opt_state, data, keys):
        # Traced, not a literal True, so that vmap batches the scan once.
        within_kl = hyperparams.stop_kl >= 0
        state = params.policy, opt_state[0], within_kl
        state, metrics = epochs(policy_step, state, data, keys[0], algorithm.num_epochs, parts)
        return *state[:2], metrics

    def of_critic(params, opt_state, data, keys):
        if agent.critic is None:
            return params.critic, opt_state[1], {}
        state = params.critic, opt_state[1]
        state, metrics = epochs(critic_step, state, data, keys[0], algorithm.num_epochs, parts)
        if algorithm.critic_epochs:
            more, parts_of_more = algorithm.critic_epochs, algorithm.critic_minibatches
            state, metrics = epochs(critic_step, state, data, keys[1], more, parts_of_more)
        return *state, metrics

    data, keys = (batch, carry), jax.random.split(key)
    fitted = concurrently(of_policy, of_critic, params, opt_state, data, keys)
    (policy, policy_opt, metrics), (critic, critic_opt, more) = fitted
    metrics |= more
    if algorithm.measure_kl:
        # Measured after the last step, to be the divergence of the whole update.
        moved = _kl_from(agent.policy, params.policy, batch, carry)
        metrics["kl"] = moved(policy)
    return AgentParams(policy, critic), (policy_opt, critic_opt), metrics


def _in_groups(batch: Batch, algorithm: Algorithm) -> Batch:
    """Arrange the steps in rows of a few lanes each, [T B / n, n]; an epoch shuffles rows.

    Lanes are independent, so it matters little that those of a row stay together; on a CPU, shuffling single
    steps took as long as their gradients.
    """
    num_steps, num_lanes = batch.advantage.shape
    parts = math.lcm(algorithm.num_minibatches, algorithm.critic_minibatches)
    size = next(
        n
        for n in range(min(GROUP, num_lanes), 0, -1)
        if num_lanes % n == 0 and (num_steps * num_lanes // n) % parts == 0
    )
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[2:]), batch)


def _policy_step(policy, algorithm, layout, recall, optimizer, hyperparams, state, minibatch):
    # within_kl: [] bool, no minibatch of this update has exceeded stop_kl.
    (params, opt_state, within_kl), (batch, carry) = state, minibatch
    ascent, metrics = gradient_of(
        algorithm.estimator, policy, params, carry.policy, batch, hyperparams, recall=recall
    )
    gradient = jax.tree.map(jnp.negative, ascent)  # optimizers descend
    if algorithm.control_variate:
        gradient = _controlled(policy, algorithm, params, batch, hyperparams)
    metrics["grad_norm"] = optax.tree.norm(gradient)
    updates, new_state = optimizer.update(
        gradient,
        opt_state,
        params,
        **_extra_args(policy, algorithm, layout, params, batch, carry, hyperparams),
    )
    new_params = optax.apply_updates(params, updates)
    if algorithm.num_epochs * algorithm.num_minibatches == 1:
        return (new_params, new_state, within_kl), metrics
    within_kl &= metrics["kl"] <= hyperparams.stop_kl
    new_params, new_state = jax.tree.map(
        lambda new, old: jnp.where(within_kl, new, old),
        (new_params, new_state),
        (params, opt_state),
    )
    return (new_params, new_state, within_kl), metrics


def _critic_step(critic, optimizer, hyperparams, state, minibatch):
    (params, opt_state), (batch, carry) = state, minibatch
    gradient, value = critic_gradient(critic, params, carry.critic, batch, hyperparams)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), {"critic_loss": value}


def _extra_args(policy, algorithm, layout, params, batch, carry, hyperparams):
    """Extra arguments of the natural gradient's transformations; they cost nothing if unused."""
    part = batch, carry
    if algorithm.fisher_samples:
        if layout == "steps":
            part = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch), carry
        num_lanes, count = part[0].advantage.shape[1], algorithm.fisher_samples
        # Spread over the batch: neighbouring lanes may be steps of one episode.
        lanes = jnp.array([i * num_lanes // count for i in range(count)])
        part = jax.tree.map(lambda x: x[:, lanes], part[0]), jax.tree.map(lambda x: x[lanes], carry)
    trajectory = batch.trajectory

    def episode_log_probs(params):
        _, distribution = policy.apply(params, carry.policy, trajectory.obs, trajectory.first)
        return jnp.where(trajectory.mask, distribution.log_prob(trajectory.action), 0.0).sum(0)

    def loss(params):
        estimator = algorithm.estimator
        return -objective(estimator, policy, params, carry.policy, batch, hyperparams)[0]

    return {
        "loss": loss,
        "kl": _kl_from(policy, params, batch, carry),
        "fisher_kl": _kl_from(policy, params, *part),
        "episode_log_probs": episode_log_probs,
    }


def _kl_from(policy, old, batch, carry):
    """params -> the mean over steps of KL(pi_old || pi_params)."""
    trajectory = batch.trajectory

    def distribution(params):
        return policy.apply(params, carry.policy, trajectory.obs, trajectory.first)[1]

    def kl(params):
        before = jax.lax.stop_gradient(distribution(old))
        return surrogates.per_step(before.kl(distribution(params)), trajectory.mask)

    return kl


def _controlled(policy, algorithm, params, batch, hyperparams):
    """The gradient of the loss, with every episode's part corrected by the control variate."""
    trajectory = batch.trajectory
    scores_of = partial(lane_gradients, policy, params, trajectory)
    weight = coefficients(algorithm.estimator, trajectory.log_prob, batch, hyperparams)
    rows = algorithm.control_variate(scores_of, weight, trajectory, hyperparams)
    return ravel_pytree(params)[1](-rows.mean(axis=0))


def noise(
    agent: Agent,
    algorithm: Algorithm,
    params: Params,
    batch: Batch,
    carry: AgentCarry,
    hyperparams: Hyperparams,
) -> Metrics:
    """Unbiased |E g|^2 and tr Cov of one batch's gradient, from the two halves of its lanes.

    With g+ and g- the halves' gradients: tr Cov = E|g+ - g-|^2 / 4 and |E g|^2 = E|g|^2 - tr Cov, which may
    come out negative. Average each over updates before taking the ratio: B_simple is
    num_envs * noise / signal lanes (McCandlish et al., 2018).
    """

    def gradient(half):
        part, memory = (
            jax.tree.map(lambda x: x[:, half::2], batch),
            jax.tree.map(lambda x: x[half::2], carry),
        )

        def value(params):
            return objective(
                algorithm.estimator, agent.policy, params, memory.policy, part, hyperparams
            )[0]

        return ravel_pytree(jax.grad(value)(params))[0]

    one, other = gradient(0), gradient(1)
    spread = ((one - other) ** 2).sum() / 4
    return {"noise": spread, "signal": (((one + other) / 2) ** 2).sum() - spread}
