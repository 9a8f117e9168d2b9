"""Several processes that run one command are one process, to rounding, and end together."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import FLAGS

from jaxpg.devices import fetched, placed, some_devices
from jaxpg.runs.config.processes import Cluster, take
from jaxpg.runs.host import cluster
from jaxpg.runs.play.policy import load_policy
from jaxpg.runs.store import checkpoint

# Four blocks of 64 environments, so that four devices can share an agent.
SMALL = [*FLAGS.split(), "--num-envs", "256", "--settings", "max_steps_in_episode=12"]
SPLIT = [*SMALL, "--shard", "environments", "--updates", "4"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def environment(devices=2):
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags)}


@contextmanager
def launched(*each, timeout=60, port=None):
    """A process for each list of arguments of jaxpg, with two devices; none outlives the context."""
    where = f"127.0.0.1:{port or free_port()}"
    found = []
    for i, arguments in enumerate(each):
        command = [sys.executable, "-m", "jaxpg", *map(str, arguments), "--coordinator", where]
        command += ["--processes", str(len(each)), "--process", str(i)]
        command += ["--heartbeat-timeout", str(timeout)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found.append(subprocess.Popen(command, env=environment(), **pipes))
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def ran(*each, **options):
    """(exit status, stdout, stderr) of each of several processes, once they have ended."""
    with launched(*each, **options) as processes:
        return finished(processes)


def finished(processes):
    found = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        found.append((process.returncode, out, err))
    return found


def train(count, *arguments):
    found = ran(*[["train", *arguments]] * count)
    assert all(status == 0 and err == "" for status, _, err in found), found
    assert all(out == "" for _, out, _ in found[1:]), "only process 0 speaks"
    return found[0][1]


def alone(devices, *arguments):
    command = [sys.executable, "-m", "jaxpg", "train", *map(str, arguments)]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def params(folder):
    with np.load(folder / "params.npz") as found:
        return dict(found)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: x for k, x in line.items() if "second" not in k} for line in lines]
    return {k: np.array([line[k] for line in untimed], float) for k in untimed[0]}


def close(one, other):
    for name, x in params(one).items():
        np.testing.assert_allclose(params(other)[name], x, 1e-4, 1e-5, err_msg=name)
    first, second = metrics(one), metrics(other)
    assert first.keys() == second.keys()
    for name, x in first.items():
        np.testing.assert_allclose(second[name], x, 1e-3, 1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    one, two, again, fewer = (tmp_path / name for name in ("one", "two", "again", "fewer"))
    alone(1, *SPLIT, "--run", one)
    train(2, *SPLIT, "--run", two)
    close(one, two)
    found = (json.loads((each / "evaluation.json").read_text()) for each in (one, two))
    np.testing.assert_allclose(*(each["mean_return"] for each in found), rtol=0.02)
    # The parts of both processes are in the checkpoint, and each is checked.
    saved = two / "checkpoints" / "4" / "state"
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= {path.name for path in saved.iterdir()}
    described = json.loads((two / "checkpoints" / "4" / "host" / "metadata").read_text())
    parts = [leaf["parts"] for leaf in described["leaves"].values()]
    assert max(map(len, parts)) == 4, "the lanes are split over four devices"
    # A resumed run on the same layout ends with the same bits, on another one to rounding.
    train(2, *SPLIT, "--updates", "2", "--run", again)
    shutil.copytree(again, fewer)
    train(2, "--resume", again, "--updates", "4", "--quiet")
    for name, x in params(two).items():
        np.testing.assert_array_equal(params(again)[name], x, err_msg=name)
    assert "processes was 2, is 1" in alone(1, "--resume", fewer, "--updates", "4")
    close(fewer, two)
    assert load_policy(again, update=4) is not None
    assert "has finished" in train(2, *SPLIT, "--run", two, "--resume-or-start")


@pytest.mark.slow
def test_four_processes_share_seeds(tmp_path):
    arguments = [*SMALL, "--seeds", "8", "--num-envs", "8", "--updates", "2"]
    said = train(4, *[x for x in arguments if x != "--quiet"], "--run", tmp_path / "four")
    assert "8 cpu devices of 4 processes (replicas)" in said
    alone(2, *arguments, "--run", tmp_path / "one")
    close(tmp_path / "one", tmp_path / "four")


def saved(folder, processes):
    """Waits for the first checkpoint."""
    while not checkpoint.steps(folder / "checkpoints"):
        assert all(each.poll() is None for each in processes), finished(processes)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "how", "status", "said"),
    [
        (1, signal.SIGKILL, 1, r"(another )?process .*is gone.* jaxpg train --resume \S+ goes on"),
        (0, signal.SIGKILL, 1, r"(another )?process .*is gone.* jaxpg train --resume \S+ goes on"),
        (1, signal.SIGTERM, 143, r"stopped by SIGTERM after \d+ of 100000 updates; saved in"),
    ],
    ids=["worker", "coordinator", "stopped"],
)
def test_processes_end_together(who, how, status, said, tmp_path):
    folder = tmp_path / "run"
    arguments = [
        "train",
        *SMALL,
        "--seeds",
        "4",
        "--num-envs",
        "4",
        "--updates",
        "100000",
        "--run",
        folder,
    ]
    each = [*arguments, "--checkpoint-seconds", "0.1"]
    with launched(each, each, timeout=10) as processes:
        saved(folder, processes)
        processes[who].send_signal(how)
        started = time.monotonic()
        found = finished(processes)
    assert time.monotonic() - started < 30
    other, lines = 1 - who, [err for _, _, err in found if err]
    assert found[other][0] == status and found[who][0] == (143 if status == 143 else -9)
    assert len(lines) == 1 and re.fullmatch(f"jaxpg: (error: )?{said}.*\n", lines[0]), lines
    speaks = 1 if (who, status) == (0, 1) else 0
    assert found[speaks][2], "process 0 speaks, or without it each"
    assert checkpoint.steps(folder / "checkpoints")


@pytest.mark.slow
def test_a_process_that_cannot_write_ends_all(tmp_path):
    """Orbax writes in a thread, and there each process waits for the others."""
    folder = tmp_path / "run"
    sizes = ["--seeds", "4", "--num-envs", "4", "--updates", "100000"]
    each = ["train", *SMALL, *sizes, "--run", folder, "--checkpoint-seconds", "0.1"]
    with launched(each, each) as processes:
        saved(folder, processes)
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (1, 1))
        started = time.monotonic()
        (first, _, err), (second, *said) = finished(processes)
    assert time.monotonic() - started < 30
    assert (first, second, said) == (1, 1, ["", ""])
    assert re.fullmatch(r"jaxpg: error: process 1: cannot write .*: File too large\n", err), err


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_line(tmp_path):
    base = ["train", *SMALL, "--run", tmp_path / "run"]
    for each, said in (
        (
            [base, [*base, "--gamma", "0.5"]],
            "process 1 has hyperparameters gamma=[0.5], and process 0",
        ),
        ([base, [*base, "--gama", "0.5"]], "process 1: unknown flag --gama; did you mean --gamma?"),
        (
            [[*base, "--seeds", "3", "--shard", "replicas"]] * 2,
            "3 agents cannot be split evenly over devices=4",
        ),
        (
            [["sweep", *base[1:], "--gamma", "0.9,0.99", "--halving", "2"]] * 2,
            "several processes train a part of the points each, so --halving does not go",
        ),
        ([[*base, "--debug-nans"]] * 2, "--debug-nans needs one process"),
    ):
        (first, _, err), *others = ran(*each)
        assert first == 2 and err.startswith(f"jaxpg: error: {said}") and err.count("\n") == 1, err
        assert all(other == (2, "", "") for other in others), others
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_come_together(tmp_path):
    base = ["train", *SMALL, "--run", tmp_path / "run"]
    port = free_port()
    second = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", "1"]
    command = [sys.executable, "-m", "jaxpg", *map(str, base), *second, "--heartbeat-timeout", "3"]
    with launched(base, base, timeout=3, port=port) as processes:
        third = subprocess.run(command, env=environment(), capture_output=True, text=True)
        found = finished(processes)
    # The third comes before the second, or after: either way none goes on.
    assert third.returncode == 1 and all(status == 1 for status, _, _ in found), (third, found)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        [(status, _, err)] = ran(base, port=taken.getsockname()[1])
    assert status == 1 and "Address already in use; use another port" in err
    missing = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "1"]
    command = [sys.executable, "-m", "jaxpg", *map(str, base), *missing, "--heartbeat-timeout", "2"]
    last = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert last.returncode == 1 and "cannot reach process 0" in last.stderr


@pytest.mark.slow
def test_a_sweep_over_processes_is_one_sweep(tmp_path):
    arguments = [
        "sweep",
        *SMALL,
        "--num-envs",
        "4",
        "--updates",
        "2",
        "--learning-rate",
        "1e-3,1e-2,0.1",
    ]
    found = ran(*[[*arguments, "--run", tmp_path / "two"]] * 2)
    assert all(status == 0 and err == "" for status, _, err in found), found
    assert found[1][1] == "" and "3 points" in found[0][1]
    (tmp_path / "two" / "sweep.json").unlink()  # so that it is not finished
    more = ran(*[[*arguments, "--run", tmp_path / "two", "--resume-or-start"]] * 3)
    assert [status for status, _, _ in more] == [2] * 3
    assert "was begun by 2 processes, not 3" in more[0][2]
    command = [sys.executable, "-m", "jaxpg", *map(str, arguments), "--run", str(tmp_path / "one")]
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == 0
    tables = [(tmp_path / name / "table.csv").read_text().splitlines() for name in ("one", "two")]
    rows = [[line.split(",") for line in table] for table in tables]
    assert rows[0][0] == rows[1][0] and len(rows[1]) == 4
    place = rows[0][0].index("learning_rate")
    assert [row[place] for row in rows[0]] == [row[place] for row in rows[1]]


def test_flags_of_several_processes():
    assert take(["CartPole-v1", "--seeds", "2"], "") == (None, ["CartPole-v1", "--seeds", "2"])
    assert take(["--distributed"], "") == (Cluster(None, None, None, 60), [])
    whole = ["--coordinator=a:1", "--processes", "4", "--process=3", "--heartbeat-timeout", "9"]
    assert take([*whole, "X"], "") == (Cluster("a:1", 4, 3, 9), ["X"])
    for words, said in (
        (["--coordinator", "a:1"], "--processes is missing"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "must be HOST:PORT"),
        (["--coordinator", "a:99999", "--processes", "2", "--process", "0"], "must be HOST:PORT"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "they are 0 to 1"),
        (
            ["--coordinator", "a:1", "--processes", "two", "--process", "2"],
            "whole number, not 'two'",
        ),
        (["--heartbeat-timeout", "9"], "add --distributed"),
        (["--distributed", "--heartbeat-timeout", "1"], "1 must be 2 to 86400 seconds"),
        (["--distributed", "--heartbeat-timeout", "99999"], "99999 must be 2 to 86400 seconds"),
        (["--coordinator", "a:1", "--processes", "0", "--process", "0"], "0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            take(words, "jaxpg train")


def test_one_process_is_alone():
    assert cluster.leads() and cluster.size() == 1 and cluster.index() == 0
    assert cluster.voted(15, True) == (15, True) and cluster.first(lambda: [1]) == [1]
    assert cluster.collected({"a": 1}) == [{"a": 1}]
    cluster.agree({"a": 1})
    cluster.end("message", 1)
    keys = placed(jax.random.split(jax.random.key(0), 2), None)
    assert np.array_equal(fetched(jax.random.key_data(keys)), jax.random.key_data(keys))
    assert some_devices(1) == jax.devices()[:1]


def test_a_part_of_an_array_that_another_process_damaged_is_found():
    """The checks of parts: each is read where it was written, and none is missing."""
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    halves = [whole[:, :2], whole[:, 2:]]
    parts = [
        {"first": [0, 2 * i], "end": [3, 2 * i + 2], "crc32": checkpoint._checksum(half)}
        for i, half in enumerate(halves)
    ]
    leaf: Any = {"shape": [3, 4], "dtype": "float32", "parts": parts}
    assert checkpoint._intact(whole, leaf)
    assert not checkpoint._intact(whole, leaf | {"parts": parts[:1]})
    damaged = whole.copy()
    damaged[2, 3] = 0
    assert not checkpoint._intact(damaged, leaf)
