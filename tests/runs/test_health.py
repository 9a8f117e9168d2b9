"""Whatever goes wrong in a run is reported in one line, and costs no more than it must."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import FLAGS, ROOT, resume, start
from worlds import clock

from jaxpg import Hyperparams, make_trainer
from jaxpg.cli import main
from jaxpg.policies import actor_critic
from jaxpg.rollout import EpisodeSums
from jaxpg.runs.config.presets import preset
from jaxpg.runs.host import health
from jaxpg.runs.play.policy import load_policy
from jaxpg.runs.store import checkpoint
from jaxpg.runs.store.lock import locked
from jaxpg.runs.sweep import sweep
from jaxpg.runs.train.report import table
from jaxpg.training.algorithm import algorithm
from jaxpg.training.data import episode_metrics

TOO_FAST = ("--critic-learning-rate", "1e30")  # the critic's squared error exceeds float32


MANY = ",".join(
    f"{x / 1000}" for x in range(1000)
)  # the size of its grid must be checked before the grid is listed


def command(arguments, cwd, program="from jaxpg.cli import main; main()"):
    return subprocess.run(
        [sys.executable, "-c", program, "train", *arguments.split()],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_first_divergence_is_found_per_replica():
    ok, nan, inf = 1.0, np.nan, np.inf
    found = health.first_divergence(
        np.arange(11, 14),
        {
            "objective": np.array([[ok, ok, ok], [ok, ok, nan], [ok, ok, ok]]),
            "critic_loss": np.array([[ok, ok, ok], [ok, inf, nan], [ok, ok, ok]]),
            # A curve has no value until an episode has ended.
            "episode_return": np.array([[nan, nan, ok]] * 3),
        },
    )
    assert found == [(0, ""), (12, "critic_loss"), (0, "")]


def test_parameters_are_looked_at_per_replica():
    params = {"w": np.ones((3, 2, 2)), "n": np.ones(3, np.int32), "b": np.ones(3)}
    assert health.finite(params).tolist() == [True] * 3
    params["w"][1, 0, 1] = np.inf
    params["b"][2] = np.nan
    assert health.finite(params).tolist() == [True, False, False]


@pytest.mark.slow
def test_one_setting_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "r"
    start(folder, "--updates", "4")
    saved = json.loads((folder / "config.json").read_text())
    saved["hyperparameters"]["critic_learning_rate"] = [1e30]
    # A late divergence is made by changing a setting halfway, which a resumed run would refuse.
    monkeypatch.setattr(checkpoint, "check_settings", lambda *each: None)
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(health.Diverged) as error:
        resume(folder, "--updates", "8", "--checkpoint-seconds", "0")
    message = str(error.value)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    bad = [x["update"] for x in lines if None in x["critic_loss"]]
    assert bad
    assert f"critic_loss is not finite at update {bad[0]}, with learning_rate=" in message
    assert "seed 0 (replica 0)" in message and "critic_learning_rate=1e+30" in message
    kept = checkpoint.steps(folder / "checkpoints")
    assert 4 <= kept[-1] < bad[0]
    assert f"the last good checkpoint is {folder / 'checkpoints' / str(kept[-1])}" in message
    assert load_policy(folder, 0, update=kept[-1]).act(jax.random.key(0), np.zeros(4)) in (0, 1)


@pytest.mark.slow
def test_a_grid_goes_on_without_what_diverged(tmp_path, capsys):
    start(tmp_path / "r", "--updates", "20", "--critic-learning-rate", "1e-3,1e30")
    evaluation = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert evaluation["diverged"][:2] == [None, None]
    assert all(evaluation["diverged"][2:])
    assert evaluation["mean_return"][2:] == [None, None]
    assert None not in evaluation["mean_return"][:2]
    printed = capsys.readouterr().out
    assert "2 of 2" in printed and "0 of 2" in printed
    # The others have the same returns as alone.
    start(tmp_path / "alone", "--updates", "20", "--critic-learning-rate", "1e-3")
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert alone["mean_return"] == evaluation["mean_return"][:2]


@pytest.mark.slow
def test_debug_nans_names_the_operation(tmp_path):
    # The values become infinite at the second minibatch, and their gradients 0 times infinity.
    found = r"no checkpoint yet; invalid value \(nan\) .* at .*accumulation\.py:\d+"
    beyond = ("--critic-learning-rate", "3e38")
    with pytest.raises(health.Diverged, match=found):
        start(tmp_path / "r", "--updates", "4", "--debug-nans", *beyond)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reward", "obs"])
def test_a_nan_of_the_environment_is_said_to_be_its_own(what):
    env = clock(4)

    def step(key, state, action):
        after, result = env.step(key, state, action)
        broken = jnp.where(after[0] == 2, jnp.nan, 1.0) * getattr(result, what)
        return after, result._replace(**{what: broken})

    mine = env._replace(step=step)
    agent = actor_critic(mine, hidden=(2,))
    trainer = make_trainer(mine, agent, algorithm("ppo"), num_envs=4, num_steps=2)
    state = trainer.init(jax.random.key(0))
    found = health.explain("my_clock", trainer.update, state, Hyperparams())
    assert found.startswith("my_clock gave it, in its reset or step: invalid value (nan)")
    assert "test_health.py:" in found and str(health.JAX) not in found


def test_what_is_named_is_jaxpgs_own_wherever_its_checkout_lies(monkeypatch):
    """A checkout called jaxpg may contain the installed jax; frames in jax must not count as jaxpg's."""
    checkout = Path("/home/me/jaxpg")
    monkeypatch.setattr(health, "PACKAGE", checkout / "jaxpg")
    monkeypatch.setattr(health, "JAX", checkout / ".venv/lib/jax")

    def nested(*files):
        """A function with a frame in each of these files; the last one gives a NaN."""
        found = {"FloatingPointError": FloatingPointError}
        for name in reversed(files):
            inner = "inner()" if "inner" in found else "raise FloatingPointError('a nan')"
            exec(compile(f"def step_lanes():\n    {inner}", str(checkout / name), "exec"), found)
            found = {"inner": found["step_lanes"]}
        return found["inner"]

    own = nested(
        "jaxpg/training/trainer.py", "jaxpg/training/accumulation.py", ".venv/lib/jax/lax.py"
    )
    assert health.explain("env", own) == f"a nan at {checkout}/jaxpg/training/accumulation.py:2"
    theirs = nested("jaxpg/rollout/stepping.py", "jaxpg_env/world.py", ".venv/lib/jax/lax.py")
    found = health.explain("env", theirs)
    assert found.startswith("env gave it, in its reset or step: a nan at ")
    assert found.endswith("/jaxpg_env/world.py:2")


def test_the_watch_for_nans_passes_what_has_no_value_yet():
    none = EpisodeSums(*jnp.zeros(3))
    assert np.isnan(episode_metrics(none)["episode_return"])
    with jax.debug_nans(True):
        assert episode_metrics(none)["episode_return"] == 0


def test_a_table_counts_what_diverged():
    grid = preset("CartPole-v1", "ppo")[1]._replace(gamma=(0.9, 0.99))
    returns = np.array([[1.0, np.nan], [2.0, 3.0]])
    lines = table(grid, returns, np.isnan(returns))
    assert lines[0].split()[-1] == "diverged"
    assert [line.split()[-3:] for line in lines[1:]] == [["1", "of", "2"], ["0", "of", "2"]]
    assert "diverged" not in table(grid, np.ones((2, 2)))[0]
    # A seed without a return for another reason has not diverged.
    lines = table(grid, returns)
    assert lines[0].endswith("max  no return") and lines[1].split()[-3:] == ["1", "of", "2"]


def test_two_processes_cannot_have_one_folder(tmp_path):
    holder = (
        "import sys, time; from pathlib import Path; from jaxpg.runs.store.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"written by process {process.pid};"),
            locked(tmp_path),
        ):
            pass
        assert (tmp_path / ".lock").exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    # The lock ended with its process, although its file is still there.
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / ".lock").exists()


def test_a_command_on_a_folder_in_use_says_so(tmp_path):
    (tmp_path / "r").mkdir()
    with locked(tmp_path / "r"):
        done = command(f"{FLAGS} --updates 1 --run r", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"jaxpg: error: r is being written by process {os.getpid()}; wait for it, or stop it\n"
    )
    assert list((tmp_path / "r").iterdir()) == []


FULL = """
import resource
from jaxpg.cli import main
# As of a full disk, a write beyond the limit fails (Python ignores the signal).
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
main()
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_later(tmp_path):
    start(tmp_path / "whole", "--updates", "8", "--hidden", "16")
    start(tmp_path / "r", "--updates", "4", "--checkpoint-seconds", "0", "--hidden", "16")
    largest = max(f.stat().st_size for f in (tmp_path / "r" / "checkpoints").rglob("*"))
    shutil.copytree(tmp_path / "r" / "checkpoints", tmp_path / "before")
    # Enough for config.json, not for the largest file of a checkpoint.
    least = (tmp_path / "r" / "config.json").stat().st_size
    size = (least + largest) // 2
    assert least + 256 < size < largest - 256
    done = command("--resume r --updates 8 --quiet", tmp_path, FULL.format(size=size))
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if line.startswith("jaxpg")]
    assert error == ["jaxpg: error: cannot write r: File too large"]
    assert "Traceback" not in done.stderr
    for file in (tmp_path / "before" / "4").rglob("*"):
        if file.is_file():
            now = tmp_path / "r" / "checkpoints" / file.relative_to(tmp_path / "before")
            assert now.read_bytes() == file.read_bytes()
    resume(tmp_path / "r", "--updates", "8")
    params = [(tmp_path / name / "params.npz").read_bytes() for name in ("r", "whole")]
    assert params[0] == params[1]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_cannot_be_written_is_said(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", *FLAGS.split(), "--run", "/proc/jaxpg"])
    assert exit_.value.code == 2
    assert "cannot write /proc/jaxpg" in capsys.readouterr().err


def compiled(kilobytes):
    return jax.jit(lambda x: jnp.sort(x) @ x).lower(jnp.zeros(256 * kilobytes)).compile()


def test_needed_memory_is_the_compilers():
    small, large = health.needed_bytes(compiled(1)), health.needed_bytes(compiled(1000))
    assert 1000 * 1024 <= (large - small) / jax.local_device_count() * 1000 / 999 < 4 * 1000 * 1024
    assert 1e8 < health.available_bytes() < 1e14


def test_too_little_memory_is_refused_with_what_fits(monkeypatch):
    program = SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=2_000_000_000,
            output_size_in_bytes=2_000_000_000,
            alias_size_in_bytes=1_500_000_000,
            temp_size_in_bytes=500_000_000,
            generated_code_size_in_bytes=0,
        )
    )
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(health, "available_bytes", lambda: 4e9)
    health.check_memory(program, 6)
    monkeypatch.setattr(health, "available_bytes", lambda: 2e9)
    with pytest.raises(ValueError, match=r"needs about 3.0 GB .* 2.0 GB; about 4 of 6 agents fit"):
        health.check_memory(program, 6)
    health.check_memory(program, 6, force=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 2000000000", "the states of 2,000,000,000 agents"),
        ("--evaluation-episodes 2147483647", "evaluating 2,147,483,647 episodes"),
        ("--hidden 1000000,1000000", "the states of 2 agents"),
        (f"--gamma {MANY} --lambda {MANY} --kl-coef {MANY}", "the states of 2,000,000,000 agents"),
        ("--num-envs 2147483647", "one agent's batch of 2,147,483,647 environments"),
        ("--num-steps 2147483647", "one agent's batch of 16 environments"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_sizes_are_bounded_before_anything_is_allocated(command, flags, message, tmp_path, capsys):
    given = f"{command} CartPole-v1 {flags} --run {tmp_path / 'r'}"
    if "--seeds" not in flags:
        given += " --seeds 2"
    if command == "sweep" and MANY not in flags:
        given += " --gamma .9,.99"
    with pytest.raises(SystemExit) as exit_:
        main(given.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and "memory" in error
    assert command == "sweep" or message in error
    assert not (tmp_path / "r").exists()


def test_a_run_that_cannot_fit_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "available_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="of memory"):
        start(tmp_path / "r", "--updates", "8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("trains", "room"), [(True, 1.7e7), (False, 9e6)])
def test_an_evaluation_that_cannot_fit_is_refused_before_training(
    trains, room, tmp_path, monkeypatch
):
    """There is room for the environments of all episodes, but not for what their steps need beside them."""
    monkeypatch.setattr(health, "available_bytes", lambda: room)
    flags = ("--updates", "1", "--evaluation-episodes", "100000")

    def swept():
        given = [*FLAGS.split(), *flags, "--gamma", ".9,.99", "--run", str(tmp_path / "s")]
        sweep.execute(sweep.prepare(given))

    run = partial(start, tmp_path / "r", *flags) if trains else swept
    with pytest.raises(ValueError, match=r"of memory.*fewer .*--evaluation-episodes"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_few_updates_for_many_steps_are_warned_of():
    assert "only 40 updates of 65,536 steps" in health.starving(40, 65536)
    assert max(map(len, health.starving(40, 65536).splitlines())) <= 80
    assert health.starving(100, 65536) == health.starving(40, 64) == ""
