"""Replicas: every seed at every point of the grid, on one axis, run by one program per task."""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpg.experiment.build import Parts
from jaxpg.experiment.config import Config
from jaxpg.rollout import evaluate
from jaxpg.trainer import train
from jaxpg.types import Hyperparams

AXIS = "replica"


class Replicas(NamedTuple):
    """N = points x seeds; the seed varies fastest."""

    keys: jax.Array  # [N] of training; a seed has the same key at every point
    evaluation_keys: jax.Array  # [N]
    hyperparams: Hyperparams  # [N] each
    labels: list[dict[str, float]]  # N of them: seed and hyperparameters
    sharding: NamedSharding | None  # None: one device


class Programs(NamedTuple):
    """Compiled, or still compiling in the background."""

    train: Future  # (state, hyperparams) -> state, metrics [N, updates per chunk]
    init: Future  # (keys) -> state
    evaluate: Future  # (params, keys) -> Evaluation


def use_cpu_cores() -> None:
    """Makes a CPU device of every core, before jax is first used; one device keeps one core busy."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # When jax is in use already, as in a notebook, its devices stay as they are.
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores or 1)


def make_replicas(config: Config, points: list[Hyperparams]) -> Replicas:
    """The replica axis, laid over as many devices as divide it."""
    seeds, total = config.seeds, config.seeds * len(points)
    # Named, because the rbg implementation draws all lanes of a vmap from the first key.
    root = jax.random.key(config.seed, impl="threefry2x32")
    k_train, k_evaluate = jax.random.split(root)
    # fold_in, not split: seed i is the same however many there are.
    index = jnp.arange(total) % seeds
    keys, evaluation_keys = (
        jax.vmap(partial(jax.random.fold_in, key))(index) for key in (k_train, k_evaluate)
    )
    columns = (np.asarray(column, np.float32) for column in zip(*points, strict=True))
    hyperparams = Hyperparams(*(np.repeat(column, seeds) for column in columns))
    devices = jax.devices()
    used = max(n for n in range(1, len(devices) + 1) if total % n == 0)
    sharding = None
    if used > 1:
        mesh = jax.make_mesh((used,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:used])
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    keys, evaluation_keys, hyperparams = jax.device_put(
        (keys, evaluation_keys, hyperparams), sharding
    )
    labels = [{"seed": seed, **point._asdict()} for point in points for seed in range(seeds)]
    return Replicas(keys, evaluation_keys, hyperparams, labels, sharding)


def compile_programs(
    parts: Parts, replicas: Replicas, config: Config, chunk: int, executor: Executor
) -> Programs:
    """Starts to compile the three programs; training's is the longest, so it goes first."""
    state = jax.eval_shape(jax.vmap(parts.trainer.init), replicas.keys)

    def start(function, *arguments, effort=None, donate=()):
        program = _replicated(function, replicas.sharding, donate)
        options = _compiler_options(effort)
        return executor.submit(lambda: program.lower(*arguments).compile(options))

    def evaluated(params, key):
        return evaluate(parts.env, parts.agent, params, key, config.evaluation_episodes)

    return Programs(
        train=start(
            partial(train, parts.trainer, num_updates=chunk),
            state,
            replicas.hyperparams,
            donate=(0,),
        ),
        # Run once, so optimising them costs the CPU compiler more than it saves.
        init=start(parts.trainer.init, replicas.keys, effort=0),
        evaluate=start(evaluated, state.params, replicas.evaluation_keys, effort=1),
    )


def _replicated(function: Callable, sharding: NamedSharding | None, donate) -> Any:
    mapped = jax.vmap(function)
    if sharding is None:
        return jax.jit(mapped, donate_argnums=donate)
    # shard_map, so that each device looks only at its own replicas: under jit alone, "has any replica's
    # episode ended?" would be a message between devices in every step.
    mapped = jax.shard_map(
        mapped, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
    )
    return jax.jit(mapped, in_shardings=sharding, out_shardings=sharding, donate_argnums=donate)


def _compiler_options(effort):
    if effort is None or jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": effort}
