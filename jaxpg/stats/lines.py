"""Lines: a laboratory's tidy table for the eye."""

import math
from collections.abc import Callable
from itertools import takewhile

from jaxpg.stats.intervals import NOT_RESOLVED, told

WIDTH = 80
MOST_ROWS = 24
MOST_WARNINGS = 4
KEPT = ("estimator", "quantity", "measured", "exact")  # in columns of their own
LAST = ("trajectories", "env_steps", "warning", "low", "high")  # shown elsewhere or not at all


def lines(table: dict[str, list], width: int = WIDTH, whole: str = "table.csv") -> list[str]:
    """The table for the eye: one row for each estimator, with a column for each quantity and its exact value.

    Quantities that share no rows stand below each other. Numbers of a column have equal digits; at most
    MOST_ROWS rows are shown, and the quantities that fit into the width. whole: where all of it is.
    """
    rows = [dict(zip(table, map(plain, x), strict=True)) for x in zip(*table.values(), strict=True)]
    own = [name for name in table if name not in (*KEPT, *LAST)]
    shown, hidden, cut = [], [], False
    blocks = _blocks(rows, own)
    for block in blocks:
        drawn, left_out, short = _block(block, own, MOST_ROWS // len(blocks), width)
        shown, hidden, cut = [*shown, *drawn], [*hidden, *left_out], cut or short
    if hidden:
        shown.append(f"(also in {whole}: {', '.join(hidden)})")
    if cut:
        shown.append(f"(all {len(rows)} rows are in {whole})")
    # A warning that all rows share is printed once; values that are not resolved say so in their cells.
    said = [w.split(NOT_RESOLVED)[0].strip("; ") if w else "" for w in table["warning"]]
    parts = [w.split("; ") for w in said]
    shared = [x[0] for x in takewhile(lambda x: len({*x}) == 1, zip(*parts, strict=False))]
    shown += [f"warning: {each}" for each in shared if each]
    said = ["; ".join(each[len(shared) :]) for each in parts]
    # An estimator's last warning stands for its others, which are in the files.
    about: dict[str, list[str]] = {}
    for name, text in {e: w for e, w in zip(table["estimator"], said, strict=True) if w}.items():
        about.setdefault(text, []).append(name)
    for text, (first, *more) in list(about.items())[:MOST_WARNINGS]:
        names = f"{first} and {len(more)} more" if len(more) > 1 else ", ".join([first, *more])
        shown.append(f"warning: {names}: {text}")
    if len(about) > MOST_WARNINGS:
        shown.append(f"({len(about) - MOST_WARNINGS} more warnings are in {whole})")
    return [line[:width] for line in shown]


def _blocks(rows, own) -> list[dict[tuple, dict[str, dict]]]:
    """Rows by what they are about, then by quantity; quantities that are about other things, apart."""
    by_quantity: dict[str, dict[tuple, dict]] = {}
    for row in rows:
        about = (row["estimator"], *(row[name] for name in own))
        by_quantity.setdefault(row["quantity"], {})[about] = row
    blocks: list[dict[tuple, dict[str, dict]]] = []
    for quantity, found in by_quantity.items():
        block = next((each for each in blocks if 2 * len(each.keys() & found) >= len(found)), None)
        if block is None:
            blocks.append(block := {})
        for about, row in found.items():
            block.setdefault(about, {})[quantity] = row
    return blocks


def _block(block, own, most, width) -> tuple[list[str], list[str], bool]:
    """The lines of a block, the quantities that have no room, and whether rows are left out."""
    chosen = list(block)
    if len(block) > most:
        # Measured rows say more than the points of an exact curve.
        seen = [about for about, row in block.items() if any(map(_seen, row.values()))]
        chosen = (seen or chosen)[:most]
    columns: dict[str, list[str]] = {}
    for i, name in enumerate(("estimator", *own)):
        cells = [_text(about[i]) for about in chosen]
        if {*cells} - {"-", ""} and (len({*cells}) > 1 or name == "estimator"):
            columns[name] = cells
    numbers = [_columns(q, [block[k].get(q, {}) for k in chosen])
               for q in dict.fromkeys(q for k in chosen for q in block[k])]  # fmt: skip

    def wide(more):
        return (
            sum(max(map(len, x)) + 2 for x in ([n, *c] for n, c in (*columns.items(), *more))) - 2
        )

    for name in reversed([name for name in columns if name != "estimator"]):
        # A column that is not needed to tell rows apart makes room for numbers.
        others = list(zip(*(x for n, x in columns.items() if n != name), strict=True))
        if wide(x for each in numbers for x in each) > width and len({*others}) == len(chosen):
            del columns[name]
    shown, hidden = [], []
    for each in numbers:
        if shown and wide([*shown, *each]) > width:
            hidden.append(each[0][0])
        else:
            shown += each
    table = [[name, *cells] for name, cells in (*columns.items(), *shown)]
    widths = [max(map(len, column)) for column in table]
    lines = [
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in zip(*table, strict=True)
    ]  # fmt: skip
    return [line.rstrip() for line in lines], hidden, len(chosen) < len(block)


def _columns(quantity, rows) -> list[tuple[str, list[str]]]:
    """The columns of a quantity: what was measured, and the exact value, or that alone."""
    spelt = _digits(rows)
    measured = [_measured(row, spelt) for row in rows]
    known = [_text(row.get("exact"), spelt) for row in rows]
    if {*measured} == {"-"}:
        return [(quantity, known)]
    return [(quantity, measured)] + [("exact", known)] * ({*known} != {"-"})


def _seen(row) -> bool:
    return row.get("measured") is not None or row.get("high") == math.inf


def _digits(rows) -> Callable[[float], str]:
    """How to write the numbers of a column: with equal decimals, or where they span decades, equal digits."""
    known = [abs(row[name]) for row in rows for name in ("measured", "exact") if row.get(name)]
    clear = [
        abs(row["measured"]) for row in rows
        if row.get("measured") and not (row["low"] or 0.0) <= 0 <= (row["high"] or 0.0)
    ] + [abs(row["exact"]) for row in rows if row.get("exact")]  # fmt: skip
    known = [x for x in known if math.isfinite(x)]
    top, least = max(known, default=1.0), min(clear, default=math.inf)
    if not 1e-4 <= top < 1e5 or least < 1e-2 * top:
        return lambda x: f"{x:.3e}" if x and not 1e-4 <= abs(x) < 1e5 else f"{x:#.4g}".rstrip(".")
    decimals = min(max(0, 3 - math.floor(math.log10(top))), 6)
    return lambda x: f"{x:.{decimals}f}"


def _measured(row, spelt) -> str:
    value, low, high = (row.get(name) for name in ("measured", "low", "high"))
    if value is None and high == math.inf:
        return told(math.nan if low is None else low)
    text = _text(value, spelt)
    if value is None or low is None or high is None or high == math.inf or high <= low:
        return text  # a width of 0 shows coarse counting, not certainty
    half = (high - low) / 2
    if abs(value - (high + low) / 2) <= 0.1 * half:
        return f"{text} ±{spelt(half)}"
    return f"{text} [{spelt(low)}, {spelt(high)}]"


def _text(value, spelt: Callable[[float], str] = lambda x: f"{x:.4g}") -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return spelt(value) if isinstance(value, float) else str(value)


def plain(value):
    """A Python number, string or None; NaN, which stands for no value, becomes None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value
