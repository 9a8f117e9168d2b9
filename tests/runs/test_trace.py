"""--profile traces two chunks of updates, and changes no number."""

import gzip
import json
import os

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_runs import FLAGS

from jaxpg.cli import main
from jaxpg.runs.host.trace import check_chunks, tracing


@pytest.fixture
def profiler(monkeypatch):
    """What is asked of the profiler, which does nothing."""
    done = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: done.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append("stop"))
    return done


@pytest.mark.slow
def test_two_chunks_are_traced_and_training_is_as_without(tmp_path, capsys):
    flags = [*FLAGS.split(), "--updates", "4"]
    flags.remove("--quiet")
    folder = tmp_path / "trace"
    main(["train", *flags, "--run", str(tmp_path / "plain")])
    assert "chunks of updates" not in capsys.readouterr().out
    main(["train", *flags, "--run", str(tmp_path / "traced"), "--profile", str(folder)])
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    said = f"open {trace} in https://ui.perfetto.dev, or run xprof --logdir {folder}"
    assert f"trace of 2 chunks of updates: {said}" in capsys.readouterr().out.splitlines()
    with gzip.open(trace) as file:
        names = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
    assert any("jit" in name and "train" in name for name in names)
    runs = [np.load(tmp_path / name / "params.npz") for name in ("plain", "traced")]
    for name in runs[0].files:
        np.testing.assert_array_equal(runs[0][name], runs[1][name])
    tables = [
        pq.read_table(tmp_path / name / "metrics.parquet").drop_columns(["seconds"])
        for name in ("plain", "traced")
    ]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("chunks", "done", "said"),
    [
        (1, [], "no trace: the run ended before chunk 2"),
        (2, ["start", "stop"], None),
        (3, ["start", "stop"], None),
        (9, ["start", "stop"], None),
    ],
)
def test_the_trace_is_stopped_however_the_run_ends(chunks, done, said, tmp_path, profiler):
    lines = []
    (tmp_path / "t").mkdir()

    def run():
        with tracing(str(tmp_path / "t"), 20, lines.append) as before:
            for chunk in range(chunks):
                before()
                # The fourth begins after the trace, not inside it.
                assert profiler == done[: (chunk > 0) + (chunk > 2)]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert profiler == done
    assert said is None or lines == [said]
    assert not (tmp_path / "t").exists()  # empty, because the profiler wrote nothing


def test_a_trace_that_fails_costs_the_run_nothing(tmp_path, profiler, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("No space left on device\nat a place")

    for name, done in (("stop_trace", ["start"]), ("start_trace", [])):
        monkeypatch.setattr(jax.profiler, name, full)
        lines = []
        with tracing(str(tmp_path), 20, lines.append) as before:
            for _ in range(5):
                before()
        assert lines == ["no trace: No space left on device"]
        assert profiler == done
        profiler.clear()


def test_long_chunks_are_warned_of(tmp_path, profiler):
    lines = []
    with tracing(str(tmp_path), 200, lines.append):
        assert lines[0].startswith("warning: the trace of chunks of 200 updates is large")


def test_without_a_folder_nothing_is_traced(profiler):
    with tracing(None, 200, lambda line: pytest.fail(line)) as before:
        for _ in range(5):
            before()
    assert profiler == []


def test_too_few_chunks_are_refused():
    check_chunks(3)
    with pytest.raises(ValueError, match="there are only 2; give more --updates"):
        check_chunks(2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--updates", "2"], "--profile traces chunks 2 and 3 of the updates to come, and there are only 2"),
        (["--profile", "full"], "full is not empty; name a new folder with --profile"),
        (["--profile", "file/x"], "cannot write file/x: Not a directory; name another folder with"),
    ],
)  # fmt: skip
def test_a_trace_that_cannot_be_is_one_line_and_leaves_nothing(
    flags, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for path in ("full/x", "file"):
        (tmp_path / path).touch()
    with pytest.raises(SystemExit) as caught:
        main(["train", *FLAGS.split(), "--profile", "new", "--run", "r", *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith(f"jaxpg: error: {said}")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
