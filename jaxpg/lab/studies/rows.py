"""Rows of a study's table: pick some, and draw what they hold."""

from jaxpg.lab.measure.statistics import HEAVY
from jaxpg.stats import figures


def where(rows, **fields) -> list[dict]:
    """The rows with these values; a field that a row lacks is None."""
    return [r for r in rows if all(r.get(name) == value for name, value in fields.items())]


def intervals(rows) -> tuple[list, list, list]:
    """The columns measured, low and high of a table's rows."""
    measured, low, high = ([r[name] for r in rows] for name in ("measured", "low", "high"))
    return measured, low, high


def draw_exact(axis, rows, x: str, index: int, label: str | None = None) -> bool:
    """A line of the exact values against the column x; whether there are any."""
    known = [r for r in rows if r.get("exact") is not None]
    if known:
        figures.line(axis, [r[x] for r in known], [r["exact"] for r in known], index, label)
    return bool(known)


def draw_measured(axis, rows, x: str, index: int, label: str | None = None) -> None:
    """Points with intervals at the measured values, if there are any, against the column x.

    An interval that a heavy tail makes too narrow is crossed out.
    """
    seen = [r for r in rows if r.get("measured") is not None]
    if not seen:
        return
    figures.points(axis, [r[x] for r in seen], *intervals(seen), index, label)
    false = [r for r in seen if HEAVY in (r.get("warning") or "")]
    if false:
        figures.doubtful(axis, [r[x] for r in false], [r["measured"] for r in false])
