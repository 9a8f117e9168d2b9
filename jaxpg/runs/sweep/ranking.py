"""Rankings: the results of a sweep as a table, as files and in the terminal."""

from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.runs.config.config import Config
from jaxpg.runs.console import say
from jaxpg.runs.host import health
from jaxpg.runs.store import artifacts
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import SWEEP, write_atomically
from jaxpg.runs.store.metrics import nan_mean, write_columns
from jaxpg.runs.sweep import figures
from jaxpg.runs.sweep.record import Search
from jaxpg.runs.sweep.search import count
from jaxpg.runs.train.report import aligned
from jaxpg.stats.moments import Estimate
from jaxpg.stats.reliability import interquartile_mean
from jaxpg.stats.seeds import interval, number, robust

OUTCOMES, CURVES = "outcomes.npz", "curves.parquet"
MOST_ROWS = 12
WIDTH = 80
DESCRIBED = ("return", "low", "high", "updates", "evaluated", "area", "tied", "diverged")


class Outcomes(NamedTuple):
    """The results of every point so far, filled in while the sweep runs."""

    returns: np.ndarray  # [P, S] final evaluation, or else the last chunk of training
    updates: np.ndarray  # [P]
    evaluated: np.ndarray  # [P, S] bool
    areas: np.ndarray  # [P, S] area under the learning curve / its length: the mean return so far
    ended: np.ndarray  # [P, S] number of updates in that mean: those in which an episode ended
    diverged: np.ndarray  # [P, S] the first update with a number that is not finite; 0: none
    curves: np.ndarray  # [P, S, C] mean return of each chunk of training
    steps: np.ndarray  # [P, S, C] of environments until its end


class Costs(NamedTuple):
    """The cost of a sweep."""

    env_steps: int
    seconds: float  # without the first compilation
    compile_seconds: float
    batch: int  # replicas that the first rung trains at a time
    bytes: int | None  # memory that its program needs on one device


def nothing_yet(num_points: int, seeds: int, chunks: int) -> Outcomes:
    shape = num_points, seeds
    return Outcomes(
        np.full(shape, np.nan),
        np.zeros(num_points, int),
        np.zeros(shape, bool),
        np.full(shape, np.nan),
        np.zeros(shape, int),
        np.zeros(shape, int),
        np.full((*shape, chunks), np.nan),
        np.zeros((*shape, chunks), np.int64),
    )


def by_row(x: np.ndarray, seeds: int) -> np.ndarray:
    """An array of the outcomes for every row, [P x S, ...]; a view, unless it is one of points."""
    return np.repeat(x, seeds) if x.ndim == 1 else x.reshape(-1, *x.shape[2:])


def note(outcomes: Outcomes, rows: np.ndarray, updates: int, measured: dict) -> None:
    """Records a chunk that ends at `updates`, for these rows of [P x S]; measured: [rows, K] each."""
    returns, area, ended, diverged = (
        x.reshape(-1) for x in (outcomes.returns, outcomes.areas, outcomes.ended, outcomes.diverged)
    )
    found = measured["episode_return"]
    at = updates - found.shape[1] + 1 + np.arange(found.shape[1])
    first = np.array([update for update, _ in health.first_divergence(at, measured)])
    diverged[rows] = np.where(diverged[rows] > 0, diverged[rows], first)
    mean, count = nan_mean(found), (~np.isnan(found)).sum(axis=1)
    ended[rows] += count
    before = np.where(np.isnan(area[rows]), mean, area[rows])
    with np.errstate(invalid="ignore"):
        step = (mean - before) * count / ended[rows]
    area[rows] = np.where(count > 0, before + step, area[rows])
    returns[rows] = mean
    for each in (returns, area):
        each[rows] = np.where(diverged[rows] > 0, np.nan, each[rows])
    chunk, seeds = updates // found.shape[1] - 1, outcomes.returns.shape[1]
    curves, steps = (by_row(x, seeds) for x in (outcomes.curves, outcomes.steps))
    curves[rows, chunk] = returns[rows]
    so_far = steps[rows, chunk - 1] if chunk else 0
    steps[rows, chunk] = so_far + measured["env_steps"].astype(np.int64).sum(axis=1)
    outcomes.updates[rows // outcomes.returns.shape[1]] = updates


def best_of(outcomes: Outcomes, alive: np.ndarray, count: int) -> np.ndarray:
    """The places in `alive` of the best points, best first. Raises ValueError when none has a return."""
    found = _scores(outcomes.returns)[alive]
    if np.isnan(found).all():
        raise ValueError(
            f"no episode ended in the last chunk before update {outcomes.updates[alive[0]]}, so "
            "halving has nothing to rank by; use more --updates or --num-steps, or no --halving"
        )
    areas = _scores(outcomes.areas)[alive]
    return np.lexsort([-np.nan_to_num(x, nan=-np.inf) for x in (areas, found)])[:count]


def order(outcomes: Outcomes) -> np.ndarray:
    """The points that were run, best first; those that halving dropped come after those it kept.

    The larger area under the learning curve breaks ties; diverged points come last.
    """
    found, areas = (_scores(x) for x in (outcomes.returns, outcomes.areas))
    lost = outcomes.diverged.all(axis=1) | (outcomes.updates == 0)
    keys = (np.nan_to_num(x, nan=-np.inf) for x in (areas, found))
    return np.lexsort((*(-x for x in keys), -outcomes.updates, lost))[
        : (outcomes.updates > 0).sum()
    ]


def table(search: Search, outcomes: Outcomes) -> dict[str, list]:
    """A column for each number, a row for each point that was run, best first."""
    returns, places = _filled(outcomes.returns), order(outcomes)
    estimates = [robust(returns[i]) for i in places]
    areas = _scores(outcomes.areas)
    level = [(int(outcomes.updates[i]), e.value) for i, e in zip(places, estimates, strict=True)]
    # A point without a return has no rank.
    ranks = [i if np.isfinite(e.value) else None for i, e in enumerate(estimates, start=1)]
    columns: dict[str, list] = {"rank": ranks}
    columns |= {n.strip("_"): [getattr(search.points[i], n) for i in places] for n in search.swept}
    return columns | {
        "return": [e.value for e in estimates],
        "low": [e.low for e in estimates],
        "high": [e.high for e in estimates],
        "smallest": [float(returns[i].min()) for i in places],
        "largest": [float(returns[i].max()) for i in places],
        "updates": [int(outcomes.updates[i]) for i in places],
        "evaluated": [bool(outcomes.evaluated[i].all()) for i in places],
        "area": [float(areas[i]) for i in places],
        "tied": [level.count(each) - 1 if np.isfinite(each[1]) else 0 for each in level],
        "diverged": [int((outcomes.diverged[i] > 0).sum()) for i in places],
    }


def headline(config: Config, search: Search, where: str) -> list[str]:
    """Lines that say what is tried; where: the devices, or the parts that were joined."""
    lines = [
        f"{config.environment}, {config.algorithm}: {len(search.points):,} points x {config.seeds} "
        f"seeds, {config.updates} updates, {where}"
    ]
    if search.options.part is not None:
        part, total = search.options.part, count(search.grid, search.options)
        lines.append(f"part {part.number} of {part.of}, of {total:,} points")
    if len(search.rungs) > 1:
        said = ", ".join(f"{r.points:,} to update {r.updates:,}" for r in search.rungs)
        lines.append(f"halving: {said}")
    return lines


def report(config: Config, search: Search, outcomes: Outcomes, costs: Costs) -> list[str]:
    """The best rows of the table, and the cost of the sweep."""
    found = table(search, outcomes)
    names = [n.strip("_") for n in search.swept]
    thinned, lossy = len(set(found["updates"])) > 1, any(found["diverged"])
    last = ["updates"] * thinned + ["diverged"] * lossy
    rows = [["rank", *names, "return", "95 % interval", *last]]
    for i in range(min(len(found["rank"]), MOST_ROWS)):
        numbers = [f"{found[n][i]:g}" for n in names]
        estimate = Estimate(found["return"][i], found["low"][i], found["high"][i])
        more = [f"{found['updates'][i]:,}"] * thinned
        more += [f"{found['diverged'][i]} of {config.seeds}"] * lossy
        rank = str(found["rank"][i] or "-")
        rows.append([rank, *numbers, number(estimate.value), interval(estimate), *more])
    lines = [line[:WIDTH] for line in aligned(rows)]
    if len(found["rank"]) > MOST_ROWS:
        lines.append(f"  (the best {MOST_ROWS} of {len(found['rank']):,}; all are in table.csv)")
    evaluated = all(found["evaluated"])
    what = f"{config.evaluation_episodes} fresh episodes per agent" if evaluated else (
        "fresh episodes where training ended, else the last chunk of training"
    )  # fmt: skip
    flags, best = [], "best" if search.options.part is None else "best of this part"
    if found["rank"] and np.isfinite(found["return"][0]):
        flags = [f"--{n.replace('_', '-')} {found[n][0]:g}" for n in names]
    return [
        f"interquartile mean over {config.seeds} seed{'s' * (config.seeds > 1)} of the return of",
        f"{what}:",
        *lines,
        *([f"{best}: " + " ".join(flags), *_tie(found)] if flags else []),
        f"{costs.env_steps:,} steps in {costs.seconds:.1f} s, in batches of {costs.batch:,} agents, "
        f"after {costs.compile_seconds:.1f} s",
        "of compilation",
    ]


def announce(
    folder: Path, config: Config, search: Search, outcomes: Outcomes, costs: Costs
) -> None:
    """Prints the report. Raises health.Diverged if every agent diverged."""
    say(*report(config, search, outcomes, costs))
    if outcomes.diverged.all():
        raise health.Diverged(
            f"nothing is ranked: all {len(search.points)} points diverged, the last seed at update "
            f"{outcomes.diverged.max()}; smaller steps may help; the table is in {folder}"
        )


def _tie(found) -> list[str]:
    """Lines about points that tie with the best."""
    others = found["tied"][0]
    if not others:
        return []
    said = f"  ties with {others} other point{'s' * (others > 1)} at {number(found['return'][0])}; "
    if found["area"][0] > found["area"][1]:
        return [said + "it has the largest area under its", "  learning curve"]
    return [said + "the areas under their", "  learning curves tie too, and it was listed first"]


def write(
    folder: Path,
    described: dict[str, Any],
    search: Search,
    outcomes: Outcomes,
    costs: Costs,
    complete: bool,
) -> None:
    """Writes table.csv, table.parquet and curves.parquet, then sweep.json, whose presence vouches for them.

    A part of a sweep also has outcomes.npz, so that the parts can be ranked together to the last digit.
    """
    found = table(search, outcomes)
    artifacts.write_table(folder, found)
    write_columns(folder / CURVES, _curves(search, outcomes))
    if search.options.part is not None:
        numbers = swept_numbers(search)
        write_atomically(
            folder / OUTCOMES, lambda file: np.savez(file, points=numbers, **outcomes._asdict())
        )
    results = {
        "costs": costs._asdict(),
        "complete": complete,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "points": _described(search, outcomes, found),
    }
    # Settings keep every digit, because they are compared.
    files.write_json(folder / SWEEP, described | files.jsonable(results), exact=True)


def _curves(search: Search, outcomes: Outcomes) -> dict[str, np.ndarray]:
    """A row for each chunk of updates that a seed of a point was trained for."""
    ends = search.rungs[-1].updates * (1 + np.arange(outcomes.curves.shape[2]))
    ends = ends // outcomes.curves.shape[2]
    trained = np.broadcast_to((ends <= outcomes.updates[:, None])[:, None], outcomes.curves.shape)
    point, seed, chunk = np.nonzero(trained)
    swept = dict(zip(search.swept, swept_numbers(search).T, strict=True))
    return {
        **{name.strip("_"): values[point] for name, values in swept.items()},
        "seed": seed,
        "update": ends[chunk],
        "env_steps": outcomes.steps[trained],
        "episode_return": outcomes.curves[trained],
    }


def swept_numbers(search: Search) -> np.ndarray:
    """[P, swept]: what differs between the points."""
    return np.array([[getattr(p, n) for n in search.swept] for p in search.points], float)


def draw(folder: Path, config: Config, search: Search, outcomes: Outcomes) -> None:
    """Draws figures/response, or prints a line that says why it cannot."""
    estimates, first = _estimates(outcomes), order(outcomes)[:1]
    numbers = figures.Points(
        {n: [getattr(p, n) for p in search.points] for n in search.swept},
        estimates,
        outcomes.updates,
        config.updates,
        outcomes.returns.shape[1],
        search.options.random is None and search.options.part is None,
        np.all(outcomes.diverged, axis=1),
        next((int(i) for i in first if np.isfinite(estimates[0, i])), None),
        {name: span.logarithmic for name, span in search.options.ranges.items()},
    )
    title = f"{config.environment}, {config.algorithm}"
    artifacts.write_figure(
        folder / files.FIGURES, lambda figure: figures.draw(figure, numbers, title), "response"
    )


def _described(search, outcomes, found) -> list[dict[str, Any]]:
    """Every point that was run, best first."""
    return [
        {
            "rank": found["rank"][row],
            "hyperparameters": search.points[i]._asdict(),
            **{n: found[n][row] for n in DESCRIBED},
            "returns": outcomes.returns[i],
        }
        for row, i in enumerate(order(outcomes))
    ]


def _estimates(outcomes) -> np.ndarray:
    """[3, P]: interquartile mean, low and high; NaN for a point that was not run."""
    found = np.full((3, len(outcomes.updates)), np.nan)
    returns = _filled(outcomes.returns)
    for i in np.flatnonzero(outcomes.updates):
        found[:, i] = robust(returns[i])
    return found


def _filled(returns) -> np.ndarray:
    """The returns; a diverged seed gets the lowest of all if other seeds of its point have a return."""
    found = np.isfinite(returns)
    if not found.any():
        return returns
    beside = found.any(axis=1, keepdims=True) & ~found
    return np.where(beside, returns[found].min(), returns)


def _scores(returns) -> np.ndarray:
    return interquartile_mean(_filled(returns)[..., None])


def scores(outcomes: Outcomes) -> np.ndarray:
    """[P]: what points are ranked by, the interquartile mean of their seeds' returns; NaN without any."""
    return _scores(outcomes.returns)
