"""Metrics: what a run measures, [replica, update], and the sinks that it is written to."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.experiment.config import Config
from jaxpg.experiment.folder import append_json, jsonable, write_atomically


class Records(NamedTuple):
    """One chunk: K updates of N replicas."""

    update: np.ndarray  # [K] counted from 1
    env_steps: np.ndarray  # [N, K] of each replica, so far
    seconds: np.ndarray  # [K] of training so far; within a chunk, in equal parts
    metrics: dict[str, np.ndarray]  # [N, K] each; NaN where there is no value


class Sink(NamedTuple):
    """Where records go: two functions, so that a user's own is as short as it can be."""

    write: Callable[[Records], Any]
    close: Callable[[], Any]


class Table(NamedTuple):
    """The Parquet table: records are kept until flush writes them as one more part."""

    write: Callable[[Records], None]
    flush: Callable[[], None]


def check_sinks(config: Config) -> None:
    """Raises ValueError when a sink that was asked for is not installed."""
    for wanted, module, extra in (
        (config.tensorboard, "tensorboardX", "tensorboard"),
        (config.wandb, "wandb", "wandb"),
    ):
        if wanted and find_spec(module) is None:
            raise ValueError(f"--{extra} needs {module}: pip install 'jaxpg[{extra}]'")


def nan_mean(values: np.ndarray) -> np.ndarray:
    """[N, K] to [N]: over the updates that have a value, NaN where none has."""
    has = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(has, values, 0.0).sum(axis=1) / has.sum(axis=1)


def means(records: Records, num_envs: int) -> dict[str, np.ndarray]:
    """[N] each: the chunk's means and, where noise is measured, ratios of them."""
    found = {name: nan_mean(values) for name, values in records.metrics.items()}
    if {"noise", "signal"} <= found.keys():
        # Ratios of averages: each update's own is too noisy to be averaged.
        noise, signal = found["noise"], found["signal"]
        with np.errstate(divide="ignore", invalid="ignore"):
            found |= {
                "noise_scale": num_envs * noise / signal,  # in episodes, or lanes
                "signal_to_noise": signal / noise,
            }
    return found


def json_lines(path: Path, num_envs: int) -> Sink:
    """One line for each chunk, with the mean of every metric for each replica."""

    def write(records):
        counts = {
            "update": records.update[-1],
            "env_steps": records.env_steps[:, -1],
            "seconds": records.seconds[-1],
        }
        append_json(path, counts | means(records, num_envs))

    return Sink(write, lambda: None)


def parquet(folder: Path, labels: list[dict], columns: list[str]) -> Table:
    """A tidy table, a row for each replica and update, as a folder of parts that make one table.

    columns: of the labels, those that vary. A part is written at each checkpoint, so that neither a crash
    nor a resume has to rewrite what is there.
    """
    kept: list[Records] = []

    def flush():
        if not kept:
            return
        import pyarrow
        from pyarrow import parquet

        records = _joined(kept)
        count = len(records.update)
        rows: dict[str, Any] = {"replica": np.repeat(np.arange(len(labels), dtype=np.int32), count)}
        for name in ("seed", *columns):
            rows[name] = np.repeat(np.array([label[name] for label in labels]), count)
        rows["update"] = np.tile(records.update, len(labels))
        rows["env_steps"] = records.env_steps.reshape(-1)
        rows["seconds"] = np.tile(records.seconds, len(labels))
        rows |= {name: values.reshape(-1) for name, values in records.metrics.items()}
        table = pyarrow.table({name: _column(values) for name, values in rows.items()})
        folder.mkdir(exist_ok=True)
        path = folder / f"part-{records.update[-1]:012d}.parquet"
        write_atomically(path, lambda file: parquet.write_table(table, file))
        kept.clear()

    return Table(kept.append, flush)


def _column(values: np.ndarray) -> Any:
    """Numbers as a pyarrow array; no value is null, because readers skip that in a mean and keep NaN."""
    import pyarrow

    if values.dtype.kind not in "iuf":
        return pyarrow.array(values)
    # pyarrow.array would import pandas, half a second, to see that this is none of its series.
    valid = None
    if values.dtype.kind == "f":
        valid = pyarrow.py_buffer(np.packbits(~np.isnan(values), bitorder="little"))
    buffer = pyarrow.py_buffer(np.ascontiguousarray(values))
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [valid, buffer])


def tensorboard(folder: Path, labels: list[dict], columns: list[str], num_envs: int, after: int):
    """Event files: for every setting, the mean of each metric over its seeds, by update.

    after: events of later updates, which a resumed run repeats, are dropped.
    """
    from tensorboardX import SummaryWriter

    writers = {
        name: SummaryWriter(str(folder / name), purge_step=after + 1 if after else None)
        for name in _settings(labels, columns)
    }

    def write(records):
        for name, scalars in _by_setting(records, labels, columns, num_envs).items():
            for metric, value in scalars.items():
                writers[name].add_scalar(metric, value, int(records.update[-1]))
            writers[name].flush()

    return Sink(write, lambda: [writer.close() for writer in writers.values()])


def wandb(
    folder: Path, description: dict, labels: list[dict], columns: list[str], num_envs: int
) -> Sink:
    """Weights & Biases, offline unless WANDB_MODE says otherwise: one run, a metric for each setting."""
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
    """Drops what was recorded after this update, which a resumed run records again."""
    if lines.is_file():
        # What follows the last line break is a line that a crash cut short.
        kept = [
            line
            for line in lines.read_text().split("\n")[:-1]
            if json.loads(line)["update"] <= update
        ]
        write_atomically(lines, lambda file: file.write("".join(x + "\n" for x in kept).encode()))
    for part in table.glob("part-*.parquet"):
        if int(part.stem.removeprefix("part-")) > update:
            part.unlink()
    if update == 0:
        shutil.rmtree(table, ignore_errors=True)


def _joined(kept: list[Records]) -> Records:
    return Records(
        np.concatenate([r.update for r in kept]),
        np.concatenate([r.env_steps for r in kept], axis=1),
        np.concatenate([r.seconds for r in kept]),
        {name: np.concatenate([r.metrics[name] for r in kept], axis=1) for name in kept[0].metrics},
    )


def _settings(labels, columns) -> dict[str, list[int]]:
    """The replicas of each setting, under a name that a folder can have."""
    places: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        name = ",".join(f"{column}={label[column]:g}" for column in columns) or "all"
        places.setdefault(name, []).append(i)
    return places


def _by_setting(records, labels, columns, num_envs) -> dict[str, dict[str, float]]:
    found = means(records, num_envs)
    counts = {"env_steps": records.env_steps[:, -1].astype(float)}
    return {
        name: {
            metric: float(mean)
            for metric, values in (found | counts).items()
            if not np.isnan(mean := nan_mean(values[None, rows])[0])
        }
        | {"seconds": float(records.seconds[-1])}
        for name, rows in _settings(labels, columns).items()
    }
