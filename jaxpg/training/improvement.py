"""Improvement: from an assessed batch to new parameters, in epochs of minibatch steps."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxpg.batching import lane_block
from jaxpg.devices import LANES, backend, concurrently, first_of, mean_across, shards
from jaxpg.estimators import coefficients, lane_gradients, objective, rescaled, surrogates
from jaxpg.estimators.estimator import Batch
from jaxpg.optimizers.natural import AVERAGING
from jaxpg.policies import Agent, AgentCarry, AgentParams
from jaxpg.training.accumulation import critic_gradient, gradient_of, weight_of
from jaxpg.training.algorithm import Algorithm
from jaxpg.training.diagnostics import norms
from jaxpg.types import Array, Hyperparams, Key, Metrics, Params, Trajectory

# Minibatch steps in one pass of their loop. On a GPU its counter and metrics cost as much as a product.
UNROLL = {"gpu": 4}

# Where policy and critic share one loop, which starts fewer operations. With a loop each, two CPU devices can
# run them, steps of 2048 took one CPU 0.95 times as long, and a TPU 0.91 to 1.04 times the cycles.
ONE_LOOP = {"gpu"}

# Steps in a minibatch from which on policy and critic take theirs one after the other: at once, the
# activations of both are kept, the largest arrays of the program.
ONE_BY_ONE = {"gpu": 2**16}


def optimizers(
    agent: Agent, algorithm: Algorithm, hyperparams: Hyperparams
) -> tuple[optax.GradientTransformationExtraArgs, optax.GradientTransformation]:
    """The optimizers with these hyperparameters, of the two that `trained` gives."""
    critic = None if agent.shared else algorithm.critic_optimizer
    # Optimizers read `learning_rate`, so the critic's gets its own under that name.
    for_critic = hyperparams._replace(learning_rate=hyperparams.critic_learning_rate)
    return (
        optax.with_extra_args_support(algorithm.policy_optimizer(hyperparams)),
        critic(for_critic) if critic else optax.identity(),
    )


def trained(agent: Agent, params: AgentParams) -> tuple[Params, Params]:
    """What each of the two optimizers moves: with a shared torso, the first moves everything."""
    return (params, ()) if agent.shared else (params.policy, params.critic)


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

    Neither reads the other's new parameters, so the two may run side by side. With a shared torso they
    take one step, along the policy's gradient minus value_coef times the critic's.
    layout: what a minibatch is made of, "steps" or "lanes". recall: (params, k_rollout, index) -> lanes of
    the batch's trajectory, where it is rolled out again instead of kept.
    """
    blocks, width = arrangement(algorithm, layout, *batch.advantage.shape)
    # Rows of block s are the [:, s] of this shape.
    shape = 1, blocks, batch.advantage.shape[1] // blocks
    if layout == "steps":
        # Without memory and with a mean over steps, steps may be arranged in any way.
        shape = len(batch.advantage), blocks, shape[2] // width
        batch = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[2:]), batch)
        carry = AgentCarry((), ())
    recalled = recall and partial(recall, params, k_rollout)
    estimator = algorithm.estimator
    algorithm = algorithm._replace(estimator=rescaled(estimator, batch)[0])

    def rescale(minibatch):
        return rescaled(estimator, minibatch)[1].advantage

    flat, trees = zip(*map(ravel_pytree, trained(agent, params)), strict=True)
    policy, beside = agent.policy, None
    if agent.shared:
        beside, alone = agent.critic, policy.apply
        policy = policy._replace(apply=lambda params, *inputs: alone(params.policy, *inputs))
    policy_step = partial(_policy_step, policy, beside, algorithm, layout, recalled, trees[0])
    critic_step = partial(_critic_step, agent.critic, trees[1])
    policy_optimizer, critic_optimizer = optimizers(agent, algorithm, hyperparams)
    policy_step = partial(policy_step, policy_optimizer, hyperparams)
    critic_step = partial(critic_step, critic_optimizer, hyperparams)
    axis = 0 if layout == "steps" else 1

    def taken(data, places):
        batch, carry = data
        return (
            jax.tree.map(lambda x: jnp.take(x, places, axis, mode="clip"), batch),
            jax.tree.map(lambda x: x[places], carry),
        )

    def epochs(steps, states, data, key, num_epochs, parts):
        """Step on every minibatch of every epoch; metrics are means over all of them."""
        inputs, names, count = (), [], num_epochs * parts
        if parts > 1:
            places = _minibatches(key, shape, num_epochs, parts)
            # All minibatches are rescaled at once, not each in its step.
            inputs = places, jax.vmap(lambda x: rescale(taken(data, x)[0]))(places)
        else:
            data = data[0]._replace(advantage=rescale(data[0])), data[1]

        def on(states, inputs):
            minibatch = data
            if inputs:
                places, advantage = inputs
                batch, carry = taken(data, places)
                minibatch = batch._replace(advantage=advantage), carry
            after, metrics = [], {}
            for step, x in zip(steps, states, strict=True):
                x, found = step(x, minibatch)
                after, metrics = [*after, x], metrics | found
                if minibatch[0].advantage.size >= ONE_BY_ONE.get(backend(), math.inf):
                    after, minibatch = jax.lax.optimization_barrier((after, minibatch))
            names[:] = metrics
            # One array, because an accelerator takes as long to write one number as a few.
            return tuple(after), jnp.stack([*metrics.values()])

        unroll = min(UNROLL.get(backend(), 1), count)
        states, metrics = jax.lax.scan(on, states, inputs, length=count, unroll=unroll)
        return states, dict(zip(names, metrics.mean(axis=0), strict=True))

    def fit(steps, states, data, keys):
        parts = algorithm.num_minibatches
        states, metrics = epochs(steps, states, data, keys[0], algorithm.num_epochs, parts)
        if critic_step in steps and algorithm.critic_epochs:
            more, parts = algorithm.critic_epochs, algorithm.critic_minibatches
            last, found = epochs(steps[-1:], states[-1:], data, keys[1], more, parts)
            states, metrics = (*states[:-1], *last), metrics | found
        return states, metrics

    # Traced, not a literal True, so that vmap batches the scan once.
    states = (flat[0], opt_state[0], hyperparams.stop_kl >= 0), (flat[1], opt_state[1])
    steps = policy_step, critic_step
    data, keys = (batch, carry), jax.random.split(key)
    if agent.critic is None or agent.shared:
        (state,), metrics = fit(steps[:1], states[:1], data, keys)
        states = state, states[1]
    elif backend() not in ONE_LOOP:
        (policy, metrics), (critic, more) = concurrently(
            lambda states, *rest: fit(steps[:1], states[:1], *rest),
            lambda states, *rest: fit(steps[1:], states[1:], *rest),
            *(states, data, keys),
        )
        states, metrics = (*policy, *critic), metrics | more
    else:
        states, metrics = fit(steps, states, data, keys)
    moved = tuple(tree(state[0]) for tree, state in zip(trees, states, strict=True))
    params_after: AgentParams = moved[0] if agent.shared else AgentParams(*moved)
    opt_state = tuple(state[1] for state in states)
    if algorithm.measure_kl:
        # Measured after the last step, to be the divergence of the whole update.
        moved = _kl_from(agent.policy, params.policy, batch, carry)(params_after.policy)
        metrics["kl"] = mean_across(moved, batch.trajectory.mask.sum())[0]
    return params_after, opt_state, metrics


def arrangement(
    algorithm: Algorithm, layout: str, num_steps: int, num_lanes: int
) -> tuple[int, int]:
    """Into how many blocks of lanes a batch is divided for shuffling, and how many lanes make a row.

    Every minibatch has equally many rows of each block, so a batch may be split between blocks. A row is a
    step of a few lanes: lanes are independent, so it matters little that those stay together, and on a CPU,
    shuffling single steps took as long as their gradients.
    """
    parts = math.lcm(algorithm.num_minibatches, algorithm.critic_minibatches)
    block, rows = lane_block(num_lanes, algorithm.group_size), num_steps if layout == "steps" else 1
    if block * rows % parts:
        block = num_lanes
    if layout != "steps":
        return num_lanes // block, 1
    width = next(
        n
        for n in range(min(LANES, block), 0, -1)
        if block % n == 0 and (num_steps * block // n) % parts == 0
    )
    return num_lanes // block, width


def _minibatches(key: Key, shape: tuple[int, int, int], num_epochs: int, parts: int) -> Array:
    """The rows of every minibatch of every epoch, [epochs parts, rows].

    Rows are numbered through `shape`, whose second axis is the block; each block is shuffled by itself.
    """
    blocks = shape[1]
    rows = jnp.arange(math.prod(shape)).reshape(shape).swapaxes(0, 1).reshape(blocks, -1)

    def shuffled(epoch, block, rows):
        return jax.random.permutation(jax.random.fold_in(key, epoch + num_epochs * block), rows)

    numbers = first_of(blocks) + jnp.arange(blocks)
    of_epoch = jax.vmap(shuffled, (None, 0, 0))
    places = jax.vmap(of_epoch, (0, None, None))(jnp.arange(num_epochs), numbers, rows)
    places = places.reshape(num_epochs, blocks, parts, -1)
    return places.swapaxes(1, 2).reshape(num_epochs * parts, -1)


def _policy_step(
    policy, critic, algorithm, layout, recall, tree, optimizer, hyperparams, state, minibatch
):
    # critic: of a shared torso. flat: the parameters in one vector, so that they are moved at once.
    # within_kl: [] bool, no minibatch of this update has exceeded stop_kl.
    (flat, opt_state, within_kl), (batch, carry) = state, minibatch
    params = tree(flat)
    ascent, metrics = gradient_of(
        algorithm.estimator, policy, params, carry.policy, batch, hyperparams, recall=recall
    )
    gradient = -ravel_pytree(ascent)[0]  # optimizers descend
    if algorithm.control_variate:
        gradient = _controlled(policy, algorithm, params, batch, hyperparams)
    if critic:
        descent, metrics["critic_loss"] = critic_gradient(
            critic, params, carry.critic, batch, hyperparams
        )
        gradient += hyperparams.value_coef * ravel_pytree(descent)[0]
    metrics |= norms(gradient, algorithm.policy_optimizer, hyperparams)
    extra = _extra_args(policy, algorithm, layout, params, batch, carry, hyperparams)
    if shards() > 1 and algorithm.policy_optimizer not in AVERAGING:
        extra = dict.fromkeys(extra, _refuse)
    updates, new_state = optimizer.update(tree(gradient), opt_state, params, **extra)
    new = flat + ravel_pytree(updates)[0]
    if algorithm.num_epochs * algorithm.num_minibatches == 1:
        return (new, new_state, within_kl), metrics
    within_kl &= metrics["kl"] <= hyperparams.stop_kl
    new, new_state = jax.tree.map(
        lambda new, old: jnp.where(within_kl, new, old), (new, new_state), (flat, opt_state)
    )
    return (new, new_state, within_kl), metrics


def _critic_step(critic, tree, optimizer, hyperparams, state, minibatch):
    (flat, opt_state), (batch, carry) = state, minibatch
    params = tree(flat)
    gradient, value = critic_gradient(critic, params, carry.critic, batch, hyperparams)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return (flat + ravel_pytree(updates)[0], opt_state), {"critic_loss": value}


def _refuse(*arguments):
    del arguments
    raise ValueError(
        "an optimizer that reads the loss or the KL needs the whole batch on one device; split seeds, with "
        "--shard replicas"
    )


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
    steps = trajectory.mask.sum()
    weight = weight_of(algorithm.estimator, trajectory.mask)

    def episode_log_probs(params):
        _, distribution = policy.apply(params, carry.policy, trajectory.obs, trajectory.first)
        return jnp.where(trajectory.mask, distribution.log_prob(trajectory.action), 0.0).sum(0)

    def loss(params):
        estimator = algorithm.estimator
        return -objective(estimator, policy, params, carry.policy, batch, hyperparams)[0]

    kl = _kl_from(policy, params, batch, carry)
    return {
        "loss": lambda params: mean_across(loss(params), weight)[0],
        "kl": lambda params: mean_across(kl(params), steps)[0],
        "fisher_kl": _kl_from(policy, params, *part),
        "episode_log_probs": episode_log_probs,
        "average": lambda x: mean_across(x, steps)[0],
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
    return -rows.mean(axis=0)


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
        def halved(x, axis):  # every other group of lanes
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = x.reshape(*before, -1, algorithm.group_size, *after)
            return jnp.moveaxis(jnp.moveaxis(x, axis, 0)[half::2], 0, axis).reshape(
                *before, -1, *after
            )

        part, memory = (
            jax.tree.map(lambda x: halved(x, 1), batch),
            jax.tree.map(lambda x: halved(x, 0), carry),
        )

        def value(params):
            return objective(
                algorithm.estimator, agent.policy, params, memory.policy, part, hyperparams
            )[0]

        own = ravel_pytree(jax.grad(value)(params))[0]
        return mean_across(own, weight_of(algorithm.estimator, part.trajectory.mask))[0]

    one, other = gradient(0), gradient(1)
    spread = ((one - other) ** 2).sum() / 4
    return {"noise": spread, "signal": (((one + other) / 2) ** 2).sum() - spread}
