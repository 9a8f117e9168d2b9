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


def replicas_at_once() -> int | None:
    """How many agents to train side by side on one device; None is all of them.

    On a CPU the data of 32 agents are beyond the caches: groups of 8 of CartPole's ppo ran 1.5 times as
    fast, of 4 and of 16 less so (scripts/speed.md). Other devices are made for all at once.
    """
    return 8 if jax.default_backend() == "cpu" else None
