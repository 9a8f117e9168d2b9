"""Stored and given settings have one schema: a misfit is one line that names its place."""

import io
import json
import zipfile

import jax
import numpy as np
import pytest
from test_plots import SEEDS, write_run
from test_trajectories import T, arrays, set_at

from jaxpg.cli import main
from jaxpg.runs.config.config import load_config
from jaxpg.runs.config.schema import expect
from jaxpg.runs.plot import records
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import METRICS, TABLE, read_arrays
from jaxpg.runs.store.trajectories import read_trajectories


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "r")


def refused(read, message):
    with pytest.raises(ValueError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (3, int, True), (True, int, False), (3.0, int, False), (2**63, int, False),
        (3, float, True), (10**400, float, False), (float("nan"), float, False),
        (None, int | None, True), ([1, None], list[int | None], True), ([1, "a"], list[int], False),
        ({"a": [1]}, dict[str, list[int]], True), ({"a": 1}, dict[str, list[int]], False),
        ("\ud800", str, False), ("a\0", str, False), ("a" * 5000, str, False),
    ],
)  # fmt: skip
def test_kinds(value, kind, fits):
    if fits:
        expect(value, kind, "x")
    else:
        refused(lambda: expect(value, kind, "x"), r"^x.* must be ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("environment", 3), ("seeds", "8"), ("seeds", 2.0), ("seeds", 10**12), ("seeds", None),
        ("hidden", 8), ("hidden", [8, "8"]), ("hidden", [2**31]), ("keep", [-1]), ("quiet", 1),
        ("num_steps", []), ("initial_std", "1"), ("initial_std", 1e39), ("settings", {}),
        ("checkpoint_seconds", float("inf")), ("evaluation_episodes", 10**12), ("num_batches", 10**6),
        ("gamma", 0.9), ("gamma", []), ("gamma", [[0.9]]), ("gamma", [None]),
        ("learning_rate", [1e39]), ("max_grad_norm", [1e-50]), ("learning_rate", [1e-50]),
        ("gamma", [1e-40]), ("num_epochs", 10**7), ("critic_epochs", 2**31 - 1), ("history", 10**9),
        ("repeat", 10**9), ("learning_rate", [10**400]),
    ],
)  # fmt: skip
def test_a_stored_setting_names_its_file_and_field(run, name, value):
    path = run / "config.json"
    load_config(run)
    saved = json.loads(path.read_text())
    saved["hyperparameters" if name in saved["hyperparameters"] else "config"][name] = value
    path.write_text(json.dumps(saved))
    refused(lambda: load_config(run), f"config.json: .*{name}")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "null", "3", '{"config": []}', "\xff\xfe", "9" * 5000]
)
def test_any_other_json_is_refused(run, content):
    (run / "config.json").write_bytes(content.encode("latin-1"))
    refused(lambda: load_config(run), r"cannot read .*config\.json")


@pytest.mark.parametrize(
    "returns", [None, 3, [1.0], ["a"] * 2 * SEEDS, [[1.0]] * 2 * SEEDS, [True] * 2 * SEEDS]
)
def test_evaluations_have_a_number_for_each_replica(run, returns):
    (run / "evaluation.json").write_text(json.dumps({"mean_return": returns}))
    refused(lambda: records.read([run]), r"evaluation\.json")


@pytest.mark.parametrize(
    "changes", [{"update": "1"}, {"seconds": None}, {"kl": 3}, {"kl": [1.0]}, {"env_steps": [None]}]
)
def test_lines_of_metrics_are_checked(run, changes):
    for part in (run / TABLE).iterdir():
        part.unlink()
    (run / TABLE).rmdir()
    lines = (run / METRICS).read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | changes)
    (run / METRICS).write_text("\n".join(lines) + "\n")
    refused(lambda: records.read([run]), rf"metrics\.jsonl, line 2: {next(iter(changes))}")


def test_a_table_is_read_in_parts_of_any_size(run, monkeypatch):
    whole = records.read([run])
    monkeypatch.setattr(records, "BATCH", 3)
    for one, other in zip(whole, records.read([run]), strict=True):
        np.testing.assert_array_equal(one.env_steps, other.env_steps)
        np.testing.assert_array_equal(one.seconds, other.seconds)
        for name, values in one.metrics.items():
            np.testing.assert_array_equal(values, other.metrics[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mask", lambda x: np.where(x, np.nan, 0), "mask must be 1 where a step counts"),
        ("mask", lambda x: x.astype(str), "mask must be numbers"),
        ("discount", lambda x: set_at(x, 7.0, (0, 0)), "discount must be 1, or 0 in the last step"),
        ("discount", lambda x: set_at(x, 0.0, (0, 0)), "discount must be 1, or 0 in the last step"),
        ("reward", lambda x: set_at(x.astype(float), 1e39, (0, 0)), "reward is not finite"),
        ("log_prob", lambda x: set_at(x, np.inf, (0, 0)), "log_prob must be the logarithm"),
        ("obs", lambda x: x.astype(object), "cannot read"),
        ("environment", lambda x: np.array(3), "environment must be a name"),
    ],
)
def test_demonstrations_are_what_they_are_called(name, change, message, tmp_path):
    path = tmp_path / "a.npz"
    fields = arrays()
    np.savez(path, **fields)
    assert read_trajectories(path)[0].mask.shape[0] == T
    np.savez(path, **(fields | {name: change(fields[name])}))
    refused(lambda: read_trajectories(path), message)


@pytest.mark.slow
def test_what_float64_holds_is_taken_in_64_bits(run, tmp_path, x64):
    """A number beyond float32, and one that float32 rounds to 0."""
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["initial_std"] = 1e39
    saved["hyperparameters"] |= {"value_clip_eps": [1e39], "max_grad_norm": [1e-50]}
    (run / "config.json").write_text(json.dumps(saved))
    _, grid = load_config(run)
    assert grid.value_clip_eps == (1e39,) and grid.max_grad_norm == (1e-50,)
    fields = arrays()
    reward = set_at(fields["reward"].astype(float), 1e39, (0, 0))
    np.savez(tmp_path / "a.npz", **(fields | {"reward": reward}))
    assert read_trajectories(tmp_path / "a.npz")[0].reward[0, 0] == 1e39
    jax.config.update("jax_enable_x64", False)
    refused(lambda: load_config(run), "initial_std=1e.39 is beyond float32, .* JAX_ENABLE_X64=1")
    refused(lambda: read_trajectories(tmp_path / "a.npz"), "reward is not finite")


def test_a_flipped_byte_is_said(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays())
    whole, said = path.read_bytes(), []
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_trajectories(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 10
    assert all(str(path) in text and "\n" not in text for text in said)


def declared(length, shape):
    """An archive of one array with this many zeros, whose header declares a shape."""
    header, stream = io.BytesIO(), io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(length))
    return stream.getvalue()


def test_an_archive_is_measured_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(declared(10**6, (10**6,)))
    assert len(path.read_bytes()) < 10**4
    assert read_arrays(path, ("x",))["x"].shape == (10**6,)
    monkeypatch.setattr(files, "machine_bytes", lambda: 10**6)
    monkeypatch.setattr(np.lib.format, "read_array", None)  # nothing may be unpacked
    refused(lambda: read_arrays(path, ("x",)), r"unpacks to 0\.0 GB")
    path.write_bytes(declared(10, (10**12,)))
    refused(lambda: read_arrays(path, ("x",)), "x.npy holds 10 bytes, and its header says")


@pytest.mark.parametrize(
    "arguments",
    [
        "train", "train E --seeds " + "9" * 5000, "train E --seeds " + "x" * 5000, "train E --nonsense",
        "train E F", "train E --seeds", "train E --quiet=1", "train E --gamma .9,,1", "train -x",
        "train CartPole-v1 --learning-rate 1e39", "train --config " + "x" * 300,
        "train --resume " + "x" * 300, "sweep CartPole-v1 --gamma .9,x", "plot " + "x" * 300,
        "plot r --x sideways", "evaluate", "evaluate r --seed x", "record r", "render r --out",
        "evaluate " + "x" * 300, "lab ladder --seed x", "train --nonsense", "list", "CartPole-v1",
        "x" * 5000, "plot " + "x" * 5000,
        *(f"{command} --{name} {value}"
          for command, names in (
              ("evaluate r", ("seed", "episodes", "update")),
              ("record r --episodes 2 --out a.npz", ("seed", "episodes", "update", "replica")),
              ("lab gae", ("seed", "trajectories", "repeats", "replica")),
          )
          for name in names
          for value in ("-1", "9" * 23, "1e999", "2**99999999", "nan", "2.5", "\u00b2")),
        "render r --out a.gif --seed -1", "record r --episodes 2 --out " + "x" * 300 + ".npz",
        "render r --out " + "x" * 300 + "/a.gif", "render r --out nowhere/a.gif",
        "record CartPole-v1 --expert --episodes 2 --out a.npz --settings size=" + "9" * 5000,
    ],
)  # fmt: skip
def test_mistakes_of_every_command_are_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("jaxpg: error: ") and error.count("\n") == 1 and len(error) < 500
    assert list(tmp_path.iterdir()) == []
