"""One process at a time writes a run's folder."""

import errno
import os
import stat
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
    """Holds the folder's lock. Raises ValueError, naming the process, when another one has it, and for a
    lock that is a link: the file at its other end is not ours to write.

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
        try:
            # Neither following a link nor waiting for whoever may read from a pipe.
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o644)
        except OSError as error:
            if path.is_symlink():
                raise _foreign(path) from error
            raise
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
            found = os.fstat(file)
            if os.path.samestat(os.lstat(path), found):
                if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                    os.close(file)
                    raise _foreign(path)
                return file
        os.close(file)


def _foreign(path: Path) -> ValueError:
    return ValueError(f"{path} is a link, or no plain file, and will not be written; remove it")
