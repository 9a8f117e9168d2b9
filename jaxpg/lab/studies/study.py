"""The frame of an experiment: what it is asked, and what it gives back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.lab.worlds.world import TABLES, Checkpoint, World, world
from jaxpg.stats.intervals import NOT_RESOLVED, Estimate, told, unresolved
from jaxpg.types import Key

Table = dict[str, list]  # tidy: one row per measured or exact point
Progress = Callable[[str], None]  # called on long work, with a line to show
Draw = Callable[[Any], None]  # fills a matplotlib Figure

# Present in every table, whatever else an experiment adds; None where it does not apply.
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
NO_VALUE = "the samples give no value"  # such as of degenerate weights


class Settings(NamedTuple):
    """What an experiment is asked to do."""

    env: str = "A"
    policy: str | None = None  # a network's name; None: the world's own
    estimators: tuple[str, ...] = ()
    trajectories: int = 2**16  # per measured point
    repeats: int = 64  # independent batches or runs, where an experiment repeats something
    seed: int = 0
    quick: bool = False
    gamma: float | None = None  # None: the checkpoint's, or 1
    checkpoint: Checkpoint | None = None  # final parameters of a run, and its numbers


class Result(NamedTuple):
    table: Table
    summary: dict[str, Any]  # JSON-able: the numbers the experiment is about
    draw: Draw


class Experiment(NamedTuple):
    summary: str  # one line for `jaxpg lab list`
    run: Callable[[Settings, Progress], Result]
    defaults: Settings
    quick: Settings
    worlds: tuple[str, ...] = ()  # the only ones it runs on, its own first; (): any
    ignores: tuple[str, ...] = ()  # settings that mean nothing to it, so that asking is a mistake
    # What is measured with other settings than those of the checkpoint's run.
    replaces: Callable[[Settings, Checkpoint], list[str]] = lambda settings, checkpoint: []


def world_of(settings: Settings) -> World:
    """The world that the settings name."""
    return world(settings.env, settings.policy, settings.checkpoint, settings.gamma)


def key_of(settings: Settings) -> Key:
    """The key of a seed; named, so that results do not depend on a global switch."""
    return jax.random.key(settings.seed, impl="threefry2x32")


def tidy(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Rows as columns: those of COLUMNS that no row has are None, an experiment's own come first."""
    rows = [_told(row) for row in rows]
    own = [name for name in dict.fromkeys(k for row in rows for k in row) if name not in COLUMNS]
    names = [COLUMNS[0], *own, *COLUMNS[1:]]
    return {name: [row.get(name) for row in rows] for name in names}


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, its warning with what is known of a ratio that is not resolved, or of a square below 0."""
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


def stated(estimate: Estimate, name: str = "value") -> dict[str, Any]:
    """An estimate as a summary has it: only what there is, and of a ratio not resolved its bound `above`."""
    value, low, high = map(float, estimate)
    if unresolved(estimate):
        return {"reason": NOT_RESOLVED} | ({} if np.isnan(low) else {"above": low})
    ends = {k: x for k, x in (("low", low), ("high", high)) if np.isfinite(x)}
    return ({name: value} if np.isfinite(value) else {"reason": NO_VALUE}) | ends


def stated_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has measured, by `stated`, and what is exact."""
    known = {} if row.get("exact") is None else {"exact": row["exact"]}
    if row.get("measured") is None:
        return known
    return stated(Estimate(*(row[k] for k in ("measured", "low", "high"))), "measured") | known


def need_exact(world: World, experiment: str) -> None:
    """Raises ValueError for a world without tables."""
    if not world.is_tabular:
        raise ValueError(
            f"{experiment} compares with exact answers, which {world.name} has not; use one of "
            f"{', '.join(TABLES)}"
        )
