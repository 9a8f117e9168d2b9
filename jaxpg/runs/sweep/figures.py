"""Figures of sweeps: the return against the swept hyperparameters."""

from typing import NamedTuple

import numpy as np

from jaxpg.stats.figures import COLOURS, caption, label, panels

MOST_CELLS = 144  # a larger heat map shows no numbers


class Points(NamedTuple):
    """P points of a sweep."""

    numbers: dict[str, list[float]]  # [P] for each swept hyperparameter
    estimates: np.ndarray  # [3, P] return, low, high; NaN where a point was not run
    whole: np.ndarray  # [P] bool: trained to the end, not dropped before
    gridded: bool
    diverged: np.ndarray | bool = False  # [P] bool: every seed diverged
    best: int | None = None  # the point ranked first, even if others tie with it


def draw(figure, points: Points, title: str) -> None:
    """A heat map of a grid of two numbers; otherwise a panel for each number."""
    if len(points.numbers) == 2 and points.gridded:
        _heat_map(figure, points, title)
        return
    names = list(points.numbers)
    columns = min(3, len(names))
    axes = panels(
        figure, columns, -(-len(names) // columns), width=5.4 if columns == 1 else 4.6, height=3.4
    )
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, points, name)
        label(axis, title if len(names) == 1 else "", words(name), "return", legend=False)
    for axis in axes[len(names) :]:
        axis.remove()
    if len(names) > 1:
        figure.suptitle(title, fontsize=10)
    said = "interquartile mean, 95 % intervals over seeds"
    if not points.whole.all():
        said += "; open: not trained to the end"
    if np.any(points.diverged):
        said += "; cross: diverged"
    caption(figure, said + _best(points, "ring"))


def _best(points, mark) -> str:
    """The caption's note on the best point."""
    if points.best is None:
        return ""
    tied = int((points.whole & (points.estimates[0] == points.estimates[0, points.best])).sum())
    return f"; {mark}: best" + f" of {tied} that tie, by area" * (tied > 1)


def words(name: str) -> str:
    return name.strip("_").replace("_", " ")


def _panel(axis, points, name):
    at, (value, low, high) = np.array(points.numbers[name]), points.estimates
    reach = np.nan_to_num(np.maximum([value - low, high - value], 0.0))
    for some, colour, fill in (
        (~points.whole, "0.6", "white"),
        (points.whole, COLOURS[0], COLOURS[0]),
    ):
        axis.errorbar(
            at[some], value[some], yerr=reach[:, some], fmt="o", color=colour, markersize=5,
            markerfacecolor=fill, linewidth=1.0, capsize=2.5,
        )  # fmt: skip
    if len(points.numbers) == 1 and points.gridded:
        order = np.argsort(at)
        axis.plot(at[order], value[order], color=COLOURS[0], linewidth=1.0, zorder=1)
    if points.best is not None:
        best = at[points.best], value[points.best]
        axis.plot(*best, "o", color=COLOURS[1], markersize=11, markerfacecolor="none")
    lost = at[np.broadcast_to(points.diverged, at.shape)]
    if len(lost):  # an empty line that is not clipped has no box, and the panels would collapse
        axis.plot(lost, np.zeros(len(lost)), "x", color=COLOURS[1], transform=axis.get_xaxis_transform(),
                  clip_on=False)  # fmt: skip
    if _spread(at):
        axis.set_xscale("log")


def _heat_map(figure, points, title):
    (x, xs), (y, ys) = ((n, sorted(set(v))) for n, v in points.numbers.items())
    if len(ys) > len(xs):  # keep the figure wider than tall
        (x, xs), (y, ys) = (y, ys), (x, xs)
    values = np.full((len(ys), len(xs)), np.nan)
    whole, lost = (np.zeros(values.shape, bool) for _ in range(2))
    at = [ys.index(b) for b in points.numbers[y]], [xs.index(a) for a in points.numbers[x]]
    values[at], whole[at], lost[at] = points.estimates[0], points.whole, points.diverged
    width, height = max(4.5, 0.78 * len(xs) + 2.2), max(2.6, 0.5 * len(ys) + 1.5)
    (axis,) = panels(figure, width=width, height=height)
    axis.grid(False)
    image = axis.imshow(values, cmap="Greys_r", aspect="auto", origin="lower")
    if values.size <= MOST_CELLS:
        best = None if points.best is None else (at[0][points.best], at[1][points.best])
        _write_cells(axis, values, whole, lost, best, image.norm)
    axis.set_xticks(range(len(xs)), [f"{v:.3g}" for v in xs])
    axis.set_yticks(range(len(ys)), [f"{v:.4g}" for v in ys])
    if np.isfinite(values).any():
        figure.colorbar(image, label="return", fraction=0.05, pad=0.02).outline.set_visible(False)
    label(axis, title, words(x), words(y), legend=False)
    said = "interquartile mean over seeds"
    if not points.whole.all():
        said += "; in brackets: not trained to the end"
    caption(figure, said + _best(points, "bold") * (values.size <= MOST_CELLS))


def _write_cells(axis, values, whole, lost, best, norm):
    for row, column in np.argwhere(lost):
        axis.text(column, row, "diverged", ha="center", va="center", fontsize=7, color=COLOURS[1])
    if not np.isfinite(values).any():
        return
    low, high = np.nanmin(values), np.nanmax(values)
    digits = 0 if high - low > 20 else 1 if high - low > 2 else 2
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        text = f"{value:.{digits}f}"
        text = text if whole[row, column] else f"({text})"
        axis.text(
            column, row, text, ha="center", va="center", fontsize=8,
            color="black" if norm(value) > 0.5 else "white",
            fontweight="bold" if (row, column) == best else "normal",
        )  # fmt: skip


def _spread(values) -> bool:
    """Whether the numbers need a logarithmic axis."""
    return values.min() > 0 and values.max() >= 10 * values.min()
