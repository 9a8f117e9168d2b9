"""A trace of two chunks of updates, by jax's profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

FIRST, LAST = 2, 3  # chunks to trace: the first also warms the device up
LONG = 20  # updates of a chunk; 200 of the default command on a CPU took a gigabyte and minutes to write


def check_chunks(chunks: int) -> None:
    """Raises ValueError if a run of this many chunks ends before the last one to trace."""
    if chunks < LAST:
        raise ValueError(
            f"--profile traces chunks {FIRST} and {LAST} of the updates to come, and there are only "
            f"{chunks}; give more --updates, or leave it out"
        )


@contextmanager
def tracing(
    folder: str | None, updates: int, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Yields a function to call before each chunk, and says at the end where the trace is.

    updates: those of a chunk; a warning says when that makes a trace large. A run that ends earlier, in
    whatever way, keeps the trace so far. A trace that cannot be written is said to be missing, and costs the
    run nothing. Without a folder there is no trace.
    """
    if folder is None:
        yield lambda: None
        return
    if updates > LONG:
        say(
            f"warning: the trace of chunks of {updates} updates is large and takes long to write; a "
            "run of fewer --updates has shorter ones"
        )
    chunk, open_, said = 0, False, ""

    def start():
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the host only waits
        jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)

    def attempt(function):
        nonlocal open_, said
        open_ = False
        try:
            function()
            open_ = function is start
        except (OSError, RuntimeError, ValueError) as error:
            said = f"no trace: {error}".partition("\n")[0]

    def before_chunk():
        nonlocal chunk
        chunk += 1
        if chunk == FIRST:
            attempt(start)
        elif chunk == LAST + 1 and open_:
            attempt(jax.profiler.stop_trace)

    try:
        yield before_chunk
    finally:
        if open_:
            attempt(jax.profiler.stop_trace)
        found = next(Path(folder).rglob("perfetto_trace.json.gz"), None)
        with suppress(OSError):
            Path(folder).rmdir()  # if it is empty
        if found:
            count = min(chunk, LAST) - FIRST + 1
            said = (
                f"trace of {count} chunk{'s' * (count > 1)} of updates: open {found} in "
                f"https://ui.perfetto.dev, or run xprof --logdir {folder}"
            )
        say(said or f"no trace: the run ended before chunk {FIRST}")
