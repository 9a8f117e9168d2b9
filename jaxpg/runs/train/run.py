"""A run from its start to its report: checked, trained, evaluated, all in its folder."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.devices import fetched, placed, processes
from jaxpg.rollout import Evaluation
from jaxpg.runs import console
from jaxpg.runs.config.config import (
    Config,
    Grid,
    check,
    completed,
    load_config,
    num_points,
    points,
    read_config,
    varying,
)
from jaxpg.runs.config.flags import TrainRequest
from jaxpg.runs.config.presets import preset
from jaxpg.runs.config.rows import check_varying, settled
from jaxpg.runs.host import cluster, health
from jaxpg.runs.host.interrupt import heeding, signals
from jaxpg.runs.host.progress import display
from jaxpg.runs.host.trace import check_chunks, tracing
from jaxpg.runs.store import checkpoint, metrics
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.evaluation import read_evaluation
from jaxpg.runs.store.lock import locked
from jaxpg.runs.store.metrics import Sink
from jaxpg.runs.train.build import Parts, build, instructed
from jaxpg.runs.train.loop import (
    Progress,
    Recorder,
    TrainingJob,
    chunk_length,
    on_workers,
    stopper,
    train_chunks,
    wait_for,
    workers,
)
from jaxpg.runs.train.replica_batches import state_bytes
from jaxpg.runs.train.replicas import (
    Replicas,
    check_layout,
    compile_programs,
    lanes,
    layout_of,
    make_replicas,
    use_cpu_cores,
)
from jaxpg.runs.train.report import headline, summary
from jaxpg.runs.train.saved import referred
from jaxpg.stats.intervals import attained


class PreparedRun(NamedTuple):
    """A run that has been checked for every mistake that a user can make."""

    config: Config
    grid: Grid
    parts: Parts
    folder: Path
    start: int | None = None  # the updates of the checkpoint to resume from; None: a new run


def begin(asked: TrainRequest) -> PreparedRun | None:
    """Prepares what the arguments of train ask for; None: the run has finished. Raises ValueError."""
    prepared = {True: prepare_resume, False: prepare, None: prepare_either}[asked.resume](
        asked.config, asked.grid
    )
    if prepared is None:
        console.say(f"{asked.config.run} has finished its {asked.config.updates} updates")
    return prepared


def prepare(config: Config, grid: Grid, over: bool = False) -> PreparedRun:
    """Checks everything and makes the run's folder. Raises ValueError, leaving nothing behind.

    over: starts over a run that was killed before its first checkpoint.
    """
    use_cpu_cores()
    grid = completed(config, grid)
    check(config, grid)
    config = settled(config)
    check_varying(config, grid)
    metrics.check_sinks(config)
    parts = _parts(config, grid)
    _check_profile(config)
    _agree(config, grid, "start")

    def placed():
        folder = files.create_folder(config, over)
        try:
            _check_profile(config, make=True)
        except ValueError:
            files.discard_folder(folder)
            raise
        return str(folder)

    return PreparedRun(config, grid, parts, Path(cluster.first(placed)))


def _agree(config: Config, grid: Grid, how: str) -> None:
    """Ends several processes unless all were asked for the same run, with the same files and versions."""
    if processes() > cluster.size():
        raise ValueError(
            f"jax has joined {processes()} processes, which a run must know of; start each with "
            "jaxpg train --distributed"
        )
    if cluster.size() > 1:
        if config.debug_nans:
            raise ValueError(
                "--debug-nans needs one process; leave it out, or run without the others"
            )
        found = files.description(config, grid, [])
        asked = {name: found[name] for name in (*files.ASKED, "config", "hyperparameters")}
        alike = {
            f"{part} {name}": x for part, each in asked.items() for name, x in (each or {}).items()
        }
        cluster.agree({"command": how, **alike})


def _check_profile(config: Config, done: int = 0, make: bool = False) -> None:
    """Raises ValueError for a --profile that cannot be; make: makes its folder."""
    if config.profile is not None:
        left = config.updates - done
        check_chunks(left // chunk_length(config.updates, done))
        if make:
            files.empty_folder(config.profile, "--profile")


def _parts(config: Config, grid: Grid) -> Parts:
    parts = build(config)
    count = num_points(grid) * config.seeds
    health.check_sizes(config, parts.env, state_bytes(parts), count)
    check_layout(config, count, parts.trainer)
    return referred(instructed(parts, config), config)


def prepare_either(config: Config, grid: Grid) -> PreparedRun | None:
    """Prepares the run in the folder config.run, from its newest checkpoint or else from its start.

    Returns None if it has finished. Raises ValueError.
    """

    def done() -> bool | None:
        found = checkpoint.steps(Path(str(config.run)) / files.CHECKPOINTS)
        return found[-1] >= config.updates and _evaluated(config, grid) if found else None

    finished = cluster.first(done)
    if finished is None:
        return prepare(config, grid, over=True)
    return None if finished else prepare_resume(config, grid)


def _evaluated(config: Config, grid: Grid) -> bool:
    """Whether the folder config.run has an evaluation after config.updates or more."""
    try:
        found = read_evaluation(Path(str(config.run)), num_points(grid) * config.seeds)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, to evaluate again") from error
    return found is not None and found.get("update", config.updates) >= config.updates


def prepare_resume(config: Config, grid: Grid) -> PreparedRun:
    """Prepares to resume the run in config.run until it has made config.updates. Raises ValueError.

    config, grid: as in the folder's config.json, except for settings that may change on resume.
    """
    use_cpu_cores()
    grid = completed(config, grid)
    check(config, grid)
    config = settled(config)
    metrics.check_sinks(config)
    folder = Path(str(config.run))
    start = cluster.first(lambda: _newest(folder, config, grid))
    parts = _parts(config, grid)
    files.check_demonstrations(folder, config)
    _agree(config, grid, "resume")
    cluster.first(lambda: _check_profile(config, start, make=True))
    return PreparedRun(config, grid, parts, folder, start)


def _newest(folder: Path, config: Config, grid: Grid) -> int:
    """The updates of the newest checkpoint. Raises ValueError unless a run can go on from it."""
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
    _check_schedule(folder, config, grid)
    if config.updates == start and _evaluated(config, grid):
        raise ValueError(
            f"{folder} has finished its {start} updates; --updates {2 * start} goes on to "
            f"{2 * start} in all"
        )
    return start


def _check_schedule(folder: Path, config: Config, grid: Grid) -> None:
    """Raises ValueError for updates beyond the end of the schedule, where the learning rate is 0."""
    before, numbers = load_config(folder)
    if len(grid.schedule_updates) != len(numbers.schedule_updates):
        raise ValueError(
            f"{folder} has {len(numbers.schedule_updates)} values of schedule_updates; give as many"
        )
    ends = min(grid.schedule_updates)
    if config.schedule != "constant" and config.updates > max(before.updates, ends):
        raise ValueError(
            f"the {config.schedule} schedule of {folder} ends at update {ends:g}, and from there on the "
            f"learning rate is 0; --schedule-updates {config.updates} stretches it, and --schedule "
            "constant goes on at the full rate"
        )


def execute(experiment: PreparedRun, sinks: Sequence[Sink] = ()) -> None:
    """Trains, evaluates, reports and fills the folder; sinks: additional ones of the user's.

    Raises Interrupted after SIGINT or SIGTERM, once the run so far is saved; health.Diverged; and
    ValueError if another process holds the folder, or a checkpoint cannot be read.
    """
    config, grid, parts, folder, _ = experiment
    say = (lambda text: None) if config.quiet else console.say
    leads = cluster.leads()
    with ExitStack() as stack:
        if leads:
            stack.enter_context(locked(folder))
        stopped = stack.enter_context(signals())
        executor = stack.enter_context(workers())
        length = chunk_length(config.updates, experiment.start or 0)
        profile = config.profile if leads else None
        before_chunk = stack.enter_context(tracing(profile, length, say))
        cluster.advise(f"jaxpg train --resume {folder} goes on from its last checkpoint")
        replicas = make_replicas(config, points(grid), parts.trainer)
        try:
            say(headline(config, grid, layout_of(config, len(replicas.labels), parts.trainer)))
            state, progress, now = _begin(experiment, replicas, say)
            shown = stack.enter_context(display(config.quiet))
            show, stopped = stack.enter_context(heeding(shown, stopped))
            job = TrainingJob(
                config, grid, parts, folder, replicas, executor, stopped, show, before_chunk
            )
            programs, seconds = _compiled(job, state is None, progress.updates, say)
        except BaseException:
            if experiment.start is None and leads:
                files.discard_folder(folder)
            raise
        recorder = _recorder(job, sinks, progress.updates, now)
        stack.callback(_close, recorder)
        if programs.init is not None:
            state = programs.init.result()(replicas.keys)
        train = programs.train.result()
        state, status, progress, stopping = train_chunks(
            job, train, state, progress, recorder, seconds
        )
        params = fetched(state.params)
        if leads:
            (folder / files.EVALUATION).unlink(missing_ok=True)  # it belongs to other parameters
            about = {"updates": progress.updates, "settings": files.settings(folder)}
            files.write_params(folder / files.PARAMS, params, about)
        done = (
            f"after {status.updates} of {config.updates} updates; saved in {folder}; "
            f"go on with jaxpg train --resume {folder}"
        )
        # Several processes evaluate together or not at all.
        stop = stopper(stopped if cluster.size() == 1 else lambda: stopping, done)
        stop()
        show("evaluating")
        evaluate = wait_for(programs.evaluate, stop)
        evaluation = on_workers(job, stop, evaluate, state.params, replicas.evaluation_keys)
        diverged = np.isin(np.arange(len(replicas.labels)), list(progress.diverged))
        # A diverged replica has no return.
        returns = np.where(diverged, np.nan, evaluation.mean)
        if leads:
            _write_evaluation(folder, evaluation, returns, replicas, progress)
    attainable = attained(evaluation.smallest, evaluation.largest)
    console.say(*summary(config, grid, status, returns, diverged, attainable), f"saved in {folder}")


def _begin(experiment, replicas, say) -> tuple[Any, Progress, dict[str, Any]]:
    """Writes config.json. Returns a resumed run's state or None, its progress, and what it computes with."""
    config, grid, parts, folder, start = experiment
    now = files.description(config, grid, replicas.labels) | {"lanes": lanes(replicas)}
    computing = {name: now[name] for name in files.COMPUTING}
    if start is not None:
        return *_go_on(experiment, replicas, now, say), computing
    warning = health.starving(config.updates, config.num_envs * health.num_steps(config, parts.env))
    if warning and not _as_preset(config):
        say(warning)
    cluster.first(lambda: files.write_json(folder / files.CONFIG, now, exact=True))
    return None, Progress(0, [0] * len(replicas.labels), 0.0, {}), computing


def _go_on(experiment, replicas, now: dict, say) -> tuple[Any, Progress]:
    """Restores the state of the checkpoint; now: the description that a new run would have."""
    _, _, parts, folder, start = experiment
    files.check_links(folder)
    shapes = jax.eval_shape(jax.vmap(parts.trainer.init), replicas.keys)
    settings = files.settings(folder)
    state, host = checkpoint.restore_run(
        folder / files.CHECKPOINTS, start, shapes, len(replicas.labels), settings
    )
    record: Any = host["record"]
    state = placed(state, replicas.state)
    lines = cluster.first(lambda: _noted(experiment, replicas, now, host, say))
    diverged = {int(i): update for i, update in record["diverged"].items()}
    return state, Progress(start, record["env_steps"], record["seconds"], diverged, lines)


def _noted(experiment, replicas, now: dict, host: checkpoint.Host, say) -> int:
    """Prints and records what has changed since the checkpoint. Returns the lines of metrics until then."""
    config, _, _, folder, start = experiment
    record: Any = host["record"]
    saved: dict[str, Any] = dict(read_config(folder)[1])
    entry = {"update": start, "time": now["started"], **_recorded(experiment, saved, record, say)}
    say(f"resuming {folder} after {start} of {config.updates} updates")
    if "lines" not in record:
        say("its checkpoint is of an older version without settings, so none were compared")
    # An older checkpoint does not say what it was computed with: assume what the run began with.
    if changed := files.otherwise(host.get("computing", saved), now):
        entry["changed"] = changed
        own = [name for name in changed if name.startswith(files.SOURCES)]
        for name in own:
            say(
                f"the file of {name.removeprefix(files.SOURCES)} has changed since the last checkpoint"
            )
        said = "; ".join(
            f"{k} was {old}, is {new}" for k, (old, new) in changed.items() if k not in own
        )
        if said:
            say(f"its numbers will match an unbroken run's to rounding, not bit by bit: {said}")
    for part, name in (("config", "schedule"), ("hyperparameters", "schedule_updates")):
        if json.loads(json.dumps(now[part][name])) != saved[part].get(name):
            entry[name] = now[part][name]
            saved[part][name] = now[part][name]
    saved["config"]["updates"] = config.updates
    saved["replicas"] = replicas.labels
    saved["resumed"] = [*saved.get("resumed", []), entry]
    files.write_json(folder / files.CONFIG, saved, exact=True)
    return metrics.count_lines(folder / files.METRICS)


def _recorded(experiment, saved: dict, record: checkpoint.Record, say) -> dict[str, int]:
    """Checks the metrics, rewinds them to the checkpoint, and returns what config.json must note of them.

    Raises ValueError, leaving everything as it is, if the table has a hole.
    """
    config, _, _, folder, start = experiment
    lines, table = folder / files.METRICS, folder / files.TABLE
    since = max((each.get("recorded_from", 1) for each in saved.get("resumed", ())), default=1)
    if not lines.exists() and not table.exists() and since <= start:
        say(f"{folder} has lost {lines.name} and {table.name}: both begin at update {start + 1}")
        return {"recorded_from": start + 1}
    metrics.check_table(table, since, start, len(record["env_steps"]))
    metrics.rewind(lines, table, start)
    chunk, count = chunk_length(load_config(folder)[0].updates), record.get("lines")
    if said := metrics.mend_lines(lines, table, (since, start), chunk, count, config.num_envs):
        say(said)
    return {}


def _as_preset(config) -> bool:
    """Whether batches and updates are the defaults, which are known to learn."""
    usual = preset(config.environment, config.algorithm)[0]
    sizes = ("updates", "num_envs", "num_steps")
    return all(getattr(config, name) == getattr(usual, name) for name in sizes)


def _compiled(job: TrainingJob, fresh: bool, done: int, say):
    """The programs, and the seconds that they took; evaluation's may still be compiling."""
    config = job.config
    started = time.perf_counter()
    job.show("compiling")
    stop = stopper(job.stopped, "before the first update; nothing was saved")
    if not fresh:
        stop = stopper(
            job.stopped, f"before it resumed; the checkpoint in {job.folder} is untouched"
        )
    chunk = chunk_length(config.updates, done)
    programs = compile_programs(
        job.parts, job.replicas, config, chunk, job.executor, job.parts.demonstrations, fresh
    )
    for each in (programs.train, programs.init):
        if each is not None:
            wait_for(each, stop)
    count, episodes = len(job.replicas.labels), config.evaluation_episodes
    health.check_memory(programs.train.result(), count, config.force)
    if count * episodes > health.MANY_EPISODES and not config.force:
        # Training does not wait for evaluation to compile, unless it could be in vain.
        evaluate = wait_for(programs.evaluate, stop)
        health.check_episodes(evaluate, episodes, "give fewer --evaluation-episodes or --seeds")
    # Several processes go on together: from here on a signal to one stops all after the same chunk.
    wait_for(job.executor.submit(cluster.agree, {}), stop)
    seconds = time.perf_counter() - started
    job.show(f"compiled in {seconds:.1f} s")
    return programs, seconds


def _recorder(job: TrainingJob, sinks: Sequence[Sink], after: int, computing: dict) -> Recorder:
    config, folder, labels = job.config, job.folder, job.replicas.labels
    columns = varying(job.grid)
    checkpoints = checkpoint.open_checkpoints(
        folder / files.CHECKPOINTS, settings=files.settings(folder), computing=computing
    )
    if not cluster.leads():
        return Recorder([], metrics.Table(lambda records: None, lambda: None), checkpoints)
    found = [metrics.json_lines(folder / files.METRICS, config.num_envs), *sinks]
    if config.tensorboard:
        place = folder / files.TENSORBOARD
        found.append(metrics.tensorboard(place, labels, columns, config.num_envs, after))
    if config.wandb:
        description = {"config": asdict(config), "hyperparameters": job.grid._asdict()}
        found.append(metrics.wandb(folder, description, labels, columns, config.num_envs))
    table = metrics.parquet(folder / files.TABLE, labels, columns)
    return Recorder(found, table, checkpoints)


def _close(recorder: Recorder) -> None:
    for sink in recorder.sinks:
        sink.close()
    recorder.checkpoints.close()


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
        "smallest": evaluation.smallest,
        "largest": evaluation.largest,
        "diverged": [progress.diverged.get(i) for i in range(len(labels))],
        **{name: [label[name] for label in labels] for name in labels[0]},
    }
    files.write_json(folder / files.EVALUATION, record)
