"""The frame of an experiment: its settings, its result, and the rows of its table."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.lab.worlds.world import TABLES, Checkpoint, World, has_exact, num_params, world
from jaxpg.stats.intervals import NOT_RESOLVED, Estimate, told, unresolved
from jaxpg.types import Key

Table = dict[str, list]  # tidy: one row per measured or exact point
Progress = Callable[[str], None]  # called during long work with a line to show
Draw = Callable[[Any], None]  # fills a matplotlib Figure

# The columns of every table, besides those an experiment adds; None where one does not apply.
COLUMNS = (
    "estimator",
    "quantity",
    "measured",
    "low",  # of the 95 % interval
    "high",
    "exact",
    "trajectories",
    "env_steps",
    "warning",
)


BELOW = "an unbiased square, which may come out below 0"
# The least trajectories, and runs, of a quick run, and the most of them × steps × parameters.
LEAST, LEAST_RUNS = (2**12, 2**31), (8, 2**21)
QUICK_STEPS = 50  # the longest episode in a quick run without exact answers
NO_VALUE = "the samples give no value"  # for example because the weights are degenerate


class Settings(NamedTuple):
    """The settings of an experiment."""

    env: str = "A"
    policy: str | None = None  # a network's name; None: the world's own
    estimators: tuple[str, ...] = ()
    trajectories: int = 2**16  # per measured point
    repeats: int = 64  # independent batches or runs, where an experiment repeats something
    seed: int = 0
    quick: bool = False
    gamma: float | None = None  # None: the checkpoint's, or 1
    checkpoint: Checkpoint | None = None  # final parameters of a run, and its hyperparameters


class Result(NamedTuple):
    table: Table
    summary: dict[str, Any]  # JSON-able: the numbers the experiment is about
    draw: Draw
    others: Mapping[str, Draw] = {}  # further figures by the names of their files


class Experiment(NamedTuple):
    summary: str  # one line for `jaxpg lab list`
    run: Callable[[Settings, Progress], Result]
    defaults: Settings
    quick: Settings
    worlds: tuple[str, ...] = ()  # the only ones it runs on, its own first; (): any
    ignores: tuple[str, ...] = ()  # settings that mean nothing to it; giving one is an error
    # Lists the settings that differ from those of the checkpoint's run.
    replaces: Callable[[Settings, Checkpoint], list[str]] = lambda settings, checkpoint: []


def world_of(settings: Settings, whole: bool = False) -> World:
    """The world that the settings name; whole: with its own episodes in a quick run too, see `shortened`."""
    found = world(settings.env, settings.policy, settings.checkpoint, settings.gamma)
    return found if whole or has_exact(found) else shortened(found, settings)


def shortened(world: World, settings: Settings) -> World:
    """The world, with short episodes in a quick run, except a trained one: its episodes differ only late."""
    if not settings.quick or settings.checkpoint is not None:
        return world
    return world._replace(env=world.env._replace(horizon=min(world.env.horizon, QUICK_STEPS)))


def affordable(settings: Settings) -> Settings:
    """The sizes of a quick run where episodes are long or networks large: fewer, never below LEAST.

    By the work, not by the clock: the same rows on every machine.
    """
    place = world_of(settings._replace(env=settings.env.partition(",")[0]))
    if place.is_tabular and not place.is_projected:
        return settings
    work = place.env.horizon * num_params(place)
    fewer = (
        max(least, 2 ** int(np.log2(max(most / work, 1)))) for least, most in (LEAST, LEAST_RUNS)
    )
    trajectories, repeats = fewer
    return settings._replace(
        trajectories=min(settings.trajectories, trajectories),
        repeats=min(settings.repeats, repeats),
    )


def key_of(settings: Settings) -> Key:
    """The key of a seed, with its implementation named, so that no global switch changes results."""
    return jax.random.key(settings.seed, impl="threefry2x32")


def tidy(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Turn rows into columns, an experiment's own before the rest of COLUMNS; missing values are None."""
    rows = [_told(row) for row in rows]
    own = [name for name in dict.fromkeys(k for row in rows for k in row) if name not in COLUMNS]
    names = [COLUMNS[0], *own, *COLUMNS[1:]]
    return {name: [row.get(name) for row in rows] for name in names}


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with its warning extended if a ratio is not resolved or a square is below 0."""
    measured, low, high = (row.get(name) for name in ("measured", "low", "high"))
    if measured is None or low is None:
        return dict(row)
    more = None
    if unresolved(Estimate(measured, low, high)):
        more = told(low)
    elif measured < 0 and row["quantity"].startswith("squared"):
        more = BELOW
    return {**row, "warning": "; ".join(filter(None, (row.get("warning"), more))) or None}


def estimated(estimate, **rest) -> dict[str, Any]:
    """A row's `measured`, `low` and `high` from a (value, low, high)."""
    value, low, high = map(float, estimate)
    return {"measured": value, "low": low, "high": high, **rest}


def compared(known: dict[str, Any], seen: dict[str, Any], **common) -> list[dict[str, Any]]:
    """A row for each quantity with its exact value and its estimate, unless both are missing."""
    return [
        {**common, "quantity": name, "exact": value}
        | (estimated(seen[name]) if name in seen else {})
        for name, value in known.items()
        if name in seen or value is not None
    ]


def stated(estimate: Estimate, name: str = "value") -> dict[str, Any]:
    """An estimate for a summary: its finite numbers, or the bound `above` of a ratio that is not resolved."""
    value, low, high = map(float, estimate)
    if unresolved(estimate):
        return {"reason": NOT_RESOLVED} | ({} if np.isnan(low) else {"above": low})
    ends = {k: x for k, x in (("low", low), ("high", high)) if np.isfinite(x)}
    return ({name: value} if np.isfinite(value) else {"reason": NO_VALUE}) | ends


def stated_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The measured value of a row, by `stated`, and its exact one."""
    known = {} if row.get("exact") is None else {"exact": row["exact"]}
    if row.get("measured") is None:
        return known
    return stated(Estimate(*(row[k] for k in ("measured", "low", "high"))), "measured") | known


def need_exact(world: World, experiment: str) -> None:
    """Raises ValueError for a world without tables."""
    if not world.is_tabular:
        raise ValueError(
            f"{experiment} compares with exact answers, which {world.name} does not have; use one of "
            f"{', '.join(TABLES)}"
        )
