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
from jax.sharding import NamedSharding, PartitionSpec

from jaxpg.batching import group_size
from jaxpg.devices import (
    LANES,
    PAIR,
    SHARDS,
    backend,
    check_devices,
    check_present,
    check_split,
    compiler_options,
    lane_specs,
    mesh_of,
    placed,
    prefer,
    present,
    processes,
    some_devices,
    undivided,
)
from jaxpg.rollout import evaluate
from jaxpg.runs.config.config import ALL, Config
from jaxpg.runs.train.build import Parts
from jaxpg.training.algorithm import algorithm
from jaxpg.training.trainer import Trainer, train
from jaxpg.types import Hyperparams, Trajectory

AXIS = "replica"


class Replicas(NamedTuple):
    """N = points x seeds; the seed varies fastest."""

    keys: jax.Array  # [N] of training; a seed has the same key at every point
    evaluation_keys: jax.Array  # [N]
    hyperparams: Hyperparams  # [N] each
    labels: list[dict[str, float]]  # N of them: seed and hyperparameters
    sharding: NamedSharding | None  # None: one device
    state: Any = None  # the sharding of a state, or of each of its arrays


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


class Layout(NamedTuple):
    """How many devices share the replicas, and how many of them share each replica's environments."""

    replicas: int
    environments: int

    def words(self, present: int) -> str:
        """What is split, and over how many devices if not all: ` (replicas)`, ` (environments over 4)`."""
        parts = zip(self._fields, self, strict=True)
        split = [
            name if count == present else f"{name} over {count}"
            for name, count in parts
            if count > 1
        ]
        return f" ({', '.join(split)})" if split else ""


def devices_of(config: Config) -> int:
    """The number of devices asked for."""
    return len(present()) if config.devices == ALL else int(config.devices)


def layout_of(config: Config, total: int, trainer: Trainer | None = None) -> Layout:
    """The most of the devices asked for that replicas, or else environments, can be split over.

    On a CPU with a core to spare, policy and critic take one each, so their environments stay together,
    unless there are several processes, which all take part.
    """
    most = devices_of(config)
    few = 1 if trainer is None or trainer.obstacle else trainer.blocks
    asked = config.shard
    if asked is None:
        alone = backend() == "cpu" and processes() == 1
        together = alone and config.devices == ALL and _pairs(config)
        asked = "replicas" if total % most == 0 or together else "both"
    found = [
        Layout(one, other)
        for one in range(1, most + 1)
        for other in range(1, most // one + 1)
        if total % one == 0 and few % other == 0
    ]
    if asked != "both":
        found = [each for each in found if each[asked == "replicas"] == 1]
    return max(found, key=lambda each: (math.prod(each), each.replicas))


def check_shares(config: Config, trainer: Trainer) -> int:
    """The devices asked for. Raises ValueError if they are not there, or cannot share an agent as asked."""
    asked = check_present(devices_of(config))
    if config.shard == "environments":
        check_split(trainer, asked)
    return asked


def check_layout(config: Config, total: int, trainer: Trainer) -> None:
    """Raises ValueError for more devices than there are, and for a split as asked for that is uneven."""
    asked = check_shares(config, trainer)
    unasked = config.shard is None and config.devices == ALL and processes() == 1
    if config.shard == "environments" or unasked:
        return
    found = layout_of(config, total, trainer)
    if math.prod(found) == asked:
        return
    near = sorted({max(total // asked, 1) * asked, -(-total // asked) * asked})
    ways = [
        f"{' or '.join(map(str, near))} agents (seeds x points)",
    ]
    if math.prod(found) % processes() == 0:
        ways.append(f"--devices {math.prod(found)}")
    if config.shard == "replicas":
        ways.append("--shard environments")
    elif not trainer.obstacle:
        ways.append(f"a multiple of {LANES * asked} environments")
    raise ValueError(
        f"{total} agents cannot be split evenly over devices={asked}; use "
        f"{', '.join(ways[:-1])} or {ways[-1]}"
    )


def make_replicas(
    config: Config, points: list[Hyperparams], trainer: Trainer | None = None
) -> Replicas:
    """A replica for every seed at every point; trainer: if given, environments may be split, too."""
    pairs = [(point, seed) for point in points for seed in range(config.seeds)]
    return replicas_of(config, pairs, trainer)


def replicas_of(
    config: Config, pairs: Sequence[tuple[Hyperparams, int]], trainer: Trainer | None = None
) -> Replicas:
    """A replica for each point and seed, on as many devices as `layout_of` finds, or twice as many."""
    # impl is fixed, because the rbg implementation draws all lanes of a vmap from the first key.
    root = jax.random.key(config.seed, impl="threefry2x32")
    keys, evaluation_keys = _keys(root, np.array([seed for _, seed in pairs]))
    columns = zip(*(point for point, _ in pairs), strict=True)
    dtype = jax.numpy.result_type(float)
    hyperparams = Hyperparams(*(np.asarray(column, dtype) for column in columns))
    layout = layout_of(config, len(pairs), trainer)
    devices = some_devices(devices_of(config))
    mesh = {AXIS: layout.replicas}
    if layout.environments > 1:
        mesh[SHARDS] = layout.environments
    # With cores to spare, policy and critic are improved on two.
    elif _pairs(config) and _spare(len(devices), layout.replicas):
        mesh[PAIR] = 2
    sharding = state = None
    size = math.prod(mesh.values())
    if size > 1:
        laid = mesh_of(mesh, devices)
        state = sharding = NamedSharding(laid, PartitionSpec(AXIS))
        if trainer and SHARDS in mesh:
            state = jax.tree.map(
                lambda spec: NamedSharding(laid, PartitionSpec(AXIS, *spec)),
                lane_specs(trainer.init, laid),
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )
    keys, evaluation_keys, hyperparams = placed((keys, evaluation_keys, hyperparams), sharding)
    labels = [{"seed": seed, **point._asdict()} for point, seed in pairs]
    return Replicas(keys, evaluation_keys, hyperparams, labels, sharding, state)


def lanes(replicas: Replicas) -> dict[str, int]:
    """The layout of the replicas, on which the last digits of their numbers depend."""
    total, sharding = len(replicas.labels), replicas.sharding
    mesh = {} if sharding is None else dict(sharding.mesh.shape)
    used = mesh.get(AXIS, 1)
    together = group_size(total // used)
    found = {"replicas": total, "devices": used, "halves": mesh.get(PAIR, 1), "together": together}
    return found | ({"environments": mesh[SHARDS]} if SHARDS in mesh else {})


def _pairs(config: Config) -> bool:
    """Whether policy and critic take steps of their own, and so can take them on two devices."""
    return algorithm(config.algorithm).critic_optimizer is not None and not config.shared_torso


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
    laid, of_state = replicas.sharding, replicas.state

    def lower(function, arguments, common=(), donate=(), shardings=None, out=None):
        axes = (0,) * len(arguments) + (None,) * len(common)
        program = replicated(function, axes, laid, donate, shardings, out or laid)
        return program.lower(*arguments, *common)

    def start(lowered, effort):
        return executor.submit(lambda: lowered().compile(compiler_options(effort)))

    def evaluated(params, key):
        with undivided():
            return evaluate(parts.env, parts.agent, params, key, config.evaluation_episodes)

    init = None
    if fresh:
        making = lower(parts.trainer.init, (replicas.keys,), out=of_state)
        # init runs once, so optimising it costs a CPU more than it saves, unless it fits a policy.
        init = start(lambda: making, None if config.imitate else 0)
        state = making.out_info
    else:
        state = jax.eval_shape(jax.vmap(parts.trainer.init), replicas.keys)
    training = partial(
        lower,
        partial(train, parts.trainer, num_updates=chunk),
        (state, replicas.hyperparams),
        common=common,
        shardings=(of_state, laid),
        out=(of_state, laid),
        # Finding what gave a NaN needs the state before it.
        donate=() if config.debug_nans else (0,),
    )
    evaluating = partial(lower, evaluated, (state.params, replicas.evaluation_keys))
    # Traced in a thread of its own, so that a signal takes effect meanwhile.
    traced = executor.submit(training)
    # Effort 2 gives a program as fast as the highest, in three quarters of the compile time.
    trained = start(traced.result, 2)

    def once_trained():
        # Compile training first: evaluation is not needed before it ends.
        wait([trained])
        return evaluating()

    return Programs(trained, init, start(once_trained, 1))


def replicated(
    function: Callable,
    axes,
    sharding: NamedSharding | None,
    donate,
    ins: Any = None,
    out: Any = None,
) -> Any:
    """The function of all replicas at once; ins, out: shardings, where they are not all the replicas'."""
    mapped = jax.vmap(function, in_axes=axes)
    if sharding is None:
        return jax.jit(mapped, donate_argnums=donate)
    # shard_map, so that each device looks only at its own replicas: under jit alone, "has any replica's
    # episode ended?" would be a message between devices in every step.
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    ins = ins or (sharding,) * axes.count(0)
    ins, out = (*ins, *(everywhere,) * axes.count(None)), sharding if out is None else out
    specs = jax.tree.map(lambda placed: placed.spec, (ins, out))
    mapped = jax.shard_map(
        mapped, mesh=sharding.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
    )
    return jax.jit(mapped, in_shardings=ins, out_shardings=out, donate_argnums=donate)
