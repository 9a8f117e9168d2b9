"""The console: what every command says, where it says it, and how it refuses what it cannot read."""

import argparse
import sys
from contextlib import contextmanager, suppress
from typing import NoReturn

from rich.console import Console


class Unheard(Exception):
    """Standard output takes nothing more: its reader has left, or its device is full."""


def say(*lines: str) -> None:
    """Prints lines at once. Raises Unheard."""
    with _heard():
        print("\n".join(lines), flush=True)


def flush() -> None:
    """Of what others have printed. Raises Unheard."""
    if sys.stdout is not None:
        with _heard():
            sys.stdout.flush()


@contextmanager
def _heard():
    try:
        yield
    except OSError as error:
        raise Unheard(error.strerror or error) from error


def warn(message: object) -> None:
    """One line on standard error, after which the command goes on."""
    tell(f"warning: {message}")


def tell(message: object) -> None:
    """One line on standard error. Where that is closed or full, nobody can be told."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"jaxpg: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def terminal() -> Console | None:
    """Standard error where its lines can be drawn again; None for files, pipes and TERM=dumb.

    Colours are rich's, which heeds NO_COLOR.
    """
    console = Console(stderr=True)
    return console if console.is_interactive and sys.stderr.isatty() else None


def parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Of `jaxpg NAME`. Raises ValueError for arguments that it cannot read, and exits after --help."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message} (see jaxpg {name} --help)")

    found = argparse.ArgumentParser(
        prog=f"jaxpg {name}", description=description, epilog=epilog, allow_abbrev=False
    )
    found.error = refuse  # type: ignore[method-assign]
    # Its own hides that it was not heard.
    found.print_help = lambda file=None: say(*found.format_help().splitlines())
    return found
