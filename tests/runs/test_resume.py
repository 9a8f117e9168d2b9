"""A run that was stopped, killed or extended resumes as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from pyarrow import parquet
from small_runs import FLAGS, ROOT, resume, start

from jaxpg.cli import main
from jaxpg.runs.config.config import load_config, points
from jaxpg.runs.config.flags import EITHER, request
from jaxpg.runs.config.presets import preset
from jaxpg.runs.play.playback import record
from jaxpg.runs.play.policy import load, load_policy
from jaxpg.runs.store import checkpoint
from jaxpg.runs.store.folder import create_folder
from jaxpg.runs.store.lock import locked
from jaxpg.runs.train import run
from jaxpg.runs.train.build import build
from jaxpg.runs.train.replicas import make_replicas
from jaxpg.runs.train.run import prepare_resume
from jaxpg.runs.train.saved import read_run


def leaves(folder):
    """The newest state: the bits of each leaf."""
    config, grid = load_config(folder)
    shapes = jax.eval_shape(
        jax.vmap(build(config).trainer.init), make_replicas(config, points(grid)).keys
    )
    place = folder / "checkpoints"
    state, _ = checkpoint.restore(place, checkpoint.steps(place)[-1], shapes)
    host = jax.tree_util.tree_leaves_with_path(checkpoint.on_host(jax.device_put(state)))
    return {jax.tree_util.keystr(path): x.tobytes() for path, x in host}


def curves(folder):
    table = parquet.read_table(folder / "metrics.parquet").to_pydict()
    order = np.lexsort((table["update"], table["replica"]))
    return {
        k: [v[i] for i in order]
        for k, v in table.items()
        if k not in ("seconds", "replica", "seed")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 8 updates in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder, "--updates", "8")
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of 4 updates, to be copied."""
    folder = tmp_path_factory.mktemp("half") / "run"
    start(folder, "--updates", "4", "--checkpoint-seconds", "0")
    return folder


@pytest.fixture
def copy(half, tmp_path):
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.mark.slow
def test_twice_half_is_the_whole_bit_by_bit(whole, copy):
    before = leaves(copy)
    resume(copy, "--updates", "8")
    after = leaves(copy)
    assert after == leaves(whole)
    assert len(after) > 20
    # Negative control: four updates change the compared values.
    assert {k for k in after if "params" in k and after[k] != before[k]}
    assert curves(copy) == curves(whole)
    assert (copy / "params.npz").read_bytes() == (whole / "params.npz").read_bytes()
    returns, expected = (
        json.loads((run / "evaluation.json").read_text())["mean_return"] for run in (copy, whole)
    )
    assert returns == expected
    saved = json.loads((copy / "config.json").read_text())
    assert saved["config"]["updates"] == 8
    assert [each["update"] for each in saved["resumed"]] == [4]
    lines = [json.loads(x) for x in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [x["update"] for x in lines] == list(range(1, 9))
    assert lines[-1]["env_steps"] == [128, 128]


@pytest.mark.slow
def test_what_a_crash_left_after_the_checkpoint_is_done_again(whole, copy):
    shutil.rmtree(copy / "checkpoints" / "4")  # killed before it was whole
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"update": 5, "env_')
    (copy / ".lock").write_text("999999\n")
    torn = copy / "checkpoints" / "4.orbax-checkpoint-tmp"
    torn.mkdir()
    resume(copy, "--updates", "8")
    assert leaves(copy) == leaves(whole)
    assert curves(copy) == curves(whole)
    assert not torn.exists()
    assert not (copy / ".lock").exists()


# tensorstore's threads go on after a failure, and their errors reach nobody.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("failed_reads")
def test_a_damaged_checkpoint_is_refused_and_moving_it_away_helps(whole, copy):
    newest = copy / "checkpoints" / "4"
    (newest / "host" / "metadata").write_text('{"lay')
    files = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    with pytest.raises(
        ValueError, match=r"checkpoints.4: .*To go on from the one of 3 updates, move"
    ):
        resume(copy, "--updates", "8")
    assert {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()} == files
    shutil.rmtree(newest)
    resume(copy, "--updates", "8")
    assert leaves(copy) == leaves(whole)


def contents(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def changed(folder, **values):
    """Writes other settings into the folder's config.json."""
    saved = json.loads((folder / "config.json").read_text())
    for name, value in values.items():
        saved["config" if name in saved["config"] else "hyperparameters"][name] = value
    (folder / "config.json").write_text(json.dumps(saved))


def go_on(folder, *flags):
    """The lines printed when a run is resumed, before anything is compiled."""
    config, grid, _ = request(["--resume", str(folder), *flags], "jaxpg train")
    found, said = prepare_resume(config, grid), []
    replicas = make_replicas(config, points(found.grid))
    state, progress, _ = run._begin(found, replicas, said.append)
    assert progress.updates == state.num_updates[0]
    return said


def refused(folder, message):
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        go_on(folder, "--updates", "8")
    assert "\n" not in str(error.value)
    assert contents(folder) == before


@pytest.mark.slow
def test_a_checkpoint_of_another_run_or_update_is_refused(copy):
    for name, value, of in (
        (
            "algorithm",
            "ppo_kl",
            "of a run with algorithm=ppo, and its config.json says algorithm=ppo_kl",
        ),
        ("seed", 1, "seed=0, and its config.json says seed=1; put"),
        (
            "learning_rate",
            [1e-5],
            r"learning_rate=0\.0025, and its config.json says learning_rate=1e-05",
        ),
        ("gamma", [0.5], r"gamma=0\.98"),
        ("num_epochs", 2, "num_epochs=1"),
    ):
        before = (copy / "config.json").read_bytes()
        changed(copy, **{name: value})
        refused(copy, f"checkpoints.4 is {'' if 'run' in of else '.*'}{of}")
        with pytest.raises(ValueError, match=f"params.npz is .*{of}"):
            read_run(copy)
        (copy / "config.json").write_bytes(before)
    place = copy / "checkpoints"
    (place / "4").rename(place / "6")
    refused(copy, "checkpoints.6 is the checkpoint of 4 updates, not of 6; rename it to 4")
    (place / "3").rename(place / "4")
    (place / "6").rename(place / "3")
    refused(copy, "checkpoints.4 is the checkpoint of 3 updates, not of 4")
    with pytest.raises(ValueError, match=r"checkpoints.3 is the checkpoint of 4 updates"):
        read_run(copy, 3)


@pytest.mark.slow
def test_what_the_host_noted_is_checked(copy):
    host = copy / "checkpoints" / "4" / "host" / "metadata"
    whole = json.loads(host.read_text())
    for place, value, message in (
        (("record", "env_steps"), [1], "record.env_steps has 1 entries for 2 replicas"),
        (("record", "env_steps"), ["x", 1], r"record.env_steps\[0\] must be a whole number"),
        (("record", "diverged"), {"7": 1}, "record.diverged names '7'; there are replicas 0 to 1"),
        (("record", "seconds"), None, "record.seconds must be a finite number"),
        (("leaves", "key"), {"shape": [2]}, "host.leaves.key.dtype is missing"),
        (("updates",), "4", "host.updates must be a whole number"),
    ):
        saved = json.loads(json.dumps(whole))
        table = saved
        for name in place[:-1]:
            table = table[name]
        table[place[-1]] = value
        host.write_text(json.dumps(saved))
        refused(copy, f"cannot read the checkpoint .*checkpoints.4: {message}")
    host.write_text(json.dumps(whole))
    evaluation = copy / "evaluation.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"update": "4"}))
    with pytest.raises(ValueError, match=r"evaluation.json: update must be .*; remove it, to eval"):
        go_on(copy)


@pytest.mark.slow
def test_what_may_change_is_not_compared_and_what_changes_bits_is_said(copy):
    said = go_on(copy, "--updates", "8", "--checkpoint-seconds", "7", "--debug-nans")
    assert said == [f"resuming {copy} after 4 of 8 updates"]
    # The comparison is with what made the checkpoint, not with how the run began.
    host, config = copy / "checkpoints" / "4" / "host" / "metadata", copy / "config.json"
    began, saved = json.loads(config.read_text()), json.loads(host.read_text())
    config.write_text(json.dumps(began | {"xla_flags": "--xla_before"}))
    assert go_on(copy) == [f"resuming {copy} after 4 of 8 updates"]
    computing = saved["computing"]
    computing["versions"]["jax"], computing["xla_flags"] = "0.0.1", "--xla_else"
    computing["lanes"]["devices"] += 7
    host.write_text(json.dumps(saved))
    said = go_on(copy)[-1]
    now = jax.__version__, len(jax.devices())
    assert "to rounding, not bit by bit" in said
    assert f"versions jax was 0.0.1, is {now[0]}" in said
    assert "xla_flags was --xla_else, is" in said and "lanes devices was" in said
    noted = json.loads((copy / "config.json").read_text())["resumed"][-1]["changed"]
    assert noted["versions jax"] == ["0.0.1", now[0]] and len(noted) == 3


def test_a_run_from_before_checkpoints_named_their_settings_goes_on(copy):
    host = copy / "checkpoints" / "4" / "host" / "metadata"
    saved = json.loads(host.read_text())
    del saved["settings"], saved["updates"], saved["record"]["lines"], saved["computing"]
    host.write_text(json.dumps(saved))
    whole = (copy / "params.npz").read_bytes()
    (copy / "params.npz").write_bytes(whole[: whole.rindex(b"PK\x05\x06") + 20] + b"\0\0")
    assert "of an older version without settings" in go_on(copy, "--updates", "8")[-1]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"xla_flags": "--xla_before"}))
    assert "xla_flags was --xla_before, is" in go_on(copy)[-1]
    assert read_run(copy).update is None


@pytest.mark.slow
def test_holes_in_what_was_recorded_are_refused_or_mended(copy):
    lines, table = copy / "metrics.jsonl", copy / "metrics.parquet"
    whole, parts = lines.read_bytes(), sorted(table.iterdir())
    assert len(parts) == len(whole.splitlines()) == 4
    for damage in (
        b"",
        whole[: len(whole) // 2],
        whole.replace(b'"update": 2', b'"upd\xff'),
        b"".join(whole.splitlines(True)[::3]),
        None,
    ):
        lines.unlink() if damage is None else lines.write_bytes(damage)
        assert "metrics.jsonl had lost lines; it is rewritten" in go_on(copy, "--updates", "8")[0]
        assert lines.read_bytes() == whole
    second = parts[1].read_bytes()
    flipped = bytearray(second)
    column = parquet.read_metadata(parts[1]).row_group(0).column(5)
    start = column.dictionary_page_offset or column.data_page_offset
    flipped[start + column.total_compressed_size - 1] ^= 255  # headers of pages have no checksum
    for damage, why in (
        (second[: len(second) // 2], "part-000000000002.parquet cannot be read"),
        (bytes(flipped), "part-000000000002.parquet cannot be read"),
        (None, "; put its parts back, or move it and metrics.jsonl away"),
    ):
        parts[1].unlink() if damage is None else parts[1].write_bytes(damage)
        refused(copy, f"metrics.parquet is not whole between updates 2 and 2(: )?{why}")
    table.rename(copy / "kept")
    refused(copy, "metrics.parquet is not whole between updates 1 and 4; put its parts back")
    lines.unlink()
    assert "has lost metrics.jsonl and metrics.parquet: both begin at update 5" in go_on(copy)[0]
    assert go_on(copy) == [f"resuming {copy} after 4 of 8 updates"]


def test_a_schedule_that_has_ended_is_stretched_only_where_that_is_asked(copy):
    changed(copy, schedule="linear")
    config, grid, _ = request(["--resume", str(copy), "--updates", "6"], "jaxpg train")
    assert grid.schedule_updates == (4.0,)
    before = contents(copy)
    for flags in ((), ("--schedule", "cosine"), ("--schedule-updates", "5")):
        config, grid, _ = request(["--resume", str(copy), "--updates", "6", *flags], "jaxpg train")
        with pytest.raises(ValueError, match=r"ends at update \d, and from there on the learning rate is 0; "
                           "--schedule-updates 6 stretches it, and --schedule constant"):  # fmt: skip
            prepare_resume(config, grid)
    assert contents(copy) == before
    longer = ["--updates", "6", "--schedule-updates", "0"]  # 0 is all updates
    assert go_on(copy, *longer) == [f"resuming {copy} after 4 of 6 updates"]
    saved = json.loads((copy / "config.json").read_text())
    assert saved["resumed"][-1]["schedule_updates"] == [6.0]
    assert saved["hyperparameters"]["schedule_updates"] == [6.0]
    assert saved["replicas"][1]["schedule_updates"] == 6.0
    assert saved["config"]["schedule"] == "linear" and "schedule" not in saved["resumed"][-1]
    # A schedule that was always to end before the last update may do so.
    changed(copy, updates=8)
    assert go_on(copy) == [f"resuming {copy} after 4 of 8 updates"]
    assert go_on(copy, "--updates", "9", "--schedule", "constant")
    assert json.loads((copy / "config.json").read_text())["resumed"][-1]["schedule"] == "constant"


def test_what_is_a_link_is_not_written(copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (copy / ".lock").symlink_to(elsewhere)
    with pytest.raises(
        ValueError, match=r"\.lock is a link, or not a plain file, and will not be written"
    ):
        resume(copy, "--updates", "8")
    (copy / ".lock").unlink()
    (copy / ".lock").hardlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"\.lock is a link"):
        resume(copy, "--updates", "8")
    assert elsewhere.read_text() == "mine"
    (copy / ".lock").unlink()
    for name in ("checkpoints", "metrics.jsonl", "metrics.parquet", "checkpoints/2"):
        moved = (copy / name).rename(tmp_path / "moved")
        (copy / name).symlink_to(moved)
        refused(copy, f"{name} is a link to {moved}, where files would be written and removed")
        (copy / name).unlink()
        moved.rename(copy / name)
    assert go_on(copy, "--updates", "8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "has finished its 4 updates; --updates 8 goes on to 8"),
        ("--updates 3", "has made 4 already"),
        ("--updates 8 --seeds 3", "keeps its seeds; --config"),
        ("--updates 8 --learning-rate 1e-1", "keeps its learning_rate"),
        ("Pendulum-v1 --updates 8", "keeps its environment"),
        ("--config x", "use one of them"),
    ],
)
def test_a_mistake_in_resuming_is_refused(half, flags, message):
    before = {f: f.stat().st_mtime_ns for f in half.rglob("*")}
    with pytest.raises(ValueError, match=message):
        resume(half, *flags.split())
    assert {f: f.stat().st_mtime_ns for f in half.rglob("*")} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "which is not JSON"),
        ("{}", "cannot read"),
        ('{"config": {"environment": "E", "colour": 1}, "hyperparameters": {}}', "'colour'"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    for flag in ("--resume", "--config"):
        with pytest.raises(ValueError, match=message):
            request([flag, str(tmp_path)], "jaxpg train")


def test_a_run_without_a_checkpoint_says_how_to_start_again(half, tmp_path):
    shutil.copy(half / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no checkpoint to resume from; start again with --config"):
        resume(tmp_path)


def test_a_config_is_run_again_and_flags_after_it_override(half):
    config, grid, resumed = request(["--config", str(half)], "jaxpg train")
    saved = load_config(half)
    assert not resumed
    assert config == replace(saved[0], run=None, quiet=False)
    assert grid == saved[1]
    flags = ["--config", str(half / "config.json"), "--seeds", "3", "--gamma", ".5"]
    other, numbers, _ = request([*flags, "Acrobot-v1"], "jaxpg train")
    assert other == replace(config, seeds=3, environment="Acrobot-v1")
    assert numbers == grid._replace(gamma=(0.5,))
    # Its settings are not those of the presets, which differ.
    assert preset("CartPole-v1", "ppo")[0].hidden != other.hidden == (4,)


def test_the_numbers_in_a_config_are_exact(tmp_path):
    rate = 0.0012345678901234567
    flags = f"{FLAGS} --learning-rate {rate!r}"
    config, grid, _ = request([*flags.split(), "--run", str(tmp_path / "r")], "jaxpg train")
    from jaxpg.runs.store import folder

    description = folder.description(config, grid, [{"seed": 0}])
    folder.write_json(tmp_path / "config.json", description, exact=True)
    assert load_config(tmp_path)[1].learning_rate == (rate,)
    assert description["git"] is None or len(description["git"]["commit"]) == 40


WIDE = pytest.mark.skipif(not hasattr(jax, "enable_x64"), reason="a run of 64 bits needs jax 0.8")


@pytest.mark.slow
@WIDE
def test_a_run_of_64_bits_goes_on_in_32_and_again_in_64(tmp_path, capsys, monkeypatch):
    """Runs the command itself in 64 bits; its results are cast to 32, and every command says so."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "jaxpg", "train", *FLAGS.split(), "--updates", "2", "--run", folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    said = f"the parameters of {folder} are float64, and become float32; JAX_ENABLE_X64=1 leaves"
    with pytest.warns(UserWarning, match=said):
        policy = load_policy(folder, 0)
    with np.load(folder / "params.npz") as file:
        for kept, given in zip(file.values(), jax.tree.leaves(policy.params), strict=True):
            assert kept.dtype == np.float64 and given.dtype == np.float32
            np.testing.assert_array_equal(kept[0].astype(np.float32), given)
    monkeypatch.chdir(tmp_path)
    for command in (
        "evaluate run --episodes 2", "evaluate run --episodes 2 --update best",
        "record run --replica 0 --episodes 1 --out d.npz", "render run --replica 0 --out f.gif",
    ):  # fmt: skip
        main(command.split())
        told = capsys.readouterr().out
        assert told.startswith("the parameters of run are float64, and become float32; "), command
    load("run")
    assert capsys.readouterr().out.startswith("the parameters of run are float64")

    def go_on(updates):
        config, grid, _ = request(["--resume", str(folder), "--updates", updates], "jaxpg train")
        run.execute(prepare_resume(config, grid))
        return capsys.readouterr().out

    assert "precision dtype was float64, is float32" in go_on("4")
    assert "precision" not in go_on("6")
    jax.config.update("jax_enable_x64", True)
    try:
        # The run began in 64 bits, but this checkpoint was made in 32.
        assert "precision dtype was float32, is float64" in go_on("8")
    finally:
        jax.config.update("jax_enable_x64", False)
    assert curves(folder)["update"] == [1, 2, 3, 4, 5, 6, 7, 8] * 2


@pytest.mark.slow
@WIDE
def test_a_run_of_32_bits_is_read_in_64(whole, x64):
    config, grid = load_config(whole)
    init, keys = build(config).trainer.init, make_replicas(config, points(grid)).keys
    shapes = jax.eval_shape(jax.vmap(init), keys)
    state, _ = checkpoint.restore(whole / "checkpoints", 8, shapes)
    for place, found in jax.tree_util.tree_leaves_with_path(state.opt_state):
        assert found.dtype in (np.float64, np.int32), place
    for read in (read_run(whole), read_run(whole, 8)):
        found, kept = jax.tree.leaves(read.params), jax.tree.leaves(state.params)
        for one, other in zip(found, kept, strict=True):
            assert one.dtype == np.float64
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one, one.astype(np.float32))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    flags = f"{FLAGS} --updates 20 --checkpoint-seconds 0"
    # A cache of its own: the kill may leave half an entry, which the next process must clear away.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    # Equal bits are promised for the programs that users get, which tests compile differently.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | cache

    def command(*arguments):
        return [sys.executable, "-m", "jaxpg", "train", *arguments]

    def finish(*arguments):
        done = subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr

    process = subprocess.Popen(
        command(*flags.split(), "--run", "r"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    place = tmp_path / "r" / "checkpoints"
    try:
        deadline = time.monotonic() + 200
        while len(checkpoint.steps(place)) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < checkpoint.steps(place)[-1] < 20
    assert not (tmp_path / "r" / "evaluation.json").exists()
    finish("--resume", "r", "--checkpoint-seconds", "30")
    # In a process like the others: this one may have fewer devices, and so another program.
    finish(*flags.split(), "--run", "whole")
    assert leaves(tmp_path / "r") == leaves(tmp_path / "whole")
    assert curves(tmp_path / "r") == curves(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_with_demonstrations_goes_on_with_the_same_ones(tmp_path):
    file, small = tmp_path / "shown.npz", "size=4,max_steps_in_episode=4"
    one = ["DeepSea-bsuite", "--expert", "--settings", small, "--episodes"]
    record([*one, "6", "--out", str(file)])
    flags = (
        f"DeepSea-bsuite --settings {small} --algorithm guided --imitate 5 --demonstrations {file} "
        "--seeds 2 --num-envs 4 --hidden 4 --evaluation-episodes 2 --schedule constant --quiet"
    )

    def begin(name, updates):
        argv = [*flags.split(), "--updates", updates, "--run", str(tmp_path / name)]
        run.execute(run.prepare(*request(argv, "jaxpg train")[:2]))

    begin("whole", "6")
    begin("half", "3")
    shutil.copytree(tmp_path / "half", tmp_path / "other")
    resume(tmp_path / "half", "--updates", "6")
    assert leaves(tmp_path / "half") == leaves(tmp_path / "whole")
    assert leaves(tmp_path / "half") != leaves(tmp_path / "other")
    record([*one, "7", "--out", str(file)])
    with pytest.raises(ValueError, match=r"shown\.npz has changed since .* began with it"):
        resume(tmp_path / "other", "--updates", "6")
    file.unlink()
    with pytest.raises(ValueError, match=r"shown\.npz"):
        resume(tmp_path / "other", "--updates", "6")


def either(folder, *flags):
    main(["train", *FLAGS.split(), "--updates", "4", "--run", str(folder), EITHER, *flags])


@pytest.mark.slow
def test_one_command_starts_goes_on_and_has_finished(half, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    # A kill before the first checkpoint: half a checkpoint and a line of metrics are there.
    shutil.copy(half / "config.json", folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / ".config.json.17.tmp").touch()
    before = contents(folder)
    for flags, message in (
        (["--seeds", "3"], "keeps its seeds"),
        (["--gamma", ".5"], "keeps its gamma"),
        (["--resume", str(folder)], "name the folder with --run"),
    ):
        with pytest.raises(SystemExit) as stop:
            either(folder, *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
        assert contents(folder) == before
    either(folder)
    assert leaves(folder) == leaves(half) and curves(folder) == curves(half)
    capsys.readouterr()
    before = contents(folder)
    either(folder)
    assert capsys.readouterr().out == f"{folder} has finished its 4 updates\n"
    assert contents(folder) == before
    # A kill after a checkpoint.
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "evaluation.json").unlink()
    either(folder)
    assert leaves(folder) == leaves(half) and curves(folder) == curves(half)
    assert json.loads((folder / "config.json").read_text())["resumed"][0]["update"] == 1


def test_settings_of_another_run_start_in_the_folder_that_was_named(half, tmp_path):
    flags = ["--config", str(half), EITHER]
    with pytest.raises(ValueError, match="needs the same folder each time"):
        request(flags, "jaxpg train")
    config, _, resumed = request([*flags, "--run", str(tmp_path)], "jaxpg train")
    assert (resumed, config.run, config.hidden) == (None, str(tmp_path), (4,))


def test_only_what_a_killed_run_left_is_started_over(half, tmp_path):
    config, _ = load_config(half)
    for name, content in (("notes.txt", "mine"), ("params.npz", "learnt")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(half / "config.json", folder)
        (folder / name).write_text(content)
        before = contents(folder)
        with pytest.raises(ValueError, match="is not empty"):
            create_folder(replace(config, run=str(folder)), over=True)
        assert contents(folder) == before
    folder = tmp_path / "used"
    folder.mkdir()
    shutil.copy(half / "config.json", folder)
    with locked(folder), pytest.raises(ValueError, match="is being written by process"):
        create_folder(replace(config, run=str(folder)), over=True)
    assert (folder / "config.json").exists()


def test_an_evaluation_of_fewer_updates_is_not_the_end(copy):
    found = json.loads((copy / "evaluation.json").read_text())
    (copy / "evaluation.json").write_text(json.dumps(found | {"update": 2}))
    config, grid, _ = request(["--resume", str(copy)], "jaxpg train")
    assert prepare_resume(config, grid).start == 4
