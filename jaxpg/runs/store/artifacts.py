"""Artifacts: the files that a laboratory experiment writes, each whole or not at all."""

import csv
import io
import logging
import math
import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from jaxpg.runs.console import warn
from jaxpg.runs.store.folder import write_atomically, write_json
from jaxpg.stats.figures import STYLE, drawn
from jaxpg.stats.intervals import NOT_RESOLVED, told

TABLE, CSV, SUMMARY, *_ = FILES = (
    "table.parquet",
    "table.csv",
    "summary.json",
    "figure.png",
    "figure.svg",
    "figure.pdf",
)
# The kinds of file, each with what keeps the time of drawing out of it.
FIGURES = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
WIDTH = 80
MOST_ROWS = 24
MOST_WARNINGS = 4
KEPT = ("estimator", "quantity", "measured", "exact")
LAST = ("trajectories", "env_steps", "warning", "low", "high")  # shown elsewhere or not at all


def write_table(folder: Path, table: dict[str, list]) -> None:
    """Writes the tidy table as Parquet and as CSV."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: [_plain(x) for x in column] for name, column in table.items()}
    arrow = pyarrow.table({name: _column(pyarrow, name, x) for name, x in columns.items()})
    write_atomically(folder / TABLE, lambda file: parquet.write_table(arrow, file))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(folder / CSV, lambda file: file.write(text.getvalue().encode()))


def write_summary(folder: Path, value: Any) -> None:
    """Writes strict JSON."""
    write_json(folder / SUMMARY, value)


def write_figure(
    folder: Path, draw: Callable[[Any], None], name: str = "figure", width: str = "page"
) -> bool:
    """Writes the figure as PNG (300 dots per inch), SVG and PDF, each as wide as the page or column.

    Figures are drawn last, and whatever goes wrong here must not lose the results: on failure, warns and
    returns False.
    """
    try:
        # The same data gives the same file.
        with _matplotlib().rc_context(STYLE):
            figure = drawn(draw, width)
            folder.mkdir(exist_ok=True)
            for kind, undated in FIGURES.items():
                write_atomically(
                    folder / f"{name}.{kind}",
                    lambda file, k=kind, m=undated: figure.savefig(
                        file, format=k, dpi=300, metadata=m
                    ),
                )
    except Exception as error:  # a missing font, a full disk, numbers that cannot be drawn
        why = getattr(error, "strerror", None) or error
        warn(f"cannot draw {folder / name}: {why or type(error).__name__}")
        return False
    return True


def _matplotlib() -> Any:
    """Imports matplotlib without its three lines about a temporary font folder where there is no home.

    The import fails if MPLBACKEND names a backend that is not installed, as a notebook's may not be
    outside its environment, so it is hidden: files need no backend.
    """
    log = logging.getLogger("matplotlib")
    level, backend = log.level, os.environ.pop("MPLBACKEND", None)
    log.setLevel(logging.ERROR)
    try:
        import matplotlib
        import matplotlib.font_manager

        return matplotlib
    finally:
        log.setLevel(level)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def lines(table: dict[str, list]) -> list[str]:
    """The table in 80 columns and at most MOST_ROWS rows: numbers to four digits, intervals as ±."""
    count = len(table["estimator"])
    chosen = list(range(count))
    if count > MOST_ROWS:
        # Measured rows say more than the points of an exact curve.
        measured = [i for i in chosen if table["measured"][i] is not None]
        chosen = (measured or chosen)[:MOST_ROWS]
    names = [
        name
        for name, column in table.items()
        if name not in LAST and any(column[i] is not None for i in chosen)
    ]
    cells = [[_cell(table, name, i) for i in chosen] for name in names]
    widths = [max(map(len, (name, *column))) for name, column in zip(names, cells, strict=True)]
    while sum(widths) + 2 * len(widths) > WIDTH and len(widths) > 3:
        # Drop the least informative: the last of the experiment's own columns.
        own = [i for i, name in enumerate(names) if name not in KEPT]
        if not own:
            break
        for each in (names, cells, widths):
            del each[own[-1]]
    rows = [names, *map(list, zip(*cells, strict=True))]
    shown = [
        "  ".join(
            _aligned(x, w, i) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if len(chosen) < count:
        shown.append(f"({len(chosen)} of {count} rows; all are in {CSV})")
    # A warning that all rows share is printed once; values that are not resolved say so in their cells.
    said = [w.split(NOT_RESOLVED)[0].strip("; ") if w else "" for w in table["warning"]]
    parts = [w.split("; ") for w in said]
    shared = [x[0] for x in takewhile(lambda x: len({*x}) == 1, zip(*parts, strict=False))]
    shown += [f"warning: {each}" for each in shared if each]
    said = ["; ".join(each[len(shared) :]) for each in parts]
    # One line for each estimator: its last warning stands for the others, which are in the files.
    warnings = {e: w for e, w in zip(table["estimator"], said, strict=True) if w}
    shown += [f"warning: {name}: {text}" for name, text in list(warnings.items())[:MOST_WARNINGS]]
    if len(warnings) > MOST_WARNINGS:
        shown.append(f"({len(warnings) - MOST_WARNINGS} more estimators have warnings)")
    return [line[:WIDTH] for line in shown]


def _cell(table, name, i) -> str:
    value = _plain(table[name][i])
    text = _number(value)
    if name == "measured":
        low, high = _plain(table["low"][i]), _plain(table["high"][i])
        if value is None and high == math.inf:
            return told(math.nan if low is None else low)
        if value is not None and low is not None and high is not None and high < math.inf:
            half = (high - low) / 2
            even = abs(value - (high + low) / 2) <= 0.1 * half
            if half > 0:  # a width of 0 shows coarse counting, not certainty
                text += f" ±{float(f'{half:.1g}'):g}" if even else f" [{low:.3g}, {high:.3g}]"
    return text


def _number(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value)


def _aligned(text, width, place) -> str:
    return text.ljust(width) if place == 0 else text.rjust(width)


def _plain(value):
    """A Python number, string or None; NaN, which stands for no value, becomes None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _column(pyarrow, name, values):
    if all(x is None for x in values):
        kind = (
            pyarrow.string() if name in ("estimator", "quantity", "warning") else pyarrow.float64()
        )
        return pyarrow.array(values, kind)
    if any(isinstance(x, float) for x in values):
        return pyarrow.array([None if x is None else float(x) for x in values], pyarrow.float64())
    return pyarrow.array(values)
