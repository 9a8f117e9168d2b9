"""Enumeration: run every trajectory of a small world through the slots that training uses.

This is a second route to exact moments, for any composition, coupled ones too, in worlds small enough to
list all trajectories (or all batches of them). Float64 precision needs jax_enable_x64.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Discrete, Mdp
from jaxpg.estimators import Estimator, assess, objective
from jaxpg.lab.exact.tables import Moments, Tables, tabulate
from jaxpg.policies import tabular
from jaxpg.types import Hyperparams, Trajectory

LIMIT = 1_000_000  # trajectories, or batches of them
CHUNK = 8192  # gradients computed at a time


class Enumeration(NamedTuple):
    """All trajectories of a world, [H, N], and their probabilities under the behaviour."""

    trajectory: Trajectory
    probability: np.ndarray  # [N]


def count_trajectories(mdp: Mdp) -> int:
    """The number of distinct trajectories, without listing them."""
    return _count(tabulate(mdp, _zeros(mdp)))


def enumerate_trajectories(
    mdp: Mdp, behaviour_logits, critic=None, reference_logits=None
) -> Enumeration:
    """Every trajectory with its probability under the behaviour; rows after an end are masked zeros.

    critic: V(s) [S] or V_t(s) [H, S] for `value` and `next_value`; 0 when not given.
    reference_logits: [O, A] of a fixed policy whose log-probabilities are recorded too.
    Raises ValueError for a world with reward noise, or with more than LIMIT trajectories.
    """
    world = tabulate(mdp, behaviour_logits)
    if world.variance.any():
        raise ValueError(
            "reward noise gives a continuum of trajectories; use lab.exact, or set it to 0"
        )
    count = _count(world)
    if count > LIMIT:
        raise ValueError(
            f"the world has {count} trajectories, more than the {LIMIT} that can be listed; shorten the "
            f"horizon={world.horizon}, or use lab.exact"
        )
    state, action, alive, probability = _paths(world)
    trajectory = _trajectory(world, state, action, alive, critic)
    if reference_logits is not None:
        seen = np.log(tabulate(mdp, reference_logits).policy)[state, action]
        trajectory = trajectory._replace(reference=jnp.asarray(np.where(alive, seen, 0.0)))
    return Enumeration(trajectory, probability)


def moments(
    mdp: Mdp,
    logits,
    estimator: Estimator,
    hyperparams: Hyperparams,
    behaviour_logits=None,
    *,
    critic=None,
    reference_logits=None,
    batch_size: int = 1,
) -> Moments:
    """Mean and covariance of the gradient of a batch of independent episodes, over all batches.

    logits, behaviour_logits, reference_logits: [O, A]. The gradient is that of estimators.objective, at
    `logits`, of a tabular policy. Batches are multisets: N trajectories make (N + batch_size - 1 choose
    batch_size).
    Raises ValueError for a world with reward noise, or with more than LIMIT batches.
    """
    acting = logits if behaviour_logits is None else behaviour_logits
    tabulate(mdp, logits, acting)  # checks shapes and support
    _check_count(count_trajectories(mdp), batch_size, mdp.horizon)
    listed = enumerate_trajectories(mdp, acting, critic, reference_logits)
    index, weight = _batches(listed.probability, batch_size)
    return _moments(_gradients(estimator, listed.trajectory, logits, hyperparams, index), weight)


def group_moments(
    mdp: Mdp,
    logits,
    estimator: Estimator,
    hyperparams: Hyperparams,
    group_size: int,
    num_groups: int = 1,
    behaviour_logits=None,
) -> Moments:
    """Mean and covariance of the gradient of M groups of G episodes from one start each, over all batches.

    A group's start is drawn as the world's, and the episodes from it are independent. Raises ValueError as
    `moments` does.
    """
    acting = logits if behaviour_logits is None else behaviour_logits
    initial = np.asarray(mdp.initial, np.float64)
    parts, rows, weights, first = [], [], [], 0
    for state in np.flatnonzero(initial):
        start = mdp._replace(initial=np.eye(len(initial))[state])
        listed = enumerate_trajectories(start, acting)
        _check_count(len(listed.probability), group_size, mdp.horizon)
        index, weight = _batches(listed.probability, group_size)
        parts.append(listed.trajectory)
        rows.append(first + index)
        weights.append(initial[state] * weight)
        first += len(listed.probability)
    trajectory = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    groups, probability = np.concatenate(rows), np.concatenate(weights)
    _check_count(len(groups), num_groups, mdp.horizon)
    index, weight = _batches(probability, num_groups)
    index = groups[index].reshape(len(index), -1)
    return _moments(_gradients(estimator, trajectory, logits, hyperparams, index), weight)


def _check_count(number, size, horizon):
    count = math.comb(number + size - 1, size)
    if count > LIMIT:
        raise ValueError(
            f"there are {count} batches of {size} trajectories, more than the {LIMIT} that can be "
            f"listed; shorten the horizon={horizon} or the batch"
        )


def _moments(gradients, weight) -> Moments:
    mean = weight @ gradients
    centred = gradients - mean
    return Moments(mean, (weight[:, None] * centred).T @ centred)


def _zeros(mdp):
    return np.zeros((int(np.max(mdp.observation)) + 1, np.shape(mdp.reward)[1]))


def _count(world: Tables) -> int:
    """The number of trajectories, in Python integers, which do not overflow on a long horizon."""
    num_actions = world.reward.shape[1]
    ways = [num_actions] * len(world.initial)  # at the last step the successor does not matter
    for _ in range(world.horizon - 1):
        ways = [
            sum(
                1 if world.terminal[after] else ways[after]
                for action in range(num_actions)
                for after in np.flatnonzero(world.transition[state, action])
            )
            for state in range(len(world.initial))
        ]
    return sum(ways[state] for state in np.flatnonzero(world.initial))


def _paths(world: Tables):
    """States, actions and alive flags [H, N], and probabilities [N]; paths grow step by step."""
    start = np.flatnonzero(world.initial)
    now, probability = start, world.initial[start]
    rows = []  # of (state, action, alive), each [N so far]
    for t in range(world.horizon):
        alive = ~world.terminal[now]
        # Branch on the action and, before the last step, on the successor; an ended path stays put.
        joint = world.behaviour[now][..., None] * world.transition[now]
        if t == world.horizon - 1:
            joint = np.concatenate([world.behaviour[now][..., None], joint[..., 1:] * 0], axis=-1)
        joint[~alive] = 0.0
        joint[~alive, 0, 0] = 1.0
        path, action, after = np.nonzero(joint)
        probability = probability[path] * joint[path, action, after]
        rows = [tuple(x[path] for x in row) for row in rows]
        rows.append((now[path], action, alive[path]))
        now = np.where(alive[path], after, now[path])
    state, action, alive = (np.stack(x) for x in zip(*rows, strict=True))
    return state, action, alive, probability


def _trajectory(world, state, action, alive, critic):
    horizon = world.horizon
    value = np.zeros((horizon, len(world.initial)))
    value[:] = 0.0 if critic is None else critic
    value[:, world.terminal] = 0.0
    steps = np.arange(horizon)[:, None]
    going_on = np.concatenate([alive[1:], np.zeros_like(alive[:1])])
    columns = value[steps, state]
    with np.errstate(divide="ignore"):
        log_prob = np.log(world.behaviour)[state, action]
    floats = {
        "log_prob": log_prob,
        "reward": world.reward[state, action],
        "discount": going_on,
        "value": columns,
        "next_value": np.concatenate([columns[1:], np.zeros_like(columns[:1])]),
    }
    dtype = jnp.result_type(float)
    return Trajectory(
        obs=jnp.asarray(np.where(alive, world.observation[state], 0), jnp.int32),
        action=jnp.asarray(np.where(alive, action, 0), jnp.int32),
        first=jnp.asarray(alive & (steps == 0)),
        last=jnp.asarray(alive & ~going_on),
        mask=jnp.asarray(alive),
        **{name: jnp.asarray(np.where(alive, x, 0.0), dtype) for name, x in floats.items()},
    )


def _batches(probability, batch_size):
    """Multisets of trajectories [M, batch_size], in ascending order, and their probabilities [M]."""
    count = len(probability)
    index = np.arange(count)[:, None]
    for _ in range(batch_size - 1):
        more = count - index[:, -1]
        grown = np.repeat(index, more, axis=0)
        offset = np.arange(len(grown)) - np.repeat(np.cumsum(more) - more, more)
        index = np.concatenate([grown, (grown[:, -1] + offset)[:, None]], axis=1)
    # Count batch_size! orders, but only once those that swap equal trajectories.
    run = np.ones(len(index))
    repeats = np.ones(len(index))
    for i in range(1, batch_size):
        run = np.where(index[:, i] == index[:, i - 1], run + 1, 1)
        repeats *= run
    return index, math.factorial(batch_size) / repeats * probability[index].prod(axis=1)


def _gradients(estimator, trajectory, logits, hyperparams, index):
    """The batch gradient [M, P] of every row of index, in chunks of one shape."""
    logits = np.asarray(logits, np.float64)
    policy = tabular(Discrete(logits.shape[0]), Discrete(logits.shape[1]))
    params = {"logits": jnp.asarray(logits, jnp.result_type(float))}
    of_all = jax.jit(
        jax.vmap(partial(_gradient, estimator, policy, params, trajectory, hyperparams))
    )
    size = min(CHUNK, len(index))
    padded = np.concatenate([index, np.repeat(index[:1], -len(index) % size, axis=0)])
    chunks = [
        np.asarray(of_all(jnp.asarray(rows))) for rows in np.split(padded, len(padded) // size)
    ]
    return np.concatenate(chunks)[: len(index)].astype(np.float64)


def _gradient(estimator, policy, params, trajectory, hyperparams, lanes):
    batch = jax.tree.map(lambda x: x[:, lanes], trajectory)

    def gain(params):
        _, distribution = policy.apply(params, (), batch.obs, batch.first)
        log_prob = distribution.log_prob(batch.action)
        assessed = assess(estimator, batch, log_prob, hyperparams, policy, params)
        return objective(estimator, policy, params, (), assessed, hyperparams)[0]

    return jax.grad(gain)(params)["logits"].reshape(-1)
