"""Runs, sweeps, plots and studies from Python are what the commands make, and show themselves."""

import re
from base64 import b64decode

import pytest

import jaxpg
from jaxpg.hints import in_python
from jaxpg.runs.config.config import completed, load_config
from jaxpg.runs.config.flags import parse
from jaxpg.runs.config.rows import settled

SMALL = {
    "seeds": 2,
    "updates": 2,
    "num_envs": 2,
    "num_steps": 8,
    "num_minibatches": 1,
    "hidden": (4,),
    "evaluation_episodes": 2,
}


def small_env(length: int = 6):
    return jaxpg.envs.from_gymnax("CartPole-v1", max_steps_in_episode=length)


def images(html):
    """The images inside HTML."""
    return [b64decode(data) for data in re.findall(r"base64,([^\"]+)", html)]


@pytest.mark.slow
def test_a_run_from_python_is_the_commands(tmp_path, capsys):
    here = tmp_path / "here"
    run = jaxpg.run(small_env, folder=here, learning_rate=[1e-3, 1e-2], **SMALL)
    words = f"{small_env.__module__}:small_env --seeds 2 --updates 2 --num-envs 2 --num-steps 8 --hidden 4"
    words += f" --num-minibatches 1 --evaluation-episodes 2 --learning-rate 0.001,0.01 --run {here}"
    config, grid = parse(words.split(), "jaxpg train")
    assert load_config(here) == (settled(config), completed(config, grid))
    assert run.folder == here and run.returns.shape == (2, 2)
    # CartPole cut after 6 steps returns 6 from any policy.
    assert (run.returns == 6).all() and (run.evaluate(3).mean == 6).all()
    assert [each.metrics["episode_return"].shape for each in run.series] == [(2, 2), (2, 2)]
    assert run._repr_png_()[:4] == b"\x89PNG"
    assert str(here) in repr(run)
    assert run.policy().params is not None and run.checkpoint(3).origin["seed"] == 1
    # It has finished, so it only says so; without an environment it goes on with its own settings.
    again = jaxpg.run(small_env, folder=here, resume=True, learning_rate=[1e-3, 1e-2], **SMALL)
    assert again == run and "has finished its 2 updates" in capsys.readouterr().out
    with pytest.raises(ValueError, match="updates=4 goes on to 4 in all"):
        jaxpg.run(folder=here, resume=True)
    figures = jaxpg.plot([run], out=tmp_path / "out")
    assert len(images(figures._repr_html_())) == len(figures.files) == 3


@pytest.mark.slow
def test_a_sweep_from_python_is_ranked_and_shown(tmp_path):
    sizes = SMALL | {"folder": tmp_path / "sweep", "quiet": True}
    found = jaxpg.sweep("CartPole-v1", learning_rate="1e-3:1e-2:log2", **sizes)
    assert sorted(found.table["learning_rate"]) == [1e-3, 1e-2] and found.table["rank"] == [1, 2]
    assert found.best.returns.shape == (1, 2) and found.best.policy().params is not None
    shown = found._repr_html_()
    assert "<th>learning_rate</th>" in shown and len(images(shown)) == 1
    assert jaxpg.sweep("CartPole-v1", learning_rate="1e-3:1e-2:log2", resume=True, **sizes) == found


@pytest.mark.slow
def test_a_study_has_its_numbers_and_shows_itself():
    study = jaxpg.lab.run("ladder", estimators=("rtg", "rtg_value"), trajectories=2**12, quick=True)
    assert {*study.summary["trace"]} == {*study.table["estimator"]} == {"rtg", "rtg_value"}
    (picture,) = images(study._repr_html_())
    assert picture[:4] == b"\x89PNG" and re.search(
        r"<pre>.*rtg_value .*</pre>", study._repr_html_(), re.DOTALL
    )
    assert repr(study) == "<ladder on A: 6 rows>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxpg.run("CartPole-v1", num_envs=0), "num_envs=0 must be at least 1"),
        (lambda: jaxpg.run("CartPol-v1"), "unknown environment 'CartPol-v1'; did you mean CartPole-v1"),
        (lambda: jaxpg.run("CartPole-v1", algorithm="pp"), "unknown algorithm 'pp'"),
        (lambda: jaxpg.run("CartPole-v1", gamma="high"), "gamma takes numbers, not 'high'"),
        (lambda: jaxpg.run("CartPole-v1", resume=True), "name it with folder"),
        (lambda: jaxpg.run(lambda: None), "env is a function, and a run is opened again by names"),
        (lambda: jaxpg.run(small_env()), "env is a Env, and a run is opened again by names"),
        (lambda: jaxpg.sweep("CartPole-v1", random=0, gamma=[0, 1]), "random=0 must be at least 1"),
        (lambda: jaxpg.plot("runs/none", x="steps"), "x: invalid choice: 'steps'"),
        (lambda: jaxpg.lab.run("ladder", trajectories=1), "use trajectories=64 or more"),
        (lambda: jaxpg.lab.run("ladder", trajectories=1.5), "trajectories=1.5 must be a whole number"),
        (lambda: jaxpg.lab.run("ladder", repeats=2), "repeats means nothing to ladder"),
        (lambda: jaxpg.lab.run("ladder", trajectory=2), "did you mean trajectories?"),
        (lambda: jaxpg.lab.run("ladder", gamma=2), "gamma=2 must lie in [0, 1]"),
        (lambda: jaxpg.lab.run("ladder", checkpoint="runs/a"), "jaxpg.Run('runs/a').checkpoint() is"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_pythons_words(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    text = re.sub(r"jaxpg \w+ --help", "", str(caught.value))
    assert "--" not in text and "\n" not in text


def test_hints_leave_whole_commands_as_they_are():
    assert in_python("give --part 1/3, or jaxpg sweep --join FOLDER") == (
        "give part='1/3', or jaxpg sweep --join FOLDER"
    )
    assert in_python("with --run and --lambda 0.9, or --resume-or-start") == (
        "with folder and lambda_=0.9, or resume=True"
    )
    assert in_python(
        "give --kl-estimate reward, or --keep 0,2 with more --updates or --num-steps"
    ) == ("give kl_estimate reward, or keep=0,2 with more updates or num_steps")
