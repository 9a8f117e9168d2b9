"""Replicas: every seed at every point of the grid, on one axis, run by one program per task."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpg.batching import divisor, group_size
from jaxpg.devices import PAIR, backend, check_devices, compiler_options, prefer
from jaxpg.rollout import evaluate
from jaxpg.runs.config.config import Config
from jaxpg.runs.train.build import Parts
from jaxpg.training.algorithm import algorithm
from jaxpg.training.trainer import train
from jaxpg.types import Hyperparams, Trajectory

AXIS = "replica"


class Replicas(NamedTuple):
    """N = points x seeds; the seed varies fastest."""

    keys: jax.Array  # [N] of training; a seed has the same key at every point
    evaluation_keys: jax.Array  # [N]
    hyperparams: Hyperparams  # [N] each
    labels: list[dict[str, float]]  # N of them: seed and hyperparameters
    sharding: NamedSharding | None  # None: one device


class Programs(NamedTuple):
    """The programs of a run, compiled or still compiling in the background."""

    train: Future  # (state, hyperparams[, demonstrations]) -> state, metrics [N, updates per chunk]
    init: Future | None  # (keys) -> state; None when there is a state already
    evaluate: Future  # (params, keys) -> Evaluation


def use_cpu_cores() -> None:
    """Makes every core a CPU device, before jax is first used; one device keeps only one core busy.

    A number of devices that the user has set stays. Raises ValueError if there is no device as asked for.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # When jax is in use already, as in a notebook, its devices stay as they are.
        with suppress(RuntimeError):
            prefer("jax_num_cpu_devices", cores or 1, -1)
    check_devices()


def make_replicas(config: Config, points: list[Hyperparams]) -> Replicas:
    """A replica for every seed at every point."""
    return replicas_of(config, [(point, seed) for point in points for seed in range(config.seeds)])


def replicas_of(config: Config, pairs: Sequence[tuple[Hyperparams, int]]) -> Replicas:
    """A replica for each point and seed, on as many devices as divide their number, or twice as many."""
    # impl is fixed, because the rbg implementation draws all lanes of a vmap from the first key.
    root = jax.random.key(config.seed, impl="threefry2x32")
    keys, evaluation_keys = _keys(root, np.array([seed for _, seed in pairs]))
    columns = zip(*(point for point, _ in pairs), strict=True)
    dtype = jax.numpy.result_type(float)
    hyperparams = Hyperparams(*(np.asarray(column, dtype) for column in columns))
    total = len(pairs)
    devices = jax.devices()
    used = divisor(total, len(devices))
    mesh = {AXIS: used}
    # With cores to spare, policy and critic are improved on two.
    if algorithm(config.algorithm).critic_optimizer and _spare(len(devices), used):
        mesh[PAIR] = 2
    sharding, size = None, math.prod(mesh.values())
    if size > 1:
        types = (AxisType.Auto,) * len(mesh)
        laid = jax.make_mesh((*mesh.values(),), (*mesh,), axis_types=types, devices=devices[:size])
        sharding = NamedSharding(laid, PartitionSpec(AXIS))
    keys, evaluation_keys, hyperparams = jax.device_put(
        (keys, evaluation_keys, hyperparams), sharding
    )
    labels = [{"seed": seed, **point._asdict()} for point, seed in pairs]
    return Replicas(keys, evaluation_keys, hyperparams, labels, sharding)


def lanes(replicas: Replicas) -> dict[str, int]:
    """The layout of the replicas, on which the last digits of their numbers depend."""
    total, sharding = len(replicas.labels), replicas.sharding
    mesh = {} if sharding is None else dict(sharding.mesh.shape)
    used = mesh.get(AXIS, 1)
    together = group_size(total // used)
    return {"replicas": total, "devices": used, "halves": mesh.get(PAIR, 1), "together": together}


def _spare(devices: int, used: int) -> bool:
    return backend() == "cpu" and devices >= 2 * used


@jax.jit
def _keys(root, index):
    # fold_in, not split: seed i is the same whatever their number.
    return tuple(
        jax.vmap(partial(jax.random.fold_in, key))(index) for key in jax.random.split(root)
    )


def compile_programs(
    parts: Parts,
    replicas: Replicas,
    config: Config,
    chunk: int,
    executor: Executor,
    demonstrations: Trajectory | None = None,
    fresh: bool = True,
) -> Programs:
    """Starts to compile the three programs.

    demonstrations: common to all replicas. fresh: there is no state yet, so compile init, too.
    """
    common = () if demonstrations is None else (demonstrations,)

    def lower(function, *arguments, common=(), donate=()):
        axes = (0,) * len(arguments) + (None,) * len(common)
        return replicated(function, axes, replicas.sharding, donate).lower(*arguments, *common)

    def start(lowered, effort):
        return executor.submit(lambda: lowered().compile(compiler_options(effort)))

    def evaluated(params, key):
        return evaluate(parts.env, parts.agent, params, key, config.evaluation_episodes)

    init = None
    if fresh:
        making = lower(parts.trainer.init, replicas.keys)
        # init runs once, so optimising it costs a CPU more than it saves, unless it fits a policy.
        init = start(lambda: making, None if config.imitate else 0)
        state = making.out_info
    else:
        state = jax.eval_shape(jax.vmap(parts.trainer.init), replicas.keys)
    training = partial(
        lower,
        partial(train, parts.trainer, num_updates=chunk),
        state,
        replicas.hyperparams,
        common=common,
        # Finding what gave a NaN needs the state before it.
        donate=() if config.debug_nans else (0,),
    )
    evaluating = partial(lower, evaluated, state.params, replicas.evaluation_keys)
    # Traced in a thread of its own, so that a signal takes effect meanwhile.
    traced = executor.submit(training)
    # Effort 2 gives a program as fast as the highest, in three quarters of the compile time.
    trained = start(traced.result, 2)

    def once_trained():
        # Compile training first: evaluation is not needed before it ends.
        wait([trained])
        return evaluating()

    return Programs(trained, init, start(once_trained, 1))


def replicated(function: Callable, axes, sharding: NamedSharding | None, donate) -> Any:
    mapped = jax.vmap(function, in_axes=axes)
    if sharding is None:
        return jax.jit(mapped, donate_argnums=donate)
    # shard_map, so that each device looks only at its own replicas: under jit alone, "has any replica's
    # episode ended?" would be a message between devices in every step.
    specs = tuple(sharding.spec if axis == 0 else PartitionSpec() for axis in axes)
    mapped = jax.shard_map(
        mapped, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False
    )
    placed = tuple(NamedSharding(sharding.mesh, spec) for spec in specs)
    return jax.jit(mapped, in_shardings=placed, out_shardings=sharding, donate_argnums=donate)
