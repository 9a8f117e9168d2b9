"""Measurements are kept per seed and update, and reach every sink."""

import json
import os
import struct

import numpy as np
import pytest
from pyarrow import parquet
from small_runs import FLAGS, start

from jaxpg.runs.config.flags import request
from jaxpg.runs.store import metrics
from jaxpg.runs.store.metrics import Records, Sink
from jaxpg.runs.train.run import execute, prepare
from jaxpg.training.algorithm import algorithm, unmeasured

LABELS = [
    {"seed": 0, "learning_rate": 0.1, "gamma": 0.9},
    {"seed": 1, "learning_rate": 0.1, "gamma": 0.9},
    {"seed": 0, "learning_rate": 0.2, "gamma": 0.9},
    {"seed": 1, "learning_rate": 0.2, "gamma": 0.9},
]
COLUMNS = ["learning_rate"]
HUGE = 3 * 10**9  # beyond int32


def records(first, count):
    update = np.arange(first, first + count)
    value = 100.0 * np.arange(4)[:, None] + update
    returns = np.where(update < 3, np.nan, value)  # no episode has ended yet
    return Records(
        update,
        HUGE + np.broadcast_to(update, (4, count)) * 7,
        update / 10,
        {"objective": value.astype(np.float32), "episode_return": returns.astype(np.float32)},
    )


def test_the_table_has_a_row_for_each_replica_and_update(tmp_path):
    folder = tmp_path / "metrics.parquet"
    table = metrics.parquet(folder, LABELS, COLUMNS)
    for first in (1, 3):
        table.write(records(first, 2))
    table.flush()
    table.flush()  # nothing new, nothing written
    table.write(records(5, 1))
    table.flush()
    assert len(list(folder.iterdir())) == 2
    rows = parquet.read_table(folder).to_pylist()
    assert len(rows) == 4 * 5
    for row in rows:
        i, update = row["replica"], row["update"]
        expected = {
            "replica": i,
            "seed": i % 2,
            "learning_rate": 0.1 if i < 2 else 0.2,
            "update": update,
            "env_steps": HUGE + 7 * update,
            "seconds": update / 10,
            "objective": 100.0 * i + update,
            "episode_return": None if update < 3 else 100.0 * i + update,
        }
        assert row == expected
    assert {(row["replica"], row["update"]) for row in rows} == {
        (i, u) for i in range(4) for u in range(1, 6)
    }


def test_rewinding_leaves_what_a_checkpoint_knows(tmp_path):
    lines, folder = tmp_path / "metrics.jsonl", tmp_path / "metrics.parquet"
    sink, table = metrics.json_lines(lines, 1), metrics.parquet(folder, LABELS, COLUMNS)
    for first in (1, 3, 5):
        for write in (sink.write, table.write):
            write(records(first, 2))
        table.flush()
    with open(lines, "a") as file:
        file.write('{"update": 8, "ob')
    metrics.rewind(lines, folder, 4)
    kept = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["update"] for line in kept] == [2, 4]
    assert max(parquet.read_table(folder)["update"].to_pylist()) == 4
    metrics.rewind(lines, folder, 0)
    assert lines.read_text() == ""
    assert not folder.exists()


def test_ratios_are_of_averages():
    values = {"noise": np.array([[1.0, 3.0] * 4]), "signal": np.array([[-1.0, 5.0] * 4])}
    found = metrics.means(Records(np.arange(8), np.zeros((1, 8)), np.arange(8), values), 10)
    # The mean of the updates' own ratios would be -20 / 10.
    assert np.isnan(found["noise_scale"]) and np.isnan(found["signal_to_noise_above"])
    np.testing.assert_allclose(found["signal_to_noise"], 2 / 2)
    values["signal"] = np.array([[1.0, 2.0] * 4])
    found = metrics.means(Records(np.arange(8), np.zeros((1, 8)), np.arange(8), values), 10)
    np.testing.assert_allclose(found["noise_scale"], 10 * 2 / 1.5)
    np.testing.assert_allclose(found["signal_to_noise"], 1.5 / 2)


def summaries(folder):
    """Reads (step, summary value) from an event file: records of length, checksum, data, checksum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = folder.glob("events*")
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = proto.Event.FromString(data[12 : 12 + size])
        yield from ((event.step, value) for value in event.summary.value)
        data = data[16 + size :]


def events(folder):
    return [(x.tag, step, x.simple_value) for step, x in summaries(folder)]


def test_tensorboard_has_the_mean_over_seeds_of_every_setting(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    sink = metrics.tensorboard(tmp_path, LABELS, COLUMNS, 1, 0)
    sink.write(records(1, 2))
    sink.write(records(3, 2))
    sink.close()
    assert {f.name for f in tmp_path.iterdir()} == {"learning_rate=0.1", "learning_rate=0.2"}
    found = events(tmp_path / "learning_rate=0.2")
    curves = {(tag, step): value for tag, step, value in found}
    assert curves["losses/objective", 2] == 250 + 1.5
    assert curves["charts/episode_return", 4] == 250 + 3.5
    assert ("charts/episode_return", 2) not in curves
    assert curves["time/steps_per_second", 4] == pytest.approx(4 * (HUGE + 4 * 7) / 0.4)
    # Two seeds, 50 on both sides of their mean: t = 12.706 with one degree of freedom.
    ends = curves["band/objective_low", 2], curves["band/objective_high", 2]
    np.testing.assert_allclose(ends, 251.5 + 12.706 * 50 * np.array([-1, 1]), rtol=1e-4)
    seeds = {f.name for f in (tmp_path / "learning_rate=0.2").iterdir() if f.is_dir()}
    assert seeds == {"seed=0", "seed=1"}
    own = {(tag, step): x for tag, step, x in events(tmp_path / "learning_rate=0.2" / "seed=1")}
    assert own["losses/objective", 2] == 300 + 1.5 and own["charts/episode_return", 4] == 303.5
    # Many agents would open too many files.
    monkeypatch.setattr(metrics, "MOST_RUNS", 3)
    sink = metrics.tensorboard(tmp_path / "many", LABELS, COLUMNS, 1, 0)
    sink.write(records(1, 2))
    sink.close()
    assert not any(f.is_dir() for f in (tmp_path / "many" / "learning_rate=0.2").iterdir())


def test_tensorboard_draws_the_interval_of_each_metric_as_a_band(tmp_path):
    pytest.importorskip("tensorboardX")
    summary = pytest.importorskip("tensorboardX.proto.layout_pb2")
    sink = metrics.tensorboard(tmp_path, LABELS, COLUMNS, 1, 0)
    sink.write(records(1, 2))
    sink.write(records(3, 2))
    sink.close()
    found = [x.tensor.string_val for _, x in summaries(tmp_path / "learning_rate=0.1")]
    ((layout,),) = [x for x in found if x]
    (category,) = summary.Layout.FromString(layout).category
    series = {chart.title: chart.margin.series[0] for chart in category.chart}
    assert {*series} == {"objective", "episode_return"}
    one = series["episode_return"]
    assert one.value == "charts/episode_return"
    assert (one.lower, one.upper) == ("band/episode_return_low", "band/episode_return_high")


def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    sink = metrics.wandb(tmp_path, {"config": {"seeds": 2}}, LABELS, COLUMNS, 1)
    sink.write(records(1, 2))
    sink.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0


def test_a_sink_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    config, _, _ = request([*FLAGS.split(), "--tensorboard"], "jaxpg train")
    with pytest.raises(ValueError, match=r"tensorboardX: .*pip install .*\[tensorboard\]'"):
        metrics.check_sinks(config)


@pytest.mark.slow
def test_a_users_own_sink_gets_every_update_once(tmp_path, capsys):
    got, closed = [], []
    flags = [*FLAGS.split(), "--updates", "40", "--tensorboard", "--run", str(tmp_path / "r")]
    config, grid, _ = request(flags, "jaxpg train")
    execute(prepare(config, grid), sinks=[Sink(got.append, lambda: closed.append(True))])
    assert closed == [True]
    assert np.concatenate([r.update for r in got]).tolist() == list(range(1, 41))
    steps = np.concatenate([r.env_steps for r in got], axis=1)
    np.testing.assert_array_equal(steps, np.tile(16 * np.arange(1, 41), (2, 1)))
    seconds = np.concatenate([r.seconds for r in got])
    assert (np.diff(seconds) > 0).all()
    # The table has the same numbers, bit by bit, and the lines have their means.
    table = parquet.read_table(tmp_path / "r" / "metrics.parquet").to_pandas()
    table = table.sort_values(["replica", "update"])
    for name in got[0].metrics:
        values = np.concatenate([r.metrics[name] for r in got], axis=1)
        np.testing.assert_array_equal(table[name].to_numpy().reshape(2, 40), values)
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(got) == 20
    expected = got[3].metrics["entropy"].mean(axis=1)
    line = json.loads(lines[3])
    np.testing.assert_allclose(line["entropy"], expected, rtol=1e-6)
    assert line["steps_per_second"] == pytest.approx(2 * 16 * line["update"] / line["seconds"])
    assert events(tmp_path / "r" / "tensorboard" / "all")
    assert os.listdir(tmp_path / "r" / "tensorboard") == ["all"]


@pytest.mark.slow
def test_what_a_method_does_not_measure_is_not_logged(tmp_path):
    """A single step on on-policy data has a KL of 0 and an effective share of 1 by construction."""
    assert unmeasured(algorithm("reinforce")) == ["clip_fraction", "ess", "kl"]
    assert unmeasured(algorithm("trpo")) == ["clip_fraction", "ess"], (
        "it measures the KL of the whole update"
    )
    assert unmeasured(algorithm("ppo")) == unmeasured(algorithm("impala")) == []
    start(tmp_path / "r", "--algorithm", "a2c", "--num-minibatches", "1", "--updates", "1")
    (line,) = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    names = {*json.loads(line)}
    assert {"entropy", "grad_norm"} <= names and not {"ess", "kl"} & names
