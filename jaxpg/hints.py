"""Hints: errors that name a flag of the command, in the words of a call from Python.

>>> in_python("use --num-envs 64 or more, or --shard replicas; jaxpg train --help lists them")
"use num_envs=64 or more, or shard='replicas'; jaxpg train --help lists them"
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# A whole command stays as it is. What follows a flag may be its value, or the next word of the sentence.
_FLAG = re.compile(r"jaxpg [a-z]+ [^;,)]*|--([a-z]+(?:-[a-z]+)*)(?:[ =]([^\s;,)]*[^\s;,.)]))?")
_NUMBER = re.compile(r"[\d.][\w.*+-]*|[A-Z]+")
_WORDS = {"shard", "schedule", "distribution", "adaptation", "importance", "env"}  # take a word
_NAMES = {"run": "folder", "lambda": "lambda_", "resume-or-start": "resume=True"}


def in_python(message: str) -> str:
    """The message with `--num-envs 64` written as `num_envs=64`."""

    def spelled(found: re.Match[str]) -> str:
        flag, value = found[1], found[2]
        if flag is None:
            return found[0]
        name = _NAMES.get(flag, flag.replace("-", "_"))
        if not value:
            return name
        if _NUMBER.fullmatch(value):
            return f"{name}={value}"
        text = re.search("[/:]", value) or flag in _WORDS
        return f"{name}={value!r}" if text else f"{name} {value}"

    return re.sub(r"\bflag\b", "setting", _FLAG.sub(spelled, message))


@contextmanager
def python_hints() -> Iterator[None]:
    """Turns the flags in a ValueError's message into arguments.

    >>> with python_hints():
    ...     raise ValueError("--gamma 2 must lie in [0, 1]")
    Traceback (most recent call last):
    ValueError: gamma=2 must lie in [0, 1]
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(in_python(str(error))) from error
