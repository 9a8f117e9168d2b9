"""Sampling: the gradients of several estimators on the same episodes, reduced as they are drawn.

The work is split into groups, each a call of one compiled program. Within a group, batches of N
trajectories are formed for every N asked for, so that one pass over the data gives the whole curve.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.batching import divisor, map_over_devices
from jaxpg.devices import compiler_options, running
from jaxpg.lab.measure.samples import Source, log_probs, roll, trajectory_bytes, weigh
from jaxpg.lab.measure.statistics import log_power_sums
from jaxpg.lab.studies.forms import Form
from jaxpg.lab.studies.measured import Measured
from jaxpg.lab.studies.study import Progress
from jaxpg.lab.worlds.world import World, num_params
from jaxpg.memory import available_bytes, check_fits, needed_bytes
from jaxpg.stats.moments import GROUPS, SampleMoments, moments_of
from jaxpg.types import Key

Measure = Callable[..., dict[str, Measured]]  # one compiled program of (key, params=the world's)


def measure(
    world: World,
    forms: Sequence[Form],
    key: Key,
    num_trajectories: int,
    sizes: Sequence[int] = (1,),
    progress: Progress = lambda line: None,
    reference: np.ndarray | None = None,
) -> dict[str, Measured]:
    """Measure every form on the same episodes: moments of means over N trajectories for each N of sizes.

    sizes: multiples of the smallest, which is the batch of forms that couple trajectories. Trajectory i
    has the key fold_in(key, i), whatever the forms. reference: [P], for cosines. Raises ValueError for
    too few trajectories, and for a request that does not fit in memory, with one that does.
    """
    return measurer(world, forms, num_trajectories, sizes, progress, reference)(key)


def measurer(
    world: World,
    forms: Sequence[Form],
    num_trajectories: int,
    sizes: Sequence[int] = (1,),
    progress: Progress = lambda line: None,
    reference: np.ndarray | None = None,
) -> Measure:
    """`measure`, compiled once for many keys and parameters: run(key, params)."""
    per_group = group_size(num_trajectories, max(sizes))
    # The means of a group's batches, with their sorted copies and the gradients' workspace.
    means = 3 * len(forms) / min(sizes)
    each = trajectory_bytes(source_of(world, forms[0], jax.random.key(0)), means) / GROUPS
    check_episodes(each, num_trajectories)
    toward = jnp.zeros(num_params(world)) if reference is None else jnp.asarray(reference)

    # As many groups in a call as devices can share evenly; what a group gives does not depend on the others.
    together = divisor(GROUPS, running())

    def groups(key, params, first):
        there = world._replace(params=params)

        def group(index):
            start = (first + index) * per_group
            return _group(there, forms, per_group, tuple(sorted(sizes)), toward, key, start)

        return map_over_devices(group, together)

    progress(f"compiling {len(forms)} estimator{'s' * (len(forms) > 1)} on {world.name}")
    lowered = jax.jit(groups).lower(jax.random.key(0, impl="threefry2x32"), world.params, 0)
    numbers = num_trajectories * world.env.horizon * num_params(world)
    program = lowered.compile(options_for(numbers // 4))
    check_episodes((needed_bytes(program) or 0) / num_trajectories, num_trajectories)

    def run(key, params=world.params):
        found, started = [], time.perf_counter()
        for first in range(0, GROUPS, together):
            found.append(jax.tree.map(np.asarray, program(key, params, first)))
            done = first + together
            left = (time.perf_counter() - started) * (GROUPS / done - 1)
            if first == 0 or done * 4 // GROUPS > first * 4 // GROUPS:
                count = f"{done * per_group:,} of {GROUPS * per_group:,} trajectories"
                progress(f"{count}, about {left:.0f} s left" if left > 1 else count)
        return _collect(forms, per_group, found)

    return run


def group_size(num_trajectories: int, largest: int) -> int:
    """Trajectories per group, a multiple of the largest batch. Raises ValueError for too few."""
    per_group = num_trajectories // GROUPS // largest * largest
    if per_group < 2 * largest:
        raise ValueError(
            f"trajectories={num_trajectories} gives fewer than the {2 * GROUPS} batches of {largest} that an "
            f"interval needs; use --trajectories {2 * GROUPS * largest} or more"
        )
    return per_group


def powers(num_trajectories: int, first: int = 1, base: int = 4) -> list[int]:
    """first, first base, first base^2 ... as long as there are enough batches for an interval."""
    sizes = [first]
    while sizes[-1] * base * 2 * GROUPS <= num_trajectories:
        sizes.append(sizes[-1] * base)
    return sizes


def _collect(forms, per_group, found) -> dict[str, Measured]:
    rows, steps, log_weights = jax.tree.map(lambda *x: np.concatenate(x), *found)
    return {
        form.name: Measured(
            {
                n: SampleMoments(*(np.asarray(x, np.float64) for x in m))
                for n, (m, _) in levels.items()
            },
            GROUPS * per_group,
            int(steps[int(form.off_policy)].astype(np.int64).sum()),
            _effective(log_weights[int(form.off_policy)][:, :2]),
            _effective(log_weights[int(form.off_policy)][:, 2:]),
            {n: np.asarray(c, np.float64) for n, (_, c) in levels.items()},
        )
        for form, levels in zip(forms, rows, strict=True)
    }


def check_episodes(one: float, count: int, what: str = "the gradients of") -> None:
    """Raises ValueError if `count` episodes of `one` bytes each need more memory than there is."""
    check_fits(available_bytes(), one, count, what, "episode", "give fewer --trajectories")


def _group(world, forms, per_group, sizes, toward, key, start):
    """Moments and cosines of every form and N, environment steps, log sums of the weights' powers."""
    unit, rows = sizes[0], {}
    steps, log_weights = [jnp.int32(0)] * 2, [jnp.full(4, -jnp.inf)] * 2
    for off_policy, critics in _shared(forms):
        for group in critics:
            source = source_of(world, group[-1], key)  # the last: forms without a critic come first
            trajectory = roll(source, start, per_group)
            batches = jax.tree.map(lambda x: x.reshape(len(x), -1, unit, *x.shape[2:]), trajectory)
            steps[off_policy] = trajectory.mask.sum()
            log_weights[off_policy] = _log_weights(source, trajectory)
            sources = [source_of(world, form, key) for form in group]
            means = jax.vmap(partial(_mean_gradients, sources), in_axes=1)(batches)
            for n in sizes:
                parts = means.reshape(-1, n // unit, *means.shape[1:]).mean(axis=1)
                of_forms = jax.vmap(partial(_reduced, toward), in_axes=1)(parts)
                for i, form in enumerate(group):
                    row = jax.tree.map(lambda x, i=i: x[i], of_forms)
                    rows.setdefault(form.name, {})[n] = row
    return [rows[form.name] for form in forms], steps, log_weights


def options_for(steps) -> dict[str, Any] | None:
    """Compiler options: for little work, optimising costs more than it saves."""
    return compiler_options(0 if steps < 2**24 else None)


def source_of(world: World, form: Form, key: Key) -> Source:
    """The Source from which the laboratory's functions sample a form."""
    behaviour = world.behaviour_params if form.off_policy else None
    return Source(
        world.env, world.policy, form.sampled, world.params, key, form.hyperparams, behaviour,
        form.critic, form.critic_params,
    )  # fmt: skip


def _shared(forms):
    """Yield (off_policy, groups of forms that share a rollout); forms without a critic join any group."""
    for off_policy in sorted({form.off_policy for form in forms}):
        groups: dict[bytes, list] = {}
        same = [form for form in forms if form.off_policy == off_policy]
        for form in same:
            if form.critic is not None:
                leaves = jax.tree.leaves(form.critic_params)
                params = b"".join(np.asarray(x).tobytes() for x in leaves)
                groups.setdefault(params, []).append(form)
        plain = [form for form in same if form.critic is None]
        first, *others = list(groups.values()) or [[]]
        yield off_policy, [plain + first, *others]


def _mean_gradients(sources, trajectory):
    """The batch estimate of every source [E, P]: coefficients differ, scores are shared."""
    coefficients = jnp.stack([_coefficient(source, trajectory) for source in sources])
    _, pull = jax.vjp(log_probs(sources[0], trajectory), sources[0].policy_params)
    return jax.vmap(lambda c: ravel_pytree(pull(c)[0])[0])(coefficients)


def _reduced(toward, means):
    """Moments of batch means [K, P], and their mean cosine to the reference and to their neighbours."""
    length = jnp.linalg.norm(means, axis=1)
    unit = means / jnp.where(length > 0, length, 1.0)[:, None]  # 0 has no direction: cosine 0
    aim = toward / jnp.maximum(jnp.linalg.norm(toward), 1e-30)
    pairs = unit[: len(unit) // 2 * 2].reshape(-1, 2, unit.shape[1])
    cosines = jnp.stack([(unit @ aim).mean(), (pairs[:, 0] * pairs[:, 1]).sum(axis=1).mean()])
    return moments_of(means), cosines


def _coefficient(source, trajectory):
    if source.critic is None:  # the rollout may hold the values of another form's critic
        zero = jnp.zeros_like(trajectory.value)
        trajectory = trajectory._replace(value=zero, next_value=zero)
    return weigh(source, trajectory).coefficient / trajectory.mask.shape[1]


def _log_weights(source, trajectory):
    if source.behaviour_params is None:
        log_weight = jnp.zeros(trajectory.mask.shape[1])
    else:
        log_prob = log_probs(source, trajectory)(source.policy_params)
        log_weight = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0).sum(axis=0)
    return log_power_sums(log_weight)


def _effective(log_weights) -> float:
    """The effective sample size, exp(2 lse(l) - lse(2 l)) over the groups."""
    total, squares = (np.logaddexp.reduce(x) for x in np.asarray(log_weights, np.float64).T)
    return float(np.exp(2 * total - squares)) if np.isfinite(total) else 0.0
