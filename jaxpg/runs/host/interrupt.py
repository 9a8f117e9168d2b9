"""Ctrl-C and SIGTERM: the first saves and stops, the second aborts. A closed pipe saves and stops, too."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxpg.runs.console import Ended, Unheard, terminal
from jaxpg.runs.host import cluster

# Signals within this many seconds are one: `timeout` and schedulers signal a process, then its group.
SAME = 0.5


class Interrupted(Ended):
    """Training stopped at a signal; `status` is the exit status that shells expect."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.status = 128 + number


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the first signal so far, or 0; a second one aborts."""
    received: list[int] = []
    first = 0.0
    show_cursor = b"\x1b[?25h" if terminal() else b""  # the live display hides it

    def handle(number, frame):
        # Do little here: the signal may have come in the middle of a print.
        nonlocal first
        del frame
        if received and time.monotonic() - first < SAME:
            return
        if received:
            os.write(2, show_cursor + b"\njaxpg: aborted\n")
            os._exit(128 + number)
        received.append(number)
        cluster.stopping(number)
        first = time.monotonic()

    # Only the main thread may set handlers; elsewhere, such as in a notebook's worker, leave them be.
    own = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if own else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def heeding(
    show: Callable[[Any], None], stopped: Callable[[], int]
) -> Iterator[tuple[Callable[[Any], None], Callable[[], int]]]:
    """Yields the same two functions, but a progress line that cannot be written stops the run like a signal.

    The run is then saved as after a signal, and Unheard is raised in place of Interrupted.
    """
    lost: list[Unheard] = []

    def heard(status):
        try:
            if not lost:
                show(status)
        except Unheard as error:
            lost.append(error)

    try:
        yield heard, lambda: stopped() or bool(lost) * signal.SIGPIPE
    except Interrupted:
        for error in lost:
            raise error from error.__cause__
        raise
