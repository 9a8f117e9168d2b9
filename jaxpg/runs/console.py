"""The console: how every command prints, warns, and reads its arguments."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, NoReturn

from rich.console import Console

LONGEST_WORD = 320  # characters

_muted: list[None] = []  # not empty: another process speaks for this one


class Ended(Exception):
    """Ends a command: the message is its last line, `status` its exit status."""

    status = 1


class Unheard(Exception):
    """Standard output takes nothing more: its reader has left, or its device is full."""


def mute() -> None:
    """Prints nothing from here on, because another process speaks for this one."""
    _muted.append(None)


def unmute() -> None:
    """Prints again."""
    _muted.clear()


def say(*lines: str) -> None:
    """Prints lines at once. Raises Unheard."""
    if not _muted:
        with heard():
            print("\n".join(lines), flush=True)


def flush() -> None:
    """Flushes what others have printed. Raises Unheard."""
    if sys.stdout is not None:
        with heard():
            sys.stdout.flush()


@contextmanager
def heard() -> Iterator[None]:
    """Wraps code that prints to standard output, also that of others. Raises Unheard."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # the error is about a file
            raise
        raise Unheard(error.strerror or error) from error


def warn(message: object) -> None:
    """Prints a warning on standard error, after which the command goes on."""
    tell(f"warning: {message}")


def tell(message: object) -> None:
    """Prints one line on standard error, with very long words cut short."""
    words = (shortened(word, LONGEST_WORD) for word in str(message).split())
    note(f"jaxpg: {' '.join(words)}")


def note(line: str) -> None:
    """Prints a line on standard error, or nothing if that is closed or full."""
    if sys.stderr is not None and not _muted:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def nearest(
    name: str, known: Iterable[str], others: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The end of a message on an unknown name: what is meant, if something is near.

    others: what is meant by names that are near to none, or to another.

    >>> nearest("--gama", ["--gamma"]), nearest("--lr", ["--run"], {"--lr": "--rate"}), nearest("x", [])
    ('; did you mean --gamma?', '; did you mean --rate?', '')
    """
    near = others.get(name) or next(
        iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), ""
    )
    return near and f"; did you mean {near}?"


def terminal() -> Console | None:
    """Standard error if its lines can be redrawn; None for files, pipes and TERM=dumb.

    rich chooses the colours, and respects NO_COLOR.
    """
    console = Console(stderr=True)
    return console if console.is_interactive and sys.stderr.isatty() and not _muted else None


def whole(least: int = 0, most: int = 2**31 - 1, word: str = "") -> Callable[[str], Any]:
    """A `type` for a parser's argument: reads a whole number, also 1e6 and 2**20, or one word instead."""

    def read(text: str) -> int | str:
        if word and text == word:
            return word
        what = f"a whole number from {least} to {most}{word and f', or {word}'}"
        try:
            base, power, exponent = text.partition("**")
            # Floating point is quick even for numbers that are far too large.
            value = float(base) ** float(exponent) if power else float(text)
            if text.strip().lstrip("+-").isdecimal():
                value = int(text)  # with every digit
            if value == int(value):
                if least <= value <= most:
                    return int(value)
                what = f"at least {least}" if value < least else f"at most {most}"
        except (ValueError, ArithmeticError, TypeError):  # TypeError: a complex number
            pass
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be {what}")

    return read


def parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of `jaxpg NAME`: raises ValueError for arguments it cannot read, exits after --help."""

    def refuse(message: str) -> NoReturn:
        # A message of `whole` continues after the flag: "--seed -1 must be ...".
        message = re.sub(r"^argument (\S+): (?=\S+ must be )", r"\1 ", message)
        if unknown := re.match(r"unrecognized arguments: (--\S+)", message):
            message += nearest(unknown[1].partition("=")[0], found._option_string_actions)
        raise ValueError(f"{message} (see jaxpg {name} --help)")

    found = argparse.ArgumentParser(
        prog=f"jaxpg {name}", description=description, epilog=epilog, allow_abbrev=False
    )
    found.error = refuse  # type: ignore[method-assign]
    # argparse's own print_help hides that a write failed.
    found.print_help = lambda file=None: say(*found.format_help().splitlines())
    return found
