"""The one loop: gather, assess, improve. It runs every row of the algorithm table."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg import adaptation, sources
from jaxpg.algorithms import Algorithm, check_algorithm
from jaxpg.devices import in_groups
from jaxpg.envs import Env
from jaxpg.estimators import assess, baselines, surrogates, uses
from jaxpg.improvement import improve, noise, optimizers
from jaxpg.optimizers import scheduled
from jaxpg.pieces import improve_in_pieces, num_pieces
from jaxpg.policies import (
    Agent,
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
    scales: adaptation.Scales | tuple = ()  # () unless numbers adapt
    memory: Any = ()  # sources.Memory of the last batches; or, guided, the behaviour's parameters


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
    adapts = algorithm.adaptation is not adaptation.fixed
    remembers = algorithm.num_batches > 1
    pieces = num_pieces(agent, algorithm, num_envs)
    improved = in_groups(partial(improve, agent, algorithm, layout))

    def init(key):
        k_params, k_rollout, k_train = jax.random.split(key, 3)
        params = init_params(agent, k_params)
        # The state of an optimizer has the same structure whatever its numbers.
        policy, critic = optimizers(algorithm, Hyperparams())
        opt_state = (policy.init(params.policy), critic.init(params.critic))
        stream = not algorithm.episodic and not algorithm.imitates
        rollout = init_stream(env, agent, k_rollout, num_envs) if stream else ()
        scales = adaptation.initial_scales() if adapts else ()
        memory = ()
        if algorithm.guided:
            memory = params.policy
        elif remembers:
            batch = jax.eval_shape(lambda: roll(params, rollout, k_train)[1:3])
            memory = sources.empty_memory(batch, algorithm.num_batches)
        return TrainState(params, opt_state, rollout, k_train, jnp.int32(0), scales, memory)

    def update_in_pieces(state, hyperparams, demonstrations=None):
        del demonstrations
        key = jax.random.fold_in(state.key, state.num_updates)
        hyperparams = scheduled(hyperparams, algorithm.schedule, state.num_updates)
        params, opt_state, metrics, ended = improve_in_pieces(
            env,
            agent,
            algorithm,
            state.params,
            state.opt_state,
            hyperparams,
            key,
            num_envs,
            num_steps,
            pieces,
        )
        metrics = _episode_metrics(ended) | metrics
        count = state.num_updates + 1
        return state._replace(params=params, opt_state=opt_state, num_updates=count), metrics

    def update(state, hyperparams, demonstrations=None):
        key = jax.random.fold_in(state.key, state.num_updates)
        k_rollout, k_fit = jax.random.split(key)
        hyperparams = scheduled(hyperparams, algorithm.schedule, state.num_updates)
        if adapts:
            hyperparams = adaptation.scaled(hyperparams, state.scales)
        (rollout, memory), new, data, ended, metrics = gather(
            state, hyperparams, k_rollout, demonstrations
        )
        policy, estimator = state.params.policy, algorithm.estimator
        batch = assess(estimator, data.trajectory, data.log_prob, hyperparams, agent.policy, policy)
        if data.log_prob is not data.trajectory.log_prob:
            batch = sources.corrected(
                batch, data, whole=uses(estimator.reduce, surrogates.per_episode)
            )
        params, opt_state, more = improved(
            state.params, state.opt_state, batch, data.carry, hyperparams, k_fit
        )
        metrics |= more | ended
        if algorithm.measure_noise:
            metrics |= noise(agent, algorithm, policy, batch, data.carry, hyperparams)
        scales = state.scales
        if adapts:
            scales = algorithm.adaptation(scales, metrics["kl"], hyperparams)
            metrics |= {f"{name}_scale": x for name, x in scales._asdict().items()}
        params = observed(agent, params, new)  # not what is remembered, which has been seen
        count = state.num_updates + 1
        return TrainState(params, opt_state, rollout, state.key, count, scales, memory), metrics

    def roll(params, rollout, key):
        """One batch of the policy's own: (rollout, trajectory, carry at its first row, ended)."""
        if algorithm.episodic:
            trajectory, ended = episodes(env, agent, params, key, num_envs, num_steps)
            return (), trajectory, initial_carry(agent, num_envs), ended
        after, (trajectory, ended) = unroll(env, agent, params, rollout, key, num_steps)
        return after, trajectory, rollout.carry, ended

    def gather(state, hyperparams, key, demonstrations):
        """(rollout, memory), what was not seen before, what to learn from, metrics of both."""
        if algorithm.imitates or algorithm.guided:
            demonstrations = _given(demonstrations)
        if algorithm.imitates:
            none = jnp.zeros(())
            ended = _episode_metrics(EpisodeSums(none, none, none))
            ended["env_steps"] = demonstrations.mask.sum()
            data = sources.imitated(agent, state.params.policy, demonstrations)
            return ((), ()), data.trajectory, data, ended, {}
        rollout, trajectory, carry, ended = roll(state.params, state.rollout, key)
        ended = _episode_metrics(ended) | {"env_steps": trajectory.mask.sum()}
        policy, memory = state.params.policy, state.memory
        if algorithm.guided:
            data = sources.joined(agent, policy, memory, trajectory, demonstrations)
            share = sources.share_of_demonstrations(data, num_envs)
            return (rollout, memory), trajectory, data, ended, share
        if not remembers:
            return (rollout, memory), trajectory, sources.on_policy(trajectory, carry), ended, {}
        memory = sources.remember(memory, trajectory, carry, state.num_updates)
        data, metrics = sources.recalled(
            memory,
            algorithm.num_batches,
            algorithm.estimator.importance,
            agent.policy,
            policy,
            hyperparams,
            state.num_updates,
        )
        return (rollout, memory), trajectory, data, ended, metrics

    return Trainer(init, update_in_pieces if pieces > 1 else update)


def _given(demonstrations: Trajectory | None) -> Trajectory:
    if demonstrations is None:
        raise ValueError("this algorithm learns from demonstrations, and none were given")
    return demonstrations


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
    for name in ("num_minibatches", "critic_minibatches"):
        parts = getattr(algorithm, name)
        if num_lanes % parts and not algorithm.imitates:
            near = sorted({max(num_lanes // parts, 1) * parts, (num_lanes // parts + 1) * parts})
            raise ValueError(
                f"{unit}={num_lanes} is not a multiple of {name}={parts}; "
                f"use {' or '.join(map(str, near))}"
            )
    samples, part = algorithm.fisher_samples, num_lanes * algorithm.num_batches
    part = part // algorithm.num_minibatches
    if samples is not None and not 1 <= samples <= part and not algorithm.imitates:
        raise ValueError(
            f"fisher_samples={samples} must be between 1 and the batch's {unit}={part}; "
            "leave it out to use all"
        )
    return "lanes" if whole else "steps"


def _episode_metrics(ended: EpisodeSums) -> Metrics:
    # 0/0 is NaN: a curve has no value until an episode has ended. Who watches for NaNs looks for others.
    watched = jax.config.jax_debug_nans  # type: ignore[attr-defined]
    count = jnp.maximum(ended.episodes, 1) if watched else ended.episodes
    return {
        "episode_return": ended.returns / count,
        "episode_length": ended.lengths / count,
        "episodes": ended.episodes,
    }
