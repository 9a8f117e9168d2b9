"""A run from its start to its report: checked, trained, evaluated, all in its folder."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.experiment import checkpoint, health, metrics
from jaxpg.experiment import folder as files
from jaxpg.experiment.build import Parts, build, build_algorithm, instructed
from jaxpg.experiment.config import Config, Grid, check, completed, points, varying
from jaxpg.experiment.interrupt import signals
from jaxpg.experiment.lock import locked
from jaxpg.experiment.loop import (
    Job,
    Progress,
    Recorder,
    chunk_length,
    on_workers,
    stopper,
    train_chunks,
    wait_for,
    workers,
)
from jaxpg.experiment.metrics import Sink
from jaxpg.experiment.presets import preset
from jaxpg.experiment.progress import display
from jaxpg.experiment.replicas import Replicas, compile_programs, make_replicas, use_cpu_cores
from jaxpg.experiment.report import headline, summary
from jaxpg.rollout import Evaluation


class Experiment(NamedTuple):
    """A run that has been checked: nothing about it can be a user's mistake any more."""

    config: Config
    grid: Grid
    parts: Parts
    folder: Path
    start: int | None = None  # the updates of the checkpoint to go on from; None: a new run


def prepare(config: Config, grid: Grid) -> Experiment:
    """Checks everything and makes the run's folder. Raises ValueError, leaving nothing behind."""
    use_cpu_cores()
    grid = completed(config, grid)
    check(config, grid)
    metrics.check_sinks(config)
    parts = instructed(build(config), config)
    return Experiment(config, grid, parts, files.create_folder(config))


def prepare_resume(config: Config, grid: Grid) -> Experiment:
    """The run of the folder config.run, to go on to config.updates in all. Raises ValueError.

    config, grid: as the folder's config.json says, but for what a resumed run may change.
    """
    use_cpu_cores()
    check(config, grid)
    metrics.check_sinks(config)
    folder = Path(str(config.run))
    found = checkpoint.steps(folder / files.CHECKPOINTS)
    if not found:
        raise ValueError(
            f"{folder} has no checkpoint to resume from; start again with --config {folder}"
        )
    start = found[-1]
    if config.updates < start:
        raise ValueError(
            f"updates={config.updates} in all, and {folder} has made {start} already; ask for more"
        )
    if config.updates == start and (folder / files.EVALUATION).is_file():
        raise ValueError(
            f"{folder} has finished its {start} updates; --updates {2 * start} goes on to "
            f"{2 * start} in all"
        )
    parts = instructed(build(config), config)
    files.check_demonstrations(folder, config)
    return Experiment(config, grid, parts, folder, start)


def execute(experiment: Experiment, sinks: Sequence[Sink] = ()) -> None:
    """Trains, evaluates, reports and fills the folder; sinks: further ones of the user's.

    Raises Interrupted after SIGINT or SIGTERM, with what was learnt so far saved; health.Diverged; and
    ValueError when another process has the folder, or a checkpoint cannot be read.
    """
    config, grid, parts, folder, _ = experiment
    say = (lambda text: None) if config.quiet else partial(print, flush=True)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        stopped = stack.enter_context(signals())
        executor = stack.enter_context(workers())
        replicas = make_replicas(config, points(grid))
        say(headline(config, grid))
        state, progress = _begin(experiment, replicas, say)
        show = stack.enter_context(display(config.quiet))
        job = Job(config, grid, parts, folder, replicas, executor, stopped, show)
        programs, seconds = _compiled(job, state is None, progress.updates, say)
        recorder = _recorder(job, sinks, progress.updates)
        stack.callback(_close, recorder)
        if programs.init is not None:
            state = programs.init.result()(replicas.keys)
        train = programs.train.result()
        state, status, progress = train_chunks(job, train, state, progress, recorder, seconds)
        (folder / files.EVALUATION).unlink(missing_ok=True)  # of other parameters
        files.write_params(folder / files.PARAMS, state.params)
        done = (
            f"after {status.updates} of {config.updates} updates; saved in {folder}; "
            f"go on with jaxpg train --resume {folder}"
        )
        stop = stopper(stopped, done)
        stop()
        show("evaluating")
        evaluate = wait_for(programs.evaluate, stop)
        evaluation = on_workers(job, stop, evaluate, state.params, replicas.evaluation_keys)
        returns = _without(evaluation.mean, progress.diverged)
        _write_evaluation(folder, evaluation, returns, replicas, progress)
    print("\n".join(summary(config, grid, status, returns)))
    print(f"saved in {folder}")


def _begin(experiment, replicas, say) -> tuple[Any, Progress]:
    """Writes config.json. Of a resumed run, the state; of a new one, None."""
    config, grid, parts, folder, start = experiment
    if start is None:
        warning = health.starving(config.updates, _steps_per_update(config, parts))
        if warning and not _as_preset(config):
            say(warning)
        files.write_json(
            folder / files.CONFIG, files.description(config, grid, replicas.labels), exact=True
        )
        return None, Progress(0, [0] * len(replicas.labels), 0.0, {})
    shapes = jax.eval_shape(jax.vmap(parts.trainer.init), replicas.keys)
    state, record = checkpoint.restore(folder / files.CHECKPOINTS, start, shapes)
    state = jax.device_put(state, replicas.sharding)
    diverged = {int(i): update for i, update in record["diverged"].items()}
    progress = Progress(start, record["env_steps"], record["seconds"], diverged)
    metrics.rewind(folder / files.METRICS, folder / files.TABLE, start)
    say(f"resuming {folder} after {start} of {config.updates} updates")
    saved = json.loads((folder / files.CONFIG).read_text())
    ends = min(grid.schedule_updates)
    if config.schedule != "constant" and config.updates > ends:
        say(
            f"the {config.schedule} schedule ends at update {ends:g}, as the run began, and the learning\n"
            f"rate is 0 from there on: jaxpg train --config {folder} --updates {config.updates} "
            "starts\na run with a longer one"
        )
    saved["config"]["updates"] = config.updates
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    saved["resumed"] = [*saved.get("resumed", []), {"update": start, "time": now}]
    files.write_json(folder / files.CONFIG, saved, exact=True)
    return state, progress


def _steps_per_update(config, parts) -> int:
    """Of one agent; of whole episodes, the most."""
    usual = parts.env.horizon if build_algorithm(config).episodic else 128
    return config.num_envs * (config.num_steps or usual)


def _as_preset(config) -> bool:
    """Whether batches and updates are the defaults, which have been tried."""
    usual = preset(config.environment, config.algorithm)[0]
    sizes = ("updates", "num_envs", "num_steps")
    return all(getattr(config, name) == getattr(usual, name) for name in sizes)


def _compiled(job: Job, fresh: bool, done: int, say):
    """The programs, of which evaluation's may still be compiling, and the seconds that they took."""
    config = job.config
    started = time.perf_counter()
    job.show("compiling")
    stop = stopper(job.stopped, "before the first update; nothing was saved")
    if not fresh:
        stop = stopper(
            job.stopped, f"before it went on; the checkpoint in {job.folder} is untouched"
        )
    try:
        chunk = chunk_length(config.updates, done)
        programs = compile_programs(
            job.parts,
            job.replicas,
            config,
            chunk,
            job.executor,
            job.parts.demonstrations,
            fresh,
        )
        for each in (programs.train, programs.init):
            if each is not None:
                wait_for(each, stop)
        health.check_memory(programs.train.result(), say)
    except BaseException:
        if fresh:
            files.discard_folder(job.folder)
        raise
    seconds = time.perf_counter() - started
    job.show(f"compiled in {seconds:.1f} s")
    return programs, seconds


def _recorder(job: Job, sinks: Sequence[Sink], after: int) -> Recorder:
    config, folder, labels = job.config, job.folder, job.replicas.labels
    columns = varying(job.grid)
    found = [metrics.json_lines(folder / files.METRICS, config.num_envs), *sinks]
    if config.tensorboard:
        place = folder / files.TENSORBOARD
        found.append(metrics.tensorboard(place, labels, columns, config.num_envs, after))
    if config.wandb:
        description = {"config": asdict(config), "hyperparameters": job.grid._asdict()}
        found.append(metrics.wandb(folder, description, labels, columns, config.num_envs))
    table = metrics.parquet(folder / files.TABLE, labels, columns)
    return Recorder(found, table, checkpoint.open_checkpoints(folder / files.CHECKPOINTS))


def _close(recorder: Recorder) -> None:
    for sink in recorder.sinks:
        sink.close()
    recorder.checkpoints.close()


def _without(returns, diverged: dict[int, int]) -> np.ndarray:
    """What has diverged has no return."""
    return np.where(np.isin(np.arange(len(returns)), list(diverged)), np.nan, returns)


def _write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    returns: np.ndarray,
    replicas: Replicas,
    progress: Progress,
) -> None:
    labels = replicas.labels
    record = {
        "update": progress.updates,
        "mean_return": returns,
        "standard_error": evaluation.standard_error,
        "episodes": evaluation.episodes,
        "diverged": [progress.diverged.get(i) for i in range(len(labels))],
        **{name: [label[name] for label in labels] for name in labels[0]},
    }
    files.write_json(folder / files.EVALUATION, record)
