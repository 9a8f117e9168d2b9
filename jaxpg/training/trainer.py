"""The one loop: gather, assess, improve. It runs every row of the algorithm table.

>>> env = jaxpg.envs.from_mdp(jaxpg.lab.exact.bandits.bandit([0.0, 1.0]))
>>> agent, row = jaxpg.policies.actor_critic(env, "tabular"), Algorithm(jaxpg.estimators.Estimator())
>>> trainer = make_trainer(env, agent, row, num_envs=2)
>>> state, metrics = train(trainer, trainer.init(jax.random.key(0)), Hyperparams(), num_updates=3)
>>> int(state.num_updates), metrics["env_steps"].tolist()
(3, [2, 2, 2])
>>> isinstance(trainer, Trainer) and isinstance(state, TrainState)
True
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.batching import in_groups
from jaxpg.devices import shards
from jaxpg.envs import Env, check_env
from jaxpg.estimators import assess, describe, facts_of, groups
from jaxpg.optimizers import adaptation, scheduled
from jaxpg.optimizers.natural import AVERAGING, NATURAL_OPTIMIZERS
from jaxpg.policies import Agent, AgentParams, check_agent, init_params, initial_carry, observed
from jaxpg.rollout import episodes_again, lanes_at_once
from jaxpg.rollout.episodic import check_groups
from jaxpg.training.algorithm import Algorithm, check_algorithm, check_shared
from jaxpg.training.data import Moment, Task, corrected
from jaxpg.training.diagnostics import explained_variance, rates
from jaxpg.training.improvement import arrangement, improve, noise, optimizers, trained
from jaxpg.types import Array, Hyperparams, Key, Metrics, Trajectory

# A batch of whole episodes larger than this is rolled out again instead of kept.
KEPT_BYTES = 2**32


class TrainState(NamedTuple):
    """The whole state of a run: only arrays, so it can be vmapped, sharded and checkpointed as it is."""

    params: AgentParams
    opt_state: Any  # of the policy's and the critic's optimizer
    data: Any  # the state of the row's Data: a stream, a memory, a behaviour's parameters, or ()
    key: Key
    num_updates: Array
    scales: adaptation.Scales | tuple = ()  # () without adaptation


class Trainer(NamedTuple):
    init: Callable[[Key], TrainState]
    update: Callable[
        [TrainState, Hyperparams, Trajectory | None], tuple[TrainState, Metrics]
    ]  # the third argument: demonstrations
    blocks: int = 1  # equal parts of an agent's environments, which can be split between them
    obstacle: str = (
        "unknown"  # what keeps them on one device; empty if they can be split over several
    )


def train(
    trainer: Trainer,
    state: TrainState,
    hyperparams: Hyperparams,
    demonstrations: Trajectory | None = None,
    *,
    num_updates: int,
) -> tuple[TrainState, Metrics]:
    """Run num_updates updates by `lax.scan`; metrics are stacked, [num_updates].

    Randomness depends only on the update's number: train(4) equals train(2) twice.
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
    recompute: bool | None = None,
) -> Trainer:
    """The pure functions that train an agent.

    num_envs: whole episodes per update, or parallel streams. num_steps: the longest episode
    (the environment's horizon by default), or the steps per stream and update (128 by default).
    recompute: roll whole episodes out again for their gradient instead of keeping them, which bounds the
    memory and changes no number beyond rounding; by default where they would take more than KEPT_BYTES.
    Raises ValueError for parts that do not fit together.
    """
    check_env(env)
    if algorithm.critic_optimizer is None:
        agent = agent._replace(critic=None)
    if num_steps is None:
        num_steps = env.horizon if algorithm.data.whole_episodes else 128
    layout = _check(env, agent, algorithm, num_envs, num_steps)
    estimator, data = algorithm.estimator, algorithm.data
    size = algorithm.group_size
    task = Task(env, agent, estimator, num_envs, num_steps, size)
    adapts = algorithm.adaptation is not adaptation.fixed
    recall = _recall(task, algorithm, recompute)
    improved = in_groups(partial(improve, agent, algorithm, layout, recall=recall))

    def own_task():
        return task._replace(num_envs=num_envs // shards())

    def init(key):
        k_params, k_data, k_train = jax.random.split(key, 3)
        params = init_params(agent, k_params)
        # The state of an optimizer has the same structure whatever its numbers.
        made = optimizers(agent, algorithm, Hyperparams())
        made = zip(made, trained(agent, params), strict=True)
        opt_state = tuple(optimizer.init(moved) for optimizer, moved in made)
        scales = adaptation.initial_scales() if adapts else ()
        state = data.init(own_task(), params, k_data)
        return TrainState(params, opt_state, state, k_train, jnp.int32(0), scales)

    def update(state, hyperparams, demonstrations=None):
        key = jax.random.fold_in(state.key, state.num_updates)
        k_rollout, k_fit = jax.random.split(key)
        hyperparams = scheduled(hyperparams, algorithm.schedule, state.num_updates)
        if adapts:
            hyperparams = adaptation.scaled(hyperparams, state.scales)
        moment = Moment(state.params, hyperparams, k_rollout, state.num_updates, demonstrations)
        carried, found = data.gather(own_task(), moment, state.data)
        policy = state.params.policy
        batch = assess(
            estimator, found.trajectory, found.log_prob, hyperparams, agent.policy, policy
        )
        if data.reweighs:
            batch = corrected(batch, found, whole=not facts_of(estimator.reduce).ignores_lanes)
        params, opt_state, metrics = improved(
            state.params, state.opt_state, batch, found.carry, hyperparams, k_fit, k_rollout
        )
        metrics |= found.metrics | rates(algorithm, agent.shared, hyperparams)
        if agent.critic is not None:
            metrics["explained_variance"] = explained_variance(batch)
        if size > 1:
            share = groups.silent_share(size, batch.advantage, batch.resolution)
            metrics["silent_groups"] = share
        if algorithm.measure_noise:
            metrics |= noise(agent, algorithm, policy, batch, found.carry, hyperparams)
        scales = state.scales
        if adapts:
            scales = algorithm.adaptation(scales, metrics["kl"], hyperparams)
            metrics |= {f"{name}_scale": x for name, x in scales._asdict().items()}
        params = observed(agent, params, found.new)
        count = state.num_updates + 1
        return TrainState(params, opt_state, carried, state.key, count, scales), metrics

    blocks, _ = arrangement(algorithm, layout, num_steps, num_envs)
    return Trainer(init, update, blocks, _obstacle(algorithm))


def _obstacle(algorithm: Algorithm) -> str:
    """What keeps the lanes of one agent on one device; empty if they can be split over several."""
    estimator = algorithm.estimator
    for value in estimator[:-1]:
        if facts_of(value).couples and not facts_of(value).splits:
            return f"{describe(value)} compares all environments of a batch"
    if not facts_of(estimator.reduce).averages:
        return f"{describe(estimator.reduce)} does not say what it averages"
    if not algorithm.data.splits:
        return f"data={algorithm.data.name} is kept in one piece"
    if algorithm.policy_optimizer in NATURAL_OPTIMIZERS:
        if algorithm.policy_optimizer not in AVERAGING:
            return f"{algorithm.policy_optimizer.__name__} compares the scores of all episodes of a batch"
        if algorithm.fisher_samples:
            return "fisher_samples are spread over the whole batch"
    return "a control variate compares all episodes of a batch" if algorithm.control_variate else ""


def _recall(task: Task, algorithm: Algorithm, asked: bool | None):
    """(params, key, index) -> lanes rolled out again; None where the batch is kept."""
    env, fits = task.env, algorithm.data.repeats and algorithm.num_minibatches == 1
    # The gradient takes lanes in the parts of a rollout without groups.
    fits &= lanes_at_once(task.num_envs, task.group_size) == lanes_at_once(task.num_envs)
    if asked and not fits:
        raise ValueError(
            f"recompute needs data=episodes in one minibatch, not {algorithm.data.name} in "
            f"num_minibatches={algorithm.num_minibatches} with group_size={task.group_size}; leave it out"
        )
    row = jax.eval_shape(lambda: env.reset(jax.random.key(0))[1])
    bytes_of_step = row.size * row.dtype.itemsize + 32  # the other fields are numbers and flags
    large = task.num_envs * task.num_steps * bytes_of_step > KEPT_BYTES
    if not (fits and (large if asked is None else asked)):
        return None

    def recall(params, key, index):
        sizes = {
            "num_episodes": task.num_envs // shards(),
            "num_steps": task.num_steps,
            "group_size": task.group_size,
        }
        return episodes_again(env, task.agent, params, key, index=index, **sizes)

    return recall


def _check(env, agent, algorithm, num_envs, num_steps) -> str:
    """Raises ValueError for a bad combination; returns what a minibatch is made of: steps or lanes."""
    for name, value in (("num_envs", num_envs), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if agent.shared:
        check_shared(algorithm)
    check_algorithm(algorithm, agent.critic is not None)
    check_agent(env, agent)
    estimator, data = algorithm.estimator, algorithm.data
    size = algorithm.group_size
    check_groups(num_envs, size, "num_envs")
    if algorithm.measure_noise and num_envs // size % 2 and size > 1:
        raise ValueError(
            f"measure_noise halves the batch: num_envs={num_envs} must be an even number of groups of {size}"
        )
    if algorithm.measure_noise and num_envs % 2:
        raise ValueError(f"measure_noise halves the batch: num_envs={num_envs} must be even")
    needed = 2 if algorithm.control_variate else max(facts_of(x).min_lanes for x in estimator)
    lanes = num_envs * data.num_batches + data.demonstrations  # at least one demonstration is given
    if data.gathers and lanes < needed:
        what = next((describe(x) for x in estimator if facts_of(x).min_lanes > lanes), "")
        raise ValueError(
            f"{what or 'the control variate'} compares each episode with the others: "
            f"num_envs={num_envs} must be at least {needed}"
        )
    recurrent = jax.tree.leaves(jax.eval_shape(lambda: initial_carry(agent, 1))) != []
    whole = recurrent or not facts_of(estimator.reduce).ignores_lanes
    num_lanes, unit = (
        (num_envs, "num_envs") if whole else (num_envs * num_steps, "num_envs x num_steps")
    )
    for name in ("num_minibatches", "critic_minibatches"):
        parts = getattr(algorithm, name)
        if num_lanes % parts and data.gathers:
            both = math.lcm(parts, size)
            near = sorted({max(num_lanes // both, 1) * both, (num_lanes // both + 1) * both})
            raise ValueError(
                f"{unit}={num_lanes} is not a multiple of {name}={parts}; "
                f"use {' or '.join(map(str, near))}"
            )
    steps = num_envs * num_steps // algorithm.num_minibatches
    if facts_of(estimator.surrogate).rescale and data.gathers and steps < 2:
        raise ValueError(
            f"a minibatch of {steps} step standardises to an advantage of 0, so the policy would never move; "
            f"num_envs={num_envs} x num_steps={num_steps} must be at least "
            f"{2 * algorithm.num_minibatches}, twice num_minibatches={algorithm.num_minibatches}"
        )
    samples, part = algorithm.fisher_samples, num_lanes * data.num_batches
    part = part // algorithm.num_minibatches
    if samples is not None and not 1 <= samples <= part and data.gathers:
        raise ValueError(
            f"fisher_samples={samples} must be between 1 and the batch's {unit}={part}; "
            "leave it out to use all"
        )
    return "lanes" if whole else "steps"
