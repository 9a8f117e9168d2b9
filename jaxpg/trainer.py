"""The one loop: gather, assess, improve. It runs every row of the algorithm table."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxpg.algorithms import Algorithm, check_algorithm
from jaxpg.envs import Env
from jaxpg.estimators import (
    assess,
    baselines,
    coefficients,
    lane_gradients,
    objective,
    surrogates,
    uses,
)
from jaxpg.optimizers import scheduled
from jaxpg.policies import (
    Agent,
    AgentCarry,
    AgentParams,
    check_agent,
    init_params,
    initial_carry,
    observed,
)
from jaxpg.rollout import EpisodeSums, RolloutState, episodes, init_stream, unroll
from jaxpg.types import Array, Hyperparams, Key, Metrics, Trajectory


class TrainState(NamedTuple):
    """Everything that a run is; arrays only, so vmappable, shardable and checkpointable as it is."""

    params: AgentParams
    opt_state: Any  # of the policy's and the critic's optimizer
    rollout: RolloutState | tuple  # () when episodic
    key: Key
    num_updates: Array


class Trainer(NamedTuple):
    init: Callable[[Key], TrainState]
    update: Callable[
        [TrainState, Hyperparams, Trajectory | None], tuple[TrainState, Metrics]
    ]  # the third: demonstrations


def train(
    trainer: Trainer,
    state: TrainState,
    hyperparams: Hyperparams,
    demonstrations: Trajectory | None = None,
    *,
    num_updates: int,
) -> tuple[TrainState, Metrics]:
    """num_updates updates by `lax.scan`; metrics are stacked, [num_updates].

    Randomness depends on the update's number alone: train(4) equals train(2) twice.
    """

    def step(state, _):
        return trainer.update(state, hyperparams, demonstrations)

    return jax.lax.scan(step, state, length=num_updates)


def make_trainer(
    env: Env,
    agent: Agent,
    algorithm: Algorithm,
    *,
    num_envs: int,
    num_steps: int | None = None,
) -> Trainer:
    """The pure functions that train an agent.

    num_envs: episodes per update when episodic, else parallel streams. num_steps: the longest episode
    (the environment's horizon by default), or the steps per stream and update (128 by default).
    Raises ValueError for parts that do not fit together.
    """
    if algorithm.critic_optimizer is None:
        agent = agent._replace(critic=None)
    if num_steps is None:
        num_steps = env.horizon if algorithm.episodic else 128
    layout = _check(env, agent, algorithm, num_envs, num_steps)

    def init(key):
        k_params, k_rollout, k_train = jax.random.split(key, 3)
        params = init_params(agent, k_params)
        # The state of an optimizer has the same structure whatever its numbers.
        policy, critic = _optimizers(algorithm, Hyperparams())
        opt_state = (policy.init(params.policy), critic.init(params.critic))
        stream = not algorithm.episodic and not algorithm.imitates
        rollout = init_stream(env, agent, k_rollout, num_envs) if stream else ()
        return TrainState(params, opt_state, rollout, k_train, jnp.int32(0))

    def update(state, hyperparams, demonstrations=None):
        key = jax.random.fold_in(state.key, state.num_updates)
        k_rollout, k_fit = jax.random.split(key)
        hyperparams = scheduled(hyperparams, algorithm.schedule, state.num_updates)
        rollout, carry, trajectory, ended = gather(state, k_rollout, demonstrations)
        batch = assess(
            algorithm.estimator,
            trajectory,
            trajectory.log_prob,
            hyperparams,
            agent.policy,
            state.params.policy,
        )
        (params, opt_state), metrics = _fit(
            agent, algorithm, layout, state, batch, carry, hyperparams, k_fit
        )
        params = observed(agent, params, trajectory)
        metrics |= _episode_metrics(ended, trajectory)
        if algorithm.measure_noise:
            metrics |= _noise(
                agent, algorithm, state.params.policy, batch, carry.policy, hyperparams
            )
        return TrainState(params, opt_state, rollout, state.key, state.num_updates + 1), metrics

    def gather(state, key, demonstrations):
        if algorithm.imitates:
            if demonstrations is None:
                raise ValueError("this algorithm imitates demonstrations, and none were given")
            carry = initial_carry(agent, demonstrations.mask.shape[1])
            none = jnp.zeros(())
            return state.rollout, carry, demonstrations, EpisodeSums(none, none, none)
        if algorithm.episodic:
            carry = initial_carry(agent, num_envs)
            return (), carry, *episodes(env, agent, state.params, key, num_envs, num_steps)
        rollout, (trajectory, ended) = unroll(
            env, agent, state.params, state.rollout, key, num_steps
        )
        return rollout, state.rollout.carry, trajectory, ended

    return Trainer(init, update)


def _check(env, agent, algorithm, num_envs, num_steps) -> str:
    """Raises ValueError for a bad combination; returns what a minibatch is made of: steps or lanes."""
    for name, value in (("num_envs", num_envs), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    check_algorithm(algorithm, agent.critic is not None)
    check_agent(env, agent)
    others = (
        baselines.leave_one_out,
        baselines.time_mean,
        baselines.optimal_constant,
        baselines.optimal_per_time,
    )
    if algorithm.measure_noise and num_envs % 2:
        raise ValueError(f"measure_noise halves the batch: num_envs={num_envs} must be even")
    if algorithm.control_variate and num_envs < 2:
        raise ValueError(
            f"a control variate compares episodes: num_envs={num_envs} must be at least 2"
        )
    if num_envs < 2 and any(uses(algorithm.estimator.baseline, value) for value in others):
        raise ValueError(
            f"the baseline compares each episode with the others: num_envs={num_envs} must be at least 2"
        )
    recurrent = jax.tree.leaves(jax.eval_shape(lambda: initial_carry(agent, 1))) != []
    whole = recurrent or uses(algorithm.estimator.reduce, surrogates.per_episode)
    num_lanes, unit = (
        (num_envs, "num_envs") if whole else (num_envs * num_steps, "num_envs x num_steps")
    )
    parts = algorithm.num_minibatches
    if num_lanes % parts and not algorithm.imitates:
        near = sorted({max(num_lanes // parts, 1) * parts, (num_lanes // parts + 1) * parts})
        raise ValueError(
            f"{unit}={num_lanes} is not a multiple of num_minibatches={parts}; "
            f"use {' or '.join(map(str, near))}"
        )
    return "lanes" if whole else "steps"


def _optimizers(algorithm, hyperparams):
    critic = algorithm.critic_optimizer
    # The critic's optimizer is an ordinary one that reads its own learning rate.
    for_critic = hyperparams._replace(learning_rate=hyperparams.critic_learning_rate)
    return (
        algorithm.policy_optimizer(hyperparams),
        critic(for_critic) if critic else optax.identity(),
    )


def _fit(agent, algorithm, layout, state, batch, carry, hyperparams, key):
    """Epochs of minibatch steps: first of policy and critic together, then of the critic alone."""
    policy_optimizer, critic_optimizer = _optimizers(algorithm, hyperparams)
    estimator = algorithm.estimator
    parts = algorithm.num_minibatches
    if layout == "steps":
        # Without memory and with a mean over steps, the layout means nothing: one row of T x B lanes.
        batch = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
        carry = AgentCarry((), ())

    def policy_step(params, opt_state, batch, carry):
        def loss(params):
            value, (log_prob, distribution) = objective(
                estimator, agent.policy, params, carry.policy, batch, hyperparams
            )
            return -value, (log_prob, distribution.entropy())

        (negative, (log_prob, entropy)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        if algorithm.control_variate:
            gradient = _controlled(agent.policy, algorithm, params, batch, hyperparams)
        updates, opt_state = policy_optimizer.update(gradient, opt_state, params)
        mask = batch.trajectory.mask
        log_rho = jnp.where(mask, log_prob - batch.trajectory.log_prob, 0.0)
        metrics = {
            "objective": -negative,
            "grad_norm": optax.tree.norm(gradient),
            "entropy": surrogates.per_step(entropy, mask),
            "kl": surrogates.per_step(jnp.expm1(log_rho) - log_rho, mask),
            # Effective share of the batch: (sum rho)^2 / (N sum rho^2), 1 on-policy.
            "ess": surrogates.per_step(jnp.exp(log_rho), mask) ** 2
            / surrogates.per_step(jnp.exp(2 * log_rho), mask),
        }
        return optax.apply_updates(params, updates), opt_state, metrics

    def critic_step(params, opt_state, batch, carry):
        def loss(params):
            trajectory = batch.trajectory
            _, value = agent.critic.apply(params, carry.critic, trajectory.obs, trajectory.first)
            return 0.5 * surrogates.per_step((value - batch.target) ** 2, trajectory.mask)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = critic_optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"critic_loss": value}

    def minibatch_step(with_policy, state, minibatch):
        (policy, critic), (policy_opt, critic_opt) = state
        metrics = {}
        if with_policy:
            policy, policy_opt, metrics = policy_step(policy, policy_opt, *minibatch)
        if agent.critic is not None:
            critic, critic_opt, more = critic_step(critic, critic_opt, *minibatch)
            metrics |= more
        return (AgentParams(policy, critic), (policy_opt, critic_opt)), metrics

    def epoch(with_policy, state, key):
        if parts == 1:
            return minibatch_step(with_policy, state, (batch, carry))
        num_lanes = batch.advantage.shape[1]
        order = jax.random.permutation(key, num_lanes).reshape(parts, -1)

        def step(state, lanes):
            minibatch = (
                jax.tree.map(lambda x: x[:, lanes], batch),
                jax.tree.map(lambda x: x[lanes], carry),
            )
            return minibatch_step(with_policy, state, minibatch)

        state, metrics = jax.lax.scan(step, state, order)
        return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    def run(with_policy, state, key, num_epochs):
        def step(state, key):
            return epoch(with_policy, state, key)

        state, metrics = jax.lax.scan(step, state, jax.random.split(key, num_epochs))
        return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    k_both, k_critic = jax.random.split(key)
    fitted, metrics = run(True, (state.params, state.opt_state), k_both, algorithm.num_epochs)
    if agent.critic is not None and algorithm.critic_epochs:
        fitted, more = run(False, fitted, k_critic, algorithm.critic_epochs)
        metrics |= more
    return fitted, metrics


def _controlled(policy, algorithm, params, batch, hyperparams):
    """The gradient of the loss, every episode's corrected by the control variate."""
    trajectory = batch.trajectory
    scores_of = partial(lane_gradients, policy, params, trajectory)
    weight = coefficients(algorithm.estimator, trajectory.log_prob, batch, hyperparams)
    rows = algorithm.control_variate(scores_of, weight, trajectory, hyperparams)
    return ravel_pytree(params)[1](-rows.mean(axis=0))


def _noise(agent, algorithm, params, batch, carry, hyperparams) -> Metrics:
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
            return objective(algorithm.estimator, agent.policy, params, memory, part, hyperparams)[
                0
            ]

        return ravel_pytree(jax.grad(value)(params))[0]

    one, other = gradient(0), gradient(1)
    noise = ((one - other) ** 2).sum() / 4
    return {"noise": noise, "signal": (((one + other) / 2) ** 2).sum() - noise}


def _episode_metrics(ended: EpisodeSums, trajectory: Trajectory) -> Metrics:
    # 0/0 is NaN: a curve has no value until an episode has ended.
    return {
        "episode_return": ended.returns / ended.episodes,
        "episode_length": ended.lengths / ended.episodes,
        "episodes": ended.episodes,
        "env_steps": trajectory.mask.sum(),
    }
