"""Devices: what is asked of their compilers, and how one program uses several."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

# Replicas whose improvement is computed side by side, where every core is a device. Of 32 agents together
# every array is beyond the caches: in groups of 4 the default ppo ran 1.6 times as fast, of 2 about the same,
# of 8 as little as 1.1 times (scripts/speed.md). A rollout's arrays are small, and its steps cost the fewer
# the wider they are. One device of several cores spreads wide products over them: there, groups took 1.3
# times as long.
SIDE_BY_SIDE = 4
# The mesh axis of two devices between which `beside` divides its work.
HALVES = "halves"


def prefer(option: str, value: Any, default: Any) -> None:
    """Sets an option of jax, unless its user has: in the environment, or to other than jax's default.

    Raises RuntimeError for an option that is too late, because jax is in use already.
    """
    if option.upper() not in os.environ and getattr(jax.config, option) == default:
        jax.config.update(option, value)


def check_devices() -> None:
    """Raises ValueError where there is no device of the kind that JAX_PLATFORMS names."""
    try:
        jax.devices()
    # A platform that jax does not know is the first, one that it has no plugin for the second.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = str(error).partition("(set JAX_PLATFORMS")[0] or "it has no such device"
        raise ValueError(
            f"JAX_PLATFORMS={asked or ''}: jax cannot start: {reason.strip().rstrip('.')}; leave it unset "
            "for the best device there is, or set it to cpu"
        ) from error


def compiler_options(effort: int | None) -> dict[str, Any] | None:
    """Options of `jax.jit` for an optimisation effort of 0 (compiles fastest) to 3; None is the usual.

    Only the CPU's compiler takes one: other devices always do their best.
    """
    if effort is None or jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": effort}


def beside(one: Callable, other: Callable, *arguments: Any) -> tuple[Any, Any]:
    """one(*arguments) and other(*arguments); over a mesh with the axis HALVES, each on one half of it.

    On a CPU device XLA runs loops that do not need each other one after another, and a second core idles.
    The results are the same to rounding.
    """
    if HALVES not in jax.sharding.get_abstract_mesh().axis_names:
        return one(*arguments), other(*arguments)
    one, other = jax.jit(one), jax.jit(other)  # each is traced once, here and for its shape
    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (jax.eval_shape(one, *arguments), jax.eval_shape(other, *arguments)),
    )
    found = jax.lax.cond(
        jax.lax.axis_index(HALVES) == 0,
        lambda: (one(*arguments), nothing[1]),
        lambda: (nothing[0], other(*arguments)),
    )
    leaves, tree = jax.tree.flatten(found)
    # What the other half left at zero comes by a sum; one for each type, because messages cost by number.
    for dtype in dict.fromkeys(x.dtype for x in leaves):  # in an order that every process finds
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = jnp.concatenate([leaves[i].ravel() for i in places])
        flat = jax.lax.psum(flat, HALVES).astype(dtype)
        ends = np.cumsum([leaves[i].size for i in places])
        for i, part in zip(places, jnp.split(flat, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(tree, leaves)


def over_halves(function: Callable) -> Callable:
    """A function of arrays that gives arrays, run over two devices of a CPU that has them; else as it is."""
    devices = jax.devices()
    if jax.default_backend() != "cpu" or len(devices) < 2:
        return function
    mesh = jax.make_mesh((2,), (HALVES,), axis_types=(AxisType.Auto,), devices=devices[:2])
    everywhere = PartitionSpec()
    return jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )


def in_groups(function: Callable, most: int | None = None) -> Callable:
    """The function; under vmap, for groups of replicas one after another, with the same results.

    most: replicas in a group (by default by backend), of which the largest number that divides them all is
    taken. A function of arrays that gives arrays.
    """

    function = jax.jit(function)  # which is traced once, here and for the groups

    @jax.custom_batching.custom_vmap
    def run(*arguments):
        return function(*arguments)

    @run.def_vmap
    def _groups(axis_size, in_batched, *arguments):
        leaves, tree = jax.tree.flatten(arguments)
        batched = jax.tree.leaves(in_batched)
        size = group_size(axis_size, most)

        def together(leaves):
            def of_leaves(*leaves):
                return function(*jax.tree.unflatten(tree, leaves))

            return jax.vmap(of_leaves, in_axes=[0 if each else None for each in batched])(*leaves)

        def group(own):
            rest = iter(own)
            return together(
                [next(rest) if each else x for x, each in zip(leaves, batched, strict=True)]
            )

        if size == axis_size:
            out = together(leaves)
        else:
            own = [
                x.reshape(axis_size // size, size, *x.shape[1:])
                for x, each in zip(leaves, batched, strict=True)
                if each
            ]
            out = jax.lax.map(group, own)
            out = jax.tree.map(lambda x: x.reshape(axis_size, *x.shape[2:]), out)
        return out, jax.tree.map(lambda x: True, out)

    def grouped(*arguments):
        # Operation by operation, as in a search for NaNs, what custom_vmap wraps would not be watched.
        plainly = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        return (function if plainly else run)(*arguments)

    return grouped


def group_size(total: int, most: int | None = None) -> int:
    """How many of the replicas of one device `in_groups` improves together."""
    limit = most or _side_by_side(total)
    return max(n for n in range(1, limit + 1) if total % n == 0)


def _side_by_side(total: int) -> int:
    busy = jax.default_backend() == "cpu" and jax.local_device_count() >= (os.cpu_count() or 1)
    return SIDE_BY_SIDE if busy else total
