"""One process at a time writes a run's folder."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises ValueError, naming the process, when another one has it.

    The kernel lets go of the lock when its process ends, however it ends: what a killed process left
    behind is taken over. Where a file system has no locks, there is no protection.
    """
    file = _acquire(folder / LOCK)
    try:
        os.truncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        # Unlinked while still held, so that nobody else's file is.
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(file)


def _acquire(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(file, 32).decode(errors="replace").strip() or "unknown"
                os.close(file)
                raise ValueError(
                    f"{path.parent} is being written by process {owner}; wait for it, or stop it"
                ) from error
        # The owner may have unlinked the file between our opening and locking it.
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        os.close(file)
