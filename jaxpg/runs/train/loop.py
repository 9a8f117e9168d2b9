"""The host loop: chunks of updates on the devices, and between them files and progress."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.devices import fetched
from jaxpg.runs.config.config import Config, Grid, points
from jaxpg.runs.host import cluster, health
from jaxpg.runs.host.interrupt import Interrupted
from jaxpg.runs.host.progress import Show, Status
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.checkpoint import Checkpoints, copied, steps
from jaxpg.runs.store.metrics import Records, Sink, Table, nan_mean
from jaxpg.runs.train.build import Parts, build_algorithm
from jaxpg.runs.train.replicas import Replicas
from jaxpg.stats.intervals import ANY, attained
from jaxpg.training.algorithm import unmeasured
from jaxpg.training.trainer import TrainState, train

CHUNKS = 20  # approximate number in a run
# Bounded, so that Ctrl-C soon takes effect; a long scan may also cost more per step (jax issue 40101).
LONGEST_CHUNK = 200


class TrainingJob(NamedTuple):
    """What every part of a run needs."""

    config: Config
    grid: Grid
    parts: Parts
    folder: Path
    replicas: Replicas
    executor: Executor
    stopped: Callable[[], int]  # the number of a signal, or 0
    show: Show
    before_chunk: Callable[[], None] = lambda: None


class Recorder(NamedTuple):
    """The destinations that a run is written to."""

    sinks: Sequence[Sink]
    table: Table
    checkpoints: Checkpoints


class Progress(NamedTuple):
    """The progress of a run, which a checkpoint stores with the state."""

    updates: int
    env_steps: list[int]  # of each replica; Python integers do not overflow
    seconds: float  # of training, without compilation
    diverged: dict[int, int]  # replica -> update
    lines: int = 0  # of metrics.jsonl


def train_chunks(
    job: TrainingJob,
    program: Any,
    state: TrainState,
    progress: Progress,
    recorder: Recorder,
    compile_seconds: float,
) -> tuple[TrainState, Status, Progress, int]:
    """Trains chunk after chunk until the end or a signal, whose number it returns, and saves there.

    Several processes stop at the same chunk. Raises health.Diverged.
    """
    config = job.config
    none = np.full((len(points(job.grid)), config.seeds), np.nan)
    base, started, saved = progress.seconds, time.perf_counter(), -math.inf
    saved_at = progress.updates or -1
    at = partial(_status, config, compile_seconds)
    unsaid = unmeasured(build_algorithm(config))
    job.show(status := at(progress, none))
    stopping, _ = cluster.voted(job.stopped(), False)
    while progress.updates < config.updates and not stopping:
        paused = time.perf_counter()
        job.before_chunk()
        started += time.perf_counter() - paused
        before = state if config.debug_nans else None
        state, measured = _advance(job, program, state)
        measured = {name: x for name, x in measured.items() if name not in unsaid}
        seconds = base + time.perf_counter() - started
        records, progress = _records(measured, progress, seconds)
        for write in (recorder.table.write, *(sink.write for sink in recorder.sinks)):
            write(records)
        progress = _judge(job, recorder, records, progress, before)
        returns = nan_mean(records.metrics["episode_return"]).reshape(none.shape)
        seen = attained(records.metrics["episode_return"])
        job.show(status := at(progress, returns, seen))
        due = time.perf_counter() - saved >= config.checkpoint_seconds
        stopping, due = cluster.voted(job.stopped(), due)
        if due:
            progress = _save(job, recorder, state, progress, returns)
            saved, saved_at = time.perf_counter(), progress.updates
    if saved_at != progress.updates:
        progress = _save(job, recorder, state, progress, status.returns)
    recorder.checkpoints.wait()
    return state, status, progress, stopping


def chunk_length(updates: int, done: int = 0) -> int:
    """The updates per chunk: about CHUNKS chunks of equal length, so that one compile serves all.

    A resumed run keeps the length of the whole run if it can, because that program may be in the cache.
    """
    chunk = _divisor(updates)
    return chunk if done % chunk == 0 else _divisor(updates - done)


def _divisor(updates: int) -> int:
    divisors = [k for k in range(1, min(updates, LONGEST_CHUNK) + 1) if updates % k == 0]
    wanted = min(max(updates / CHUNKS, 1), LONGEST_CHUNK)
    return min(divisors, key=lambda k: abs(math.log(k / wanted)))


def _status(config, compile_seconds, progress, returns, attainable=ANY) -> Status:
    total = sum(progress.env_steps)
    return Status(
        progress.updates,
        config.updates,
        total,
        progress.seconds,
        compile_seconds,
        returns,
        attainable,
    )


def _records(measured, progress, seconds) -> tuple[Records, Progress]:
    """The chunk's metrics with its counters, and the run's progress after it."""
    steps = np.asarray(measured.pop("env_steps")).astype(np.int64)
    count = steps.shape[1]
    so_far = np.array(progress.env_steps, np.int64)[:, None] + steps.cumsum(axis=1)
    records = Records(
        progress.updates + 1 + np.arange(count),
        so_far,
        np.linspace(progress.seconds, seconds, count + 1)[1:],
        measured,
    )
    after = progress._replace(
        updates=progress.updates + count,
        env_steps=so_far[:, -1].tolist(),
        seconds=seconds,
        lines=progress.lines + 1,
    )
    return records, after


def _advance(job: TrainingJob, program, state):
    noted = []

    def note():
        if job.stopped() and not noted:
            noted.append(True)
            job.show("stopping after this chunk; the same signal again aborts at once")

    def step(state):
        state, metrics = program(state, job.replicas.hyperparams, *_common(job))
        return state, fetched(metrics)  # which waits for the devices

    return wait_for(job.executor.submit(step, state), note)


def _common(job: TrainingJob) -> tuple:
    """The arguments that all replicas share: demonstrations, if there are any."""
    demonstrations = job.parts.demonstrations
    return () if demonstrations is None else (demonstrations,)


def _judge(job, recorder, records, progress, before) -> Progress:
    """Records replicas that have diverged. Raises health.Diverged if no setting is left to go on."""
    found = health.first_divergence(records.update, records.metrics)
    new = {i: each for i, each in enumerate(found) if each[0] and i not in progress.diverged}
    return _diverged(job, recorder, progress, new, before)


def _diverged(job, recorder, progress, new: dict[int, tuple[int, str]], before) -> Progress:
    if not new:
        return progress
    replica, (update, what) = min(new.items(), key=lambda item: item[1][0])
    labels = job.replicas.labels
    message = health.diverged_message(labels[replica], replica, update, what)
    diverged = progress.diverged | {i: each[0] for i, each in new.items()}
    # One diverged seed ends a run of one setting; in a grid the other settings are still informative.
    if len(points(job.grid)) > 1 and len(diverged) < len(labels):
        job.show(f"{message}; the others go on")
        return progress._replace(diverged=diverged)
    recorder.table.flush()
    recorder.checkpoints.wait()
    message += _last_checkpoint(job.folder)
    if before is not None:
        message += _explained(job, before, replica, update)
    raise health.Diverged(message)


def _last_checkpoint(folder) -> str:
    found = steps(folder / files.CHECKPOINTS)
    if not found:
        return "; there is no checkpoint yet"
    return f"; the last good checkpoint is {folder / files.CHECKPOINTS / str(found[-1])}"


def _explained(job, before, replica, update) -> str:
    """Finds the operation that gave the NaN, from the state before the chunk."""
    state, numbers = jax.tree.map(lambda x: x[replica], (before, job.replicas.hyperparams))
    good = update - 1 - int(state.num_updates)
    trainer, common = job.parts.trainer, _common(job)
    if good:
        state, _ = jax.jit(partial(train, trainer, num_updates=good))(state, numbers, *common)
    found = health.explain(job.config.environment, trainer.update, state, numbers, *common)
    return f"; {found}" if found else "; run alone, its update gave no NaN"


def _save(job, recorder, state, progress, returns) -> Progress:
    """Saves a checkpoint. Raises health.Diverged if parameters are not finite and no setting can go on."""
    copy = copied(state)
    bad = (
        set(np.flatnonzero(~health.finite(fetched(copy.params))).tolist())
        - progress.diverged.keys()
    )
    new: dict[int, tuple[int, str]] = dict.fromkeys(bad, (progress.updates, "a parameter"))
    progress = _diverged(job, recorder, progress, new, None)
    recorder.table.flush()
    record = {
        "env_steps": progress.env_steps,
        "seconds": progress.seconds,
        "lines": progress.lines,
        "diverged": {str(i): update for i, update in progress.diverged.items()},
    }
    settings = nan_mean(returns)
    score = np.nanmax(settings) if np.isfinite(settings).any() else -math.inf
    recorder.checkpoints.save(progress.updates, copy, record, float(score))
    return progress


@contextmanager
def workers() -> Iterator[Executor]:
    """Provides worker threads, because Python handles a signal only while its main thread waits."""
    executor = ThreadPoolExecutor(2)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def on_workers(job: TrainingJob, poll: Callable[[], Any], program: Any, *arguments: Any) -> Any:
    """Runs a program in a worker thread, and returns its results on the host."""
    return wait_for(job.executor.submit(lambda: fetched(program(*arguments))), poll)


def wait_for(future: Future, poll: Callable[[], Any]) -> Any:
    """Waits for the future's result, and polls now and then whether to stop."""
    while not wait([future], timeout=0.1).done:
        poll()
    return future.result()


def stopper(stopped: Callable[[], int], message: str) -> Callable[[], None]:
    """A function that raises Interrupted after a signal."""

    def stop():
        if stopped():
            raise Interrupted(stopped(), message)

    return stop
