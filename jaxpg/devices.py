"""Devices: what programs are built for, compiler options, and one program on several devices."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

# Mesh axis over the two devices on which `concurrently` runs its two functions.
PAIR = "pair"

_told: list[str] = []  # what `built_for` says, innermost last


def backend() -> str:
    """What programs are built for, "cpu", "gpu" or "tpu": jax's default unless `built_for` says another."""
    return _told[-1] if _told else jax.default_backend()


@contextmanager
def built_for(platform: str) -> Iterator[None]:
    """Trace programs for a platform that this machine need not have, to lower and compile them for it.

    >>> with built_for("tpu"):
    ...     backend()
    'tpu'
    """
    jax.clear_caches()  # jax knows traces by their arguments, not by the platform
    _told.append(platform)
    try:
        yield
    finally:
        _told.pop()
        jax.clear_caches()


def prefer(option: str, value: Any, default: Any) -> None:
    """Set an option of jax unless the user has, in the environment or by changing it from jax's default.

    Raises RuntimeError when jax is already in use and the option can no longer change.
    """
    if option.upper() not in os.environ and getattr(jax.config, option) == default:
        jax.config.update(option, value)


def check_devices() -> None:
    """Raises ValueError when there is no device of the kind that JAX_PLATFORMS names."""
    try:
        jax.devices()
    # RuntimeError: a platform unknown to jax; AssertionError: one without an installed plugin.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = str(error).partition("(set JAX_PLATFORMS")[0] or "it has no such device"
        raise ValueError(
            f"JAX_PLATFORMS={asked or ''}: jax cannot start: {reason.strip().rstrip('.')}; leave it unset "
            "for the best available device, or set it to cpu"
        ) from error


def compiler_options(effort: int | None) -> dict[str, Any] | None:
    """Options of `jax.jit` for an optimisation effort of 0 (compiles fastest) to 3; None is the default.

    Only the CPU's compiler takes one; other devices always compile with full effort.
    """
    if effort is None or backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": effort}


def concurrently(one: Callable, other: Callable, *arguments: Any) -> tuple[Any, Any]:
    """Return one(*arguments), other(*arguments); over a mesh with the axis PAIR, each on its own device.

    On one CPU device XLA runs independent loops one after another and leaves the second core idle. The
    results agree to rounding.
    """
    if PAIR not in jax.sharding.get_abstract_mesh().axis_names:
        return one(*arguments), other(*arguments)
    one, other = jax.jit(one), jax.jit(other)  # each is traced once, here and for its shape
    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (jax.eval_shape(one, *arguments), jax.eval_shape(other, *arguments)),
    )
    found = jax.lax.cond(
        jax.lax.axis_index(PAIR) == 0,
        lambda: (one(*arguments), nothing[1]),
        lambda: (nothing[0], other(*arguments)),
    )
    leaves, tree = jax.tree.flatten(found)
    # Each device holds zeros for the other's results, so a sum shares them; one per dtype saves messages.
    for dtype in dict.fromkeys(x.dtype for x in leaves):  # the same order in every process
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = jnp.concatenate([leaves[i].ravel() for i in places])
        flat = jax.lax.psum(flat, PAIR).astype(dtype)
        ends = np.cumsum([leaves[i].size for i in places])
        for i, part in zip(places, jnp.split(flat, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(tree, leaves)


def on_two_devices(function: Callable) -> Callable:
    """Run on two CPU devices if there are two; otherwise return the function unchanged.

    >>> on_two_devices(lambda x: x + 1)(jnp.ones(2)).tolist()
    [2.0, 2.0]
    """
    devices = jax.devices()
    if backend() != "cpu" or len(devices) < 2:
        return function
    mesh = jax.make_mesh((2,), (PAIR,), axis_types=(AxisType.Auto,), devices=devices[:2])
    everywhere = PartitionSpec()
    return jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )


over_halves = on_two_devices  # the name that published scripts import
