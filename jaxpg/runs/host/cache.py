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
    """Keeps compiled programs in the user's cache folder, or in the one that jax is already set to use.

    Processes may share it and take turns. The user's cache folder drops its least recently used entries
    beyond a gigabyte; a configured one may hold other programs' entries, so nothing is deleted there.
    Without a writable folder nothing is kept. Cache settings that the user has given jax stay.
    """
    # A full disk costs only time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    # By default, only programs that compile for over a second are kept; a run has many quicker ones.
    prefer("jax_persistent_cache_min_compile_time_secs", 0, 1.0)
    prefer("jax_persistent_cache_min_entry_size_bytes", -1, 0)
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(folder)
    except (OSError, RuntimeError):  # RuntimeError: the user has no known home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    prefer("jax_compilation_cache_max_size", LARGEST, -1)
    # jax decides once, at its first compilation, whether there is a cache.
    compilation_cache.reset_cache()


def _drop_unfinished(folder: Path) -> None:
    # jax writes an entry and then its time of use: a process killed in between leaves the entry alone,
    # perhaps cut short, and jax would never rewrite it.
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
    # Entries are machine code, and machines with different processors may share a home.
    return base / "jaxpg" / f"{platform.machine()}-{processor()}"


def processor() -> str:
    """A digest of the processor's features, on which machine code depends."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
