"""Narrow: 32 bits, which is all that most suites' functions support."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import jax

_NARROW = {f"{kind}64": f"{kind}32" for kind in ("int", "uint", "float")}


@contextmanager
def narrow() -> Iterator[None]:
    """Run in 32 bits, whatever the default precision."""
    if not jax.config.read("jax_enable_x64"):
        yield
    elif hasattr(jax, "enable_x64"):
        with jax.enable_x64(False):
            yield
    else:  # jax before 0.8
        with import_module("jax.experimental").disable_x64():
            yield


def narrowed(x: Any) -> Any:
    """An array of 64-bit numbers in 32 bits; anything else as it is."""
    dtype = _NARROW.get(str(getattr(x, "dtype", "")))
    return x.astype(dtype) if dtype else x
