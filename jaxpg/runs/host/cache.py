"""The compilation cache: programs compiled once are read back by later runs."""

import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpg.devices import prefer

LARGEST = 2**30  # bytes


def use_compilation_cache() -> None:
    """Keeps compiled programs in a folder of the user's, or in that which jax has been given already.

    Processes may share it, each waiting for its turn. In its own folder the entries not used for longest go
    when it exceeds a gigabyte; a named one may hold other programs' entries, so nothing is deleted there.
    Without a folder that can be written nothing is kept; and what the user has told jax about it stays.
    """
    # A full disk costs time, and nothing else.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    # By default, only what takes more than a second is kept; a run has many programs that take less.
    prefer("jax_persistent_cache_min_compile_time_secs", 0, 1.0)
    prefer("jax_persistent_cache_min_entry_size_bytes", -1, 0)
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(folder)
    except (OSError, RuntimeError):  # the second where nothing says whose home is where
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    prefer("jax_compilation_cache_max_size", LARGEST, -1)
    # Whatever was compiled before has fixed jax's opinion of whether there is a cache.
    compilation_cache.reset_cache()


def _drop_unfinished(folder: Path) -> None:
    # jax writes an entry and then its time of use: a process killed in between leaves the first alone,
    # maybe cut short, and jax would never write it again.
    for entry in folder.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)


def _folder() -> Path:
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A home may be shared by machines whose processors differ, and what is kept is machine code.
    return base / "jaxpg" / f"{platform.machine()}-{processor()}"


def processor() -> str:
    """A digest of what the processor can do, on which the machine code for it depends."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
