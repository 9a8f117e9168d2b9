"""Batching: what runs side by side, replicas of one function, blocks of lanes and parts of a map."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpg.devices import LANES, backend, mesh_of, running

# Replicas improved side by side where every core is a device. The arrays of 32 agents together exceed the
# caches: in groups of 4 the default ppo ran 1.6 times as fast, in groups of 2 about the same, in groups of 8
# as little as 1.1 times (scripts/speed.md). Rollouts stay whole: their arrays are small, and wider steps cost
# less per lane. One device with several cores spreads wide products over them; there, groups took 1.3 times
# as long.
SIDE_BY_SIDE = 4


def divisor(total: int, most: int) -> int:
    """The largest divisor of total that is at most `most`."""
    return next(n for n in range(min(most, total), 0, -1) if total % n == 0)


def fair_divisor(total: int, wanted: int) -> int:
    """The largest divisor of total up to `wanted`; total itself if that is below a quarter of `wanted`."""
    size = divisor(total, wanted)
    return size if 4 * size >= min(wanted, total) else total


def lane_block(num_lanes: int, group_size: int = 1) -> int:
    """How many lanes make a block: whole groups, and a divisor of num_lanes.

    >>> lane_block(4096), lane_block(100), lane_block(16), lane_block(240, group_size=6)
    (64, 50, 16, 60)
    """
    return group_size * fair_divisor(num_lanes // group_size, max(LANES // group_size, 1))


@jax.custom_batching.custom_vmap
def any_replica(flags):
    """Whether any flag is set; under vmap, whether any is set in any replica.

    A predicate that differs between replicas makes `cond` compute both branches, and `while_loop` select
    over its whole carry, including the stored trajectory, in every iteration. Work done for a replica that
    did not ask for it is masked, so one common predicate changes no result.
    """
    return flags.any()


@any_replica.def_vmap
def _any_of_replicas(axis_size, in_batched, flags):
    del axis_size, in_batched
    return any_replica(flags.any(axis=0)), False


def if_any(flags: jax.Array, function: Callable[[], Any]) -> Any:
    """function() if any flag is set, in any replica; else zeros, or whatever is as cheap.

    On a GPU to ask is a round trip to the host, which costs more than a small function.
    """
    if backend() not in ("cpu", "tpu"):
        return function()
    shape = jax.eval_shape(function)
    return jax.lax.cond(
        any_replica(flags),
        function,
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape),
    )


def in_groups(function: Callable, most: int | None = None) -> Callable:
    """Run the function on groups of replicas, one after another, under vmap; the results are the same.

    most: upper limit of replicas in a group (by default by backend); the size is the largest divisor of their
    number up to it. The function takes and returns arrays.
    """

    function = jax.jit(function)  # so that it is traced once, here and for the groups

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
        # Without jit, as in a search for NaNs, operations inside custom_vmap would not be checked.
        plainly = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        return (function if plainly else run)(*arguments)

    return grouped


def group_size(total: int, most: int | None = None) -> int:
    """How many of one device's replicas `in_groups` runs together."""
    return divisor(total, most or _side_by_side(total))


def _side_by_side(total: int) -> int:
    busy = backend() == "cpu" and jax.local_device_count() >= (os.cpu_count() or 1)
    return SIDE_BY_SIDE if busy else total


def map_over_devices(function: Callable, count: int, beside: int | None = None) -> Any:
    """Return function(0), ..., function(count - 1), stacked, with the numbers split over devices.

    As many devices as divide the count compute `beside` of theirs at a time; what a number gives does not
    depend on them.

    >>> map_over_devices(lambda i: i**2, 4).tolist()
    [0, 1, 4, 9]
    """

    def own(numbers):
        return jax.lax.map(function, numbers, batch_size=beside)

    used = divisor(count, running())
    if used == 1 or jax.sharding.get_abstract_mesh().axis_names:
        return own(jnp.arange(count))
    parts = PartitionSpec("part")
    mapped = jax.shard_map(
        own, mesh=mesh_of({"part": used}), in_specs=parts, out_specs=parts, check_vma=False
    )
    return mapped(jnp.arange(count))
