"""Devices: what is asked of their compilers."""

import os
from collections.abc import Callable
from typing import Any

import jax

# Replicas whose improvement is computed side by side, where every core is a device. Of 32 agents together
# every array is beyond the caches: in groups of 4 the default ppo ran 1.6 times as fast, of 2 about the same,
# of 8 as little as 1.1 times (scripts/speed.md). A rollout's arrays are small, and its steps cost the fewer
# the wider they are. One device of several cores spreads wide products over them: there, groups took 1.3
# times as long.
SIDE_BY_SIDE = 4


def compiler_options(effort: int | None) -> dict[str, Any] | None:
    """Options of `jax.jit` for an optimisation effort of 0 (compiles fastest) to 3; None is the usual.

    Only the CPU's compiler takes one: other devices always do their best.
    """
    if effort is None or jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": effort}


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
        limit = most or _side_by_side(axis_size)
        size = max(n for n in range(1, limit + 1) if axis_size % n == 0)

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

    return run


def _side_by_side(total: int) -> int:
    busy = jax.default_backend() == "cpu" and jax.local_device_count() >= (os.cpu_count() or 1)
    return SIDE_BY_SIDE if busy else total
