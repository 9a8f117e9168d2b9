"""Checkpoints: a tree of arrays and keys with the host's record, saved whole or not at all.

Each is an orbax folder named after its number of updates. A tree is stored as leaves by their path, so the
code that reads one must build the same tree; a mismatch is reported.
"""

import errno
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.devices import is_key, processes
from jaxpg.runs.config.config import CONFIG
from jaxpg.runs.config.schema import expect
from jaxpg.runs.host import cluster

LAYOUT = 1  # version of this format; the structure of a tree is in its leaves
KEEP = 3  # number of the newest to keep, besides the best
REMOVAL = 1.0  # seconds that removing a checkpoint may take


class Written(TypedDict):
    """The part of an array that one of several processes has written."""

    first: list[int]  # index
    end: list[int]
    crc32: int


class Leaf(TypedDict):
    """The description of an array in a checkpoint."""

    shape: list[int]
    dtype: str
    crc32: NotRequired[int]
    parts: NotRequired[list[Written]]  # instead, if several processes wrote it


class Host(TypedDict):
    """What the host stores with the tree."""

    layout: int
    leaves: dict[str, Leaf]
    record: dict[str, Any]
    updates: NotRequired[int]  # older checkpoints lack this and what follows
    settings: NotRequired[dict[str, Any]]
    computing: NotRequired[dict[str, Any]]


class Scored(TypedDict):
    """The metrics of a checkpoint that has a score."""

    score: float


class Record(TypedDict):
    """The required content of a run's record."""

    env_steps: list[int]  # of every replica
    seconds: float
    diverged: dict[str, int]  # replica -> update
    lines: NotRequired[int]  # of metrics.jsonl


class Checkpoints(NamedTuple):
    """Saves a run. An OSError that occurred in the background is raised by the next call."""

    save: Callable[[int, Any, dict, float], None]  # updates, tree from `copied`, record, score
    wait: Callable[[], None]
    close: Callable[[], None]


def open_checkpoints(folder: Path, **about: dict) -> Checkpoints:
    """Saves in the background; a checkpoint gets its name once it is whole. Processes write their own parts.

    about: the run's `settings` and what it is `computing` with, stored in every checkpoint with its number
    of updates.
    """
    ocp = _orbax()
    from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

    def score(metrics):
        return metrics["score"]

    class Manager(ocp.CheckpointManager):
        def _wait_for_checkpointers(self):  # in a thread that then waits for the other processes
            try:
                _written(folder, super()._wait_for_checkpointers)
            except OSError as error:
                # A timeout means that another process is gone, which jax's service notices.
                if processes() > 1 and not isinstance(error, TimeoutError):
                    cluster.fail(f"error: cannot write {folder}: {error.strerror or error}")
                raise

    best = keep.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=score,
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(KEEP), best]),
        cleanup_tmp_directories=True,
    )
    manager = _written(folder, lambda: Manager(folder.absolute(), options=options))

    def save(updates, tree, record, score):
        leaves = {name: leaf for name, (leaf, _) in _named(tree).items()}
        described = _joined(cluster.collected({name: _leaf(x) for name, x in leaves.items()}))
        host = {"layout": LAYOUT, "leaves": described, "record": record, "updates": updates}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave({name: leaves[name] for name in _full(described)}),
            host=ocp.args.JsonSave(host | about),
        )
        metrics = {"score": score} if math.isfinite(score) else None
        # force: after a resume from an earlier checkpoint, the number of updates is not above the last.
        _written(folder, lambda: manager.save(updates, args=arguments, metrics=metrics, force=True))

    return Checkpoints(
        save,
        lambda: _written(folder, manager.wait_until_finished),
        lambda: _written(folder, manager.close),
    )


def on_host(tree: Any) -> Any:
    """Copies a tree of arrays and typed keys to the host's memory; keys become their data."""

    # np.array copies: on a CPU, jax would share memory with an array that is about to be donated.
    return jax.tree.map(lambda x: np.array(_data(x)), tree)


def copied(tree: Any) -> Any:
    """A copy of a state to save: on the host or, if several processes hold its parts, on their devices."""
    if processes() == 1:
        return on_host(tree)
    return _copies(tree)


@jax.jit
def _copies(tree):
    return jax.tree.map(lambda x: jnp.copy(_data(x)), tree)


def steps(folder: Path) -> list[int]:
    """The numbers of updates at which there are checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    names = (f.name for f in folder.iterdir() if f.name.isdecimal() and f.is_dir())
    return sorted(int(name) for name in names if name == str(int(name)))


def best(folder: Path) -> int:
    """The number of updates of the checkpoint with the highest score. Raises ValueError if none has one."""
    scores = {}
    for step in steps(folder):
        path = folder / str(step)
        if (path / "metrics").is_dir():
            items = _orbax().args.Composite(metrics=_orbax().args.JsonRestore())
            try:
                found = _read(path, items).metrics
                expect(found, Scored, f"cannot read the checkpoint {path}: metrics")
                scores[step] = found["score"]
            except ValueError:
                if not removed(path):
                    raise
    if not scores:
        raise ValueError(
            f"no checkpoint in {folder} has a score; name one by its number of updates"
        )
    return max(scores, key=lambda step: scores[step])


def removed(path: Path) -> bool:
    """Whether an unreadable checkpoint was just being removed by a process that trains."""
    deadline = time.monotonic() + REMOVAL
    while path.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not path.is_dir()


def restore(folder: Path, step: int, shapes: Any, settings: dict | None = None) -> tuple[Any, Host]:
    """Restores a tree with the structure of shapes, and what the host stored with it.

    shapes: a tree of objects with shape and dtype; numbers of 32 and 64 bits are converted.
    settings: those of the run that the checkpoint must belong to.
    Raises ValueError, leaving every file as it is, for a checkpoint that is damaged or foreign, or of another
    run, number of updates or layout.
    """
    ocp, path = _orbax(), folder / str(step)
    host = _read(path, ocp.args.Composite(host=ocp.args.JsonRestore())).host
    if not isinstance(host, dict) or host.get("layout") != LAYOUT:
        found = host.get("layout") if isinstance(host, dict) else None
        raise ValueError(
            f"{path} has layout {found}, and this version of jaxpg reads {LAYOUT}; "
            "use the version that wrote it, which config.json names"
        )
    expect(host, Host, f"cannot read the checkpoint {path}: host")
    if host.get("updates", step) != step:
        raise ValueError(
            f"{path} is the checkpoint of {host['updates']} updates, not of {step}; rename it to "
            f"{host['updates']}"
        )
    check_settings(path, host.get("settings"), settings)
    expected = {name: leaf for name, (leaf, _) in _named(shapes).items()}
    _same_leaves(path, host["leaves"], expected)
    _check_headers(path, host["leaves"])
    # On the host whatever wrote it, and whole in every process.
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in _full(host["leaves"])}
    arguments = ocp.args.PyTreeRestore(restore_args=plain)
    saved = _read(path, ocp.args.Composite(state=arguments)).state if plain else {}
    found = []
    for name, leaf in expected.items():
        array = np.asarray(saved[name]) if name in saved else _empty(leaf)
        if not _intact(array, host["leaves"][name]):
            raise ValueError(f"{path} is damaged: {name} is not what was written{_other(path)}")
        found.append(_as_saved(array, leaf))
    return jax.tree.unflatten(jax.tree.structure(shapes), found), cast(Host, host)


def restore_run(
    folder: Path, step: int, shapes: Any, count: int, settings: dict | None = None
) -> tuple[Any, Host]:
    """Restores a run of this many replicas, and checks the record that it resumes with."""
    state, host = restore(folder, step, shapes, settings)
    where, found = f"cannot read the checkpoint {folder / str(step)}: record", host["record"]
    expect(found, Record, where)
    if len(found["env_steps"]) != count:
        raise ValueError(
            f"{where}.env_steps has {len(found['env_steps'])} entries for {count} replicas"
        )
    if wrong := found["diverged"].keys() - set(map(str, range(count))):
        raise ValueError(
            f"{where}.diverged names {min(wrong)!r}; there are replicas 0 to {count - 1}"
        )
    return state, host


def check_settings(path: Path, found: dict | None, expected: dict | None) -> None:
    """Raises ValueError if a file is of a run with other settings; an older file has none to compare."""
    for name, value in (expected or {}).items():
        if found is not None and found.get(name, value) != value:
            of, wanted = (f"{name.strip('_')}={_said(each)}" for each in (found[name], value))
            raise ValueError(
                f"{path} is of a run with {of}, and its {CONFIG} says {wanted}; put the run's own file back"
            )


def _said(value) -> str:
    return ",".join(map(_said, value)) if isinstance(value, list) else json.dumps(value).strip('"')


def _named(tree):
    return {
        jax.tree_util.keystr(place, simple=True, separator="."): (leaf, place)
        for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _leaf(x) -> Leaf:
    """The description of an array, or of the parts of it that this process writes."""
    found: Leaf = {"shape": list(x.shape), "dtype": str(x.dtype)}
    if getattr(x, "is_fully_addressable", True):
        return {**found, "crc32": _checksum(np.asarray(x))}
    parts = []
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            bounds = [
                part.indices(size)[:2] for part, size in zip(shard.index, x.shape, strict=True)
            ]
            first, end = ([bound[i] for bound in bounds] for i in range(2))
            parts.append(Written(first=first, end=end, crc32=_checksum(np.asarray(shard.data))))
    return {**found, "parts": parts}


def _joined(each: list[dict[str, Leaf]]) -> dict[str, Leaf]:
    """The leaves with the parts of all processes."""
    whole, *others = each
    for name, leaf in whole.items():
        if "parts" in leaf:
            leaf["parts"] = sum((other[name].get("parts", []) for other in others), leaf["parts"])
    return whole


def _intact(array, leaf: Leaf) -> bool:
    """Whether an array is what was written."""
    if "parts" not in leaf:
        return _checksum(array) == leaf.get("crc32")
    size = 0
    for each in leaf["parts"]:
        part = array[tuple(map(slice, each["first"], each["end"]))]
        size += part.size
        if _checksum(part) != each["crc32"]:
            return False
    return size == array.size


def _full(leaves: dict[str, Leaf]) -> list[str]:
    """The names of the arrays that have elements: orbax refuses others, which have nothing to store."""
    return [name for name, leaf in leaves.items() if math.prod(leaf["shape"])]


def _same_leaves(path, saved, expected):
    """Raises ValueError for the first leaf that differs."""
    for name in (*expected, *saved):
        if name not in saved or name not in expected:
            which = "lacks" if name not in saved else "has"
            raise ValueError(
                f"{path} {which} {name}, unlike the state that its config.json makes in this version "
                "of jaxpg; use the version that wrote it"
            )
        shape, dtype = stored_as(expected[name])
        kinds = (str(x).rstrip("0123456789") for x in (saved[name]["dtype"], dtype))
        alike = len({*kinds}) == 1  # in 32 bits or 64
        if list(shape) != saved[name]["shape"] or not alike:
            raise ValueError(
                f"{path} has {name} as {saved[name]['dtype']}{saved[name]['shape']}, and its "
                f"config.json makes {dtype}{list(shape)}; was either changed?"
            )


def _check_headers(path, leaves):
    """Raises ValueError for an array that disagrees with its header, before memory is allocated for it."""
    with _reading(path):
        headers = _orbax().PyTreeCheckpointHandler().metadata((path / "state").absolute()).tree
    for name, header in headers.items():
        said, chunk = [list(header.shape), str(header.dtype)], header.storage.chunk_shape or ()
        leaf = leaves.get(name, {"shape": [], "dtype": ""})
        if said != [leaf["shape"], leaf["dtype"]] or math.prod(chunk) > math.prod(header.shape):
            raise ValueError(
                f"{path} is damaged: by its header, {name} is {said[1]}{said[0]} in parts of {list(chunk)}, "
                f"which is not what was written{_other(path)}"
            )


def _data(x):
    """An array, or the data of keys."""
    return jax.random.key_data(x) if is_key(x) else x


def stored_as(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a leaf on the host."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.shape, leaf.dtype


def _empty(leaf):
    shape, dtype = stored_as(leaf)
    return np.zeros(shape, dtype)


def _as_saved(array, leaf):
    if is_key(leaf):
        return jax.random.wrap_key_data(array, impl=_implementation(leaf))
    return array.astype(leaf.dtype)


def _implementation(leaf) -> str:
    found = []
    # jax tells the implementation of a traced key, but not of a shape alone.
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), leaf)
    return found[0]


def _checksum(array) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _read(path, items):
    ocp = _orbax()
    # Each process reads for itself, whether or not others do.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
    )
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    with (
        _reading(path),
        ocp.CheckpointManager(path.parent.absolute(), options=options) as manager,
    ):
        return manager.restore(int(path.name), args=items)


@contextmanager
def _reading(path) -> Iterator[None]:
    try:
        yield
    # A damaged file makes orbax, tensorstore or json raise almost anything.
    except Exception as error:
        why = str(error).splitlines()[0][:200] if str(error) else repr(error)
        raise ValueError(f"cannot read the checkpoint {path}: {why}{_other(path)}") from error


def _other(path) -> str:
    """What to do about a damaged checkpoint."""
    earlier = [step for step in steps(path.parent) if step < int(path.name)]
    if not earlier:
        return ""
    return f". To go on from the one of {earlier[-1]} updates, move {path} away"


def _written(folder, action):
    """Runs the action; raises OSError for whatever goes wrong, except a lack of memory or threads."""
    try:
        return action()
    except (OSError, MemoryError):
        raise
    # tensorstore raises ValueError, and jax its own errors; their text holds the system's error number.
    except Exception as error:
        text = str(error) or repr(error)
        if isinstance(error, ImportError) or "new thread" in text or "Out of memory" in text:
            raise
        system = re.search(r"os_error_code='(\d+)'|OS error (\d+)", text)
        code = int(system[1] or system[2]) if system else None
        if code is None and text.startswith("RESOURCE_EXHAUSTED"):
            code = errno.ENOSPC
        if code is None and processes() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            raise  # another process is gone
        why = os.strerror(code) if code else text.splitlines()[0][:200]
        raise OSError(code, why, str(folder)) from error


def _orbax() -> Any:
    """Imports orbax late: it takes half a second, and plain training from Python does not need it."""
    import orbax.checkpoint

    # Its warnings are about its own internals; what matters is raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return orbax.checkpoint
