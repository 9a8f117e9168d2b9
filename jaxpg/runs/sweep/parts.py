"""Parts of a sweep, which `jaxpg sweep --join` ranks together like the points of one sweep."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from jaxpg.runs.config.config import Config, Grid, load_config, num_points, varying
from jaxpg.runs.config.schema import expect
from jaxpg.runs.console import parser, say, shortened
from jaxpg.runs.host.interrupt import signals
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import SWEEP, read_arrays_like
from jaxpg.runs.store.lock import locked
from jaxpg.runs.sweep import ranking
from jaxpg.runs.sweep.best import copy
from jaxpg.runs.sweep.ranking import OUTCOMES, Costs, Outcomes
from jaxpg.runs.sweep.record import Search, new_folder, recorded, settings
from jaxpg.runs.sweep.search import Options, Part, Rung, places
from jaxpg.runs.train.loop import chunk_length
from jaxpg.types import Hyperparams

MOST_NAMED = 5  # parts in a message
OWN = ("part", "rungs")  # settings in which the parts of one sweep differ


class Ran(NamedTuple):
    """A part that was run, finished or not."""

    folder: Path
    record: dict[str, Any]
    part: Part
    points: int  # of the whole sweep


class Joined(NamedTuple):
    """All parts of a sweep, put together."""

    config: Config
    search: Search
    outcomes: Outcomes
    costs: Costs
    described: dict[str, Any]  # for the record
    folder: Path


def prepare(argv: Sequence[str], place: Path | None = None) -> Joined:
    """Reads the parts that the arguments name. No device is needed. place: a folder that is there already.

    Raises ValueError for what is no part, parts of different sweeps, a part that is given twice, and parts
    that are missing or unfinished.
    """
    given = _parser().parse_args(list(argv))
    found: dict[int, Ran] = {}
    for folder in map(Path, given.join):
        ran = _read(folder)
        _check_same(next(iter(found.values()), ran), ran)
        if twin := found.get(ran.part.number):
            raise ValueError(
                f"part {ran.part.number} is given twice, as {twin.folder} and {folder}; leave one out"
            )
        found[ran.part.number] = ran
    _check_whole(found)
    parts = [found[number] for number in sorted(found)]
    first = parts[0].record
    config, grid = load_config(parts[0].folder / SWEEP)
    config, total = replace(config, run=given.run), parts[0].points
    points, outcomes = _results(parts, config, grid)
    search = Search(
        grid,
        Options({}, first["search"]["random"], None),
        tuple(varying(grid)),
        points,
        [Rung(total, config.updates)],
    )
    described = first | {
        "config": first["config"] | {"run": given.run},
        "search": first["search"]
        | {"part": None, "parts": None, "rungs": [rung._asdict() for rung in search.rungs]},
        "joined": [_provenance(ran) for ran in parts],
    }
    costs = _costs(parts)
    if place is None:
        place = new_folder(config) if given.run is None else files.empty_folder(given.run, "--run")
    return Joined(config, search, outcomes, costs, described, place)


def execute(joined: Joined) -> None:
    """Ranks all points, and fills the folder with the files of a sweep or removes it.

    Raises OSError if it cannot be written; health.Diverged if every agent diverged.
    """
    config, search, outcomes, costs, described, folder = joined
    before, *others = described["joined"]
    say(*ranking.headline(config, search, f"{1 + len(others)} part{'s' * (len(others) > 0)}"))
    if changed := sorted({name for after in others for name in files.otherwise(before, after)}):
        say(f"not all parts were computed with the same {', '.join(changed)} (see {SWEEP})")
    with locked(folder), signals():  # a signal waits for the end, which is near
        try:
            ranking.draw(folder, config, search, outcomes)
            copy(folder, [Path(x["folder"]) for x in described["joined"]], search, outcomes)
            # Last, because its record vouches for the other files.
            ranking.write(folder, described, search, outcomes, costs, complete=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    ranking.announce(folder, config, search, outcomes, costs)
    say(f"saved in {folder}")


def _read(folder: Path) -> Ran:
    """The record of the part in a folder. Raises ValueError."""
    found = recorded(folder)
    if not found:
        raise ValueError(
            f"{folder} has no {SWEEP}; name the folders that jaxpg sweep --part I/N has written"
        )
    path, record = found[0]
    asked = record["search"]
    if asked.get("part") is None:
        raise ValueError(f"{folder} is a whole sweep, not a part of one, and has its own table")
    for name, kind in {"part": int, "parts": int, "random": int | None}.items():
        expect(asked.get(name), kind, f"cannot read {path}: search.{name}")
    _, grid = load_config(path)
    part = Part(asked["part"], asked["parts"])
    points = num_points(grid) if asked["random"] is None else asked["random"]
    if not 1 <= part.number <= part.of <= points:
        raise ValueError(
            f"cannot read {path}: it is part {part.number} of {part.of}, of {points} points"
        )
    return Ran(folder, record, part, points)


def _check_same(first: Ran, ran: Ran) -> None:
    """Raises ValueError if two parts are of different sweeps."""
    old, new = (settings(each.record) for each in (first, ran))
    for name, value in new.items():
        if name not in OWN and old.get(name, value) != value:
            raise ValueError(
                f"{ran.folder} is part of another sweep than {first.folder}: it has "
                f"{name.strip('_')}={_shown(value)} instead of {_shown(old[name])}"
            )


def _check_whole(found: dict[int, Ran]) -> None:
    """Raises ValueError if parts are missing or unfinished."""
    count, lacks = next(iter(found.values())).part.of, []
    missing = (str(number) for number in range(1, count + 1) if number not in found)
    if named := list(islice(missing, MOST_NAMED)):
        more = count - len(found) - len(named)
        said = ", ".join(named) + f" and {more:,} more" * (more > 0)
        how = f"name every folder, or run --part {named[0]}/{count}"
        lacks.append(f"missing {said} ({how})")
    begun = [x.folder for x in found.values() if not x.record.get("complete", False)][:MOST_NAMED]
    if begun:
        said = ", ".join(map(str, begun))
        how = f"its command with --run {begun[0]} --resume-or-start resumes it"
        lacks.append(f"unfinished {said} ({how})")
    if lacks:
        raise ValueError(f"not all {count:,} parts are there: {'; '.join(lacks)}")


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return shortened(text)


def _results(parts: list[Ran], config: Config, grid: Grid) -> tuple[list[Hyperparams], Outcomes]:
    """The points of the whole sweep and their outcomes, from the files of its parts. Raises ValueError."""
    swept = varying(grid)
    nothing = ranking.nothing_yet(0, config.seeds, config.updates // chunk_length(config.updates))
    like = {"points": np.empty((0, len(swept)))} | nothing._asdict()
    read = []
    for ran in parts:
        path, asked = ran.folder / OUTCOMES, ran.folder / SWEEP
        size = len(range(ran.points)[places(ran.part, ran.points)])
        wanted = {name: ((size, *x.shape[1:]), x.dtype) for name, x in like.items()}
        arrays = read_arrays_like(path, wanted, asked)
        ends = arrays["updates"] == config.updates
        within = (arrays["diverged"] >= 0) & (arrays["diverged"] <= config.updates)
        if not (ends.all() and within.all()):
            raise ValueError(f"{path} does not hold the {config.updates} updates of {asked}")
        read.append(arrays)
    whole = {n: np.empty((parts[0].points, *x.shape[1:]), x.dtype) for n, x in like.items()}
    for ran, arrays in zip(parts, read, strict=True):
        for name, x in arrays.items():
            whole[name][places(ran.part, ran.points)] = x
    fixed = Hyperparams(*(values[0] for values in grid))
    rows = whole.pop("points").tolist()
    points = [fixed._replace(**dict(zip(swept, row, strict=True))) for row in rows]
    return points, Outcomes(**whole)


def _costs(parts: list[Ran]) -> Costs:
    """The costs of all parts: the sums of steps and times, and the largest batch. Raises ValueError."""
    each = []
    for ran in parts:
        where, costs = f"cannot read {ran.folder / SWEEP}: costs", ran.record.get("costs", {})
        expect(costs, dict[str, Any], where)
        for name, kind in get_type_hints(Costs).items():
            expect(costs.get(name), kind, f"{where}.{name}")
        each.append(Costs(**{name: costs[name] for name in Costs._fields}))
    return Costs(
        sum(x.env_steps for x in each),
        sum(x.seconds for x in each),
        sum(x.compile_seconds for x in each),
        max(x.batch for x in each),
        max((x.bytes for x in each if x.bytes is not None), default=None),
    )


def _provenance(ran: Ran) -> dict[str, Any]:
    """What a part was computed with, and where it lies."""
    common = ("kind", "config", "hyperparameters", "search", "demonstrations_sha256", "points")
    rest = {name: x for name, x in ran.record.items() if name not in (*common, "complete")}
    return {"part": ran.part.number, "folder": str(ran.folder)} | rest


def _parser():
    found = parser("sweep", "Ranks all parts of a sweep together, in a folder of its own.")
    found.add_argument("--join", metavar="FOLDER", nargs="+", required=True)
    found.add_argument("--run", metavar="FOLDER")
    return found
