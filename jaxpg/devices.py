"""Devices: what programs are built for, compiler options, and one program on several devices."""

import math
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

# Lanes side by side that share their keys, are shuffled among themselves and stay on one device: as many on
# every machine, so that draws and minibatches are the same on all of them.
LANES = 64

# Mesh axis over the devices that the lanes of one agent are split over.
SHARDS = "environments"
# Mesh axis over the two devices on which `concurrently` runs its two functions.
PAIR = "pair"
# What a GPU launches as one graph: all that jaxlib puts there by itself and loops, which the host would drive
# otherwise. Without the second option a loop between fewer than 5 kernels stays outside, with its whole body.
GRAPHS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}
# Before 0.10 a loop's graph crashed when it ran again (openxla/xla#35760); after 0.11 the names are untried.
_GRAPHS_KNOWN = (0, 10) <= jax.__version_info__ < (0, 12)
# Say how jax allocates a GPU's memory; jax refuses the first beside the second, its deprecated name.
MEMORY = (
    *("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    *("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"),
)

_whole: list[None] = []  # one for each `undivided` around what is traced
_told: list[str] = []  # what `built_for` says, innermost last
_apart: list[None] = []  # one for each `apart` around what runs
_most: list[int] = []  # what `at_most` says, innermost last


def backend() -> str:
    """What programs are built for, "cpu", "gpu" or "tpu": jax's default unless `built_for` says another."""
    return _told[-1] if _told else jax.default_backend()


def running() -> int:
    """How many devices run what is traced; 1 if `built_for` says that another machine does."""
    return 1 if _told else len(present())


def present() -> list[Any]:
    """The devices of all processes; within `apart` only this one's, within `at_most` the first of them."""
    found = jax.local_devices() if _apart else jax.devices()
    return found[: _most[-1]] if _most else found


@contextmanager
def at_most(count: int | None) -> Iterator[None]:
    """Use the first `count` devices. Raises ValueError if there are fewer.

    >>> with at_most(1):
    ...     len(present())
    1
    """
    _most.append(check_present(count))
    try:
        yield
    finally:
        _most.pop()


@contextmanager
def apart() -> Iterator[None]:
    """Let each of several processes use its own devices, for work that they do not share.

    >>> with apart():
    ...     present() == jax.local_devices()
    True
    """
    _apart.append(None)
    try:
        yield
    finally:
        _apart.pop()


def processes() -> int:
    """How many processes share the work on the present devices."""
    return 1 if _apart else jax.process_count()


def some_devices(count: int) -> list[Any]:
    """The first `count` devices, as many of each process.

    >>> len(some_devices(1))
    1
    """
    each, found = count // processes(), []
    for device in present():
        if sum(other.process_index == device.process_index for other in found) < each:
            found.append(device)
    return found


def placed(tree: Any, sharding: Any) -> Any:
    """Puts arrays and keys, the same in every process, on the devices of a sharding, or of one for each leaf.

    >>> placed(jnp.arange(2), None).tolist()
    [0, 1]
    """
    if processes() == 1:
        return jax.device_put(tree, sharding)
    kinds = jax.tree.map(lambda x: jax.random.key_impl(x) if is_key(x) else None, tree)
    data = jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)

    def again(tree):
        return jax.tree.map(
            lambda x, kind: x if kind is None else jax.random.wrap_key_data(x, impl=kind),
            tree,
            kinds,
        )

    return jax.jit(again, out_shardings=sharding)(jax.device_put(data, sharding))


def fetched(tree: Any) -> Any:
    """Arrays of the devices of all processes, as numpy arrays in each of them.

    >>> fetched({"a": jnp.arange(2)})
    {'a': array([0, 1], dtype=int32)}
    """
    leaves, structure = jax.tree.flatten(tree)
    far = [i for i, x in enumerate(leaves) if not getattr(x, "is_fully_addressable", True)]
    if far:
        from jax.experimental.multihost_utils import process_allgather

        found = process_allgather([leaves[i] for i in far], tiled=True)
        for i, x in zip(far, found, strict=True):
            leaves[i] = x
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def is_key(leaf: Any) -> bool:
    """Whether an array, or its shape, is of random keys.

    >>> is_key(jax.random.key(0)), is_key(jnp.ones(2))
    (True, False)
    """
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


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
    """Starts jax's devices. Raises ValueError when there is none of the kind that JAX_PLATFORMS names."""
    plugins = find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    names = [module.name for module in pkgutil.iter_modules(folders or ())]
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    take_gpu_memory(asked or "", names, os.environ)
    try:
        jax.devices()
    # RuntimeError: a platform unknown to jax; AssertionError: one without an installed plugin.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("(set JAX_PLATFORMS")[0] or "it has no such device"
        raise ValueError(
            f"JAX_PLATFORMS={asked or ''}: jax cannot start: {reason.strip().rstrip('.')}; leave it unset "
            "for the best available device, or set it to cpu"
        ) from error


def compiler_options(effort: int | None) -> dict[str, Any] | None:
    """Options of `jax.jit` for an optimisation effort of 0 (compiles fastest) to 3; None is the default.

    Only the CPU's compiler takes one; other devices always compile with full effort. A GPU's puts loops into
    graphs, unless the user's XLA_FLAGS say what it puts there.

    >>> compiler_options(2), compiler_options(None)
    ({'xla_backend_optimization_level': 2}, None)
    """
    if backend() == "gpu":
        return _graphs() or None
    if effort is None or backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": effort}


def _graphs() -> dict[str, Any]:
    given = any(option in os.environ.get("XLA_FLAGS", "") for option in GRAPHS)
    return {} if given or not _GRAPHS_KNOWN else dict(GRAPHS)


def take_gpu_memory(
    platforms: str, plugins: list[str], environment: MutableMapping[str, str]
) -> None:
    """Let arrays have 9/10 of a GPU's memory, not jax's 3/4, unless the user says how it is allocated.

    Only where jax is about to start one: `platforms` (as in JAX_PLATFORMS, empty for the best) do not exclude
    it, and one of the `plugins` drives it. The rest is for graphs and libraries.

    >>> found = {}
    >>> take_gpu_memory("", ["xla_cuda12"], found)
    >>> found
    {'XLA_CLIENT_MEM_FRACTION': '0.9'}
    """
    asked = not platforms or {"cuda", "rocm", "gpu"} & {*platforms.split(",")}
    driven = any(name.startswith(("xla_cuda", "xla_rocm")) for name in plugins)
    if asked and driven and not any(name in environment for name in MEMORY):
        environment[MEMORY[0]] = "0.9"


def launch_options() -> dict[str, Any]:
    """What a GPU's programs are launched with, for the record: their graphs and its memory.

    >>> launch_options()  # on any other device
    {}
    """
    if backend() != "gpu":
        return {}
    given = {name: os.environ[name] for name in MEMORY if name in os.environ}
    return _graphs() | given


def shards() -> int:
    """How many devices the lanes of one agent are split over, in a function that is traced for each of them.

    >>> shards(), jax.vmap(lambda x: x * shards(), axis_name=SHARDS)(jnp.ones(3)).tolist()
    (1, [3.0, 3.0, 3.0])
    """
    if _whole:
        return 1
    try:
        return jax.lax.axis_size(SHARDS)
    except NameError:
        return 1


@contextmanager
def undivided() -> Iterator[None]:
    """Trace what each device does by itself, though lanes around it are split: sums stay its own."""
    _whole.append(None)
    try:
        yield
    finally:
        _whole.pop()


def first_of(count: int) -> jax.Array | int:
    """The number, among those of all devices, of the first of this device's `count` lanes or blocks."""
    return jax.lax.axis_index(SHARDS) * count if shards() > 1 else 0


def across(tree: Any) -> Any:
    """Sums over the devices that lanes are split over, in one message per dtype; the tree itself on one.

    >>> jax.vmap(across, axis_name=SHARDS)(jnp.arange(3)).tolist()
    [3, 3, 3]
    """
    return _summed(tree, SHARDS) if shards() > 1 else tree


def totals(mask: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the steps that count, of all devices.

    >>> [float(x) for x in totals(jnp.array([True, False]), jnp.arange(2.0), jnp.ones(2))]
    [0.0, 1.0]
    """
    return across(tuple(jnp.where(mask, x, 0.0).sum() for x in values))


def largest(x: jax.Array) -> jax.Array:
    """The largest over the devices that lanes are split over."""
    return jax.lax.pmax(x, SHARDS) if shards() > 1 else x


def mean_across(tree: Any, weight: Any, sums: Any = ()) -> tuple[Any, Any]:
    """Return the weighted mean over devices of a tree of floats, and sums over them, in one message.

    >>> jax.vmap(lambda x: mean_across(x, x)[0], axis_name=SHARDS)(jnp.array([1.0, 3.0])).tolist()
    [2.5, 2.5]
    """
    if shards() == 1:
        return tree, sums
    dtype = jnp.result_type(*jax.tree.leaves(tree))
    weight = jnp.asarray(weight, dtype)
    total, sums, weight = across((jax.tree.map(lambda x: weight * x, tree), sums, weight))
    return jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1), total), sums


def split_over(trainer: Any, devices: int | Sequence[Any] | None = None) -> Any:
    """The trainer with the environments of each agent split over devices, by default all.

    trainer: as `make_trainer` builds it. devices: the first so many, or these themselves. Draws, minibatches
    and groups are those of one device, exactly, and all else is to rounding; an optimizer step costs one
    message for each network. Raises ValueError where an agent cannot be split so.

    >>> row = jaxpg.algorithms.algorithm("ppo")
    >>> env = jaxpg.envs.make_env("CartPole-v1")
    >>> trainer = jaxpg.make_trainer(env, jaxpg.policies.actor_critic(env), row, num_envs=4096)
    >>> split = split_over(trainer, 1)  # or 8, or leave it out
    >>> jax.eval_shape(split.init, jax.random.key(0)).data.obs.shape
    (4096, 4)
    """
    if devices is None or isinstance(devices, int):
        devices = some_devices(check_present(devices))
    check_split(trainer, len(devices))
    mesh = mesh_of({SHARDS: len(devices)}, devices)
    specs, same = lane_specs(trainer.init, mesh), PartitionSpec()
    on = partial(jax.shard_map, mesh=mesh, check_vma=False)
    update = on(trainer.update, in_specs=(specs, same, same), out_specs=(specs, same))
    return trainer._replace(
        init=on(trainer.init, in_specs=same, out_specs=specs),
        update=lambda state, numbers, demonstrations=None: update(state, numbers, demonstrations),
    )


def lane_specs(init: Callable, mesh: Any) -> Any:
    """Where the lanes of a trainer's state are: the axis of each array that is split over the mesh."""
    key, same = jax.eval_shape(lambda: jax.random.key(0)), PartitionSpec()

    def one(key):
        return jax.tree.map(lambda x: x[None], init(key))

    mesh = AbstractMesh((mesh.shape[SHARDS],), (SHARDS,))
    of_all = {
        "mesh": mesh,
        "in_specs": same,
        "out_specs": PartitionSpec(SHARDS),
        "check_vma": False,
    }
    parts = jax.eval_shape(jax.shard_map(one, **of_all), key)

    def spec(whole, part):
        split = [n != own for n, own in zip(whole.shape, part.shape[1:], strict=True)]
        return PartitionSpec(*(SHARDS if each else None for each in split))

    return jax.tree.map(spec, jax.eval_shape(init, key), parts)


def check_present(count: int | None) -> int:
    """The number of devices asked for, by default all. Raises ValueError if there are fewer."""
    most, each = len(present()), processes()
    own = [sum(x.process_index == i for x in present()) for i in range(each)] if each > 1 else []
    if len({*own}) > 1:
        raise ValueError(
            f"the processes have {', '.join(map(str, own))} devices; start each with equally many"
        )
    if count is not None and not 1 <= count <= most:
        raise ValueError(f"devices={count}, but there are {most}; use 1 to {most}, or all")
    if count is not None and count % each:
        raise ValueError(
            f"devices={count} cannot be spread evenly over {each} processes; use a multiple of {each}, or all"
        )
    return most if count is None else count


def check_split(trainer: Any, count: int) -> None:
    """Raises ValueError unless the environments of each agent can be split over `count` devices."""
    if count > 1 and trainer.obstacle:
        raise ValueError(
            f"the environments of one agent cannot be split over {count} devices: {trainer.obstacle}; "
            "split its seeds, with --shard replicas"
        )
    if trainer.blocks % count:
        fit = " or ".join(str(n) for n in range(2, count) if trainer.blocks % n == 0)
        raise ValueError(
            f"the environments of one agent make {trainer.blocks} block{'s' * (trainer.blocks > 1)}, which "
            f"{count} devices cannot share evenly; use {fit or 'one'} of them, or a multiple of "
            f"{LANES * count} environments"
        )


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
    return _summed(found, PAIR)  # each device holds zeros for the other's results


def on_two_devices(function: Callable) -> Callable:
    """Run on two CPU devices if there are two; otherwise return the function unchanged.

    >>> on_two_devices(lambda x: x + 1)(jnp.ones(2)).tolist()
    [2.0, 2.0]
    """
    if backend() != "cpu" or len(present()) < 2:
        return function
    mesh = mesh_of({PAIR: 2})
    everywhere = PartitionSpec()
    return jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )


def mesh_of(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh with axes of these sizes, over the first of the devices, by default this machine's."""
    count, kinds = math.prod(sizes.values()), (AxisType.Auto,) * len(sizes)
    devices = (present() if devices is None else devices)[:count]
    return jax.make_mesh((*sizes.values(),), (*sizes,), axis_types=kinds, devices=devices)


def _summed(tree: Any, axis: str) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    for dtype in dict.fromkeys(x.dtype for x in leaves):  # the same order in every process
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = jnp.concatenate([leaves[i].ravel() for i in places])
        flat = jax.lax.psum(flat, axis).astype(dtype)
        ends = np.cumsum([leaves[i].size for i in places])
        for i, part in zip(places, jnp.split(flat, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


over_halves = on_two_devices  # the name that published scripts import
