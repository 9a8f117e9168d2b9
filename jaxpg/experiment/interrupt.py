"""Ctrl-C and SIGTERM: the first asks, the second insists."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    def handle(number, frame):
        # Little may be done here: the signal may have come in the middle of a print.
        nonlocal first
        del frame
        if received and time.monotonic() - first < SAME:
            return
        if received:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # the live display had hidden it
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
