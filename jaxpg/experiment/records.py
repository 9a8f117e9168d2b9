"""Records: runs as their folders tell them, as arrays over seeds for pictures and tables."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.experiment.folder import CONFIG, EVALUATION, FIGURES, METRICS, TABLE
from jaxpg.experiment.health import first_divergence
from jaxpg.experiment.presets import preset
from jaxpg.experiment.statistics import noise_ratios
from jaxpg.intervals import Estimate

SWEEP = "sweep.json"
MOST_POINTS = 100  # of a curve: more are averaged over windows of updates
LEAST_WINDOW = 10  # updates that noise and signal are averaged over before their ratio
RATIOS = ("noise_scale", "signal_to_noise")  # as metrics.jsonl has them, of each chunk
# Settings that make no other series of a run.
UNSAID = ("environment", "run", "quiet", "seeds", "checkpoint_seconds", "tensorboard", "wandb",
          "debug_nans", "compilation_cache", "measure_noise", "evaluation_episodes")  # fmt: skip


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
    diverged: Sequence[
        int
    ] = ()  # of the seeds that did, the first update whose numbers are not finite


def read(folders: list[Path]) -> list[Series]:
    """Every series of the runs, labelled by what differs. Raises ValueError for what is no run."""
    repeated = [f for f in folders if sum(f.resolve() == g.resolve() for g in folders) > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice; there is nothing to compare")
    return labelled(list(chain.from_iterable(map(_read, folders))))


def labelled(series: list[Series]) -> list[Series]:
    """The same with labels: every setting in which series of one environment differ, updates last.

    The algorithm comes before all: what is only its own default follows from it, and is not said.
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
    """Of each seed, [R]: the final evaluation, or the last of the curve where there is none.

    NaN of a seed that has diverged.
    """
    if series.final is not None:
        return series.final
    return series.metrics["episode_return"][:, -1]


def best(series: list[Series], most: int) -> list[Series]:
    """The series of the labels that rank highest by mean score, over the environments, in their order."""
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
    """Whether series of one environment differ in it, and not only by their algorithms' defaults."""
    found: dict[str, set[tuple[str, str]]] = {}
    for s in series:
        config, grid = preset(s.environment, str(s.settings.get("algorithm")))
        usual = getattr(grid, name)[0] if name in grid._fields else getattr(config, name, None)
        value = s.settings.get(name, usual)
        whole = s.settings.get("schedule") == "constant" or value == s.settings.get("updates")
        if name == "schedule_updates" and whole:
            value = usual  # none, or one that is as long as the run
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
    try:
        structure, replicas = saved["config"], saved["replicas"]
        numbers = list(saved["hyperparameters"])
        environment = str(structure["environment"])
        read = _from_parquet if (folder / TABLE).exists() else _from_lines
        update, env_steps, seconds, metrics = read(folder, len(replicas))
        final = _final(folder, len(replicas))
    except (OSError, KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the run in {folder}: {error!r}") from error
    # From where a replica diverged on, nothing that it does is a result.
    since = np.array([at or np.inf for at, _ in first_divergence(update, metrics)])
    metrics = {
        name: np.where(update[None] >= since[:, None], np.nan, each)
        for name, each in metrics.items()
    }
    noise = [metrics.pop(name, None) for name in ("noise", "signal")]
    metrics = {name: each for name, each in metrics.items() if not name.startswith(RATIOS)}
    every = update
    update, env_steps, seconds, metrics = _windows(update, env_steps, seconds, metrics)
    # Replicas that share every number are the seeds of one series.
    places: dict[tuple, list[int]] = {}
    for i, replica in enumerate(replicas):
        places.setdefault(tuple(replica[name] for name in numbers), []).append(i)
    return [
        Series(
            environment,
            "",
            folder,
            structure | dict(zip(numbers, values, strict=True)),
            update,
            env_steps[rows],
            seconds,
            {name: each[rows] for name, each in metrics.items()},
            None if final is None else final[rows],
            _ratios(noise, rows, every, update, structure["num_envs"]),
            [int(at) for at in since[rows] if at < np.inf],
        )
        for values, rows in places.items()
    ]


def _config(folder: Path) -> dict[str, Any]:
    if (folder / SWEEP).is_file():
        raise ValueError(f"{folder} is a sweep; its pictures are in {folder / FIGURES}")
    if not (folder / CONFIG).is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}; name the folder of a jaxpg train run")
    try:
        return json.loads((folder / CONFIG).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {folder / CONFIG}: {error}") from error


def _from_lines(folder, count):
    """metrics.jsonl: a line for each chunk of updates."""
    path = folder / METRICS
    text = path.read_text() if path.is_file() else ""
    # What follows the last line break is a line that a crash cut short.
    lines = [json.loads(line) for line in text.split("\n")[:-1] if line]
    if not lines:
        raise ValueError(f"{path} is empty: the run ended before its first chunk of updates")
    # Columns may come later than the first line, when a resumed run measures more.
    names = dict.fromkeys(chain.from_iterable(lines))
    columns = {
        name: np.array([line.get(name, [None] * count) for line in lines], float)
        for name in names
        if name not in ("update", "seconds")
    }
    update, seconds = (np.array([line[k] for line in lines], float) for k in ("update", "seconds"))
    arrays = {name: each.T for name, each in columns.items()}
    return update, arrays.pop("env_steps"), seconds, arrays


def _from_parquet(folder, count):
    """metrics.parquet, of one part or several: a row for each replica and update."""
    from pyarrow import ArrowException, parquet

    path = folder / TABLE
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not table.num_rows:
        raise ValueError(f"{path} is empty: the run ended before its first chunk of updates")
    replica, update = (table[name].to_numpy() for name in ("replica", "update"))
    order = np.lexsort((update, replica))
    if len(order) % count:
        raise ValueError(f"{path} has {len(order)} rows, not a multiple of {count} replicas")
    shape = (count, -1)
    skipped = {"replica", *json.loads((folder / CONFIG).read_text())["replicas"][0]}
    arrays = {
        name: table[name].to_numpy().astype(float)[order].reshape(shape)
        for name in table.column_names
        if name not in skipped
    }
    update, seconds = arrays.pop("update")[0], arrays.pop("seconds")[0]
    return update, arrays.pop("env_steps"), seconds, arrays


def _final(folder, count):
    path = folder / EVALUATION
    if not path.is_file():
        return None
    returns = np.array(json.loads(path.read_text())["mean_return"], float)
    if len(returns) != count:
        raise ValueError(f"{path} has {len(returns)} returns for {count} replicas")
    return returns


def _windows(update, env_steps, seconds, metrics):
    """At most MOST_POINTS points: counters at the end of each window, metrics averaged over it."""
    if len(update) <= MOST_POINTS:
        return update, env_steps, seconds, metrics
    edges = np.linspace(0, len(update), MOST_POINTS + 1).round().astype(int)
    starts, ends = edges[:-1], edges[1:] - 1

    def average(values):
        has = np.isfinite(values)
        total = np.add.reduceat(np.where(has, values, 0.0), starts, axis=1)
        with np.errstate(invalid="ignore"):
            return total / np.add.reduceat(has, starts, axis=1, dtype=float)

    averaged = {name: average(values) for name, values in metrics.items()}
    return update[ends], env_steps[:, ends], seconds[ends], averaged


def _ratios(noise, rows, every, shown, num_envs) -> dict[str, Estimate]:
    """The noise scale and signal to noise at the shown updates, of all seeds and the last updates until then.

    noise: noise and signal [R, T] at `every` update.
    """
    if any(each is None for each in noise):
        return {}
    found: list[dict[str, Estimate]] = []
    start = every[0] - 1
    window = max(LEAST_WINDOW, (every[-1] - start) / MOST_POINTS)
    for end in shown:
        # A whole window, but for a run that is shorter.
        whole = end - window >= start or end == every[-1]
        inside = (every > end - window) & (every <= end) & whole
        samples = np.stack([each[rows][:, inside].ravel() for each in noise])
        above, below = samples[:, np.isfinite(samples).all(axis=0)]  # without what has diverged
        found.append(noise_ratios(above, below, num_envs))
    return {
        name: Estimate(*(np.array(x) for x in zip(*(each[name] for each in found), strict=True)))
        for name in found[0]
    }
