"""The console: what every command says, where it says it, and how it refuses what it cannot read."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from rich.console import Console

LONGEST_WORD = 320  # characters


class Unheard(Exception):
    """Standard output takes nothing more: its reader has left, or its device is full."""


def say(*lines: str) -> None:
    """Prints lines at once. Raises Unheard."""
    with heard():
        print("\n".join(lines), flush=True)


def flush() -> None:
    """Of what others have printed. Raises Unheard."""
    if sys.stdout is not None:
        with heard():
            sys.stdout.flush()


@contextmanager
def heard() -> Iterator[None]:
    """Around what prints to standard output, also what others print. Raises Unheard."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # of a file
            raise
        raise Unheard(error.strerror or error) from error


def warn(message: object) -> None:
    """One line on standard error, after which the command goes on."""
    tell(f"warning: {message}")


def tell(message: object) -> None:
    """One line on standard error, in which very long words are cut short."""
    words = (shortened(word, LONGEST_WORD) for word in str(message).split())
    note(f"jaxpg: {' '.join(words)}")


def note(line: str) -> None:
    """A line on standard error. Where that is closed or full, nobody can be told."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def terminal() -> Console | None:
    """Standard error where its lines can be drawn again; None for files, pipes and TERM=dumb.

    Colours are rich's, which heeds NO_COLOR.
    """
    console = Console(stderr=True)
    return console if console.is_interactive and sys.stderr.isatty() else None


def whole(least: int = 0, most: int = 2**31 - 1, word: str = "") -> Callable[[str], Any]:
    """Reads a whole number, also 1e6 and 2**20, or one word instead; for `type` of a parser's argument."""

    def read(text: str) -> int | str:
        if word and text == word:
            return word
        what = f"a whole number from {least} to {most}{word and f', or {word}'}"
        try:
            base, power, exponent = text.partition("**")
            # In floating point, which is quick about what is far too large.
            value = float(base) ** float(exponent) if power else float(text)
            if text.strip().lstrip("+-").isdecimal():
                value = int(text)  # with every digit
            if value == int(value):
                if least <= value <= most:
                    return int(value)
                what = f"at least {least}" if value < least else f"at most {most}"
        except (ValueError, ArithmeticError, TypeError):  # the last of a complex number
            pass
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be {what}")

    return read


def parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Of `jaxpg NAME`. Raises ValueError for arguments that it cannot read, and exits after --help."""

    def refuse(message: str) -> NoReturn:
        # What `whole` says begins with the flag.
        message = re.sub(r"^argument (\S+): (?=\S+ must be )", r"\1 ", message)
        raise ValueError(f"{message} (see jaxpg {name} --help)")

    found = argparse.ArgumentParser(
        prog=f"jaxpg {name}", description=description, epilog=epilog, allow_abbrev=False
    )
    found.error = refuse  # type: ignore[method-assign]
    # Its own hides that it was not heard.
    found.print_help = lambda file=None: say(*found.format_help().splitlines())
    return found
