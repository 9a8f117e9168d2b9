"""The run's folder: every file is written whole or not at all."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import jax
import numpy as np

from jaxpg.devices import launch_options, present, processes
from jaxpg.envs import SUITES
from jaxpg.envs.factory import source_of
from jaxpg.memory import machine_bytes
from jaxpg.policies.layers import precision_of
from jaxpg.runs.config.config import CONFIG, FREE, Config, Grid, read_config
from jaxpg.runs.config.schema import parsed
from jaxpg.runs.host.cache import processor
from jaxpg.runs.store.lock import LOCK, locked

METRICS, PARAMS, EVALUATION = "metrics.jsonl", "params.npz", "evaluation.json"
SWEEP = "sweep.json"
TABLE = "metrics.parquet"  # a folder of parts, which Parquet readers open as one table
CHECKPOINTS, FIGURES = "checkpoints", "figures"
RUNS = Path("runs")  # where runs go by default
BATCHES = "batches"  # of an unfinished sweep
TENSORBOARD, WANDB = "tensorboard", "wandb"
TEMPORARY = r"\..+\.\d+\.tmp"  # the names of files that are being written
LONG = 16
# Entries of a description that may change the last digits of a result.
COMPUTING = ("versions", "git", "device", "xla_flags", "precision", "lanes", "sources")
# Entries in which several processes of a run must agree.
ASKED = ("versions", "git", "precision", "sources")
SOURCES = (
    "sources "  # before the name of one's own environment or network, in a list of what has changed
)
PACKAGES = ("jaxpg", "jax", "jaxlib", "flax", "optax", "gymnax", "orbax-checkpoint")


def create_folder(config: Config, over: bool = False) -> Path:
    """A new or empty folder for the run. Raises ValueError when it is in use or cannot be written.

    over: removes the files of a run that was killed before its first checkpoint.
    """
    if config.run is None:
        return new_folder(RUNS, plain(f"{config.environment}-{config.algorithm}"))
    advice = "; --resume-or-start goes on with a run of the same command"
    return empty_folder(config.run, "--run", advice, _clear if over else None)


def empty_folder(
    path: str, flag: str, advice: str = "", clear: Callable[[Path], None] | None = None
) -> Path:
    """A new or empty folder, named by a flag. Raises ValueError when it is in use or cannot be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if clear is not None:
            clear(folder)
        if any(file.name != LOCK for file in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty; name a new folder with {flag}, or leave it out{advice}"
            )
        _probe(folder)
    except OSError as error:
        raise _unwritable(folder, error, flag) from error
    return folder


def _clear(folder):
    """Removes the files of a run that was killed before its first checkpoint, if there are no others."""
    with locked(folder):
        check_links(folder)
        ours = {".probe"}
        if (folder / CONFIG).is_file():
            ours |= {CONFIG, METRICS, TABLE, TENSORBOARD, WANDB, CHECKPOINTS}
        if all(re.fullmatch(TEMPORARY, file.name) for file in (folder / BATCHES).glob("*")):
            ours.add(BATCHES)
        found = [file for file in folder.iterdir() if file.name != LOCK]
        if any(file.name not in ours and not re.fullmatch(TEMPORARY, file.name) for file in found):
            return
        if any(file.name.isdecimal() for file in (folder / CHECKPOINTS).glob("*")):
            return
        # config.json goes last: it marks the other files as ours.
        for file in sorted(found, key=lambda file: file.name == CONFIG):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def plain(name: str) -> str:
    """The name of an environment as part of a file's name: without `/` and `:`."""
    return name.replace("/", "-").replace(":", "-")


def new_folder(parent, name):
    name = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            _probe(folder)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(folder, error) from error


def _probe(folder):
    # A folder may exist and still not be writable.
    write_atomically(folder / ".probe", lambda file: None)
    (folder / ".probe").unlink()


def _unwritable(folder, error, flag="--run"):
    return ValueError(
        f"cannot write {folder}: {error.strerror or error}; name another folder with {flag}"
    )


def discard_folder(folder: Path) -> None:
    """Removes the folder of a run that has saved nothing."""
    with suppress(OSError):  # it may be a mount point, or hold a user's file by now
        for name in (CONFIG, LOCK):
            (folder / name).unlink(missing_ok=True)
        for name in (TENSORBOARD, WANDB, CHECKPOINTS):
            shutil.rmtree(folder / name, ignore_errors=True)
        remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Removes an empty folder, and runs/ if that empties it. Raises OSError."""
    folder.rmdir()
    if folder.parent == RUNS:
        RUNS.rmdir()


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Calls write(binary file), then gives the file its name. An OSError names the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, exact: bool = False) -> None:
    """Writes strict JSON: NaN and the infinities become null. exact: keeps every digit of a float."""
    text = json.dumps(jsonable(value, 17 if exact else 8), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append_json(path: Path, value: Any) -> None:
    """Appends a line, in one write."""
    with open(path, "ab", buffering=0) as file:
        file.write(json_line(value))


def json_line(value: Any) -> bytes:
    return json.dumps(jsonable(value), allow_nan=False).encode() + b"\n"


def write_params(path: Path, params: Any, about: dict | None = None) -> None:
    """Writes leaves [N, ...] by their path in the tree; about: their origin, as the archive's comment."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {
        jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf)
        for place, leaf in leaves
    }

    def write(file):
        np.savez(file, **cast(Any, arrays))
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = json.dumps(about).encode()

    write_atomically(path, write)


def about_params(path: Path) -> dict | None:
    """The origin of the arrays in params.npz; None if it is not recorded. Raises ValueError."""
    with _archive(path) as archive:
        said = archive.comment
    return parsed(said or b"null", About | None, f"the comment of {path}")


def settings(folder: Path) -> dict[str, Any]:
    """The settings in config.json that determine a run's numbers, without those that may change on resume.

    Checkpoints and params.npz store them. Digests stand for long lists.
    """
    saved = read_config(folder)[1]
    found = saved["config"] | saved["hyperparameters"]
    found["demonstrations_sha256"] = saved.get("demonstrations_sha256")

    def short(value):
        if not isinstance(value, list) or len(value) <= LONG:
            return value
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        return f"{len(value)} values {digest[:12]}"

    # The file of demonstrations may have moved, so its digest identifies it.
    return {k: short(v) for k, v in found.items() if k not in (*FREE, "run", "demonstrations")}


class About(TypedDict):
    """The required content of the comment of params.npz."""

    settings: dict[str, Any]
    updates: int


class Declared(NamedTuple):
    """The header of an array in an .npz file."""

    shape: tuple[int, ...]
    dtype: np.dtype


def declared_arrays(path: str | Path) -> dict[str, Declared]:
    """The headers of the arrays in an .npz file, read without unpacking. Raises ValueError."""
    with _archive(path) as archive:
        return {name.removesuffix(".npy"): _declared(archive, name) for name in archive.namelist()}


def read_arrays(path: str | Path, names: Container[str]) -> dict[str, np.ndarray]:
    """Reads arrays of an .npz file. Raises ValueError if memory cannot hold them or the file is damaged."""
    wanted = {name: each for name, each in declared_arrays(path).items() if name in names}
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
    free = machine_bytes()
    if free is not None and needed > free / 2:  # they are copied once
        raise ValueError(
            f"{path} unpacks to {needed / 1e9:,.1f} GB, and {free / 1e9:.1f} GB of memory are free"
        )
    with _archive(path) as archive:
        found = {}
        for name in wanted:
            with archive.open(f"{name}.npy") as member:
                found[name] = np.lib.format.read_array(member, allow_pickle=False)
        return found


def read_arrays_like(
    path: Path, wanted: dict[str, tuple[tuple[int, ...], np.dtype]], owner: object
) -> dict[str, np.ndarray]:
    """Reads the arrays of these shapes and types, which `owner` asks for. Raises ValueError."""
    declared = declared_arrays(path)
    for name, (shape, dtype) in wanted.items():
        # Another precision is converted to the expected one.
        found = declared.get(name)
        if found is None or (found.shape, found.dtype.kind) != (shape, dtype.kind):
            has = "lacks it" if found is None else f"has {found.dtype}{found.shape}"
            raise ValueError(f"{path} does not hold {name} of {owner}, {dtype}{shape}: it {has}")
    return read_arrays(path, wanted)


@contextmanager
def _archive(path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("error")
            yield archive
    # A damaged file makes zipfile, zlib and numpy raise almost anything.
    except Exception as error:
        why = f"{error}".splitlines()[0][:200] if str(error) else repr(error)
        raise ValueError(f"cannot read {path}: {why}") from error


def _declared(archive, name) -> Declared:
    """The header of a member. Raises ValueError if it is not an array, or has another length."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0}
        shape, _, dtype = readers.get(version, np.lib.format.read_array_header_2_0)(member)
        length = archive.getinfo(name).file_size - member.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != length or min(shape, default=0) < 0:
        raise ValueError(f"{name} holds {length} bytes, and its header says {dtype}{list(shape)}")
    return Declared(shape, dtype)


def description(config: Config, grid: Grid, replicas: list[dict]) -> dict[str, Any]:
    """The content of config.json."""
    device = present()[0]
    suite, _, inside = config.environment.partition("/")
    packages = (*PACKAGES, suite) if inside and suite in SUITES else PACKAGES
    return {
        "config": asdict(config),
        "hyperparameters": grid._asdict(),
        "replicas": replicas,
        "demonstrations_sha256": _digest(config.demonstrations),
        "sources": {
            name: _digest(file)
            for name in (config.environment, config.network)
            if (file := source_of(name)) is not None
        },
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in packages},
        "git": revision(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(present()),
            "processes": processes(),
            "processor": processor(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "launch": launch_options(),
        "precision": {
            "matmul": precision_of(config.precision),
            "dtype": str(jax.numpy.result_type(float)),
            "x64": jax.config.read("jax_enable_x64"),
        },
    }


def otherwise(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list]:
    """What two descriptions compute with differently: [then, now] each, of entries that both have."""
    found = {}
    for name in COMPUTING:
        old, new = (x.get(name) for x in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            found |= {f"{name} {k}": [old[k], new[k]] for k in old if k in new and old[k] != new[k]}
        elif name in before and name in now and old != new:
            found[name] = [old, new]
    return found


def check_links(folder: Path) -> None:
    """Raises ValueError if a link would make a run write or remove files in another folder."""
    names = (METRICS, TABLE, CHECKPOINTS, BATCHES, TENSORBOARD, WANDB)
    for path in (*(folder / name for name in names), *(folder / CHECKPOINTS).glob("*")):
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, where files would be written and removed; "
                "put a copy in its place"
            )


def check_demonstrations(folder: Path, config: Config) -> None:
    """Raises ValueError if the demonstrations that the folder's run learnt from have changed."""
    # An older run has no digest to compare.
    began = read_config(folder)[1].get("demonstrations_sha256")
    if began is not None and began != _digest(config.demonstrations):
        raise ValueError(
            f"{config.demonstrations} has changed since {folder} began with it, so a resumed run would "
            f"not be the same; put the original back, or start again with --config {folder}"
        )


def _digest(path):
    if not path:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def revision() -> dict[str, Any] | None:
    """The git commit of jaxpg's own sources, and whether they differ from it; None if there is none."""
    package = Path(__file__).parents[2]

    def git(*arguments):
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An installed package may lie inside the repository of another project.
        if git("ls-files", "--error-unmatch", "__init__.py") is None:
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", ".")),
        }
    except (OSError, subprocess.TimeoutExpired):
        return None


def jsonable(value: Any, digits: int = 8) -> Any:
    """Plain Python values; floats to the digits of float32 (17 keep all), NaN and infinities as None."""
    if isinstance(value, dict):
        return {name: jsonable(each, digits) for name, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist(), digits)
    if isinstance(value, list | tuple):
        return [jsonable(each, digits) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def package_version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None  # run from its sources
