"""The record of a sweep, sweep.json: what it was asked for, and what it computed with."""

from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from jaxpg.runs.config.config import Config, Grid
from jaxpg.runs.config.schema import read_json
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import SWEEP
from jaxpg.runs.sweep.search import Options, Part, Rung
from jaxpg.types import Hyperparams


class Search(NamedTuple):
    """The points that a sweep tries, and for how long."""

    grid: Grid  # the listed values; for a range of random search, its ends
    options: Options
    swept: tuple[str, ...]
    points: list[Hyperparams]  # those of the part, if only a part is run
    rungs: list[Rung]


class Began(TypedDict):
    """The required content of sweep.json, for a finished sweep or an unfinished one."""

    config: dict[str, Any]
    hyperparameters: dict[str, Any]
    search: dict[str, Any]
    demonstrations_sha256: str | None
    complete: NotRequired[bool]
    batch: NotRequired[int]


def description(config: Config, search: Search) -> dict[str, Any]:
    """The settings of a sweep, and what it computes with."""
    described = files.description(config, search.grid, [])
    del described["replicas"]
    part = search.options.part
    return {
        "kind": "sweep",
        **described,
        "search": {
            "swept": list(search.swept),
            "random": search.options.random,
            "ranges": {n: r._asdict() for n, r in search.options.ranges.items()},
            "halving": search.options.halving,
            "study": search.options.study,
            "part": part and part.number,
            "parts": part and part.of,
            "rungs": [rung._asdict() for rung in search.rungs],
        },
    }


def recorded(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The records in a folder with their paths: of its results, and of the batches still to be resumed.

    The first says whether the sweep is complete. Raises ValueError.
    """
    paths = [path for path in (folder / SWEEP, folder / files.BATCHES / SWEEP) if path.is_file()]
    return [(path, read_json(path, Began)) for path in paths]


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine a sweep's numbers."""
    free = ("run", "quiet", "demonstrations", "checkpoint_seconds", "compilation_cache")
    free += ("devices", "shard")
    found = record["config"] | record["hyperparameters"] | record["search"]
    found["demonstrations_sha256"] = record["demonstrations_sha256"]
    return {name: value for name, value in found.items() if name not in free}


def new_folder(config: Config, part: Part | None = None, over: bool = False) -> Path:
    """The folder config.run, which must be new or empty, or a new one. Raises ValueError.

    over: removes the files of a sweep that was killed before its first batch.
    """
    if config.run is not None:
        return files.create_folder(config, over)
    which = "" if part is None else f"-part-{part.number}-of-{part.of}"
    return files.new_folder(
        files.RUNS, files.plain(f"sweep-{config.environment}-{config.algorithm}{which}")
    )
