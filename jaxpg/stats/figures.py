"""Drawing: one style for all figures, at the size at which they are printed.

Each series has its own marker and line style, so that it can be told apart in grey.
"""

from collections.abc import Callable
from textwrap import fill
from typing import Any

import numpy as np

from jaxpg.stats.intervals import Estimate

WIDTHS = {"page": 7.2, "column": 3.5}  # inches, of a page's text and of one of its two columns
TEXT = 8  # points, of all text
PANEL = 2.2  # inches, the least width of a panel with its labels
TALLEST = 9.0  # inches, of a page's text
BESIDE = 5.0  # inches: a wider panel has its legend beside it, a narrower one below it
# A font size other than TEXT appears nowhere else.
STYLE: dict[Any, Any] = {
    "font.size": TEXT, "figure.titlesize": TEXT, "figure.labelsize": TEXT, "axes.titlesize": TEXT,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4, "lines.linewidth": 1.2, "lines.markersize": 4.0, "legend.frameon": False,
    "legend.handlelength": 2.6, "legend.borderpad": 0.0, "legend.borderaxespad": 0.2,
    "legend.labelspacing": 0.3, "legend.columnspacing": 1.4, "axes.titlepad": 4.0,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "jaxpg",
}  # fmt: skip
COLOURS = ("#0b3c5d", "#c1440e", "#3b7a57", "#8a5a9e", "#b8860b", "#5f6a72", "#1d8a99", "#7b2d26")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ARROW = np.array([(0, 0), (0, 2), (-0.5, 1.3), (0, 2), (0.5, 1.3), (0, 2), (0, 0)])
BOUND = "not resolved: beyond the arrow's foot"
ENDLESS = "arrow: no upper end"
DOUBTFUL = "heavy tail: interval too narrow"
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
BARS = {"color": "0.85", "edgecolor": "0.45", "linewidth": 0.6}


def drawn(draw: Callable[[Any], None], width: str = "page") -> Any:
    """The matplotlib Figure that `draw` fills, at its final size; needs no display."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTHS[width], WIDTHS[width]))
        FigureCanvasAgg(figure)
        draw(figure)
        fit(figure)
    return figure


def panels(figure, count: int = 1, across: int = 3, height: float | None = None) -> list[Any]:
    """`count` axes in rows of at most `across`, and of fewer where the figure's width has no room.

    height: of an axis, in inches; see `fit`.
    """
    width = figure.get_figwidth()
    columns = min(count, across, max(1, int(width / PANEL)))
    rows = -(-count // columns)
    if height is None:
        height = float(np.clip(0.7 * width / columns, 1.7, 2.6))
        height = float(
            np.clip(TALLEST / rows - 0.7, 0.9, height)
        )  # less, where there are many rows
    figure.set_figheight(rows * (height + 0.6))
    figure.set_layout_engine("constrained", h_pad=0.04, w_pad=0.04, hspace=0.0, wspace=0.0)
    grid = figure.add_gridspec(rows, columns, height_ratios=[height] * rows)
    axes = [figure.add_subplot(grid[divmod(i, columns)]) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
    return axes


def fit(figure) -> None:
    """Grows the figure until its axes are as high as `panels` promised, whatever stands around them."""
    axes = [axis for axis in figure.axes if axis.get_subplotspec() is not None]
    for each in (way for axis in axes for way in (axis.xaxis, axis.yaxis)):
        _thin_logarithms(each)
    for _ in range(3):
        figure.draw_without_rendering()
        for (
            axis
        ) in axes:  # names of rows may have left less room for a title than `label` could know
            room = _characters(axis.get_position().width * figure.get_figwidth() + 0.15)
            for text in (axis.title, axis.xaxis.label):
                text.set_text(fill(text.get_text().replace("\n", " "), room))
        lacking: dict[int, float] = {}
        for axis in axes:
            place = axis.get_subplotspec()
            row = place.rowspan.start
            wanted = place.get_gridspec().get_height_ratios()[row]
            found = axis.get_position(original=True).height * figure.get_figheight()
            lacking[row] = max(lacking.get(row, -np.inf), wanted - found)
        figure.set_figheight(figure.get_figheight() + sum(lacking.values()))


def _thin_logarithms(way) -> None:
    """Of a logarithmic x or y axis, numbers at the powers alone; if there are not two, plain ones: 20."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = sorted(way.get_view_interval())
    if way.get_scale() != "log" or isinstance(way.get_major_locator(), NullLocator):
        return

    def shown(locator):
        return sum(low <= x <= high for x in locator.tick_values(low, high))

    if shown(way.get_major_locator()) > 1:
        way.set_minor_formatter(NullFormatter())
        return
    some = LogLocator(subs=(1.0, 2.0, 5.0))
    way.set_major_locator(some if shown(some) > 2 else MaxNLocator(4, steps=[1, 2, 5, 10]))
    way.set_major_formatter(lambda x, _: f"{x:g}")
    way.set_minor_formatter(NullFormatter())


def line(axis, x, y, index: int, label: str | None = None) -> None:
    """An exact or theoretical curve: a line without markers."""
    style = LINES[index % len(LINES)]
    axis.plot(x, y, linestyle=style, color=COLOURS[index % len(COLOURS)], label=label)


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
        linewidth=0.9,
        capsize=2.0,
        label=label,
    )
    bounds(axis, x, Estimate(measured, low, high), index)


def interval(axis, estimate, row: float, index: int, label: str | None = None) -> None:
    """One measured value with its interval, across the row of an axis."""
    value, low, high = estimate
    reach = np.nan_to_num(np.maximum([[value - low], [high - value]], 0.0))
    axis.errorbar([value], [row], xerr=reach, fmt=MARKERS[index % len(MARKERS)], capsize=2.0,
                  color=COLOURS[index % len(COLOURS)], markerfacecolor="white", label=label)  # fmt: skip


def band(axis, x, low, high, index: int, step: Any = None) -> None:
    """An interval along a curve: its edges are drawn, so that bands that overlap can be told apart."""
    colour = COLOURS[index % len(COLOURS)]
    axis.fill_between(
        x, low, high, facecolor=(colour, 0.12), edgecolor=colour, linewidth=0.4, step=step
    )


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
            markeredgewidth=1.2, label="_" if text in known else text,
        )  # fmt: skip


def doubtful(axis, x, y) -> None:
    """Crosses out points whose interval a heavy tail makes too narrow."""
    axis.plot(x, y, "x", color="black", markersize=8, markeredgewidth=0.8, label=DOUBTFUL)


def rows(axis, names) -> None:
    """A name for each row of an axis, the first on top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axis.grid(False, axis="y")


def improvement(axis, pairs) -> None:
    """The probability that a run of one is better than one of the other, for (one, other, estimate) each."""
    for i, (_, _, estimate) in enumerate(pairs):
        interval(axis, estimate, i, 0)
    if pairs:
        axis.axvline(0.5, color="0.3", linewidth=0.8)
    axis.set_xlim(-0.03, 1.03)
    rows(axis, [f"{one}\nover {other}" for one, other, _ in pairs])
    label(axis, "Probability of improvement", "P(a run of the first is better)", "", legend=False)


def symmetric_logarithms(axis, threshold: float) -> None:
    """A logarithmic y axis through 0, with a dotted line where its linear part begins."""
    axis.set_yscale("symlog", linthresh=threshold)
    low, high = axis.get_ylim()
    for each, name in ((threshold, f"linear within ±{threshold:g}"), (-threshold, None)):
        if low < each < high:
            axis.axhline(each, color="0.55", linewidth=0.6, linestyle=(0, (2, 2)), label=name)


def broken_at_zero(axis, zero: float) -> None:
    """A logarithmic x axis with a break, below which the tick at `zero` says 0."""
    axis.set_xscale("log")
    axis.set_xlim(zero / 2)
    way, most = axis.xaxis, axis.get_xlim()[1]
    ticks = [x for x in way.get_majorticklocs() if 1 <= x < most]
    way.set_ticks([zero, *ticks[:: -(-len(ticks) // 4)]])
    way.set_ticks([], minor=True)
    plain = way.get_major_formatter()
    way.set_major_formatter(lambda x, place: "0" if x == zero else plain(x, place))
    for side in (0.8, 1.25):
        axis.plot([zero**0.5 * side], [0.0], marker=[(-1, -2), (1, 2)], color="black", markersize=7,
                  markeredgewidth=0.8, linestyle="none", transform=axis.get_xaxis_transform(),
                  clip_on=False)  # fmt: skip


def label(axis, title: str, x: str, y: str, *, legend: bool = True) -> None:
    """Set the title and the axis labels with units, in lines that fit; and the legend, outside the data."""
    grid = axis.get_subplotspec().get_gridspec()
    width = axis.figure.get_figwidth() / grid.ncols
    height = grid.get_height_ratios()[axis.get_subplotspec().rowspan.start]
    axis.set_title(fill(title, _characters(0.85 * width)))
    axis.set_xlabel(fill(x, _characters(0.85 * width)))
    axis.set_ylabel(fill(y, _characters(1.1 * height)))
    if not legend:
        return
    handles = _handles([axis])
    if width > BESIDE:
        axis.legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return
    from matplotlib.transforms import ScaledTranslation

    lines_below = 3.6 + axis.get_xlabel().count("\n") * 1.2  # the tick labels and the axis label
    shift = ScaledTranslation(0, -lines_below * TEXT / 72, axis.figure.dpi_scale_trans)
    axis.legend(
        handles.values(), handles, loc="upper center", bbox_to_anchor=(0.45, 0.0),
        bbox_transform=axis.transAxes + shift, ncols=_columns(handles, 0.9 * width),
    )  # fmt: skip


def legend(figure, axes=None) -> None:
    """One legend for the figure above its panels: a name for what is drawn alike in all of them."""
    handles = _handles(figure.axes if axes is None else axes)
    figure.legend(
        handles.values(), handles, loc="outside upper center",
        ncols=_columns(handles, figure.get_figwidth()),
    )  # fmt: skip


def caption(figure, text: str = "lines: exact; markers: measured, with 95 % intervals") -> None:
    """Say below the panels what lines and markers mean."""
    width = _characters(0.97 * figure.get_figwidth())
    text = "\n".join(fill(each, width) for each in text.split("\n"))
    figure.supxlabel(text, color="0.35")


def _characters(inches: float) -> int:
    """How many characters of average width fit."""
    return int(inches * 72 / (0.57 * TEXT))


def _columns(names, inches: float) -> int:
    """How many columns of a legend fit."""
    each = 0.55 + max(map(len, names), default=1) * 0.57 * TEXT / 72
    return max(1, min(len(names), int(inches / each)))


def _handles(axes) -> dict[str, Any]:
    """What to show for each name: its line and its marker, drawn over each other."""
    found: dict[str, dict[Any, Any]] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, {}).setdefault(type(handle), handle)
    notes = (BOUND, ENDLESS, DOUBTFUL)  # after the series
    return {name: tuple(found[name].values()) for name in sorted(found, key=lambda x: x in notes)}
