"""The plot command: reads runs and draws them into files."""

import argparse
import difflib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jaxpg.runs.console import parser, say
from jaxpg.stats.figures import WIDTHS

X = ("env_steps", "updates", "seconds")
METRIC = "episode_return"
WIDTH = 80


class PlotRequest(NamedTuple):
    """What to draw, and where."""

    series: list[Any]  # records.Series
    x: str
    metric: str
    out: Path
    width: str = "page"


def prepare(argv: Sequence[str]) -> PlotRequest:
    """Reads the runs that the arguments name. Raises ValueError for what cannot be drawn."""
    arguments = _parser().parse_args(list(argv))
    # Imported here, so that help does not wait for jax.
    import numpy as np

    from jaxpg.runs.plot.records import read
    from jaxpg.runs.store.folder import FIGURES

    folders = [Path(name) for name in arguments.runs]
    series = read(folders)
    metrics = sorted({name for s in series for name in (*s.metrics, *s.ratios)})
    if arguments.metric not in metrics:
        near = difflib.get_close_matches(arguments.metric, metrics, n=3, cutoff=0.4) or metrics
        raise ValueError(f"unknown metric {arguments.metric!r}; did you mean {', '.join(near)}?")
    if not any(np.isfinite(each).any() for s in series for each in s.metrics.values()):
        raise ValueError(
            f"nothing to draw: all agents of {', '.join(arguments.runs)} diverged at their first update; "
            "a smaller learning rate may help"
        )
    for s in series:
        if arguments.metric not in (*s.metrics, *s.ratios):
            raise ValueError(f"{s.folder} did not record {arguments.metric}, and another run did")
    worlds = sorted({s.environment for s in series})
    if len(worlds) == len(series) > 1:
        raise ValueError(
            f"nothing to compare: every run has a different environment ({', '.join(worlds)}); "
            "plot them one at a time"
        )
    default = folders[0] / FIGURES
    if len(folders) > 1:
        default = Path("runs") / f"plot-{datetime.now():%Y%m%d-%H%M%S}"
    out = Path(arguments.out) if arguments.out else default
    return PlotRequest(series, arguments.x, arguments.metric, out, arguments.width)


def execute(request: PlotRequest) -> list[str]:
    """Prints the scores of the runs and draws their figures into the folder; returns the figures' names.

    Raises OSError if the folder cannot be made, or no figure can be drawn.
    """
    from jaxpg.runs.plot import figures
    from jaxpg.runs.plot.records import best
    from jaxpg.runs.store.artifacts import write_figure

    series, x, metric, out, width = request
    shown = best(series, figures.MOST_SERIES)
    drawn = {
        "curves": lambda figure: figures.curves(figure, shown, x, metric),
        "diagnostics": lambda figure: figures.diagnostics(figure, shown, x),
    }
    say(*_table(shown))
    try:
        figures.final_scores(shown)
        drawn["comparison"] = lambda figure: figures.comparison(figure, shown)
    except ValueError as error:
        say(f"no comparison: {error}")
    for s in (s for s in series if s.diverged):
        say(
            f"diverged: {len(s.diverged)} of {len(s.env_steps)} seeds of {s.label}, the first at "
            f"update {min(s.diverged)}; their curves end there"
        )
    if len(shown) < len(series):
        say(f"drawn: the best {len(shown)} of {len(series)} series")
    out.mkdir(parents=True, exist_ok=True)
    saved = [name for name, draw in drawn.items() if write_figure(out, draw, name, width)]
    if not saved:
        raise OSError(f"none of {len(drawn)} figures could be drawn")
    say(f"saved {', '.join(saved)} in {out}")
    return saved


def _table(series) -> list[str]:
    """The interquartile mean of every series' scores."""
    from jaxpg.runs.plot.records import score
    from jaxpg.runs.train.report import aligned
    from jaxpg.stats.seeds import interval, number, robust

    lines = []
    for world in dict.fromkeys(s.environment for s in series):
        rows = [["", "return", "95 % interval", "seeds"]]
        for s in (s for s in series if s.environment == world):
            estimate, values = robust(score(s)), score(s)
            seeds = f"{len(values)}" + ("" if s.final is not None else ", unfinished")
            rows.append([s.label, number(estimate.value), interval(estimate), seeds])
        lines += [f"{world}: interquartile means of the final evaluation", *aligned(rows)]
    return [line[:WIDTH] for line in lines]


def _parser() -> argparse.ArgumentParser:
    found = parser(
        "plot",
        "Draws runs: learning curves, diagnostics, and a comparison of their final evaluations, with "
        "95% bootstrap intervals over seeds. Files are PNG, SVG and PDF.",
        "example: jaxpg plot runs/mine runs/other --x seconds",
    )
    add = found.add_argument
    add("runs", metavar="RUN", nargs="+", help="folder of a jaxpg train run; several are compared")
    add("--x", choices=X, default=X[0], help="x axis of the curves; default: env_steps")
    add("--metric", default=METRIC, help=f"y axis of the curves; default: {METRIC}")
    add("--width", choices=WIDTHS, default="page", help="of the figures; default: page")
    add(
        "--out",
        metavar="DIR",
        help="folder to write; default: RUN/figures, or a new one for several runs",
    )
    return found
