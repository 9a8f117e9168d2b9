"""Figures of sweeps: the return against the swept hyperparameters."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxpg.stats.figures import COLOURS, MARKERS, caption, label, legend, panels
from jaxpg.stats.words import words

MOST_CELLS = 144  # a larger heat map shows no numbers
LIGHT, DARK = (
    "0.95",
    "0.35",
)  # of the worst and best cell: neither is the page's white or the text's black


class Points(NamedTuple):
    """P points of a sweep."""

    numbers: dict[str, list[float]]  # [P] for each swept hyperparameter
    estimates: np.ndarray  # [3, P] return, low, high; NaN where a point was not run
    updates: np.ndarray  # [P] that each point was trained for
    total: int  # of a point that was trained to the end, not dropped before
    seeds: int
    gridded: bool
    diverged: np.ndarray | bool = False  # [P] bool: every seed diverged
    best: int | None = None  # the point ranked first, even if others tie with it
    logarithmic: Mapping[str, bool] = {}  # how numbers were drawn, where known

    @property
    def tied(self) -> np.ndarray:
        """[P] bool: the best point, and those with the same return."""
        if self.best is None:
            return np.zeros(len(self.updates), bool)
        same = self.estimates[0] == self.estimates[0, self.best]
        return same & (self.updates == self.total)


def draw(figure, points: Points, title: str) -> None:
    """A heat map of a grid of two numbers; otherwise a panel for each number."""
    if len(points.numbers) == 2 and points.gridded:
        _heat_map(figure, points, title)
        return
    axes = panels(figure, len(points.numbers))
    for axis, name in zip(axes, points.numbers, strict=True):
        _panel(axis, points, name)
        label(axis, title if len(axes) == 1 else "", words(name), "return", legend=False)
    if (points.updates != points.total).any():
        legend(figure)
    said = f"{title}: " * (len(axes) > 1) + _said(points) + ", 95 % intervals"
    if np.any(points.diverged):
        said += "; cross: diverged"
    caption(figure, said + _best(points, "ring"))


def _said(points) -> str:
    return f"interquartile mean over {points.seeds} seed{'s' * (points.seeds > 1)}"


def _best(points, mark) -> str:
    """The caption's note on the best point."""
    if points.best is None:
        return ""
    tied = int(points.tied.sum())
    return f"; {mark}: best" + f" of {tied} that tie, by area" * (tied > 1)


def _panel(axis, points, name):
    at, (value, low, high) = np.array(points.numbers[name]), points.estimates
    reach = np.nan_to_num(np.maximum([value - low, high - value], 0.0))
    rungs = sorted({*points.updates.tolist(), points.total})
    for i, rung in enumerate(reversed(rungs)):
        some = points.updates == rung
        if not rung or not some.any():
            continue
        # The shorter the training, the paler.
        colour = COLOURS[0] if rung == points.total else f"{0.3 + 0.4 * i / len(rungs):.2f}"
        axis.errorbar(
            at[some], value[some], yerr=reach[:, some], fmt=MARKERS[i % len(MARKERS)], color=colour,
            markerfacecolor=colour if rung == points.total else "white", linewidth=0.9, capsize=2.0,
            label=f"{rung:,} of {points.total:,} updates",
        )  # fmt: skip
    if len(points.numbers) == 1 and points.gridded:
        order = np.argsort(at)
        axis.plot(at[order], value[order], color=COLOURS[0], linewidth=0.9, zorder=1)
    if points.best is not None:
        best = at[points.best], value[points.best]
        axis.plot(*best, "o", color=COLOURS[1], markersize=9, markerfacecolor="none")
    lost = at[np.broadcast_to(points.diverged, at.shape)]
    if len(lost):  # an empty line that is not clipped has no box, and the panels would collapse
        axis.plot(lost, np.zeros(len(lost)), "x", color=COLOURS[1], transform=axis.get_xaxis_transform(),
                  clip_on=False)  # fmt: skip
    if points.logarithmic.get(name, _spread(at)):
        axis.set_xscale("log")


def _heat_map(figure, points, title):
    from matplotlib.colors import LinearSegmentedColormap

    (x, xs), (y, ys) = ((n, sorted(set(v))) for n, v in points.numbers.items())
    if len(ys) > len(xs):  # keep the figure wider than tall
        (x, xs), (y, ys) = (y, ys), (x, xs)
    estimates = np.full((3, len(ys), len(xs)), np.nan)
    whole, lost, tied = (np.zeros(estimates.shape[1:], bool) for _ in range(3))
    at = [ys.index(b) for b in points.numbers[y]], [xs.index(a) for a in points.numbers[x]]
    estimates[:, *at], lost[at], tied[at] = points.estimates, points.diverged, points.tied
    whole[at] = points.updates == points.total
    (axis,) = panels(figure, height=max(1.2, 0.36 * len(ys)))
    axis.grid(False)
    colours = LinearSegmentedColormap.from_list("returns", [LIGHT, DARK])
    image = axis.pcolormesh(
        estimates[0], cmap=colours, edgecolors="0.2", linewidth=0.5, clip_on=False
    )
    written = estimates[0].size <= MOST_CELLS
    wide = float(figure.get_figwidth()) > 0.75 * (len(xs) + 2)  # inches, for "[488, 500]"
    if written:
        _write_cells(axis, estimates, whole, lost, tied, image.norm, wide)
    axis.set_xticks(np.arange(len(xs)) + 0.5, [f"{v:.3g}" for v in xs])
    axis.set_yticks(np.arange(len(ys)) + 0.5, [f"{v:.4g}" for v in ys])
    axis.tick_params(length=0)
    if np.isfinite(estimates[0]).any():
        figure.colorbar(image, label="return", fraction=0.05, pad=0.02).outline.set_linewidth(0.5)
    label(axis, title, words(x), words(y), legend=False)
    said = _said(points) + ", with 95 % intervals" * (written and wide)
    if not whole.all():
        said += "; in brackets: not trained to the end"
    tie = int(points.tied.sum()) > 1
    caption(
        figure, said + ("; bold: best" + ", all that tie" * tie) * (written and bool(tied.any()))
    )


def _write_cells(axis, estimates, whole, lost, tied, norm, wide):
    for row, column in np.argwhere(lost):
        axis.text(column + 0.5, row + 0.5, "diverged", ha="center", va="center", color=COLOURS[1])
    if not np.isfinite(estimates[0]).any():
        return
    low, high = np.nanmin(estimates[0]), np.nanmax(estimates[0])
    digits = 0 if high - low > 20 else 1 if high - low > 2 else 2
    for row, column in np.argwhere(np.isfinite(estimates[0])):
        value, *ends = (f"{x:.{digits}f}" for x in estimates[:, row, column])
        text = value if whole[row, column] else f"({value})"
        text += f"\n[{', '.join(ends)}]" * wide
        axis.text(
            column + 0.5, row + 0.5, text, ha="center", va="center",
            color="white" if norm(estimates[0, row, column]) > 0.85 else "black",
            fontweight="bold" if tied[row, column] else "normal",
        )  # fmt: skip


def _spread(values) -> bool:
    """Whether the numbers need a logarithmic axis."""
    return values.min() > 0 and values.max() >= 10 * values.min()
