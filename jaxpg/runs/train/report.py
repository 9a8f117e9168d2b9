"""The lines printed before and after a run."""

import numpy as np

from jaxpg.devices import present, processes
from jaxpg.runs.config.config import Config, Grid, points, varying
from jaxpg.runs.host.progress import Status, steps_per_second
from jaxpg.runs.train.replicas import Layout, devices_of
from jaxpg.stats.intervals import ANY
from jaxpg.stats.seeds import interval, number, summarise

MOST_ROWS = 12


def headline(config: Config, grid: Grid, layout: Layout) -> str:
    """One line on what is trained, and where."""
    settings = len(points(grid))
    agents = _count(config.seeds, "seed") + (f" x {settings} settings" if settings > 1 else "")
    return (
        f"{config.environment}, {config.algorithm}: {agents}, {_count(config.updates, 'update')}, "
        f"{devices_in_words(config)}{layout.words(devices_of(config))}"
    )


def devices_in_words(config: Config) -> str:
    """How many devices of which kind are asked for: `8 gpu devices`."""
    several = f" of {processes()} processes" if processes() > 1 else ""
    return _count(devices_of(config), f"{present()[0].platform} device") + several


def summary(
    config: Config,
    grid: Grid,
    status: Status,
    returns: np.ndarray,
    diverged: np.ndarray,
    attainable: tuple[float, float],
) -> list[str]:
    """Lines: the table of evaluated returns [N], and the cost of the run."""
    shape = -1, config.seeds
    return [
        f"evaluation: {_count(config.evaluation_episodes, 'fresh episode')} per agent, mean over "
        f"{_count(config.seeds, 'seed')}",
        *table(grid, returns.reshape(shape), diverged.reshape(shape), attainable),
        f"{status.env_steps:,} steps in {status.seconds:.1f} s "
        f"({number(steps_per_second(status), 0)} steps/s), "
        f"after {status.compile_seconds:.1f} s of compilation",
    ]


def table(
    grid: Grid,
    returns: np.ndarray,
    diverged: np.ndarray | None = None,
    attainable: tuple[float, float] = ANY,
) -> list[str]:
    """Lines of a table with one row per point of the grid; returns, diverged: [points, seeds].

    A large grid shows only its best rows. Counts the seeds that diverged and, apart from them, those without
    a return for another reason. attainable: the range of an episode's return.
    """
    names, at = varying(grid), points(grid)
    diverged = np.zeros(returns.shape, bool) if diverged is None else diverged
    summaries = [summarise(row, attainable) for row in np.where(diverged, np.nan, returns)]
    order = list(range(len(at)))
    if len(order) > MOST_ROWS:
        order.sort(key=lambda i: -np.nan_to_num(summaries[i].mean, nan=-np.inf))
    lost = {"diverged": diverged, "no return": ~np.isfinite(returns) & ~diverged}
    lost = {name: seeds.sum(axis=1) for name, seeds in lost.items() if seeds.any()}
    rows = [[*names, "mean", "95 % interval", "min", "max", *lost]]
    for i in order[:MOST_ROWS]:
        s = summaries[i]
        settings = [f"{getattr(at[i], name):g}" for name in names]
        row = [number(s.mean), interval(s), number(s.smallest), number(s.largest)]
        last = [f"{count[i]} of {returns.shape[1]}" for count in lost.values()]
        rows.append([*settings, *row, *last])
    lines = aligned(rows)
    if len(order) > MOST_ROWS:
        lines.append(f"  (the best {MOST_ROWS} of {len(order)})")
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
    ]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
