"""Checkpoints are read back bit by bit, or refused with one clear message."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.runs.store import checkpoint
from jaxpg.runs.store.checkpoint import on_host, open_checkpoints, restore, steps

ROOT = Path(__file__).parents[2]


def tree(number=0.0):
    """A tree with a leaf of every kind that a state may hold."""
    return {
        "weights": jnp.linspace(0, 1, 12).reshape(3, 4) + number,
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "empty": jnp.zeros((3, 0)),
        "flags": jnp.array([True, False, True]),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "count": jnp.int32(5),
        "none": (),
    }


def saved(folder, *scores, first=1):
    checkpoints = open_checkpoints(folder)
    for number, score in enumerate(scores, first):
        record = {"env_steps": [2**70], "update": number}
        checkpoints.save(number, on_host(tree(number)), record, score)
        checkpoints.wait()
    checkpoints.close()


def shapes():
    return jax.eval_shape(tree)


def same(a, b):
    def raw(x):
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(raw(x), raw(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_every_leaf_comes_back(tmp_path):
    saved(tmp_path / "c", 0.0)
    found, host = restore(tmp_path / "c", 1, shapes())
    assert same(found, tree(1))
    assert not same(found, tree(2))
    assert host["record"] == {"env_steps": [2**70], "update": 1}


def test_the_newest_and_the_best_stay(tmp_path):
    saved(tmp_path, 1.0, 9.0, -np.inf, 2.0, np.nan, 3.0)
    assert steps(tmp_path) == [2, 4, 5, 6]
    assert checkpoint.best(tmp_path) == 2
    # The same when another process continues, and finds something better.
    saved(tmp_path, 4.0, 10.0, first=7)
    assert steps(tmp_path) == [6, 7, 8]


def test_a_copy_does_not_follow_the_array_it_is_of():
    x = jnp.arange(4.0)
    host = on_host({"x": x})["x"]
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    np.testing.assert_array_equal(host, np.arange(4.0))


def files(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file())


# Files needed to read a checkpoint; the others that orbax writes may be cut without harm.
NEEDED = {"metadata", "_METADATA", "manifest.ocdbt"}


# tensorstore's threads go on after a failure, and their errors reach nobody.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("failed_reads")
def test_a_damaged_file_never_passes_for_a_whole_one(tmp_path):
    saved(tmp_path / "c", 0.0, 0.0)
    before = {f: f.read_bytes() for f in files(tmp_path)}
    refused = set()
    for file in files(tmp_path / "c" / "2"):
        content = file.read_bytes()
        flipped = bytearray(content)
        if content:
            flipped[len(flipped) // 2] ^= 255
        for bad in (content[: len(content) // 2], bytes(flipped), None):
            file.unlink() if bad is None else file.write_bytes(bad)
            message = ""
            try:
                found, _ = restore(tmp_path / "c", 2, shapes())
            except ValueError as error:
                message = str(error)
            if message:
                assert str(tmp_path / "c" / "2") in message
                assert "move" in message and "\n" not in message
                refused.add(file.name)
            else:
                assert same(found, tree(2))
            file.write_bytes(content)
    assert refused >= NEEDED
    assert {f: f.read_bytes() for f in files(tmp_path)} == before


def test_values_that_rot_on_the_disk_are_seen(tmp_path, monkeypatch):
    """Large arrays are in files without a checksum of their own."""
    monkeypatch.setattr(checkpoint, "_checksum", lambda array: 1)
    saved(tmp_path, 0.0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"1 is damaged: .* is not what was written"):
        restore(tmp_path, 1, shapes())


@pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [3, 10**12]), ("chunks", [3, 10**12]), ("shape", [10**12]), ("dtype", "<f8")],
)
def test_a_header_of_huge_arrays_is_refused_before_there_is_memory_for_them(tmp_path, field, value):
    import tensorstore

    saved(tmp_path, 0.0, 0.0)
    state = {"driver": "ocdbt", "base": f"file://{tmp_path}/2/state/"}
    store = tensorstore.KvStore.open(state).result()
    header = json.loads(store.read("weights/.zarray").result().value)
    assert header["shape"] == [3, 4]
    store.write("weights/.zarray", json.dumps(header | {field: value}).encode()).result()
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/2.*weights.*move {tmp_path}/2 away"
    ) as found:
        restore(tmp_path, 2, shapes())
    assert "\n" not in str(found.value)


def test_another_tree_is_named(tmp_path):
    saved(tmp_path, 0.0)
    for change, message in (
        ({"more": jnp.zeros(2)}, "1 lacks more"),
        ({"count": None}, "1 has count"),
        ({"weights": jnp.zeros((3, 5))}, r"weights as float32\[3, 4\].*float32\[3, 5\]"),
        ({"count": jnp.float32(0)}, r"count as int32\[\].*float32\[\]"),
    ):
        other = {k: v for k, v in (tree() | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            restore(tmp_path, 1, other)


def test_an_older_layout_and_foreign_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAYOUT", 0)
    saved(tmp_path / "c", 0.0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="layout 0, and this version of jaxpg reads 1"):
        restore(tmp_path / "c", 1, shapes())
    (tmp_path / "c" / "7").mkdir()
    (tmp_path / "c" / "7" / "weights.pt").write_bytes(b"foreign")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*7"):
        restore(tmp_path / "c", 7, shapes())
    assert (tmp_path / "c" / "7" / "weights.pt").exists()


# tensorstore's threads go on after a failure, and their errors reach nobody.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("failed_reads")
@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files")
def test_a_full_disk_is_an_oserror_and_leaves_the_last_checkpoint(tmp_path):
    import resource

    saved(tmp_path, 0.0)
    checkpoints = open_checkpoints(tmp_path)
    noise = np.random.default_rng(0).random((100, 1000))  # cannot be compressed
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write beyond the limit fails as on a full disk: Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large: "):  # noqa: PT012
            checkpoints.save(2, {"noise": noise}, {}, 0.0)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(tmp_path) == [1]
    assert same(restore(tmp_path, 1, shapes())[0], tree(1))
    # Once there is room again, the next checkpoint is saved.
    saved(tmp_path, 1.0, first=3)
    assert steps(tmp_path) == [1, 3]


KILLED = """
import sys
import numpy as np
from jaxpg.runs.store.checkpoint import open_checkpoints
checkpoints = open_checkpoints(__import__("pathlib").Path(sys.argv[1]))
for n in range(1, 10**6):
    checkpoints.save(n, {"x": np.full((400, 1000), float(n))}, {"n": n}, 0.0)
    print(n, flush=True)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_leaves_whole_checkpoints(tmp_path):
    example = {"x": np.zeros((400, 1000))}
    torn = 0
    for i in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "c")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.013 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        torn += any("tmp" in f.name for f in (tmp_path / "c").iterdir())
        newest = steps(tmp_path / "c")[-1]
        found, host = restore(tmp_path / "c", newest, example)
        assert host["record"] == {"n": newest}
        assert (found["x"] == newest).all()
        shutil.rmtree(tmp_path / "c")
    assert torn  # if no save was cut, this has tested nothing
