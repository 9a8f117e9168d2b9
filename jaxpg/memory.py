"""Memory: how much there is, what a compiled program needs, and the refusal of what does not fit."""

import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxpg.devices import backend


def check_fits(
    available: float | None, one: float, count: int, what: str, noun: str, remedy: str
) -> None:
    """Raises ValueError when `count` items of `one` bytes each need more memory than is available."""
    if available is None or one * count <= available:
        return
    fits = f"{int(available // one):,}" if one <= available else "none"
    raise ValueError(
        f"about {giga(one * count)} of memory is needed for {what} {count:,} {noun}{'s' * (count > 1)}, "
        f"and there is {giga(available)}, enough for {fits}; {remedy}"
    )


def needed_bytes(compiled: Any) -> int | None:
    """Bytes that the program needs while it runs, as its compiler reports them; None if it does not."""
    try:
        found = compiled.memory_analysis()
    except (NotImplementedError, RuntimeError, jax.errors.JaxRuntimeError):
        return None
    if found is None:
        return None
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    # All devices of a CPU share its memory.
    return total * (jax.local_device_count() if backend() == "cpu" else 1)


def available_bytes() -> int | None:
    """Free memory of one accelerator, or of this machine within its limits; None where unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        found = device.memory_stats() or {}
        limit = found.get("bytes_limit")
        return None if limit is None else limit - found.get("bytes_in_use", 0)
    return machine_bytes()


def machine_bytes() -> int | None:
    """Free memory of this machine, within its limits; None where unknown."""
    limits = [_number(Path("/sys/fs/cgroup/memory.max"))]
    if sys.platform == "linux":
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((x for x in limits if x is not None), default=None)


def _number(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def giga(count: float) -> str:
    """A number of bytes in gigabytes, for messages."""
    return f"{count / 1e9:.1f} GB"
