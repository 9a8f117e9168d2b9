"""Files are whole or absent, and JSON is strict."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxpg.policies import AgentParams
from jaxpg.runs.config.config import Config
from jaxpg.runs.store.folder import (
    append_json,
    create_folder,
    discard_folder,
    write_atomically,
    write_json,
    write_params,
)

CONFIG = Config("CartPole-v1", "ppo")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"old": True})

    def half(file):
        file.write(b'{"new"')
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as raised:
        write_atomically(path, half)
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for value in (np.float32([0.1, np.nan]), np.inf, 2**70):
        append_json(path, {"x": value})
    assert path.read_text() == '{"x": [0.1, null]}\n{"x": null}\n{"x": 1180591620717411303424}\n'


def test_parameters_are_named_by_their_path(tmp_path):
    params = AgentParams({"head": {"bias": np.arange(3.0)}}, ())
    write_params(tmp_path / "params.npz", params)
    with np.load(tmp_path / "params.npz") as saved:
        assert list(saved) == ["policy/head/bias"]
        np.testing.assert_array_equal(saved["policy/head/bias"], [0, 1, 2])


def test_default_folders_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [create_folder(CONFIG) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(f.is_dir() and f.parent.name == "runs" for f in folders)


def test_an_empty_folder_may_be_used_and_a_full_one_not(tmp_path):
    config = replace(CONFIG, run=str(tmp_path))
    assert create_folder(config) == tmp_path
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        create_folder(config)


def test_discarding_spares_files_of_others(tmp_path):
    (tmp_path / "mine").touch()
    write_json(tmp_path / "config.json", {})
    discard_folder(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
