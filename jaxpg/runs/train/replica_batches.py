"""Batches of replicas that fit in memory, all run by the same compiled program."""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.devices import backend
from jaxpg.runs.config.config import Config
from jaxpg.runs.host import health
from jaxpg.runs.store.checkpoint import on_host, stored_as
from jaxpg.runs.store.folder import declared_arrays, read_arrays_like, write_atomically
from jaxpg.runs.train.build import Parts
from jaxpg.runs.train.loop import chunk_length, wait_for
from jaxpg.runs.train.replicas import Programs, Replicas, compile_programs, devices_of, replicas_of
from jaxpg.types import Hyperparams

SHARE = 0.9  # of free memory that a batch may take

Tick = Callable[[np.ndarray, int, dict[str, np.ndarray]], None]  # (rows, updates, metrics [n, K])
Save = Callable[[Any, int], None]  # (state, updates)


class SweepJob(NamedTuple):
    """What every batch needs. A row is a replica: point x seeds + seed."""

    config: Config
    points: list[Hyperparams]
    parts: Parts
    executor: Executor
    compilers: Executor
    stop: Callable[[], int]  # the number of a signal, or 0


class BatchPlan(NamedTuple):
    """The one batch size and its programs: nothing else is compiled."""

    size: int
    programs: Programs
    bytes: int | None  # memory that it needs on one device


def plan(
    job: SweepJob, totals: list[int], poll: Callable[[], Any], size: int | None = None
) -> BatchPlan:
    """Finds a batch size that fits, by the compiled program's own account, and serves every rung.

    totals: the replicas of each rung. size: the batch size of a resumed sweep. Training is compiled once, and
    again with fewer replicas only if it does not fit. Raises ValueError if not even one replica fits.
    """
    free, most = health.available_bytes(), _wanted(totals)
    if size is not None:
        programs = _start(job, size)
        needed = _needed(job, programs, size, poll)
        if needed is not None and free is not None and needed > free:
            raise ValueError(
                f"the sweep began in batches of {size} agents, which need {needed / 1e9:.1f} GB of memory, "
                f"and {free / 1e9:.1f} GB are free; free some, or start again in another folder"
            )
        wait_for(programs.init, poll)  # type: ignore[arg-type]
        return BatchPlan(size, programs, needed)
    total = totals[0] if len(totals) == 1 else most
    if free is not None:
        # Skip sizes whose input plus output state exceeds free memory.
        most = min(most, max(1, int(SHARE * free / (2 * state_bytes(job.parts)))))
    while True:
        shared = job.config.shard != "environments"
        size = _equal(total, most, devices_of(job.config) if shared else 1)
        programs = _start(job, size)
        needed = _needed(job, programs, size, poll)
        if needed is None or free is None or needed <= SHARE * free:
            break
        if size == 1:
            raise ValueError(
                f"one agent needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; "
                "give fewer --num-envs, --num-steps or --evaluation-episodes"
            )
        most = max(1, min(size - 1, int(size * SHARE * free / needed)))
    wait_for(programs.init, poll)  # type: ignore[arg-type]
    return BatchPlan(size, programs, needed)


def _needed(job: SweepJob, programs: Programs, size: int, poll: Callable[[], Any]) -> int | None:
    """Bytes for training or, if it has so many episodes that it could need more, evaluating a batch."""
    needed = health.needed_bytes(wait_for(programs.train, poll))
    if needed is None or size * job.config.evaluation_episodes <= health.MANY_EPISODES:
        return needed
    return max(needed, health.needed_bytes(wait_for(programs.evaluate, poll)) or 0)


def _wanted(totals: list[int]) -> int:
    """The batch size to use if memory were unlimited.

    With halving, one size serves all rungs. On a CPU time grows with the number of replicas, so padding the
    last rung would cost most; on an accelerator it hardly does, so many small batches would.
    """
    if len(totals) == 1:
        return totals[0]
    return totals[-1] if backend() == "cpu" else totals[1]


def batches(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def begin(job: SweepJob, programs: Programs, rows: np.ndarray, size: int, states: Any = None):
    """A batch's replicas and its state: new, or given on the host, [n, ...] each."""
    replicas = _replicas(job, rows, size)
    if states is None:
        assert programs.init is not None  # compiled, because there is no state yet
        return replicas, programs.init.result()(replicas.keys)
    shapes = jax.eval_shape(jax.vmap(job.parts.trainer.init), replicas.keys)

    def padded(like, x):
        x = np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(x), impl="threefry2x32")
        return x

    return replicas, jax.device_put(jax.tree.map(padded, shapes, states), replicas.state)


def advance(
    job, programs: Programs, replicas, state, rows, span: tuple[int, int], tick: Tick, save: Save
):
    """Trains a batch chunk after chunk, from one number of updates to another or until a signal."""
    chunk, demonstrations = chunk_length(job.config.updates), job.parts.demonstrations
    common = () if demonstrations is None else (demonstrations,)
    program = wait_for(programs.train, lambda: None)

    def step(state):
        state, measured = program(state, replicas.hyperparams, *common)
        return state, jax.device_get(measured)  # which waits for the devices

    for done in range(span[0] + chunk, span[1] + 1, chunk):
        if job.stop():
            break
        state, measured = wait_for(job.executor.submit(step, state), lambda: None)
        tick(rows, done, {name: values[: len(rows)] for name, values in measured.items()})
        save(state, done)
    return state


def evaluated(
    job: SweepJob, programs: Programs, replicas: Replicas, state, count: int
) -> np.ndarray:
    """The mean returns of a batch's final evaluation, [count]; NaN where parameters have diverged."""
    program = wait_for(programs.evaluate, lambda: None)
    arguments = state.params, replicas.evaluation_keys
    found = wait_for(job.executor.submit(lambda: jax.device_get(program(*arguments))), lambda: None)
    finite = health.finite(on_host(state.params))
    return np.where(finite, found.mean, np.nan)[:count]


def kept(state, count: int):
    """A batch's states on the host, without its padding."""
    return jax.tree.map(lambda x: x[:count], on_host(state))


def write(path: Path, rows: np.ndarray, numbers: dict[str, Any], states: Any) -> None:
    """Writes a batch for a killed sweep to resume from; states: on the host, or None."""
    leaves = {f"state_{i}": x for i, x in enumerate(jax.tree.leaves(states))}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: np.savez(file, rows=rows, **numbers, **leaves))


def read(
    job: SweepJob, path: Path, rows: np.ndarray, like: dict[str, Any]
) -> tuple[dict[str, np.ndarray], Any] | None:
    """Reads the saved batch of these rows; None if there is none. Raises ValueError.

    like: numbers of the shapes and types that are written.
    """
    if not path.exists():
        return None
    try:
        declared = declared_arrays(path)
        init = jax.eval_shape(job.parts.trainer.init, jax.random.key(0))
        leaves = {f"state_{i}": stored_as(x) for i, x in enumerate(jax.tree.leaves(init))}
        wanted = {
            name: (np.shape(x), np.asarray(x).dtype) for name, x in (like | {"rows": rows}).items()
        }
        if "state_0" in declared:
            wanted |= {
                name: ((len(rows), *shape), dtype) for name, (shape, dtype) in leaves.items()
            }
        arrays = read_arrays_like(path, wanted, "this sweep")
    except ValueError as error:
        raise ValueError(f"{error}; remove it, to train its batch again") from error
    if not np.array_equal(arrays["rows"], rows):
        raise ValueError(f"{path} is a batch of other agents than this sweep's; remove it")
    states = [arrays.pop(name) for name in leaves if name in arrays]
    return arrays, jax.tree.unflatten(jax.tree.structure(init), states) if states else None


def state_bytes(parts: Parts) -> int:
    """The size of one replica's state."""
    leaves = jax.tree.leaves(jax.eval_shape(parts.trainer.init, jax.random.key(0)))
    return sum(x.size * x.dtype.itemsize for x in leaves)


def _equal(total: int, most: int, devices: int) -> int:
    """The size of equal batches, at most `most`; a multiple of the devices, so that all are used."""
    if devices <= most:
        most -= most % devices
        size = math.ceil(total / math.ceil(total / most))
        return -(-size // devices) * devices
    return math.ceil(total / math.ceil(total / most))


def _start(job: SweepJob, size: int) -> Programs:
    replicas = _replicas(job, np.zeros(1, int), size)
    chunk = chunk_length(job.config.updates)
    return compile_programs(
        job.parts, replicas, job.config, chunk, job.compilers, job.parts.demonstrations
    )


def _replicas(job: SweepJob, rows: np.ndarray, size: int) -> Replicas:
    """The replicas of these rows; the last is repeated to fill the batch."""
    seeds = job.config.seeds
    padded = np.pad(rows, (0, size - len(rows)), mode="edge").tolist()
    pairs = [(job.points[row // seeds], row % seeds) for row in padded]
    return replicas_of(job.config, pairs, job.parts.trainer)
