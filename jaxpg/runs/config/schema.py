"""Checks that stored files and given settings fit their Python types."""

import json
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

LONGEST_TEXT = 4096  # characters, like a path
_WORDS = {
    bool: "true or false",
    int: "a whole number of 64 bits",
    float: "a finite number",
    str: f"UTF-8 text of at most {LONGEST_TEXT} characters",
    NoneType: "null",
}


def expect(value: Any, kind: Any, where: str) -> None:
    """Raises ValueError, naming the place, for a value of another kind.

    kind: bool, int, float, str, None, Any, a TypedDict, or a list, tuple, dict or union of kinds. A list
    passes for a tuple, as JSON has only lists; a float must be finite, and may be written as a whole number.
    """
    wrong = _misfit(value, kind, where)
    if wrong:
        raise ValueError(wrong)


def read_json(path: Path, kind: Any = Any) -> Any:
    """Reads a JSON file. Raises ValueError, naming it, for invalid JSON or another kind."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return parsed(text, kind, str(path))


def parsed(text: str | bytes, kind: Any, where: str) -> Any:
    """Parses JSON. Raises ValueError, naming the place, for invalid JSON or another kind."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for bytes that are not text
        raise ValueError(f"cannot read {where}, which is not JSON: {error}") from error
    if wrong := _misfit(found, kind, ""):
        raise ValueError(f"cannot read {where}: {wrong}")
    return found


def _misfit(value, kind, where) -> str:
    """Describes what is wrong with the value, or returns ""."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return ""
    if origin in (Union, UnionType):
        wrong = [_misfit(value, part, where) for part in parts]
        return "" if "" in wrong else wrong[0]
    if is_typeddict(kind):
        return _misfit_of_table(value, kind, where)
    if origin is dict:
        if not isinstance(value, dict):
            return f"{where or 'it'} must be a table of names, not {_shown(value)}"
        inside = ((f"{where}.{name}".lstrip("."), each) for name, each in value.items())
        return _first(inside, parts[1])
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return f"{where or 'it'} must be a list, not {_shown(value)}"
        return _first(((f"{where}[{i}]", each) for i, each in enumerate(value)), parts[0])
    if _is(value, kind):
        return ""
    return f"{where or 'it'} must be {_WORDS[kind or NoneType]}, not {_shown(value)}"


def _misfit_of_table(value, kind, where) -> str:
    if not isinstance(value, dict):
        return f"{where or 'it'} must be a table of names, not {_shown(value)}"
    for name, part in get_type_hints(kind).items():
        place = f"{where}.{name}".lstrip(".")
        if name not in value and name in kind.__required_keys__:
            return f"{place} is missing"
        if name in value and (wrong := _misfit(value[name], part, place)):
            return wrong
    return ""


def _first(places, kind) -> str:
    return next((wrong for place, each in places if (wrong := _misfit(each, kind, place))), "")


def _is(value, kind) -> bool:
    if kind is None or kind is NoneType:
        return value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST_TEXT and _is_plain(value)
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _is_plain(text) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return "\0" not in text


def _shown(value, most=60) -> str:
    # repr of a very long integer is slow, or refused.
    text = "a very long number" if isinstance(value, int) and abs(value) >= 10**60 else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
