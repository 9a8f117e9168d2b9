"""One process at a time writes a run's folder."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which names this process. Raises ValueError, naming the process that has it.

    Raises ValueError too for a lock that is a link: the file at its other end is not ours to write. The
    kernel releases the lock when its process ends, however it ends.
    """
    path = folder / LOCK
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise ValueError(
                f"{path} is a link, or no plain file, and will not be written; remove it"
            )
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        owner = path.read_text(errors="replace")[:32].strip() or "unknown"
        raise ValueError(
            f"{folder} is being written by process {owner}; wait for it, or stop it"
        ) from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        # Unlinked while still held, so that nobody else's file is.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
