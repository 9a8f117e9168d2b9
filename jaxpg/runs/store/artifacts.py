"""Artifacts: the files that a laboratory experiment writes, each whole or not at all."""

import csv
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpg.runs.console import warn
from jaxpg.runs.store.folder import write_atomically, write_json
from jaxpg.stats.figures import STYLE, drawn
from jaxpg.stats.lines import plain

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


def write_table(folder: Path, table: dict[str, list]) -> None:
    """Writes the tidy table as Parquet and as CSV."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: [plain(x) for x in column] for name, column in table.items()}
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


def _column(pyarrow, name, values):
    if all(x is None for x in values):
        kind = (
            pyarrow.string() if name in ("estimator", "quantity", "warning") else pyarrow.float64()
        )
        return pyarrow.array(values, kind)
    if any(isinstance(x, float) for x in values):
        return pyarrow.array([None if x is None else float(x) for x in values], pyarrow.float64())
    return pyarrow.array(values)
