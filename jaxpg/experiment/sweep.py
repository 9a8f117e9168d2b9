"""Sweeps: many points of hyperparameter space, ranked; with successive halving where it is asked."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxpg.experiment import batches, health, ranking
from jaxpg.experiment import folder as files
from jaxpg.experiment.build import Parts, build, instructed
from jaxpg.experiment.config import Config, Grid, check, completed
from jaxpg.experiment.console import say
from jaxpg.experiment.flags import request
from jaxpg.experiment.interrupt import Interrupted, heeding, signals
from jaxpg.experiment.lock import locked
from jaxpg.experiment.loop import chunk_length, stopper, workers
from jaxpg.experiment.progress import Show, Status, display
from jaxpg.experiment.ranking import Costs, Outcomes, Search
from jaxpg.experiment.replicas import use_cpu_cores
from jaxpg.experiment.search import Options, choose, count, rungs, take_options
from jaxpg.intervals import attained

REPLICA_BYTES = 2000  # of the machine's memory for each, whatever its state
NOTHING = "before the first update; nothing was saved"
UNHEARD = ("tensorboard", "wandb", "debug_nans")  # flags of train that mean nothing here


class Sweep(NamedTuple):
    """A sweep that has been checked."""

    config: Config
    search: Search
    parts: Parts
    folder: Path


def prepare(argv: Sequence[str]) -> Sweep:
    """What the arguments ask for, checked. Raises ValueError, leaving nothing behind."""
    options, rest = take_options(argv)
    asked = request(rest, prog="jaxpg sweep")
    if asked.resume:
        raise ValueError("a sweep cannot be resumed; start a new one, with fewer points")
    for name in UNHEARD:
        if getattr(asked.config, name):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} means nothing to a sweep, which keeps no curves; leave it out"
            )
    use_cpu_cores()
    config, grid = asked.config, completed(asked.config, asked.grid)
    check(config, grid)
    search = _search(config, grid, options)
    parts = instructed(build(config), config)
    if len(search.rungs) > 1:
        _check_room(len(search.points), config.seeds, batches.state_bytes(parts))
    return Sweep(config, search, parts, _folder(config))


def _search(config: Config, grid: Grid, options: Options) -> Search:
    total = count(grid, options)
    _check_room(total, config.seeds)
    points = choose(grid, options, config.seed)
    steps = rungs(total, config.updates, chunk_length(config.updates), options.halving)
    swept = tuple(name for name, values in grid._asdict().items() if len(values) > 1)
    return Search(grid, options, swept, points, steps)


def _check_room(points: int, seeds: int, state: int = 0) -> None:
    """Raises ValueError when what is kept of every replica between batches would not fit."""
    free, each = health.machine_bytes(), seeds * (REPLICA_BYTES + state)
    if free is None or points * each <= free:
        return
    what = "their states between rungs" if state else "their results"
    raise ValueError(
        f"{points:,} points x {seeds} seeds are too many for memory: {what} need "
        f"{points * each / 1e9:,.1f} GB, and {free / 1e9:.1f} GB are free; {int(free / each):,} points "
        "fit, and --random draws so many"
    )


def _folder(config: Config) -> Path:
    if config.run is None:
        return files._new_folder(Path("runs"), f"sweep-{config.environment}-{config.algorithm}")
    return files.create_folder(config)


def execute(sweep: Sweep) -> None:
    """Trains all points, ranks them and fills the folder.

    Raises Interrupted after SIGINT or SIGTERM, with what is known by then saved; and ValueError where not
    even one agent fits in memory, or halving has nothing to rank by; and health.Diverged where every
    agent did.
    """
    config, search, parts, folder = sweep
    outcomes = ranking.nothing_yet(len(search.points), config.seeds)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        stopped = stack.enter_context(signals())
        executor, compilers = (stack.enter_context(workers()) for _ in range(2))
        try:
            if not config.quiet:
                say(*ranking.headline(config, search))
            show, stopped = heeding(stack.enter_context(display(config.quiet)), stopped)
            job = batches.Job(config, search.points, parts, executor, compilers, stopped)
            costs = _climb(job, search, outcomes, show)
            if stopped() and not outcomes.updates.any():
                raise Interrupted(stopped(), NOTHING)
        except BaseException:
            files.discard_folder(folder)
            raise
        ranking.write(folder, config, search, outcomes, costs, complete=not stopped())
        show("drawing")
        ranking.draw(folder, config, search, outcomes)
        gone = outcomes.diverged.all()
    say(*ranking.report(config, search, outcomes, costs))
    if gone:
        raise health.Diverged(
            f"nothing is ranked: all {len(search.points)} points diverged, the last seed at update "
            f"{outcomes.diverged.max()}; smaller steps may help; the table is in {folder}"
        )
    if stopped():
        done = int((outcomes.updates > 0).sum())
        said = f"before the end; {done} of {len(search.points)} points are ranked in {folder}"
        raise Interrupted(stopped(), said)
    say(f"saved in {folder}")


def _climb(job: batches.Job, search: Search, outcomes: Outcomes, show: Show) -> Costs:
    """Rung after rung, batch after batch, until the end or a signal."""
    seeds, started = job.config.seeds, time.perf_counter()
    show("compiling")
    stop = stopper(job.stop, NOTHING)
    plan = batches.plan(job, [rung.points * seeds for rung in search.rungs], stop)
    compiled = time.perf_counter()
    costs = [Costs(0, 0.0, compiled - started, plan.size, plan.bytes)]
    total, chunks = _total_updates(search, plan.size, seeds), [0]
    show(f"compiled in {compiled - started:.1f} s")

    def tick(rows, updates, measured):
        ranking.note(outcomes, rows, updates, measured)
        steps = costs[0].env_steps + int(measured["env_steps"].astype(np.int64).sum())
        costs[0] = costs[0]._replace(env_steps=steps, seconds=time.perf_counter() - compiled)
        chunks[0] += 1
        done = chunks[0] * chunk_length(job.config.updates)
        seen = attained(measured["episode_return"])
        show(Status(done, total, *costs[0][:3], outcomes.returns, seen))

    alive, states, before = np.arange(len(search.points)), None, 0
    for rung in search.rungs:
        if outcomes.diverged.all():
            return costs[0]
        if states is not None:
            chosen = ranking.best_of(outcomes, alive, rung.points)
            here = _rows(chosen, seeds)
            alive, states = alive[chosen], jax.tree.map(lambda x, r=here: x[r], states)
        rows, kept = _rows(alive, seeds), []
        size, programs, last = plan.size, plan.programs, rung is search.rungs[-1]
        for some in batches.batches(len(rows), size):
            given = None if states is None else jax.tree.map(lambda x, s=some: x[s], states)
            replicas, state = batches.begin(job, programs, rows[some], size, given)
            span = (before, rung.updates)
            state = batches.advance(job, programs, replicas, state, rows[some], span, tick)
            if job.stop():
                return costs[0]
            if last:
                found = batches.evaluated(job, programs, replicas, state, len(rows[some]))
                lost = outcomes.diverged.reshape(-1)[rows[some]] > 0
                outcomes.returns.reshape(-1)[rows[some]] = np.where(lost, np.nan, found)
                outcomes.evaluated.reshape(-1)[rows[some]] = True
            else:
                kept.append(batches.kept(state, len(rows[some])))
        states = None if last else jax.tree.map(lambda *x: np.concatenate(x), *kept)
        before = rung.updates
    return costs[0]


def _rows(points: np.ndarray, seeds: int) -> np.ndarray:
    """The rows of all seeds of these points."""
    return (points[:, None] * seeds + np.arange(seeds)[None]).reshape(-1)


def _total_updates(search: Search, size: int, seeds: int) -> int:
    """Of all batches of all rungs together."""
    ends = [0, *(rung.updates for rung in search.rungs)]
    counts = (len(batches.batches(rung.points * seeds, size)) for rung in search.rungs)
    return sum(n * (b - a) for n, (a, b) in zip(counts, pairwise(ends), strict=True))
