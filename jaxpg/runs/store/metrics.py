"""Metrics of a run, [replica, update], and the sinks that they are written to."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.envs.suites import installing
from jaxpg.runs.config.config import Config
from jaxpg.runs.store.folder import append_json, json_line, jsonable, write_atomically
from jaxpg.stats.seeds import noise_ratios, summarise
from jaxpg.types import Hyperparams

ENDS = ("low", "high")  # of an interval
MOST_RUNS = 64  # agents of which each has a run of its own in TensorBoard


class Records(NamedTuple):
    """One chunk: K updates of N replicas."""

    update: np.ndarray  # [K] counted from 1
    env_steps: np.ndarray  # [N, K] of each replica, so far
    seconds: np.ndarray  # [K] of training so far, spread evenly over a chunk
    metrics: dict[str, np.ndarray]  # [N, K] each; NaN where there is no value


class Sink(NamedTuple):
    """A destination of records: just two functions, so that users can easily write their own."""

    write: Callable[[Records], Any]
    close: Callable[[], Any]


class Table(NamedTuple):
    """The Parquet table: collects records until flush writes them as one more part."""

    write: Callable[[Records], None]
    flush: Callable[[], None]


def check_sinks(config: Config) -> None:
    """Raises ValueError when a sink that was asked for is not installed."""
    for wanted, module, extra in (
        (config.tensorboard, "tensorboardX", "tensorboard"),
        (config.wandb, "wandb", "wandb"),
    ):
        if wanted and find_spec(module) is None:
            raise ValueError(f"--{extra} needs {module}: {installing(extra)}")


def nan_mean(values: np.ndarray) -> np.ndarray:
    """[N, K] to [N]: the mean over the updates that have a value, NaN if none has."""
    has = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(has, values, 0.0).sum(axis=1) / has.sum(axis=1)


def means(records: Records, num_envs: int) -> dict[str, np.ndarray]:
    """[N] each: the chunk's means and, where noise is measured, ratios of them."""
    found = {name: nan_mean(values) for name, values in records.metrics.items()}
    return found | _ratios(records, num_envs, [[i] for i in range(len(records.env_steps))])


def _ratios(records: Records, num_envs: int, groups: list[list[int]]) -> dict[str, np.ndarray]:
    """Ratios [G] over each group's replicas and the chunk's updates; if unresolved, NaN and a bound."""
    if not {"noise", "signal"} <= records.metrics.keys():
        return {}
    noise, signal = (
        np.stack([records.metrics[name][rows].ravel() for rows in groups])
        for name in ("noise", "signal")
    )
    found = {}
    for name, (value, low, _) in noise_ratios(noise, signal, num_envs).items():
        found |= {name: value, f"{name}_above": np.where(np.isnan(value), low, np.nan)}
    return found


def json_lines(path: Path, num_envs: int) -> Sink:
    """Writes one line for each chunk, with the mean of every metric for each replica."""

    def write(records):
        append_json(path, _line(records, num_envs))

    return Sink(write, lambda: None)


def _line(records: Records, num_envs: int) -> dict[str, Any]:
    counts = {
        "update": records.update[-1],
        "env_steps": records.env_steps[:, -1],
        "seconds": records.seconds[-1],
        "steps_per_second": _steps_per_second(records),
    }
    return counts | means(records, num_envs)


def _steps_per_second(records: Records) -> float:
    """Environment steps of all replicas per second of training, so far."""
    return float(records.env_steps[:, -1].sum() / records.seconds[-1])


def parquet(folder: Path, labels: list[dict], columns: list[str]) -> Table:
    """A tidy table with a row for each replica and update, stored as a folder of parts.

    columns: the labels that vary. Each checkpoint writes a new part, so that neither a crash nor a resume
    has to rewrite earlier ones.
    """
    kept: list[Records] = []

    def flush():
        if not kept:
            return
        records = _joined(kept)
        count = len(records.update)
        rows: dict[str, Any] = {"replica": np.repeat(np.arange(len(labels), dtype=np.int32), count)}
        for name in ("seed", *columns):
            rows[name] = np.repeat(np.array([label[name] for label in labels]), count)
        rows["update"] = np.tile(records.update, len(labels))
        rows["env_steps"] = records.env_steps.reshape(-1)
        rows["seconds"] = np.tile(records.seconds, len(labels))
        rows |= {name: values.reshape(-1) for name, values in records.metrics.items()}
        folder.mkdir(exist_ok=True)
        write_columns(folder / f"part-{records.update[-1]:012d}.parquet", rows)
        kept.clear()

    return Table(kept.append, flush)


def write_columns(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: _column(values) for name, values in columns.items()})
    write_atomically(path, lambda file: parquet.write_table(table, file, write_page_checksum=True))


def _column(values: np.ndarray) -> Any:
    """Numbers as a pyarrow array; NaN becomes null, because readers skip nulls in a mean but not NaN."""
    import pyarrow

    if values.dtype.kind not in "iuf":
        return pyarrow.array(values)
    # pyarrow.array would spend half a second importing pandas, only to see that this is not a series.
    valid = None
    if values.dtype.kind == "f":
        valid = pyarrow.py_buffer(np.packbits(~np.isnan(values), bitorder="little"))
    buffer = pyarrow.py_buffer(np.ascontiguousarray(values))
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [valid, buffer])


def tensorboard(folder: Path, labels: list[dict], columns: list[str], num_envs: int, after: int):
    """Writes event files, by update: a run for every setting, and one for each of its seeds.

    A setting's has the mean of each metric over seeds and, under `band/`, the ends of its 95 % interval,
    which a custom chart draws. after: drops the events of later updates, which a resumed run repeats.
    """
    from tensorboardX import SummaryWriter

    writers, settings = {}, _settings(labels, columns)

    def add(run, scalars, update):
        if run not in writers:
            place = str(folder / run)
            writers[run] = SummaryWriter(place, purge_step=after + 1 if after else None)
        for tag, value in scalars.items():
            if np.isfinite(value):
                writers[run].add_scalar(tag, float(value), update)
        writers[run].flush()

    def write(records):
        update, each = int(records.update[-1]), means(records, num_envs)
        for name, scalars in _by_setting(records, labels, columns, num_envs).items():
            rows, fresh = settings[name], name not in writers
            ends = {k: summarise(x[rows])[1:3] for k, x in each.items()} if len(rows) > 1 else {}
            bands = {
                f"band/{k}_{end}": x
                for k, v in ends.items()
                for end, x in zip(ENDS, v, strict=True)
            }
            add(name, {_tag(k): x for k, x in scalars.items()} | bands, update)
            if fresh and ends:
                charts = {
                    k: ["Margin", [_tag(k), *(f"band/{k}_{end}" for end in ENDS)]] for k in ends
                }
                writers[name].add_custom_scalars({"mean and 95 % interval over seeds": charts})
            if 1 < len(labels) <= MOST_RUNS:
                for i in rows:
                    seed = f"{name}/seed={labels[i]['seed']:g}"
                    add(seed, {_tag(k): x[i] for k, x in each.items()}, update)

    return Sink(write, lambda: [writer.close() for writer in writers.values()])


def _tag(metric: str) -> str:
    """The metric's name in TensorBoard, where others look for it."""
    if metric in ("seconds", "steps_per_second"):
        return f"time/{metric}"
    group = "charts" if metric.startswith(("episode", "env_steps", "scheduled_")) else "losses"
    return f"{group}/{metric.removeprefix('scheduled_')}"


def wandb(
    folder: Path, description: dict, labels: list[dict], columns: list[str], num_envs: int
) -> Sink:
    """Logs to Weights & Biases, offline unless WANDB_MODE is set: one run, a metric for each setting."""
    import wandb as library

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    settings = library.Settings(silent=True)
    run = library.init(
        project="jaxpg", dir=str(folder), mode=mode, config=jsonable(description), settings=settings
    )

    def write(records):
        found = _by_setting(records, labels, columns, num_envs)
        several = len(found) > 1
        flat = {
            f"{name}/{metric}" if several else metric: value
            for name, scalars in found.items()
            for metric, value in scalars.items()
        }
        run.log(flat, step=int(records.update[-1]))

    return Sink(write, run.finish)


def rewind(lines: Path, table: Path, update: int) -> None:
    """Drops the records after this update, because a resumed run writes them again."""
    if lines.is_file():
        # What follows the last line break is a line that a crash cut short.
        kept = [
            line
            for line in lines.read_text(errors="replace").split("\n")[:-1]
            if not (at := _update(line)) or at <= update
        ]
        write_atomically(lines, lambda file: file.write("".join(x + "\n" for x in kept).encode()))
    for part in table.glob("part-*.parquet"):
        if int(part.stem.removeprefix("part-")) > update:
            part.unlink()
    if update == 0:
        shutil.rmtree(table, ignore_errors=True)


def count_lines(lines: Path) -> int:
    return len(lines.read_bytes().splitlines()) if lines.is_file() else 0


def check_table(folder: Path, since: int, update: int, replicas: int) -> None:
    """Raises ValueError if the table cannot be read, or lacks a row from update `since` to `update`."""
    from pyarrow import ArrowException, parquet

    found, why = np.zeros(update + 1, int), ""
    for part in _parts(folder, update):
        try:
            table = parquet.read_table(part, page_checksum_verification=True)
            found += np.bincount(table["update"].to_numpy(), minlength=update + 1)[: update + 1]
        except (ArrowException, OSError, KeyError) as error:
            why = f": {part.name} cannot be read ({str(error).splitlines()[0][:100]})"
    bad = since + np.flatnonzero(found[since:] != replicas)
    if len(bad):
        raise ValueError(
            f"{folder} is not whole between updates {bad[0]} and {bad[-1]}{why}; put its parts back, or "
            "move it and metrics.jsonl away to go on without their records"
        )


def mend_lines(
    lines: Path, table: Path, updates: tuple[int, int], chunk: int, count: int | None, num_envs: int
) -> str:
    """Rewrites the lines from the table if some are missing or damaged, and says so; otherwise "".

    updates: the first and the last on record. count: how many lines there were; None: unknown.
    """
    since, update = updates
    at = [_update(x) for x in lines.read_bytes().splitlines()] if lines.is_file() else []
    rising = all(a < b for a, b in pairwise([since - 1, *at]))
    if update < since or (rising and at[-1:] == [update] and count in (None, len(at))):
        return ""
    from pyarrow import concat_tables, parquet

    parts = [parquet.read_table(part) for part in _parts(table, update)]
    whole = concat_tables(parts, promote_options="default").sort_by(
        [("replica", "ascending"), ("update", "ascending")]
    )
    total = update + 1 - since
    columns = {
        name: np.asarray(column.to_numpy(), column.type.to_pandas_dtype()).reshape(-1, total)
        for name, column in zip(whole.column_names, whole.columns, strict=True)
    }
    steps, seconds = columns.pop("env_steps"), columns.pop("seconds")[0]
    measured = {k: x for k, x in columns.items() if k not in ("seed", *Hyperparams._fields)}
    del measured["replica"], measured["update"]
    text: list[bytes] = []
    for end in sorted({*range(since - 1 + chunk, update, chunk), update}):
        place = slice(max(end - chunk, since - 1) + 1 - since, end + 1 - since)
        records = Records(
            np.arange(since, update + 1)[place],
            steps[:, place],
            seconds[place],
            {name: values[:, place] for name, values in measured.items()},
        )
        text.append(json_line(_line(records, num_envs)))
    write_atomically(lines, lambda file: file.writelines(text))
    return f"{lines} had lost lines; it is rewritten from {table.name}"


def _update(line: str | bytes) -> int:
    """The update of a line of metrics.jsonl; 0 if the line is damaged."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, TypeError, KeyError):
        return 0


def _parts(folder: Path, update: int) -> list[Path]:
    """The parts of the table up to an update, in their order."""
    parts = sorted(folder.glob("part-*.parquet"))
    return [part for part in parts if int(part.stem.removeprefix("part-")) <= update]


def _joined(kept: list[Records]) -> Records:
    return Records(
        np.concatenate([r.update for r in kept]),
        np.concatenate([r.env_steps for r in kept], axis=1),
        np.concatenate([r.seconds for r in kept]),
        {name: np.concatenate([r.metrics[name] for r in kept], axis=1) for name in kept[0].metrics},
    )


def _settings(labels, columns) -> dict[str, list[int]]:
    """The replicas of each setting, by a name that can serve as a folder's."""
    places: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        name = ",".join(f"{column}={label[column]:g}" for column in columns) or "all"
        places.setdefault(name, []).append(i)
    return places


def _by_setting(records, labels, columns, num_envs) -> dict[str, dict[str, float]]:
    settings = _settings(labels, columns)
    ratios = _ratios(records, num_envs, list(settings.values()))
    found = {name: nan_mean(values) for name, values in records.metrics.items()}
    found["env_steps"] = records.env_steps[:, -1].astype(float)
    scalars = {}
    for place, (name, rows) in enumerate(settings.items()):
        each = {metric: nan_mean(values[None, rows])[0] for metric, values in found.items()}
        each |= {metric: values[place] for metric, values in ratios.items()}
        scalars[name] = {metric: float(x) for metric, x in each.items() if not np.isnan(x)}
        scalars[name]["seconds"] = float(records.seconds[-1])
        scalars[name]["steps_per_second"] = _steps_per_second(records)
    return scalars
