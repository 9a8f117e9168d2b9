"""Rankings: what a sweep found, as a table, as files and in the terminal."""

from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.experiment import artifacts, responses
from jaxpg.experiment import folder as files
from jaxpg.experiment.config import Config, Grid
from jaxpg.experiment.records import SWEEP
from jaxpg.experiment.report import aligned
from jaxpg.experiment.search import Options, Rung
from jaxpg.experiment.statistics import interval, number, robust
from jaxpg.lab.reliability import interquartile_mean
from jaxpg.lab.streaming import Estimate
from jaxpg.types import Hyperparams

MOST_ROWS = 12
WIDTH = 80


class Search(NamedTuple):
    """What a sweep tries."""

    grid: Grid  # the values that were listed; of a range for random search, its ends
    options: Options
    swept: tuple[str, ...]
    points: list[Hyperparams]
    rungs: list[Rung]


class Outcomes(NamedTuple):
    """What is known of every point so far; filled while the sweep runs."""

    returns: (
        np.ndarray
    )  # [P, S] final evaluation, or the last chunk of training where there is none
    updates: np.ndarray  # [P]
    evaluated: np.ndarray  # [P, S] bool


class Costs(NamedTuple):
    """What a sweep took."""

    env_steps: int
    seconds: float  # without the first compilation
    compile_seconds: float
    batch: int  # replicas that the first rung trains at a time
    bytes: int | None  # that its program needs of one device


def nothing_yet(num_points: int, seeds: int) -> Outcomes:
    shape = num_points, seeds
    return Outcomes(np.full(shape, np.nan), np.zeros(num_points, int), np.zeros(shape, bool))


def best_of(outcomes: Outcomes, alive: np.ndarray, count: int) -> np.ndarray:
    """The places in `alive` of the best points, best first. Raises ValueError when none has a return."""
    found = _scores(outcomes)[alive]
    if np.isnan(found).all():
        raise ValueError(
            f"no episode ended in the last chunk before update {outcomes.updates[alive[0]]}, so that "
            "halving has nothing to rank by; use more --updates or --num-steps, or no --halving"
        )
    return np.argsort(-np.nan_to_num(found, nan=-np.inf), kind="stable")[:count]


def order(outcomes: Outcomes) -> np.ndarray:
    """The points that were run, best first; one that trained longer is before what halving dropped."""
    found = np.nan_to_num(_scores(outcomes), nan=-np.inf)
    return np.lexsort((-found, -outcomes.updates))[: (outcomes.updates > 0).sum()]


def table(search: Search, outcomes: Outcomes) -> dict[str, list]:
    """A column for each number, a row for each point that was run, best first."""
    returns, places = _filled(outcomes), order(outcomes)
    estimates = [robust(returns[i]) for i in places]
    columns: dict[str, list] = {"rank": list(range(1, len(places) + 1))}
    columns |= {n.strip("_"): [getattr(search.points[i], n) for i in places] for n in search.swept}
    return columns | {
        "return": [e.value for e in estimates],
        "low": [e.low for e in estimates],
        "high": [e.high for e in estimates],
        "smallest": [float(returns[i].min()) for i in places],
        "largest": [float(returns[i].max()) for i in places],
        "updates": [int(outcomes.updates[i]) for i in places],
        "evaluated": [bool(outcomes.evaluated[i].all()) for i in places],
    }


def headline(config: Config, search: Search) -> list[str]:
    """What is tried, in lines."""
    devices = jax.devices()
    lines = [
        f"{config.environment}, {config.algorithm}: {len(search.points):,} points x {config.seeds} "
        f"seeds, {config.updates} updates, {len(devices)} {devices[0].platform} "
        f"device{'s' * (len(devices) > 1)}"
    ]
    if len(search.rungs) > 1:
        said = ", ".join(f"{r.points:,} to update {r.updates:,}" for r in search.rungs)
        lines.append(f"halving: {said}")
    return lines


def report(config: Config, search: Search, outcomes: Outcomes, costs: Costs) -> list[str]:
    """The best rows of the table, and what the sweep took."""
    found = table(search, outcomes)
    names = [n.strip("_") for n in search.swept]
    thinned = len(set(found["updates"])) > 1
    last = ["updates"] if thinned else []
    rows = [["rank", *names, "return", "95 % interval", *last]]
    for i in range(min(len(found["rank"]), MOST_ROWS)):
        numbers = [f"{found[n][i]:g}" for n in names]
        estimate = Estimate(found["return"][i], found["low"][i], found["high"][i])
        more = [f"{found['updates'][i]:,}"] * thinned
        rows.append([str(i + 1), *numbers, number(estimate.value), interval(estimate), *more])
    lines = [line[:WIDTH] for line in aligned(rows)]
    if len(found["rank"]) > MOST_ROWS:
        lines.append(f"  (the best {MOST_ROWS} of {len(found['rank']):,}; all are in table.csv)")
    evaluated = all(found["evaluated"])
    what = f"{config.evaluation_episodes} fresh episodes per agent" if evaluated else (
        "fresh episodes where training ended, else the last chunk of training"
    )  # fmt: skip
    flags = [f"--{n.replace('_', '-')} {found[n][0]:g}" for n in names] if found["rank"] else []
    return [
        f"interquartile mean over {config.seeds} seed{'s' * (config.seeds > 1)} of the return of",
        f"{what}:",
        *lines,
        *(["best: " + " ".join(flags)] if flags else []),
        f"{costs.env_steps:,} steps in {costs.seconds:.1f} s, in batches of {costs.batch:,} agents, "
        f"after {costs.compile_seconds:.1f} s",
        "of compilation",
    ]


def write(
    folder: Path, config: Config, search: Search, outcomes: Outcomes, costs: Costs, complete: bool
) -> None:
    """sweep.json, table.csv, table.parquet and figures/response; the first last, as it says all is there."""
    found = table(search, outcomes)
    artifacts.write_table(folder, found)
    figures = folder / files.FIGURES
    figures.mkdir(exist_ok=True)
    numbers = responses.Points(
        {n: [getattr(p, n) for p in search.points] for n in search.swept},
        _estimates(outcomes),
        outcomes.updates == config.updates,
        search.options.random is None,
    )
    title = f"{config.environment}, {config.algorithm}"
    artifacts.write_figure(
        figures, lambda figure: responses.draw(figure, numbers, title), "response"
    )
    described = files.description(config, search.grid, [])
    del described["replicas"]
    record: dict[str, Any] = {
        "kind": "sweep",
        **described,
        "search": {
            "swept": list(search.swept),
            "random": search.options.random,
            "ranges": {n: r._asdict() for n, r in search.options.ranges.items()},
            "halving": search.options.halving,
            "rungs": [rung._asdict() for rung in search.rungs],
        },
        "costs": costs._asdict(),
        "complete": complete,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "points": _described(search, outcomes, found),
    }
    files.write_json(folder / SWEEP, record)


def _described(search, outcomes, found) -> list[dict[str, Any]]:
    """Every point that was run, best first."""
    return [
        {
            "rank": rank,
            "hyperparameters": search.points[i]._asdict(),
            **{n: found[n][rank - 1] for n in ("return", "low", "high", "updates", "evaluated")},
            "returns": outcomes.returns[i],
        }
        for rank, i in enumerate(order(outcomes), start=1)
    ]


def _estimates(outcomes) -> np.ndarray:
    """[3, P]: interquartile mean, low and high; NaN for a point that was not run."""
    found = np.full((3, len(outcomes.updates)), np.nan)
    returns = _filled(outcomes)
    for i in np.flatnonzero(outcomes.updates):
        found[:, i] = robust(returns[i])
    return found


def _filled(outcomes) -> np.ndarray:
    """The returns; a seed that diverged, beside seeds that have a return, earns the least of all."""
    returns = outcomes.returns
    found = np.isfinite(returns)
    if not found.any():
        return returns
    beside = found.any(axis=1, keepdims=True) & ~found
    return np.where(beside, returns[found].min(), returns)


def _scores(outcomes) -> np.ndarray:
    return interquartile_mean(_filled(outcomes)[..., None])
