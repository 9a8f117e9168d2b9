"""Sweeps: many points of hyperparameter space, trained and ranked, with successive halving on request."""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.devices import present
from jaxpg.memory import machine_bytes
from jaxpg.runs.config.config import Config, Grid, check, completed, varying
from jaxpg.runs.config.flags import request
from jaxpg.runs.config.rows import check_varying, settled
from jaxpg.runs.console import say
from jaxpg.runs.host import cluster, health
from jaxpg.runs.host.interrupt import Interrupted, heeding, signals
from jaxpg.runs.host.progress import Show, Status, display
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import SWEEP
from jaxpg.runs.store.lock import locked
from jaxpg.runs.sweep import best, ranking, study
from jaxpg.runs.sweep.ranking import Costs, Outcomes
from jaxpg.runs.sweep.record import Search, description, new_folder, recorded, settings
from jaxpg.runs.sweep.search import Options, choose, count, places, rungs, take_options
from jaxpg.runs.train import replica_batches
from jaxpg.runs.train.build import Parts, build, instructed
from jaxpg.runs.train.loop import chunk_length, stopper, workers
from jaxpg.runs.train.replicas import check_shares, use_cpu_cores
from jaxpg.runs.train.report import devices_in_words
from jaxpg.runs.train.saved import referred
from jaxpg.stats.intervals import attained

NOTHING = "before the first update; nothing was saved"
UNHEARD = ("tensorboard", "wandb", "profile", "debug_nans")  # flags of train that mean nothing here


class Sweep(NamedTuple):
    """A sweep that has been checked."""

    config: Config
    search: Search
    parts: Parts
    folder: Path
    began: dict[str, Any] | None = None  # the record of a sweep to resume, with its batch size

    @property
    def done(self) -> bool:
        return self.began is not None and self.began["complete"]


def prepare(argv: Sequence[str]) -> Sweep:
    """Checks the sweep that the arguments ask for. Raises ValueError, leaving nothing behind."""
    options, rest = take_options(argv)
    asked = request(rest, prog="jaxpg sweep")
    if asked.resume:
        raise ValueError(
            "a sweep has no --resume; repeat its command with its --run and --resume-or-start"
        )
    for name in UNHEARD:
        if getattr(asked.config, name):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} means nothing to a sweep, which keeps no curves; leave it out"
            )
    use_cpu_cores()
    config, grid = asked.config, completed(asked.config, asked.grid)
    check(config, grid)
    config = settled(config)
    check_varying(config, grid)
    search = _search(config, grid, options)
    if options.study is not None:
        study.check_installed()
    parts = build(config)
    check_shares(config, parts.trainer)
    health.check_sizes(config, parts.env, replica_batches.state_bytes(parts), 1)
    parts = referred(instructed(parts, config), config)
    if len(search.rungs) > 1:
        _check_room(len(search.points), config.seeds, replica_batches.state_bytes(parts))
    began = _began(config, search) if asked.resume is None else None
    folder = Path(str(config.run))
    if began is None:
        folder = new_folder(config, options.part, over=asked.resume is None)
    return Sweep(config, search, parts, folder, began)


def _began(config: Config, search: Search) -> dict[str, Any] | None:
    """The record of the sweep in the folder config.run. Raises ValueError if it is a different one."""
    folder = Path(str(config.run))
    found = recorded(folder)
    if not found:
        return None
    files.check_links(folder)
    (path, first), (last_path, last) = found[0], found[-1]
    began = settings(first)
    now = settings(json.loads(json.dumps(description(config, search))))
    for name, value in now.items():
        if began.get(name, value) != value:
            raise ValueError(
                f"{path} has a sweep with another {name.strip('_')}; use the flags that it began "
                "with, or name a new folder with --run"
            )
    if not first.get("complete", False):
        if "batch" not in last:
            raise ValueError(f"{folder} has no batches to resume; name a new folder with --run")
        most = len(search.points) * config.seeds + len(present()) - 1
        if not 1 <= last["batch"] <= most:
            raise ValueError(
                f"cannot read {last_path}: batch={last['batch']} must be between 1 and {most}"
            )
    return last | {"complete": first.get("complete", False)}


def _search(config: Config, grid: Grid, options: Options) -> Search:
    total = count(grid, options)
    _check_room(total, config.seeds)
    points = choose(grid, options, config.seed)[places(options.part, total)]
    steps = rungs(len(points), config.updates, chunk_length(config.updates), options.halving)
    return Search(grid, options, tuple(varying(grid)), points, steps)


def _check_room(points: int, seeds: int, state: int = 0) -> None:
    """Raises ValueError when the data kept per replica between batches would not fit."""
    free, each = machine_bytes(), seeds * (health.REPLICA_BYTES + state)
    if free is None or points * each <= free:
        return
    what = "their states between rungs" if state else "their results"
    raise ValueError(
        f"{points:,} points x {seeds} seeds are too many for memory: {what} need "
        f"{points * each / 1e9:,.1f} GB, and {free / 1e9:.1f} GB are free; {int(free / each):,} points "
        "fit, and --random draws fewer"
    )


def execute(sweep: Sweep) -> None:
    """Trains all points, ranks them and fills the folder.

    Raises Interrupted after SIGINT or SIGTERM, once the results so far are saved; ValueError if not even
    one agent fits in memory, or halving has nothing to rank by; health.Diverged if every agent diverged.
    """
    config, search, parts, folder, began = sweep
    asked = None
    chunks = config.updates // chunk_length(config.updates)
    outcomes = ranking.nothing_yet(len(search.points), config.seeds, chunks)
    policies: best.Policies = {}
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        stopped = stack.enter_context(signals())
        executor, compilers = (stack.enter_context(workers()) for _ in range(2))
        try:
            if not config.quiet:
                say(*ranking.headline(config, search, devices_in_words(config)))
            shown = stack.enter_context(display(config.quiet))
            show, stopped = stack.enter_context(heeding(shown, stopped))
            if search.options.study is not None:
                asked = study.ask(folder, config, search)
                search = search._replace(points=asked.points)
            job = replica_batches.SweepJob(
                config, search.points, parts, executor, compilers, stopped
            )
            if began is not None:
                now = description(config, search)
                for name, (old, new) in files.otherwise(began, now).items():
                    show(
                        f"its numbers will match an unbroken sweep's to rounding: {name} was {old}, is {new}"
                    )
            costs = _climb(job, search, outcomes, policies, show, folder / files.BATCHES, began)
            if stopped() and not outcomes.updates.any():
                raise Interrupted(stopped(), NOTHING)
        except BaseException:
            if not (folder / files.BATCHES).exists():
                files.discard_folder(folder)
                if asked:
                    study.tell(asked, search)
            raise
        cut = stopped()  # a later signal finds all results written, and ends nothing
        described = description(config, search)
        place = best.write(folder, config, search, outcomes, policies)
        ranking.write(folder, described, search, outcomes, costs, complete=not cut)
        if asked and not cut:
            study.tell(asked, search, outcomes)
        show("drawing")
        ranking.draw(folder, config, search, outcomes)
        if not cut:
            shutil.rmtree(folder / files.BATCHES, ignore_errors=True)
    alone = (
        cluster.size() == 1
    )  # else this is one of several parts, ranked together once all are done
    if alone:
        ranking.announce(folder, config, search, outcomes, costs)
    if cut:
        done = int((outcomes.updates > 0).sum())
        said = (
            f"before the end; {done} of {len(search.points)} points are ranked in {folder}; "
            f"the same command with --run {folder} --resume-or-start resumes it"
        )
        raise Interrupted(cut, said)
    if not alone:
        return
    say(f"saved in {folder}" + (f", the best point's policies as the run {place}" if place else ""))
    if search.options.part is not None:
        say("jaxpg sweep --join FOLDER... ranks all parts together, once each has run")


def _climb(
    job: replica_batches.SweepJob,
    search: Search,
    outcomes: Outcomes,
    policies: best.Policies,
    show: Show,
    place: Path,
    began: dict[str, Any] | None,
) -> Costs:
    """Trains rung after rung, batch after batch, until the end or a signal, and fills outcomes and policies.

    place: the folder of saved batches, from which a sweep resumes; began: the record of one to resume.
    """
    seeds, started = job.config.seeds, time.perf_counter()
    show("compiling")
    stop = stopper(job.stop, NOTHING if began is None else f"before it resumed from {place.parent}")
    totals = [rung.points * seeds for rung in search.rungs]
    plan = replica_batches.plan(job, totals, stop, *([] if began is None else [began["batch"]]))
    compiled = time.perf_counter()
    costs = [Costs(0, 0.0, compiled - started, plan.size, plan.bytes)]
    total, chunks = _total_updates(search, plan.size, seeds), [0]
    saved, about = [compiled], {}

    def numbers(rows, done):
        found = {name: ranking.by_row(x, seeds)[rows] for name, x in outcomes._asdict().items()}
        spent = {"env_steps": costs[0].env_steps, "seconds": costs[0].seconds}
        return found | spent | {"done": done}

    def save(path, rows, done, states):
        if not about:  # before the first batch; again after a resume, perhaps on another machine
            place.mkdir(exist_ok=True)
            about.update(description(job.config, search), batch=plan.size)
            files.write_json(place / SWEEP, about, exact=True)
        replica_batches.write(path, rows, numbers(rows, done), states)
        saved[0] = time.perf_counter()

    show(f"compiled in {compiled - started:.1f} s")

    def tick(rows, updates, measured):
        ranking.note(outcomes, rows, updates, measured)
        steps = costs[0].env_steps + int(measured["env_steps"].astype(np.int64).sum())
        costs[0] = costs[0]._replace(
            env_steps=steps, seconds=time.perf_counter() - compiled + base[0]
        )
        chunks[0] += 1
        done = chunks[0] * chunk_length(job.config.updates)
        seen = attained(measured["episode_return"])
        show(Status(done, total, *costs[0][:3], outcomes.returns, seen))

    def restored(path, rows):
        """Restores the outcomes of a saved batch; returns its number of updates and its states."""
        found = None if began is None else replica_batches.read(job, path, rows, numbers(rows, 0))
        if found is None:
            return 0, None
        kept, states = found
        done = int(kept["done"])
        if not 0 <= done <= job.config.updates or done % chunk_length(job.config.updates):
            raise ValueError(f"cannot read {path}: no chunk ends after {done} updates; remove it")
        for name, x in outcomes._asdict().items():
            if x.ndim == 1:
                x[rows // seeds] = kept[name]
            else:
                ranking.by_row(x, seeds)[rows] = kept[name]
        base[0] = float(kept["seconds"]) - (time.perf_counter() - compiled)
        costs[0] = costs[0]._replace(
            env_steps=int(kept["env_steps"]), seconds=float(kept["seconds"])
        )
        return done, states

    if began is not None:
        init = jax.eval_shape(job.parts.trainer.init, jax.random.key(0))
        policies |= best.held(place, init.params)
    base = [0.0]
    alive, states, before = np.arange(len(search.points)), None, 0
    for level, rung in enumerate(search.rungs):
        if outcomes.diverged.all():
            return costs[0]
        if states is not None:
            chosen = ranking.best_of(outcomes, alive, rung.points)
            here = _rows(chosen, seeds)
            alive, states = alive[chosen], jax.tree.map(lambda x, r=here: x[r], states)
        rows, kept = _rows(alive, seeds), []
        size, programs, last = plan.size, plan.programs, rung is search.rungs[-1]
        for number, some in enumerate(replica_batches.batches(len(rows), size)):
            path = place / f"{level}-{number}.npz"
            done, given = restored(path, rows[some])
            chunks[0] += max(done - before, 0) // chunk_length(job.config.updates)
            if done == rung.updates and (given is None) == last:  # the last rung saves no states
                kept.append(given)
                continue
            if given is None and states is not None:
                given = jax.tree.map(lambda x, s=some: x[s], states)
            replicas, state = replica_batches.begin(job, programs, rows[some], size, given)
            span = (max(done, before), rung.updates)

            def hold(state, done, path=path, here=rows[some], rung=rung):
                due = time.perf_counter() - saved[0] >= job.config.checkpoint_seconds
                if job.stop() or (due and done < rung.updates):
                    save(path, here, done, replica_batches.kept(state, len(here)))

            state = replica_batches.advance(
                job, programs, replicas, state, rows[some], span, tick, hold
            )
            if job.stop():
                return costs[0]
            if last:
                found = replica_batches.evaluated(job, programs, replicas, state, len(rows[some]))
                lost = outcomes.diverged.reshape(-1)[rows[some]] > 0
                outcomes.returns.reshape(-1)[rows[some]] = np.where(lost, np.nan, found)
                outcomes.evaluated.reshape(-1)[rows[some]] = True
                params = replica_batches.kept(state.params, len(rows[some]))
                best.hold(policies, rows[some], params, outcomes, place)
            else:
                kept.append(replica_batches.kept(state, len(rows[some])))
            save(path, rows[some], rung.updates, None if last else kept[-1])
        states = None if last else jax.tree.map(lambda *x: np.concatenate(x), *kept)
        before = rung.updates
    return costs[0]


def _rows(points: np.ndarray, seeds: int) -> np.ndarray:
    """The rows of all seeds of these points."""
    return (points[:, None] * seeds + np.arange(seeds)[None]).reshape(-1)


def _total_updates(search: Search, size: int, seeds: int) -> int:
    """The updates of all batches of all rungs together."""
    ends = [0, *(rung.updates for rung in search.rungs)]
    counts = (len(replica_batches.batches(rung.points * seeds, size)) for rung in search.rungs)
    return sum(n * (b - a) for n, (a, b) in zip(counts, pairwise(ends), strict=True))
