"""Drawing: one style for all figures, readable in grey: each series has its own marker and line style."""

from typing import Any

import numpy as np

from jaxpg.stats.moments import Estimate

COLOURS = ("#0b3c5d", "#c1440e", "#3b7a57", "#8a5a9e", "#b8860b", "#5f6a72", "#1d8a99", "#7b2d26")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ARROW = np.array([(0, 0), (0, 2), (-0.5, 1.3), (0, 2), (0.5, 1.3), (0, 2), (0, 0)])
BOUND = "not resolved: beyond the arrow's foot"
ENDLESS = "arrow: no upper end"
LINES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (7, 2)),
)


def panels(figure, columns: int = 1, rows: int = 1, width: float = 5.4, height: float = 4.0):
    """A row-major list of axes; sizes the figure for them."""
    figure.set_size_inches(width * columns, height * rows)
    figure.set_layout_engine("constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.7)
        axis.set_axisbelow(True)
    return list(axes)


def line(axis, x, y, index: int, label: str | None = None) -> None:
    """An exact or theoretical curve: a line without markers."""
    style = LINES[index % len(LINES)]
    axis.plot(
        x, y, linestyle=style, color=COLOURS[index % len(COLOURS)], linewidth=1.4, label=label
    )


def points(axis, x, measured, low, high, index: int, label: str | None = None) -> None:
    """Measured points with their intervals: markers without a line."""
    x, measured, low, high = (np.asarray(each, float) for each in (x, measured, low, high))
    # A point without an interval (nan) still shows; an unbiased square may lie outside its interval.
    below, above = (
        np.where(np.isfinite(each), np.maximum(each, 0.0), 0.0)
        for each in (measured - low, high - measured)
    )
    axis.errorbar(
        x,
        measured,
        yerr=np.stack([below, above]),
        fmt=MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        markerfacecolor="white",
        markersize=5,
        linewidth=1.0,
        capsize=2.5,
        label=label,
    )
    bounds(axis, x, Estimate(measured, low, high), index)


def bounds(axis, x, estimate: Estimate, index: int, across: bool = False) -> None:
    """An arrow up (or across) at x, from the bound of every ratio that is not resolved, and from every
    value whose interval has no upper end."""
    measured, low, high = (np.atleast_1d(np.asarray(each, float)) for each in estimate)
    open_ = high == np.inf
    for foot, some, text, size in (
        (low, open_ & np.isnan(measured) & np.isfinite(low), BOUND, 14),
        (measured, open_ & np.isfinite(measured), ENDLESS, 18),  # longer than its marker
    ):
        if not some.any():
            continue
        known = {each.get_label() for each in axis.get_lines()}
        place = [np.atleast_1d(x)[some], foot[some]]
        axis.plot(
            *(place[::-1] if across else place), linestyle="none", markersize=size, markerfacecolor="none",
            marker=ARROW[:, ::-1] if across else ARROW, color=COLOURS[index % len(COLOURS)],
            markeredgewidth=1.4, label="_" if text in known else text,
        )  # fmt: skip


def plain_logarithms(axis) -> None:
    """A logarithmic y axis with numbers between the powers of ten written out: 20, not 2 × 10¹."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def label(axis, title: str, x: str, y: str, *, legend: bool = True, **place) -> None:
    """Set the title, the axis labels with units, and the legend."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if legend:
        axis.legend(fontsize=8, frameon=False, **place)


def caption(figure, text: str = "lines: exact; markers: measured, with 95 % intervals") -> None:
    """Say what lines and markers mean, where the legend names only the series."""
    figure.text(0.995, 0.005, text, fontsize=7, color="0.35", ha="right", va="bottom")
    room = 0.025 if "\n" not in text else 0.035 * (1 + text.count("\n"))
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
