"""A lock that lets one process at a time write a run's folder."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which names this process. Raises ValueError, naming a process that holds it.

    Also raises ValueError for a lock that is a link, because its target is not ours to write. The kernel
    releases the lock when its process ends, however it ends.
    """
    path = folder / LOCK
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise ValueError(
                f"{path} is a link, or not a plain file, and will not be written; remove it"
            )
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        owner = ""
        with suppress(OSError):  # it may have finished just now
            owner = path.read_text(errors="replace")[:32].strip()
        raise ValueError(
            f"{folder} is being written by process {owner or 'unknown'}; wait for it, or stop it"
        ) from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        # Unlink while holding the lock, so as never to unlink another process's file.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
