"""Damaged files and hostile flags, for every command: refused in one line, and nothing is half-written.

Nothing is trained, rolled out or drawn here: an example that gets that far has passed every check.
"""

import io
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from small_runs import FLAGS, start, write_part
from test_trajectories import arrays

from jaxpg import cli
from jaxpg.lab.studies import (
    EXPERIMENTS,
    ascent,
    decomposition,
    groups,
    horizons,
    ladder,
    lags,
    precision,
    regulated,
    sampling,
    streams,
    training,
    windows,
)
from jaxpg.runs.config.flags import _KINDS
from jaxpg.runs.play import playback
from jaxpg.runs.store import artifacts
from jaxpg.runs.store import folder as files
from jaxpg.runs.train import replica_batches, run

SWEEP = f"sweep {FLAGS} --updates 2 --gamma .9,.99 --checkpoint-seconds 0 --run s --resume-or-start"
DEMONSTRATIONS = "demonstrations.npz"
EXAMPLES = int(os.environ.get("JAXPG_FUZZ", "1"))  # multiplies their number, and draws other ones
SIZE = 4  # agents in a batch of the sweep
ROOM = 2**32  # bytes of address space


# Where the studies begin to sample, after the checks of their sizes.
DRAWING = [
    (sampling, "_group"), (horizons, "roll"), (decomposition, "roll"), (lags, "roll"),
    (streams, "init_stream"), (windows, "gradient_samples"), (regulated, "gradient_samples"),
    (training, "gradient_samples"), (training, "make_trainer"), (ascent, "commit"),
]  # fmt: skip


class Begun(BaseException):
    """Every check has passed."""


def begun(*arguments, **named):
    raise Begun


def fuzzed(examples):
    return settings(
        max_examples=EXAMPLES * examples,
        derandomize=EXAMPLES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run r, a sweep s that was killed between its batches, a part p of one, and demonstrations."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        start(Path("r"), "--updates", "2", "--checkpoint-seconds", "0")
        shape = arrays()["mask"].shape
        changes = {"obs": np.zeros((*shape, 4), np.float32), "environment": np.array("CartPole-v1")}
        np.savez(DEMONSTRATIONS, **(arrays() | changes))
        write_part(Path("p"), f"{FLAGS} --updates 2 --gamma .9,.99", "--part 1/1")
        patch.setattr(replica_batches, "write", written_and_killed)
        with pytest.raises(Begun):
            cli.main(SWEEP.split())
    return place


def written_and_killed(*arguments, write=replica_batches.write):
    write(*arguments)
    raise Begun


@contextmanager
def halted():
    """Raises Begun where numbers would be computed."""
    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (run, "_compiled"), (replica_batches, "begin"), (playback, "evaluation"), (playback, "episodes"),
            (playback, "film"), (ladder, "measure"), (precision, "bias_rows"), (groups, "_rows"), *DRAWING,
        ):  # fmt: skip
            patch.setattr(place, name, begun)
        plan = replica_batches.BatchPlan(SIZE, None, None)
        patch.setattr(replica_batches, "plan", lambda *each: plan)
        patch.setattr(artifacts, "write_figure", lambda *each, **named: True)
        patch.setattr(files, "revision", lambda: None)  # it starts two processes
        patch.setattr(cli, "os", SimpleNamespace(_exit=left))
        yield


@pytest.fixture(scope="module", autouse=True)
def _halted(made):
    with halted():
        yield


def left(status):
    raise SystemExit(status)


def contents(place):
    return {x: x.read_bytes() if x.is_file() else None for x in place.rglob("*")}


@contextmanager
def bounded():
    """Limits the growth of the address space to ROOM; XLA aborts if that is not enough."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def judged(command, place, names=()):
    """Runs a command in a folder. names: its message must contain one of them."""
    before, out, error = contents(place), io.StringIO(), io.StringIO()
    status = 0
    with (
        bounded(),
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(error),
    ):
        patch.chdir(place)
        try:
            cli.main(command)
        except SystemExit as stop:
            status = stop.code or 0
        except Begun:
            status = None
    said = error.getvalue()
    assert status in (0, 1, 2, None), (command, status)
    assert all(line.startswith("jaxpg: ") for line in said.splitlines()), (command, said)
    if status:
        assert said.startswith("jaxpg: error: ") and said.count("\n") == 1, (command, said)
        assert len(said) < 1000, (command, said)
        assert not names or any(name in said for name in names), (command, said)
        assert contents(place) == before, (command, said)
    return status


# Damage

VALUES = st.sampled_from([
    None, True, -1, 0, 1, 3, 2**31 - 1, 2**31, 10**30, 10**400, 0.5, -1e39, 1e-50, float("nan"), float("inf"),
    "", "x", "\ud800", "\0", "a" * 5000, "../..", [], [1], [[]], [None], ["x"], [1e39], {}, {"x": 1},
])  # fmt: skip


def places(tree, at=()):
    """The paths of all nodes of a tree of JSON."""
    yield at
    inside = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for name, each in inside:
        yield from places(each, (*at, name))


def changed(tree, draw):
    """The tree with one node changed, removed or doubled."""
    at = draw(st.sampled_from(list(places(tree))))
    if not at:
        return draw(VALUES)
    parent = tree
    for name in at[:-1]:
        parent = parent[name]
    how = draw(st.sampled_from(("set", "set", "set", "remove", "add")))
    if how == "set":
        parent[at[-1]] = draw(VALUES)
    elif how == "remove":
        del parent[at[-1]]
    elif isinstance(parent, list):
        parent.insert(at[-1], draw(VALUES))
    else:
        parent["added"] = draw(VALUES)
    return tree


def of_bytes(path, draw):
    whole = path.read_bytes()
    at = draw(st.integers(0, max(len(whole) - 1, 0)))
    how = draw(
        st.sampled_from(("cut", "flip", "flip", "empty", "binary", "gone", "folder", "twice"))
    )
    if how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        return
    flipped = draw(st.integers(1, 255))
    damaged = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes(x ^ flipped for x in whole[at : at + 1]) + whole[at + 1 :],
        "empty": b"",
        "binary": whole[:at] + b"\xff\xfe\0" + whole[at:],
        "twice": whole * 2,
    }  # fmt: skip
    path.write_bytes(damaged[how])


def of_json(path, draw):
    path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))


def of_lines(path, draw):
    lines = path.read_text().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(changed(json.loads(lines[at]), draw))
    path.write_text("\n".join(lines) + "\n")


ARRAYS = st.sampled_from([
    lambda x: x[:0], lambda x: x[None], lambda x: x.reshape(-1)[:1], lambda x: x.astype(str),
    lambda x: x.astype(object), lambda x: x.astype(np.complex64), lambda x: np.full_like(x, 1) / 0,
    lambda x: np.full(x.shape, np.nan), lambda x: np.full(x.shape, 1e300), lambda x: np.full(x.shape, -1),
    lambda x: np.full(x.shape, 2**62), lambda x: x.astype(bool), lambda x: np.zeros(3, [("a", int)]),
    lambda x: x.astype("datetime64[s]"),
])  # fmt: skip


def of_arrays(path, draw):
    with np.load(path) as archive:
        found = dict(archive)
    name = draw(st.sampled_from(sorted(found)))
    array = found.pop(name)
    if draw(st.booleans()):
        with np.errstate(all="ignore"):
            try:
                found[name] = draw(ARRAYS)(array)
            except (IndexError, TypeError, ValueError):  # the change does not fit a string
                found[name] = np.array("x")
    np.savez(path, **found)


def of_columns(path, draw):
    table = parquet.read_table(path).to_pandas()
    name = draw(st.sampled_from(list(table)))
    how = draw(st.sampled_from(("gone", "text", "number", "row", "rows")))
    if how == "gone":
        del table[name]
    elif how == "text":
        table[name] = table[name].astype(str)
    elif how == "number":
        kind = draw(st.sampled_from([-1, 3, 2**40, 0.5, np.nan, np.inf, 1e300]))
        table[name] = kind
    else:
        table = table[:1] if how == "row" else table[:0]
    table.to_parquet(path)


DAMAGES = {
    "config.json": (of_json, of_json, of_bytes),
    "evaluation.json": (of_json, of_json, of_bytes),
    "metrics.jsonl": (of_lines, of_bytes),
    "metadata": (of_json, of_json, of_bytes),
    "sweep.json": (of_json, of_json, of_bytes),
    ".npz": (of_arrays, of_bytes),
    ".parquet": (of_columns, of_bytes),
}


def damage(draw, place, wanted):
    """Damages a file below the folder, and returns its path."""
    found = sorted(x for x in place.rglob("*") if x.is_file() and wanted(x.relative_to(place)))
    path = draw(st.sampled_from(found))
    kinds = next((v for k, v in DAMAGES.items() if path.name.endswith(k)), (of_bytes,))
    draw(st.sampled_from(kinds))(path, draw)
    return path


def fresh(made, tmp_path, name):
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    source, copy = made / name, place / name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    return place


# Commands on a run, on a sweep that was killed, on a part of one, and on demonstrations.
COMMANDS = {
    "r": (
        "train --resume r --updates 4", "train --config r",
        f"train {FLAGS} --updates 2 --run r --resume-or-start", "train --config r --help",
        "evaluate r", "evaluate r --update best", "evaluate r --update 1", "render r --out f.gif",
        "record r --episodes 1 --out d.npz", "record r --episodes 1 --out d.npz --replica 1 --update 2",
        "plot r", "plot r --metric kl --x seconds", "lab ladder --checkpoint r --replica 1",
    ),
    "s": (SWEEP,),
    "p": ("sweep --join p --run n",),
    DEMONSTRATIONS: (
        f"train {FLAGS} --algorithm behaviour_cloning --num-minibatches 1 --demonstrations {DEMONSTRATIONS} "
        "--run n",
    ),
}  # fmt: skip


# Commands that read the arrays of a checkpoint, the newest or an earlier one.
OF_ARRAYS = (
    "train --resume r --updates 4", f"train {FLAGS} --updates 4 --run r --resume-or-start",
    "evaluate r --update 2", "evaluate r --update 1", "render r --out f.gif --replica 1 --update best",
)  # fmt: skip


def damaged(draw, made, tmp_path, name, arrays=False):
    """Runs a command on a damaged file. arrays: damage the arrays of a checkpoint; otherwise any others."""
    place = fresh(made, tmp_path, name)
    command = draw(st.sampled_from(OF_ARRAYS if arrays else COMMANDS[name]))
    path = damage(draw, place, lambda x: ("state" in x.parts) == arrays and ".lock" not in x.name)
    # A message names a checkpoint by its folder.
    parts = path.relative_to(place).parts
    names = ["/".join(parts[:i]) for i in range(2, len(parts) + 1)] or list(parts)
    return command.split(), place, [*names, f"no {path.name}", f"{parts[0]} is not empty"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files(name, made, tmp_path):
    @fuzzed({"r": 60}.get(name, 15))
    @given(st.data())
    def check(data):
        judged(*damaged(data.draw, made, tmp_path, name))

    for command in COMMANDS[name]:
        assert judged(command.split(), fresh(made, tmp_path, name)) != 2
    check()


# tensorstore's threads go on after a failure, and their errors reach nobody.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("failed_reads")
def test_damaged_arrays(made, tmp_path):
    seen = set()

    @fuzzed(25)
    @given(st.data())
    def check(data):
        seen.add(judged(*damaged(data.draw, made, tmp_path, "r", arrays=True)))

    for command in OF_ARRAYS:
        assert judged(command.split(), fresh(made, tmp_path, "r")) != 2
    check()
    assert 2 in seen  # otherwise no file that is read was damaged


TEXTS = st.sampled_from([
    "", "-1", "0", "1", "2", "3", "7", "0.5", "nan", "inf", "-inf", "1e39", "1e-50", "1e400", "2147483647",
    "2147483648", "4294967296", str(10**30), "9" * 400, "x", "x" * 300, "é", "\udcff", "a\nb", "None",
    "1,2", "a,b", ",", "../x", "r", "r/config.json", "/dev/null", "/proc/x", "best", "0:1:log8", "0:1:lin",
    "1e-4:1:log1000000000", "1e-4:1:log3", "1.0000001", "size=1000000000", "CartPole-v1", "x.npz", "x.gif",
    "n/x.npz",
])  # fmt: skip

OF_TRAINING = (*sorted(_KINDS),)
FLAGS_OF = {
    f"train {FLAGS} --updates 2 --run n": OF_TRAINING,
    "train --config r": OF_TRAINING,
    "train --resume r --updates 4": OF_TRAINING,
    f"sweep {FLAGS} --updates 2 --gamma .9,.99 --run n": (
        *OF_TRAINING, *(5 * ("--random", "--halving", "--part"))
    ),
    "evaluate r": ("--episodes", "--greedy", "--update", "--seed"),
    "record r --episodes 1 --out d.npz": (
        "--expert", "--episodes", "--out", "--replica", "--update", "--seed",
    ),
    "record DeepSea-bsuite --expert --episodes 1 --out d.npz": (
        "--settings", "--episodes", "--out", "--seed",
    ),
    "render r --out f.gif": ("--out", "--replica", "--update", "--seed", "--greedy"),
    "plot r": ("--x", "--metric", "--out"),
}  # fmt: skip

STUDIES = dict.fromkeys(
    (f"lab {name} --quick" for name in EXPERIMENTS),
    (
        "--env", "--policy", "--checkpoint", "--replica", "--estimators", "--trajectories", "--repeats",
        "--seed", "--gamma", "--out", "--quick",
    ),
)  # fmt: skip


def hostile(draw, made, tmp_path, flags_of):
    command = draw(st.sampled_from(sorted(flags_of)))
    flag, text = draw(st.sampled_from(flags_of[command])), draw(TEXTS)
    added = [f"{flag}={text}"] if draw(st.booleans()) else [flag, text]
    name = flag.strip("-").replace("-", "_")
    # A value after a flag without one is taken for an environment.
    shown = re.split("[\n,]", text)[0][:40]
    names = (flag, name, shown, ascii(shown), "environment", "--resume")
    return [*command.split(), *added], fresh(made, tmp_path, "r"), names


@pytest.mark.slow
@pytest.mark.parametrize(("flags_of", "examples"), [(FLAGS_OF, 150), (STUDIES, 60)])
def test_hostile_flags(flags_of, examples, made, tmp_path):
    @fuzzed(examples)
    @given(st.data())
    def check(data):
        judged(*hostile(data.draw, made, tmp_path, flags_of))

    check()
