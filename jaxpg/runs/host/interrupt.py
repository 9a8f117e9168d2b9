"""Ctrl-C and SIGTERM: the first asks, the second insists. A closed pipe asks, too."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxpg.runs.console import Unheard, terminal

# Seconds within which signals are one: `timeout` and schedulers signal a process and then its group.
SAME = 0.5


class Interrupted(Exception):
    """Training stopped at a signal; `status` is the exit status that shells expect of it."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.status = 128 + number


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the number of the first signal so far, or 0; a second one aborts."""
    received: list[int] = []
    first = 0.0
    show_cursor = b"\x1b[?25h" if terminal() else b""  # the live display hides it

    def handle(number, frame):
        # Little may be done here: the signal may have come in the middle of a print.
        nonlocal first
        del frame
        if received and time.monotonic() - first < SAME:
            return
        if received:
            os.write(2, show_cursor + b"\njaxpg: aborted\n")
            os._exit(128 + number)
        received.append(number)
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
    """Yields the same two; but a line of progress that nobody hears stops the run, as a signal does.

    So what was learnt by then is saved. Raises Unheard then, in place of Interrupted.
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
