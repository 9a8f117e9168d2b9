"""The host loop: chunks of updates on the devices, and between them files and progress."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.experiment import folder as files
from jaxpg.experiment.build import Parts, build
from jaxpg.experiment.config import Config, Grid, check, completed, points
from jaxpg.experiment.interrupt import Interrupted, signals
from jaxpg.experiment.progress import Status, display
from jaxpg.experiment.replicas import (
    Programs,
    Replicas,
    compile_programs,
    make_replicas,
    use_cpu_cores,
)
from jaxpg.experiment.report import headline, summary
from jaxpg.rollout import Evaluation

CHUNKS = 20  # about so many in a run
# So that Ctrl-C is soon obeyed; and a long scan may cost more than its length (jax issue 40101).
LONGEST_CHUNK = 200


class Experiment(NamedTuple):
    """A run that has been checked: nothing about it can be a user's mistake any more."""

    config: Config
    grid: Grid
    parts: Parts
    folder: Path


def prepare(config: Config, grid: Grid) -> Experiment:
    """Checks everything and makes the run's folder. Raises ValueError, leaving nothing behind."""
    use_cpu_cores()
    grid = completed(config, grid)
    check(config, grid)
    parts = build(config)
    return Experiment(config, grid, parts, files.create_folder(config))


def execute(experiment: Experiment) -> None:
    """Trains, evaluates, reports and fills the folder.

    Raises Interrupted after SIGINT or SIGTERM, with what was learnt so far saved.
    """
    config, grid, _, folder = experiment
    with signals() as stopped, _workers() as executor:
        replicas = make_replicas(config, points(grid))
        files.write_json(folder / files.CONFIG, files.description(config, grid, replicas.labels))
        if not config.quiet:
            print(headline(config, grid), flush=True)
        with display(config.quiet) as show:
            programs, seconds = _compiled(experiment, replicas, executor, show, stopped)
            train, init, evaluate = programs
            advance = _advance(executor, train.result(), replicas, stopped, show)
            state = init.result()(replicas.keys)
            state, status = _train(experiment, advance, state, seconds, show, stopped)
            files.write_params(folder / files.PARAMS, state.params)
            done = f"after {status.updates} of {config.updates} updates; saved in {folder}"
            stop = _stopper(stopped, done)
            stop()
            show("evaluating")
            evaluate = _wait(evaluate, stop)
            arguments = state.params, replicas.evaluation_keys
            evaluation = _wait(executor.submit(_on_host, evaluate, *arguments), stop)
        _write_evaluation(folder, evaluation, replicas)
    print("\n".join(summary(config, grid, status, evaluation.mean)))
    print(f"saved in {folder}")


def chunk_length(updates: int) -> int:
    """The divisor of the number of updates that makes about CHUNKS chunks: one compile serves all."""
    divisors = [k for k in range(1, min(updates, LONGEST_CHUNK) + 1) if updates % k == 0]
    wanted = min(max(updates / CHUNKS, 1), LONGEST_CHUNK)
    return min(divisors, key=lambda k: abs(math.log(k / wanted)))


def _compiled(experiment, replicas, executor, show, stopped) -> tuple[Programs, float]:
    """The programs, of which evaluation's may still be compiling, and the seconds that they took."""
    config, _, parts, folder = experiment
    started = time.perf_counter()
    show("compiling")
    stop = _stopper(stopped, "before the first update; nothing was saved")
    try:
        programs = compile_programs(parts, replicas, config, chunk_length(config.updates), executor)
        for each in (programs.train, programs.init):
            _wait(each, stop)
    except BaseException:
        files.discard_folder(folder)
        raise
    seconds = time.perf_counter() - started
    show(f"compiled in {seconds:.1f} s")
    return programs, seconds


def _train(experiment, advance, state, compile_seconds, show, stopped):
    """Chunk after chunk until the end or a signal: the state, and where the run stands."""
    config, grid, _, folder = experiment
    chunk = chunk_length(config.updates)
    none = np.full((len(points(grid)), config.seeds), np.nan)
    status = Status(0, config.updates, 0, 0.0, compile_seconds, none)
    env_steps = [0] * none.size  # Python integers do not overflow
    show(status)
    started = time.perf_counter()
    while status.updates < config.updates and not stopped():
        state, metrics = advance(state)
        seconds = time.perf_counter() - started
        updates = status.updates + chunk
        new = metrics.pop("env_steps").sum(axis=1).tolist()
        env_steps = [a + b for a, b in zip(env_steps, new, strict=True)]
        means = {name: nan_mean(values) for name, values in metrics.items()}
        if config.measure_noise:
            # Ratios of averages: each update's own is too noisy to be averaged.
            noise, signal = means["noise"], means["signal"]
            with np.errstate(divide="ignore", invalid="ignore"):
                means |= {
                    "noise_scale": config.num_envs * noise / signal,  # in episodes, or lanes
                    "signal_to_noise": signal / noise,
                }
        line = {"update": updates, "env_steps": env_steps, "seconds": seconds, **means}
        files.append_json(folder / files.METRICS, line)
        status = status._replace(
            updates=updates,
            env_steps=sum(env_steps),
            seconds=seconds,
            returns=means["episode_return"].reshape(none.shape),
        )
        show(status)
    return state, status


def nan_mean(values: np.ndarray) -> np.ndarray:
    """[N, K] to [N]: over the updates that have a value, NaN where none has."""
    has = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(has, values, 0.0).sum(axis=1) / has.sum(axis=1)


def _advance(executor, train, replicas, stopped, show):
    noted = []

    def note():
        if stopped() and not noted:
            noted.append(True)
            show("stopping after this chunk; the same signal again aborts at once")

    def step(state):
        state, metrics = train(state, replicas.hyperparams)
        return state, jax.device_get(metrics)  # which waits for the devices

    return lambda state: _wait(executor.submit(step, state), note)


def _on_host(program, *arguments):
    return jax.device_get(program(*arguments))


def _write_evaluation(folder: Path, evaluation: Evaluation, replicas: Replicas) -> None:
    labels = replicas.labels
    record = {
        "mean_return": evaluation.mean,
        "standard_error": evaluation.standard_error,
        "episodes": evaluation.episodes,
        **{name: [label[name] for label in labels] for name in labels[0]},
    }
    files.write_json(folder / files.EVALUATION, record)


@contextmanager
def _workers() -> Iterator[Executor]:
    # Work goes on in threads because a signal reaches Python only while the main thread waits in it.
    executor = ThreadPoolExecutor(2)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _wait(future: Future, poll: Callable[[], Any]) -> Any:
    """The future's result, looking now and then at whether to stop."""
    while not wait([future], timeout=0.1).done:
        poll()
    return future.result()


def _stopper(stopped: Callable[[], int], message: str) -> Callable[[], None]:
    def stop():
        if stopped():
            raise Interrupted(stopped(), message)

    return stop
