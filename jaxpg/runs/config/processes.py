"""Several processes that run one command: how they find each other. Imports nothing heavy."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpg.runs.console import shortened

# Each with the name of its value and its help; all processes get the same command but for --process.
FLAGS = {
    "--distributed": (None, "find the others by SLURM, Kubernetes, MPI or a Cloud TPU"),
    "--coordinator": ("HOST:PORT", "or name the address of process 0"),
    "--processes": ("N", "with it: how many there are"),
    "--process": ("I", "and which of 0 to N-1 this one is"),
    "--heartbeat-timeout": (
        "S",
        "seconds to wait for the others, at the start and when one falls silent; default: 60",
    ),
}
LEAST, MOST = 2, 86_400  # seconds; those between heartbeats are a fraction of the timeout


class Cluster(NamedTuple):
    """How this process finds the others; None: jax finds out."""

    coordinator: str | None
    processes: int | None
    process: int | None
    timeout: int = 60


def take(argv: Sequence[str], prog: str) -> tuple[Cluster | None, list[str]]:
    """The processes that the arguments ask for, None for this one alone, and the other arguments.

    Raises ValueError for what cannot be read.

    >>> take(["CartPole-v1", "--coordinator", "node1:1234", "--processes", "2", "--process", "0"], "")
    (Cluster(coordinator='node1:1234', processes=2, process=0, timeout=60), ['CartPole-v1'])
    """
    automatic_flag, *flags = FLAGS
    found: dict[str, Any] = {}
    words, rest, automatic = list(argv), [], False
    while words:
        flag, equals, value = (word := words.pop(0)).partition("=")
        if flag == automatic_flag and not equals:
            automatic = True
        elif flag in flags:
            value = value if equals else (words.pop(0) if words else "")
            found[flag] = value if flag == flags[0] else _whole(flag, value, prog)
        else:
            rest.append(word)
    if not found and not automatic:
        return None, rest
    named = [flag in found for flag in flags[:3]]
    if any(named) and not all(named):
        lacking = next(flag for flag in flags if flag not in found)
        raise ValueError(f"{', '.join(flags[:2])} and {flags[2]} go together; {lacking} is missing")
    if not any(named) and not automatic:
        raise ValueError(f"{flags[3]} is for several processes; add --distributed")
    if all(named):
        address, total, index = (found[flag] for flag in flags[:3])
        if not re.fullmatch(r"\S+:[0-9]{1,5}", address) or int(address.rpartition(":")[2]) > 65535:
            raise ValueError(
                f"--coordinator {shortened(address)} must be HOST:PORT, as in node1:1234"
            )
        if total < 1:
            raise ValueError(f"--processes {total} must be at least 1")
        if not 0 <= index < total:
            raise ValueError(
                f"--process {index} does not exist; with --processes {total} they are 0 to {total - 1}"
            )
    timeout = found.get(flags[3], Cluster(None, None, None).timeout)
    if not LEAST <= timeout <= MOST:
        raise ValueError(f"{flags[3]} {timeout} must be {LEAST} to {MOST} seconds")
    where = [found.get(flag) for flag in flags[:3]]
    return Cluster(where[0], where[1], where[2], timeout), rest


def _whole(flag: str, text: str, prog: str) -> int:
    if not text.isdecimal():
        raise ValueError(
            f"{flag} takes a whole number, not {shortened(text)!r} (see {prog} --help)"
        )
    return int(text)
