"""Factories: environments of your own, named by the module and the function that makes them.

>>> from_factory("no.such:thing")
Traceback (most recent call last):
ValueError: cannot import no.such: ModuleNotFoundError: No module named 'no'
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxpg.envs.env import Env
from jaxpg.envs.gymnax import from_gymnax


def from_factory(name: str, **settings) -> Env:
    """The Env that a function makes: `MODULE:FUNCTION`, as in `my_package.worlds:make_env`.

    The module is looked for in the working directory too. settings: arguments of the function, which returns
    an Env, an environment of gymnax's kind, or a pair of one with its parameters. Raises ValueError if the
    module cannot be imported, has no such function, or the function fails or returns something else.
    """
    factory = imported(name)
    with refused(name, settings):
        made: Any = factory(**settings)
        if isinstance(made, Env):
            return made
        environment, params = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if hasattr(environment, "step_env"):
            return from_gymnax(environment, params)
    raise ValueError(
        f"{name} gives a {type(made).__name__}; it must give a jaxpg.Env or an environment of gymnax's kind"
    )


def names_factory(name: str) -> bool:
    """Whether a name has the form MODULE:FUNCTION.

    >>> names_factory("my_package.worlds:make_env"), names_factory("0:1:log8")
    (True, False)
    """
    parts = name.split(":")
    return len(parts) == 2 and all(
        word.isidentifier() for part in parts for word in part.split(".")
    )


def imported(name: str) -> Callable[..., Any]:
    """What MODULE:NAME names. Raises ValueError if it cannot be imported or is not there."""
    place, _, inside = name.partition(":")
    if os.getcwd() not in sys.path:  # the console script's path lacks it, unlike python's
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(place)
    except Exception as error:  # an import runs whatever the module does
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"cannot import {place}: {type(error).__name__}: {said}") from error
    if not hasattr(module, inside):
        near = difflib.get_close_matches(inside, vars(module), n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else f" in {module.__file__}"
        raise ValueError(f"{place} has no {inside!r}{hint}")
    return getattr(module, inside)


def source_of(name: str) -> Path | None:
    """The file of the module in MODULE:NAME, once imported; None for any other name."""
    module = sys.modules.get(name.partition(":")[0]) if names_factory(name) else None
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


@contextmanager
def refused(name: str, settings: dict[str, Any]) -> Iterator[None]:
    """Turn whatever making an environment raises into a ValueError of one line with its settings."""
    try:
        yield
    except Exception as error:
        given = ", ".join(f"{k}={v}" for k, v in settings.items())
        said = (str(error).splitlines() or [""])[0] or repr(error)
        raise ValueError(f"{name} cannot be made{given and f' with {given}'}: {said}") from error
