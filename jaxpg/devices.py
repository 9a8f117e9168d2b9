"""Devices: what is asked of their compilers."""

from typing import Any

import jax


def compiler_options(effort: int | None) -> dict[str, Any] | None:
    """Options of `jax.jit` for an optimisation effort of 0 (compiles fastest) to 3; None is the usual.

    Only the CPU's compiler takes one: other devices always do their best.
    """
    if effort is None or jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": effort}
