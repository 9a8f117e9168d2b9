"""Records: runs read from their folders, as arrays over seeds for figures and tables."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from jaxpg.runs.config.config import COUNTS, Config, read_config
from jaxpg.runs.config.presets import preset
from jaxpg.runs.config.rows import settled
from jaxpg.runs.config.schema import expect, parsed
from jaxpg.runs.host.health import WATCHED, first_divergence
from jaxpg.runs.store.evaluation import read_evaluation
from jaxpg.runs.store.folder import FIGURES, METRICS, SWEEP, TABLE
from jaxpg.runs.train.build import build_algorithm
from jaxpg.stats.intervals import Estimate
from jaxpg.stats.seeds import noise_ratios
from jaxpg.training.algorithm import unmeasured

MOST_POINTS = 100  # of a curve: more are averaged over windows of updates
NOISE = ("noise", "signal")  # averaged over windows of their own before their ratio is taken
COUNTERS = ("replica", "update", "env_steps", "seconds")
LEAST_WINDOW = 10  # updates in such a window, at least
RATIOS = ("noise_scale", "signal_to_noise")  # stored in metrics.jsonl for each chunk
# Settings that do not distinguish one series from another.
UNSAID = ("environment", "run", "quiet", "seeds", "checkpoint_seconds", "tensorboard", "wandb",
          "profile", "debug_nans", "compilation_cache", "force",
          "measure_noise", "evaluation_episodes")  # fmt: skip
BATCH = 2**18  # rows of a table that are read at a time


class Series(NamedTuple):
    """The R seeds of one point of a run's grid."""

    environment: str
    label: str
    folder: Path
    settings: dict[str, Any]  # structure and hyperparameters
    update: np.ndarray  # [T]
    env_steps: np.ndarray  # [R, T]
    seconds: np.ndarray  # [T] of training, without compilation
    metrics: dict[str, np.ndarray]  # [R, T] each; NaN where there is no value
    final: np.ndarray | None  # [R] mean returns of the final evaluation
    ratios: dict[str, Estimate] = {}  # noqa: RUF012  [T] each, of averages over seeds and updates
    diverged: Sequence[int] = ()  # for each diverged seed, the first update that is not finite


def read(folders: list[Path]) -> list[Series]:
    """Reads every series of the runs, labelled by what differs. Raises ValueError for what is not a run."""
    repeated = [f for f in folders if sum(f.resolve() == g.resolve() for g in folders) > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice; there is nothing to compare")
    return labelled(list(chain.from_iterable(map(_read, folders))))


def labelled(series: list[Series]) -> list[Series]:
    """Labels the series by every setting in which those of one environment differ, updates last.

    The algorithm comes first; settings at the default of their algorithm follow from it and are left out.
    """
    names = dict.fromkeys(("algorithm", *chain.from_iterable(s.settings for s in series)))
    said = [name for name in names if name not in (*UNSAID, "updates")]
    chosen = [name for name in (*said, "updates") if _differs(name, series)]
    alone = len(series) == _distinct(series, chosen)
    labels = [_said(each, chosen) for each in series]
    if not alone:
        labels = [f"{label}, {s.folder.name}" for s, label in zip(series, labels, strict=True)]
    return [s._replace(label=label) for s, label in zip(series, labels, strict=True)]


def score(series: Series) -> np.ndarray:
    """The final evaluation of each seed, [R], or else the end of its curve; NaN if it diverged."""
    if series.final is not None:
        return series.final
    return series.metrics["episode_return"][:, -1]


def best(series: list[Series], most: int) -> list[Series]:
    """The series whose labels rank highest by mean score over the environments, in their given order."""
    means = [float(np.nan_to_num(score(s), nan=-np.inf).mean()) for s in series]
    ranks: dict[str, list[int]] = {}
    for s, mean in zip(series, means, strict=True):
        others = (m for t, m in zip(series, means, strict=True) if t.environment == s.environment)
        ranks.setdefault(s.label, []).append(sum(other > mean for other in others))
    kept = sorted(ranks, key=lambda name: sum(ranks[name]) / len(ranks[name]))[:most]
    return [s for s in series if s.label in kept]


def _distinct(series, names) -> int:
    return len({(s.environment, *(str(s.settings.get(name)) for name in names)) for s in series})


def _differs(name, series) -> bool:
    """Whether series of one environment differ in a setting beyond their algorithms' defaults."""
    found: dict[str, set[tuple[str, str]]] = {}
    for s in series:
        config, grid = preset(s.environment, str(s.settings.get("algorithm")))
        with suppress(ValueError):  # a row of another version
            config = settled(config)
        usual = getattr(grid, name)[0] if name in grid._fields else getattr(config, name, None)
        value = s.settings.get(name, usual)
        if name in COUNTS and value is None:  # left to the row
            value = usual
        whole = s.settings.get("schedule") == "constant" or value == s.settings.get("updates")
        if name == "schedule_updates" and whole:
            value = usual  # no schedule, or one as long as the run
        said = [str(list(x) if isinstance(x, tuple) else x) for x in (value, usual)]
        kind = "default" if said[0] == said[1] and name != "algorithm" else said[0]
        found.setdefault(s.environment, set()).add((kind, said[0]))
    return any(min(len(set(x)) for x in zip(*pairs, strict=True)) > 1 for pairs in found.values())


def _said(series, names) -> str:
    parts = []
    for name in names or ["algorithm"]:
        value = series.settings.get(name)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(text if name == "algorithm" else f"{name.strip('_')}={text}")
    return ", ".join(parts)


def _read(folder: Path) -> list[Series]:
    saved = _config(folder)
    structure, replicas = saved["config"], saved["replicas"]
    numbers = list(saved["hyperparameters"])
    read = _from_parquet if (folder / TABLE).exists() else _from_lines
    points = read(folder, len(replicas))
    evaluation = read_evaluation(folder, len(replicas))
    final = None if evaluation is None else np.array(evaluation["mean_return"], float)
    if "episode_return" not in points.metrics:
        raise ValueError(f"{folder} has no episode_return in its metrics")
    left = _unmeasured(structure)
    metrics = {
        k: x for k, x in points.metrics.items() if not k.startswith(RATIOS) and k not in left
    }
    # Replicas that share every hyperparameter are the seeds of one series.
    places: dict[tuple, list[int]] = {}
    for i, replica in enumerate(replicas):
        places.setdefault(tuple(replica[name] for name in numbers), []).append(i)
    return [
        Series(
            structure["environment"],
            "",
            folder,
            structure | dict(zip(numbers, values, strict=True)),
            points.update,
            points.env_steps[rows],
            points.seconds,
            {name: each[rows] for name, each in metrics.items()},
            None if final is None else final[rows],
            _ratios(points, rows, structure["num_envs"]),
            [int(at) for at in points.since[rows] if at < np.inf],
        )
        for values, rows in places.items()
    ]


def _unmeasured(structure) -> list[str]:
    """Metrics that an earlier version recorded although they carry no information."""
    known = {each.name for each in fields(Config)}
    try:
        row = build_algorithm(Config(**{k: x for k, x in structure.items() if k in known}))
    except ValueError:  # a row, or a name, of another version
        return []
    return unmeasured(row)


def _config(folder: Path) -> Any:
    """Reads config.json and checks that it has what a series needs. Raises ValueError."""
    try:
        is_sweep, is_folder = (folder / SWEEP).is_file(), folder.is_dir()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"cannot read {folder}: {error.strerror or error}") from error
    if is_sweep:
        raise ValueError(f"{folder} is a sweep; its figures are in {folder / FIGURES}")
    if not is_folder:
        raise ValueError(f"{folder} is not a folder; name the folder of a jaxpg train run")
    path, saved = read_config(folder)
    wanted = {"config.environment": str, "config.num_envs": int}
    for place, kind in wanted.items():
        expect(saved["config"].get(place.partition(".")[2]), kind, f"cannot read {path}: {place}")
    replicas = saved.get("replicas", [])
    if not replicas:
        raise ValueError(f"cannot read {path}: it has no replicas")
    for i, each in enumerate(replicas):
        if missing := saved["hyperparameters"].keys() - each.keys():
            raise ValueError(f"cannot read {path}: replicas[{i}] has no {min(missing)}")
    return saved


class Line(TypedDict):
    """The required content of a line of metrics.jsonl; its other entries are metrics, a list each."""

    update: int
    env_steps: list[int]
    seconds: float


class Points(NamedTuple):
    """Curves of R replicas at T updates; a longer run is averaged over T windows of updates."""

    update: np.ndarray  # [T]
    env_steps: np.ndarray  # [R, T]
    seconds: np.ndarray  # [T]
    metrics: dict[str, np.ndarray]  # [R, T] each
    every: np.ndarray  # [U] every update
    noise: dict[str, np.ndarray]  # [R, U] each, at every update, if measured
    since: np.ndarray  # [R] the update at which it diverged, or inf; later values are not results


def _from_lines(folder, count) -> Points:
    """Reads metrics.jsonl: a line for each chunk of updates."""
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    with open(path, "rb") if path.is_file() else io.BytesIO() as file:
        for i, text in enumerate(file, start=1):
            # What follows the last line break is a line that a crash cut short.
            if text.strip() and text.endswith(b"\n"):
                lines.append(_line(text, count, f"{path}, line {i}"))
    if not lines:
        raise ValueError(f"{path} is empty: the run ended before its first chunk of updates")
    # A resumed run may measure more and so add columns after the first line.
    names = dict.fromkeys(chain.from_iterable(lines))
    columns = {
        name: np.array([line.get(name, [None] * count) for line in lines], float)
        for name in names
        if name not in ("update", "seconds")
    }
    update, seconds = (np.array([line[k] for line in lines], float) for k in ("update", "seconds"))
    arrays = {name: each.T for name, each in columns.items()}
    env_steps = arrays.pop("env_steps")
    since = np.array([at or np.inf for at, _ in first_divergence(update, arrays)])
    gone = update[None] >= since[:, None]
    arrays = {name: np.where(gone, np.nan, each) for name, each in arrays.items()}
    noise = {name: arrays.pop(name) for name in NOISE if name in arrays}
    return _windows(Points(update, env_steps, seconds, arrays, update, noise, since))


def _line(text, count, where) -> dict[str, Any]:
    found = parsed(text, Line, where)
    found.pop("steps_per_second", None)  # it follows from the others
    for name, values in found.items():
        if name not in ("update", "seconds"):
            expect(values, list[float | None], f"cannot read {where}: {name}")
            if len(values) != count:
                raise ValueError(
                    f"cannot read {where}: {name} has {len(values)} entries for {count} replicas"
                )
    return found


def _windows(points: Points) -> Points:
    """At most MOST_POINTS points: counters at the end of each window, metrics averaged over it."""
    update, env_steps, seconds, metrics = points[:4]
    if len(update) <= MOST_POINTS:
        return points
    edges = _edges(len(update))
    starts, ends = edges[:-1], edges[1:] - 1

    def average(values):
        has = np.isfinite(values)
        total = np.add.reduceat(np.where(has, values, 0.0), starts, axis=1)
        with np.errstate(invalid="ignore"):
            return total / np.add.reduceat(has, starts, axis=1, dtype=float)

    averaged = {name: average(values) for name, values in metrics.items()}
    return points._replace(
        update=update[ends], env_steps=env_steps[:, ends], seconds=seconds[ends], metrics=averaged
    )


def _edges(count: int) -> np.ndarray:
    """Where windows begin, and the end of the last."""
    return np.linspace(0, count, min(count, MOST_POINTS) + 1).round().astype(int)


def _from_parquet(folder, count) -> Points:
    """Reads metrics.parquet, of one part or several: a row for each replica and update.

    Makes two passes over the parts: for the updates and divergences, then for the other columns, which it
    sums over windows.
    """
    path = folder / TABLE
    labels = {*read_config(folder)[1].get("replicas", [{}])[0]} - {*COUNTERS}
    updates, num_rows, since = [np.empty(0)], 0, np.full(count, np.inf)
    for rows in _batches(path, lambda name: name in ("replica", "update", *WATCHED)):
        replica = rows["replica"]
        if not np.isin(replica, np.arange(count)).all():
            raise ValueError(f"cannot read {path}: replica must be between 0 and {count - 1}")
        updates.append(np.unique(rows["update"]))
        num_rows += len(rows["update"])
        watched = [np.isfinite(rows[name]) for name in WATCHED if name in rows]
        bad = ~np.all(watched, axis=0) & np.ones(len(replica), bool)
        np.minimum.at(since, replica[bad].astype(int), rows["update"][bad])
    if not num_rows:
        raise ValueError(f"{path} is empty: the run ended before its first chunk of updates")
    update = np.unique(np.concatenate(updates))
    if num_rows != count * len(update):
        raise ValueError(
            f"{path} has {num_rows} rows, and {len(update)} updates of {count} replicas need "
            f"{count * len(update)}"
        )
    edges = _edges(len(update))
    width, ends = len(edges) - 1, edges[1:] - 1
    # A window of one update keeps its value; a longer one leaves out values that are not finite.
    single = width == len(update)
    sums: dict[str, np.ndarray] = {}
    last: dict[str, np.ndarray] = {}
    noise: dict[str, np.ndarray] = {}
    for rows in _batches(path, lambda name: name not in labels):
        replica, at = rows.pop("replica").astype(int), rows.pop("update")
        place = np.searchsorted(update, at)
        window = np.searchsorted(edges, place, side="right") - 1
        cell, at_end = replica * width + window, place == ends[window]
        for name in ("env_steps", "seconds"):
            if name not in last:
                last[name] = np.full(count * width, np.nan)
            last[name][cell[at_end]] = rows.pop(name)[at_end]
        gone = at >= since[replica]
        rows = {name: np.where(gone, np.nan, values) for name, values in rows.items()}
        for name in rows.keys() & {*NOISE}:
            if name not in noise:
                noise[name] = np.full((count, len(update)), np.nan)
            noise[name][replica, place] = rows.pop(name)
        for name, values in rows.items():
            has = np.isfinite(values) | single
            if name not in sums:
                sums[name] = np.zeros((2, count * width))
            kept = np.where(has, values, 0.0), has
            for total, each in zip(sums[name], kept, strict=True):
                total += np.bincount(cell, each, count * width)
    with np.errstate(invalid="ignore"):
        metrics = {name: (x[0] / x[1]).reshape(count, width) for name, x in sums.items()}
    env_steps, seconds = (last[name].reshape(count, width) for name in ("env_steps", "seconds"))
    return Points(update[ends], env_steps, seconds[0], metrics, update, noise, since)


def _batches(path: Path, wanted: Callable[[str], bool]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the wanted columns of a table, a batch of rows at a time. Raises ValueError."""
    from pyarrow import ArrowException, parquet, types

    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    try:
        for part in parts:
            with parquet.ParquetFile(part, page_checksum_verification=True) as file:
                schema = file.schema_arrow
                for name in COUNTERS:
                    if name not in schema.names:
                        raise ValueError(f"cannot read {part}: it has no column {name}")
                columns = [name for name in schema.names if wanted(name)]
                for name in columns:
                    kind = schema.field(name).type
                    if not (types.is_integer(kind) or types.is_floating(kind)):
                        raise ValueError(f"cannot read {part}: {name} holds {kind}, not numbers")
                for batch in file.iter_batches(BATCH, columns=columns):
                    yield {
                        name: batch[name].to_numpy(zero_copy_only=False).astype(float)
                        for name in columns
                    }
    except (OSError, ArrowException) as error:
        why = f"{error}".splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"cannot read {path}: {why}") from error


def _ratios(points: Points, rows, num_envs) -> dict[str, Estimate]:
    """The noise scale and signal-to-noise at the shown updates, over all seeds and a window of updates."""
    every, noise, shown = points.every, points.noise, points.update
    if noise.keys() != {*NOISE}:
        return {}
    found: list[dict[str, Estimate]] = []
    start = every[0] - 1
    window = max(LEAST_WINDOW, (every[-1] - start) / MOST_POINTS)
    for end in shown:
        # Only whole windows, unless the run is shorter than one.
        whole = end - window >= start or end == every[-1]
        inside = (every > end - window) & (every <= end) & whole
        some = np.ix_(rows, np.flatnonzero(inside))
        samples = np.stack([noise[name][some].ravel() for name in NOISE])
        above, below = samples[:, np.isfinite(samples).all(axis=0)]  # without diverged values
        found.append(noise_ratios(above, below, num_envs))
    return {
        name: Estimate(*(np.array(x) for x in zip(*(each[name] for each in found), strict=True)))
        for name in found[0]
    }
