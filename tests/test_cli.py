"""The command as its user meets it: files, messages, exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxpg.cli import main

ROOT = Path(__file__).parent.parent
SMALL = "--num-envs 4 --num-steps 4 --num-minibatches 2 --hidden 8 --evaluation-episodes 4"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "80",
    # The command chooses its cache folder itself, but not below the user's.
    "JAX_COMPILATION_CACHE_DIR": "",
    "XDG_CACHE_HOME": os.environ["JAX_COMPILATION_CACHE_DIR"],
}


def command(arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "jaxpg", *arguments.split()],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def strict(text):
    """Parse JSON strictly by the standard: Python's reader would accept NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_a_grid_of_seeds_is_trained_and_every_file_written(tmp_path):
    grid = "--seeds 2 --learning-rate 1e-3,1e-2 --updates 6 --seed 7"
    done = command(f"train CartPole-v1 {grid} {SMALL} --run new/run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "new" / "run"
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "metrics.parquet",
        "evaluation.json",
        "params.npz",
        "checkpoints",
    }

    config = strict((folder / "config.json").read_text())
    assert config["config"]["hidden"] == [8]
    assert config["config"]["seed"] == 7
    assert config["hyperparameters"]["learning_rate"] == [1e-3, 1e-2]
    assert config["hyperparameters"]["schedule_updates"] == [6.0]
    assert config["versions"]["jax"]
    assert config["precision"]["matmul"] == "highest"

    lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["env_steps"] for line in lines] == [[16 * i] * 4 for i in range(1, 7)]
    # No pole falls in four steps, so the curve has no value yet.
    assert lines[0]["episode_return"] == [None] * 4
    assert all(len(v) == 4 for v in lines[-1].values() if isinstance(v, list))
    assert {"entropy", "kl", "critic_loss", "grad_norm"} <= lines[-1].keys()

    evaluation = strict((folder / "evaluation.json").read_text())
    assert evaluation["seed"] == [0, 1, 0, 1]
    assert evaluation["learning_rate"] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert evaluation["episodes"] == [4] * 4
    assert len(evaluation["mean_return"]) == len(evaluation["standard_error"]) == 4

    with np.load(folder / "params.npz") as params:
        assert all(leaf.shape[0] == 4 for leaf in params.values())
        kernels = {name: leaf.shape for name, leaf in params.items() if name.endswith("kernel")}
        body = params["policy/body/params/layers_0/kernel"]
    assert sorted(kernels.values()) == [(4, 4, 8), (4, 4, 8), (4, 8, 1), (4, 8, 2)]
    # A seed starts from the same weights at every point of the grid, and its six updates then differ.
    apart = np.abs(body[0] - body[2]).max()
    assert 0 < 5 * apart < np.abs(body[0] - body[1]).max()

    assert "learning_rate" in done.stdout
    assert "compiled in" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "wait_for"),
    [(signal.SIGINT, 130, "metrics.jsonl"), (signal.SIGTERM, 143, "config.json")],
)
def test_a_signal_saves_what_was_learnt(tmp_path, number, status, wait_for):
    arguments = f"train CartPole-v1 --seeds 1 --updates 1000000 {SMALL} --run r"
    # A shell's background job ignores SIGINT, and children inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{heed}; from jaxpg.cli import main; main()", *arguments.split()],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "r" / wait_for).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(2):  # as `timeout` does, to the process and to its group
            process.send_signal(number)
            time.sleep(0.02)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert f"jaxpg: stopped by {number.name}" in error
    assert "Traceback" not in error
    if wait_for == "config.json":  # while compiling: there was nothing to keep
        assert list(tmp_path.iterdir()) == []
    else:
        names = {f.name for f in (tmp_path / "r").iterdir()}
        assert names == {
            "config.json",
            "metrics.jsonl",
            "metrics.parquet",
            "params.npz",
            "checkpoints",
        }
        assert "go on with jaxpg train --resume r" in error
        last = strict((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
        assert f"after {last['update']} of 1000000 updates" in error
        assert (tmp_path / "r" / "checkpoints" / str(last["update"])).is_dir()


BAD = {
    "CartPol-v1": "did you mean CartPole-v1",
    "lunarlander-v3": "did you mean gymnasium/LunarLander-v3",
    "reacher": "did you mean brax/reacher",
    "CartPole-v1 --lr 1e-3": "unknown flag --lr; did you mean --learning-rate?",
    "--env CartPole-v1": "did you mean the environment without a flag, as in jaxpg train CartPole-v1?",
    "CartPole-v1 --hidden 64 64": "joined by commas, as in --hidden 64,64",
    "CartPole-v1 --learning-rate 1e-4:1e-2:log3": "jaxpg sweep takes ranges",
    "CartPole-v1 --shared-torso --critic-learning-rate 1e-3,1e-2": "critic_learning_rate has several "
    "values and no effect: learning_rate moves a shared torso, critic and all; give it one value",
    "CartPole-v1 --algorithm pppo": "did you mean ppo",
    "Pendulum-v1 --algorithm SAC": "SAC learns values from a replay buffer, which jaxpg does not; use ppo",
    "CartPole-v1 --network mpl": "did you mean mlp",
    "CartPole-v1 --activation tahn": "did you mean tanh",
    "CartPole-v1 --precision hihg": "did you mean high",
    "CartPole-v1 --optimizer adm": "did you mean adam",
    "CartPole-v1 --schedule linaer": "did you mean linear",
    "CartPole-v1 --num-minibatches 7": "num_minibatches=7; use 1022 or 1029",
    "CartPole-v1 --num-steps 0": "num_steps=0 must be at least 1",
    "CartPole-v1 --algorithm reinforce_baseline --num-envs 1": "num_envs=1 must be at least 2",
    "CartPole-v1 --seeds 0": "seeds=0 must be at least 1",
    "CartPole-v1 --updates -3": "updates=-3 must be at least 1",
    "CartPole-v1 --hidden 8,0": "hidden=8,0: every width",
    "CartPole-v1 --gamma .9,nan": "gamma=nan must be a finite number",
    "CartPole-v1 --gamma 1.01": "gamma=1.01 must lie in [0, 1]; try 0.99",
    "CartPole-v1 --lambda -0.1": "lambda_=-0.1 must lie in [0, 1]",
    "CartPole-v1 --learning-rate 1e-3,-1": "learning_rate=-1 must not be negative",
    "CartPole-v1 --max-grad-norm inf": "max_grad_norm=inf must be a finite number",
    "CartPole-v1 --algorithm behaviour_cloning": "give --demonstrations FILE",
    "CartPole-v1 --algorithm reinforce --critic-epochs 2": "reinforce has no critic",
    "CartPole-v1 --algorithm vpg --num-epochs 2": "score surrogate",
    "Pendulum-v1 --network tabular": "tabular needs discrete observations",
    "CartPole-v1 --run file/inside": "cannot write file/inside: Not a directory",
    "CartPole-v1 --run full": "full is not empty",
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(["train", *arguments.split()])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("jaxpg: error: ")
    assert BAD[arguments] in error
    assert error.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    ["", "CartPole-v1 --num-env 4", "CartPole-v1 --seeds many", "CartPole-v1 --gamma .9,,1"],
)
def test_unreadable_arguments_exit_with_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["train", *arguments.split()])
    assert exit_.value.code == 2
    assert "jaxpg train --help" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "trian CartPole-v1",
            "unknown command 'trian'; did you mean train? The commands are train,",
        ),
        ("list", "did you mean envs, or lab list?"),
        ("Pendulum-v1", "did you mean train Pendulum-v1?"),
        ("frobnicate", "unknown command 'frobnicate'; the commands are train,"),
        (
            "lab ladder --trajectory 3",
            "unrecognized arguments: --trajectory 3; did you mean --trajectories?",
        ),
        ("evaluate r --greeedy", "--greeedy; did you mean --greedy? (see jaxpg evaluate --help)"),
        ("sweep CartPole-v1 --hidden 32,64", "--hidden 32,64 (one network of two layers)"),
        (
            "sweep CartPole-v1 --algorithm reinforce --critic-learning-rate .1,.2",
            "reinforce has no critic",
        ),
        ("sweep CartPole-v1 --algorithm trpo --learning-rate .1:.2:lin3", "trpo steps by max_kl"),
        ("sweep CartPole-v1 --algorithm a2c --damping .1,.2", "a2c takes no natural gradients"),
        ("sweep CartPole-v1 --value-coef .1,.2", "no effect: there is no shared torso"),
    ],
)
def test_what_was_meant_is_said(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("jaxpg: error: ") and error.count("\n") == 1
    assert said in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["frobnicate", "train CartPole-v1 --gamma 2"])
def test_the_real_command_shows_no_traceback(arguments, tmp_path):
    done = command(arguments, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("jaxpg: error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_jax(tmp_path):
    program = (
        "import sys, jaxpg.cli\n"
        "try: jaxpg.cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print({'jax', 'flax', 'gymnax', 'scipy'} & set(sys.modules))"
    )
    for arguments in (["--help"], ["train", "CartPole-v1", "--algorithm", "vpg", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == "set()", done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert "vpg on CartPole-v1" in done.stdout
    assert command("--help", tmp_path).stdout.startswith("usage: jaxpg")


def test_importing_jaxpg_leaves_gymnax_alone(tmp_path):
    program = "import sys, jaxpg; jaxpg.make_trainer, jaxpg.envs; print('gymnax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr


def test_a_terminated_experiment_leaves_no_folder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxpg", "lab", "ladder", "--out", "found", "--trajectories", "1e7"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "found").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert error.endswith("jaxpg: stopped; the running experiment was not saved\n")
    assert list(tmp_path.iterdir()) == []
