"""Progress between chunks: a live display in a terminal, plain lines elsewhere, nothing when quiet."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jaxpg.runs.console import say, terminal
from jaxpg.stats.intervals import ANY
from jaxpg.stats.seeds import Summary, interval, number, summarise

PLAIN_LINES = 20  # at most, in a run
WIDEST = 120  # columns


class Status(NamedTuple):
    """Where a run stands."""

    updates: int
    total_updates: int
    env_steps: int  # of all replicas together
    seconds: float  # of training, without compilation
    compile_seconds: float
    returns: np.ndarray  # [points, seeds] of the last chunk; NaN where no episode has ended
    attainable: tuple[float, float] = ANY  # range in which returns are known to lie


Show = Callable[[Status | str], None]  # a string is a note


def display(quiet: bool) -> AbstractContextManager[Show]:
    """A context that gives the function to call after every chunk."""
    if quiet:
        return nullcontext(lambda status: None)
    console = terminal()
    return nullcontext(_plain()) if console is None else _live(console)


def steps_per_second(status: Status) -> float:
    return status.env_steps / status.seconds if status.seconds else float("nan")


def _plain() -> Show:
    shown = 0

    def show(status):
        nonlocal shown
        if isinstance(status, str):
            say(status)
            return
        due = status.updates * PLAIN_LINES // status.total_updates
        if due > shown:
            shown = due
            say(
                f"{status.updates}/{status.total_updates} updates  {status.env_steps:,} steps  "
                f"{number(steps_per_second(status), 0)} steps/s  return {_return(status)}  "
                f"{_left(status)} left"
            )

    return show


@contextmanager
def _live(console: Console) -> Iterator[Show]:
    spinner, curve, last = Spinner("dots", "starting"), [], None
    console.width = min(console.width, WIDEST)

    def show(status):
        nonlocal last
        if isinstance(status, str):
            spinner.update(text=Text(status, no_wrap=True, overflow="ellipsis"))
            return
        spinner.update(text="training")
        last = status
        curve.append(_best(status).mean)
        live.update(_panel(status, curve, console, spinner))

    # Draw no faster than the eye needs, because the cores are busy with training.
    with Live(spinner, console=console, refresh_per_second=4) as live:
        try:
            yield show
        finally:  # what was reached stays on the screen
            live.transient = last is None
            if last is not None:
                live.update(_panel(last, curve, console), refresh=True)


def _panel(status: Status, curve: list[float], console: Console, *above: Spinner) -> Group:
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    bar.add_row(
        ProgressBar(total=status.total_updates, completed=status.updates),
        f"{status.updates:,}/{status.total_updates:,} updates, {_left(status)} left",
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(no_wrap=True, overflow="ellipsis")
    over = "95 % over seeds" + (", best of the grid" if len(status.returns) > 1 else "")
    facts.add_row("return", f"[bold]{escape(_return(status))}[/bold]  [dim]{over}[/dim]")
    facts.add_row("", Text(sparkline(curve, console.width - 20, console.options.ascii_only)))
    facts.add_row("environment steps", f"{status.env_steps:,}")
    facts.add_row("steps per second", number(steps_per_second(status), 0))
    facts.add_row("compile seconds", number(status.compile_seconds))
    return Group(*above, bar, facts)


def sparkline(values: list[float], width: int, plain: bool = False) -> str:
    """A curve as one line of characters between its least and greatest value, means over equal stretches.

    >>> sparkline([0.0, 1.0, 3.0, 7.0], 40), sparkline([0.0, 1.0, 3.0, 7.0], 16)
    ('0.0 ▁▂▄█ 7.0', '0.0 ▁▂▄█ 7.0')
    """
    known = np.array([x for x in values if np.isfinite(x)])
    if not known.size:
        return ""
    low, high = number(known.min()), number(known.max())
    room = max(1, min(len(known), width - len(low) - len(high) - 2))
    means = [part.mean() for part in np.array_split(known, room)]
    marks = ".:-=+*#@" if plain else "▁▂▃▄▅▆▇█"
    span = float(np.ptp(known)) or 1.0
    drawn = "".join(marks[round((x - known.min()) / span * (len(marks) - 1))] for x in means)
    return f"{low} {drawn} {high}"


def _return(status: Status) -> str:
    """The mean return of the grid's best point, with a 95 % interval over its seeds."""
    best = _best(status)
    return f"{number(best.mean)} {interval(best)}"


def _best(status: Status) -> Summary:
    summaries = [summarise(row, status.attainable) for row in status.returns]
    return max(summaries, key=lambda s: -np.inf if np.isnan(s.mean) else s.mean)


def _left(status: Status) -> str:
    if not status.updates:
        return "-"
    seconds = status.seconds * (status.total_updates - status.updates) / status.updates
    return str(timedelta(seconds=round(seconds)))
