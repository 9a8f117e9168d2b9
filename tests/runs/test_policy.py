"""A loaded policy acts like the trained one, as its evaluation, recordings and films show."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_runs import start

import jaxpg
from jaxpg.cli import main
from jaxpg.envs import from_gymnax, gymnax_names
from jaxpg.policies import init_params
from jaxpg.runs.config.config import Config
from jaxpg.runs.play import playback
from jaxpg.runs.play import policy as policies
from jaxpg.runs.play.frames import DRAWERS, frame
from jaxpg.runs.store import checkpoint
from jaxpg.runs.store.trajectories import read_trajectories
from jaxpg.runs.train.build import build
from jaxpg.runs.train.saved import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "run"
    start(folder, "--updates", "20", "--checkpoint-seconds", "0", "--normalise")
    return folder


def probabilities(run, replica, obs):
    """Computed by hand: the statistics, two layers, a softmax."""
    with np.load(run / "params.npz") as file:
        p = {k: v[replica] for k, v in file.items() if k.startswith("policy")}
    seen, mean, squares = (p[f"policy/statistics/{k}"] for k in ("seen", "mean", "squares"))
    x = np.clip((obs - mean) / np.sqrt(np.maximum(squares / seen, 1e-8)), -10, 10)
    x = np.tanh(x @ p[body(p, "kernel")] + p[body(p, "bias")])
    head = [v for k, v in p.items() if "head" in k and k.endswith("kernel")]
    bias = [v for k, v in p.items() if "head" in k and k.endswith("bias")]
    logits = x @ head[0] + bias[0]
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def body(p, what):
    return next(k for k in p if "body" in k and k.endswith(what))


@pytest.mark.slow
def test_act_samples_the_policy_on_raw_observations(run):
    obs = np.array([0.5, -1.0, 0.1, 0.7], np.float32)
    for replica in (0, 1):
        policy = jaxpg.load_policy(run, replica)
        expected = probabilities(run, replica, obs)
        drawn = np.asarray(policy.act(jax.random.key(0), np.tile(obs, (20_000, 1))))
        error = np.sqrt(expected[1] * expected[0] / 20_000)
        assert abs(drawn.mean() - expected[1]) < 5 * error
        greedy = jaxpg.load_policy(run, replica, greedy=True)
        assert greedy.act(jax.random.key(1), obs) == expected.argmax()
        assert greedy.act(jax.random.key(1), obs).shape == ()


def test_the_best_is_the_best_evaluated(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    evaluation = json.loads((copy / "evaluation.json").read_text())
    for returns, best in (([1.0, 2.0], 1), ([3.0, 2.0], 0), ([None, 2.0], 1)):
        (copy / "evaluation.json").write_text(json.dumps(evaluation | {"mean_return": returns}))
        assert jaxpg.load_policy(copy).replica == best
        assert jaxpg.load_policy(copy, "best").seed == best
    (copy / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="name one from 0 to 1, or finish the run"):
        jaxpg.load_policy(copy)


def test_the_end_is_the_last_checkpoint_and_others_can_be_named(run, tmp_path):
    end, last = (read_run(run, update).params for update in (None, 20))
    assert all(map(np.array_equal, jax.tree.leaves(end), jax.tree.leaves(last)))
    before = read_run(run, 19).params
    assert not all(map(np.array_equal, jax.tree.leaves(end), jax.tree.leaves(before)))
    assert read_run(run, "best").update in range(1, 21)
    # A run that was killed has only its checkpoint.
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "params.npz").unlink()
    assert read_run(copy).update == 20


@pytest.mark.parametrize(
    ("replica", "update", "message"),
    [
        (2, None, "replicas 0 to 1, not 2"),
        ("worst", None, "must be a number"),
        (0, 7, "no checkpoint of 7 updates; it has"),
    ],
)
def test_what_a_run_has_not_is_said(run, replica, update, message):
    with pytest.raises(ValueError, match=message):
        jaxpg.load_policy(run, replica, update=update)
    with pytest.raises(ValueError, match=r"no config\.json"):
        jaxpg.load_policy(run.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: np.where(x == x.flat[0], np.nan, x),
            "is not finite in replica 0, which did not",
        ),
        (lambda x: x[..., :-1], "does not hold critic"),
        (lambda x: x[:1], "does not hold critic"),
        (lambda x: x.astype(str), "does not hold critic"),
    ],
)
def test_parameters_are_those_of_the_run(run, tmp_path, change, message):
    copy = shutil.copytree(run, tmp_path / "run")
    with np.load(copy / "params.npz") as file:
        arrays = dict(file)
    name = next(name for name in arrays if name.startswith("critic") and name.endswith("kernel"))
    np.savez(copy / "params.npz", **(arrays | {name: change(arrays[name])}))
    with (
        zipfile.ZipFile(run / "params.npz") as old,
        zipfile.ZipFile(copy / "params.npz", "a") as new,
    ):
        new.comment = old.comment
    with pytest.raises(ValueError, match=message) as error:
        read_run(copy)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_what_has_diverged_is_no_policy(run, tmp_path, capsys):
    """It cannot act, or be recorded, drawn, measured or best, and its evaluation says so."""
    folder = shutil.copytree(run, tmp_path / "run")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    best = int(np.argmax(evaluation["mean_return"]))
    evaluation["mean_return"][best] = None
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    message = f"replica {best} of {folder} has diverged, so it has no policy; name another, such as"
    for use in (lambda: jaxpg.load_policy(folder, best), lambda: policies.load(folder, best)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()
    assert jaxpg.load_policy(folder).replica != best
    out = tmp_path / "out"
    for command in (
        f"record {folder} --replica {best} --episodes 1 --out {out}.npz",
        f"render {folder} --replica {best} --out {out}.gif",
    ):
        with pytest.raises(SystemExit) as exit:
            main(command.split())
        assert (
            exit.value.code == 2 and "has diverged, so it has no policy" in capsys.readouterr().err
        )
    assert not list(tmp_path.glob("out*"))
    main(f"evaluate {folder} --episodes 2".split())
    assert "diverged" in capsys.readouterr().out


def test_a_wrong_observation_is_said(run):
    with pytest.raises(ValueError, match=r"shape \(4,\), several have one axis more; got \(3,\)"):
        jaxpg.load_policy(run, 0).act(jax.random.key(0), np.zeros(3))


@pytest.mark.slow
def test_a_recurrent_policy_remembers_until_an_episode_is_first():
    parts = build(Config("CartPole-v1", network="gru", hidden=(4,)))
    params = init_params(parts.agent, jax.random.key(2))
    policy = policies._policy(parts, params, False, 0, 0)
    key, rows = jax.random.key(0), jax.random.normal(jax.random.key(1), (5, 4))
    carry, expected = policy.initial_carry(1), []
    for t, obs in enumerate(rows):
        first = jnp.array([t in (0, 3)])
        action, carry = policy.step(jax.random.fold_in(key, t), obs[None], carry, first)
        expected.append((int(action[0]), np.concatenate(jax.tree.leaves(carry)).ravel()))
    for t, obs in enumerate(rows):
        action = policy.act(jax.random.fold_in(key, t), obs, first=t in (0, 3))
        assert int(action) == expected[t][0]
    # The same observation gives another distribution later: the carry matters, and first resets it.
    again, _ = policy.step(key, rows[:1], carry, jnp.array([True]))
    fresh, _ = policy.step(key, rows[:1], policy.initial_carry(1), jnp.array([True]))
    assert again == fresh
    assert not np.allclose(expected[2][1], expected[3][1])
    # Typed and raw keys draw the same.
    typed, raw = (
        (
            policy.step(make(3), rows, policy.initial_carry(5), jnp.ones(5, bool)),
            policy.act(make(3), rows, first=True),
        )
        for make in (jax.random.key, jax.random.PRNGKey)
    )
    jax.tree.map(np.testing.assert_array_equal, typed, raw)


@pytest.mark.slow
def test_a_policy_takes_the_wrappers_of_its_run_with_it():
    """Compares the run's network in the wrapped environment with act and step in the plain one."""
    limit, repeat, decisions = 5, 2, 3  # the last repetition is cut
    config = Config(
        "Pendulum-v1", settings=f"max_steps_in_episode={limit}", network="gru", hidden=(4,),
        keep=(1, 2), history=3, repeat=repeat, normalise=True,
    )  # fmt: skip
    parts, plain = build(config), from_gymnax("Pendulum-v1")
    network, params = parts.agent.policy, init_params(parts.agent, jax.random.key(2))
    rows = jax.random.normal(jax.random.key(3), (20, 1, *parts.env.observation.shape))
    assert network.observe is not None
    seen = params._replace(policy=network.observe(params.policy, rows, jnp.ones((20, 1))))
    # A larger last layer makes an action sensitive to every number that it depends on.
    params = jax.tree.map(lambda x: x * (20 if x.shape == (64, 1) else 1), seen)
    policy = policies._policy(parts, params, False, 0, 0)
    assert policy.env.observation.shape == (3,) and policy.env.horizon == limit

    @jax.jit
    def outer(key, state, obs, carry, first):
        carry, distribution = network.apply(params.policy, carry, obs[None], first[None])
        action = jnp.clip(distribution.sample(key)[0], -2, 2)
        keys = jax.random.split(key, len(obs))
        state, result = jax.vmap(parts.env.step)(keys, state, action)
        return action, state, result.obs, carry

    @jax.jit
    def inner(key, state, obs, carry, first, action):
        again, carry = policy.step(key, obs, carry, first)
        state, result = jax.vmap(plain.step)(jax.random.split(key, len(obs)), state, action)
        return again, state, result.obs, carry

    for lanes in (1, 3):
        memory, carry = network.initial_carry(lanes), policy.initial_carry(lanes)
        chosen, one = [], lanes == 1
        for episode in range(2):
            keys = jax.random.split(jax.random.key(episode), lanes)
            state, shown = jax.jit(jax.vmap(parts.env.reset))(keys)
            base, obs = jax.jit(jax.vmap(plain.reset))(keys)
            for t in range(limit):
                key, first = jax.random.key(10 * episode + t), jnp.full(lanes, t == 0)
                if t % repeat == 0:
                    decided, state, shown, memory = outer(key, state, shown, memory, first)
                    chosen.append(decided)
                action = policy.act(key, obs[0] if one else obs, first=t == 0)
                assert action.shape == ((1,) if one else (lanes, 1))
                action = action[None] if one else action
                again, base, obs, carry = inner(key, base, obs, carry, first, action)
                np.testing.assert_allclose(action, chosen[-1], atol=1e-4)
                np.testing.assert_allclose(again, chosen[-1], atol=1e-4)
        assert len(chosen) == 2 * decisions
        assert len(np.unique(chosen)) > decisions  # few are clipped


@pytest.mark.slow
def test_evaluate_repeats_the_runs_own_evaluation(run, capsys):
    saved = json.loads((run / "evaluation.json").read_text())["mean_return"]
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    found = playback.evaluation(read_run(run), 2, greedy=False)
    np.testing.assert_allclose(found.mean, saved, rtol=1e-6)
    main(["evaluate", str(run), "--episodes", "3", "--greedy", "--seed", "4"])
    printed = capsys.readouterr().out
    assert "3 fresh episodes, greedy actions" in printed
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")} == before


def test_recorded_episodes_are_whole_and_the_policys(run, tmp_path, capsys):
    out = tmp_path / "d.npz"
    main(["record", str(run), "--episodes", "6", "--out", str(out), "--replica", "1"])
    assert "6 episodes of replica 1" in capsys.readouterr().out
    trajectory, environment = read_trajectories(out)
    assert environment == "CartPole-v1"
    steps, count = trajectory.mask.shape
    assert count == 6
    assert trajectory.mask.sum(axis=0).max() == steps < 500
    expected = probabilities(run, 1, trajectory.obs)
    chosen = np.take_along_axis(expected, np.asarray(trajectory.action)[..., None], -1)[..., 0]
    mask = np.asarray(trajectory.mask)
    np.testing.assert_allclose(trajectory.log_prob[mask], np.log(chosen[mask]), atol=1e-4)
    main(["record", str(run), "--episodes", "6", "--out", str(out), "--greedy", "--replica", "1"])
    trajectory, _ = read_trajectories(out)
    mask = np.asarray(trajectory.mask)
    best = probabilities(run, 1, trajectory.obs).argmax(-1)
    np.testing.assert_array_equal(np.asarray(trajectory.action)[mask], best[mask])


@pytest.mark.parametrize("update", [None, "best"])
def test_a_checkpoint_that_training_removes_meanwhile_gives_way(run, tmp_path, monkeypatch, update):
    folder = shutil.copytree(run, tmp_path / "r")
    (folder / "params.npz").unlink()
    kept = checkpoint.steps(folder / "checkpoints")
    gone, read = [], checkpoint._read

    def removed(path, items):
        if not gone:
            gone.append(int(path.name))
            shutil.rmtree(path)
        return read(path, items)

    monkeypatch.setattr(checkpoint, "_read", removed)
    assert read_run(folder, update).update in {*kept} - {*gone}
    assert gone and {*checkpoint.steps(folder / "checkpoints")} == {*kept} - {*gone}
    # A checkpoint asked for by number is not replaced by another.
    named = kept[1]
    gone.clear()
    with pytest.raises(ValueError, match=f"has no checkpoint of {named} updates; it has "):
        read_run(folder, named)


def decoded(path):
    with Image.open(path) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).copy())
    return frames


def test_a_film_has_a_frame_for_each_step_and_they_differ(run, tmp_path, capsys):
    out = tmp_path / "film.gif"
    main(["render", str(run), "--out", str(out), "--replica", "0", "--seed", "3"])
    said = capsys.readouterr().out
    frames = decoded(out)
    assert said.startswith(f"{len(frames)} frames of replica 0, return {len(frames) - 1}.0")
    assert 9 <= len(frames) <= 501
    assert frames[0].shape == (264, 320, 3)
    assert len({f.tobytes() for f in frames}) == len(frames)
    # They differ without the caption, which counts steps, too; the first ones move by less than a pixel.
    assert len({f[:240].tobytes() for f in frames}) > len(frames) / 2


ENCODER = "from jaxpg.runs.play.playback import _encoder; print(_encoder())"


def test_an_mp4_needs_an_encoder(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "film.mp4"
    monkeypatch.setattr(playback.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SystemExit):
        main(["render", str(run), "--out", str(out)])
    assert "needs ffmpeg" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    if subprocess.run([sys.executable, "-c", ENCODER], capture_output=True).returncode:
        pytest.skip("no encoder here")
    main(["render", str(run), "--out", str(out), "--replica", "0"])
    assert out.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("render {run} --out film.avi", "must end in .gif or .mp4"),
        ("render {run} --out no/film.gif", "there is no folder no"),
        ("record {run} --episodes 0 --out d.npz", "--episodes 0 must be at least 1"),
        ("record {run} --episodes 2 --out d.txt", "must end in .npz"),
        ("evaluate {run} --episodes -1", "--episodes -1 must be at least 1"),
        (
            "evaluate {run} --update soon",
            "--update soon must be a whole number from 0 to 2147483647, or best",
        ),
        ("evaluate nowhere", "nowhere has no config.json"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments.format(run=run).split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("jaxpg: error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


DRAWN = (*DRAWERS, "Catch-bsuite", "Breakout-MinAtar", "DiscountingChain-bsuite")


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_follows_the_state(name):
    assert name in gymnax_names()
    env = from_gymnax(name)
    reset, take = jax.jit(env.reset), jax.jit(env.step)
    pictures = []
    for i in range(4):
        state, obs = reset(jax.random.key(i))
        for t in range(3):
            k_act, k_step = jax.random.split(jax.random.key(10 * i + t))
            space = env.action
            action = (
                jax.random.uniform(k_act, space.shape)
                if hasattr(space, "low")
                else jax.random.randint(k_act, (), 0, space.n)
            )
            state, result = take(k_step, state, action)
            obs = result.obs
        pictures.append(np.asarray(frame(name, *jax.device_get((state, obs)), caption="")))
    assert len({p.tobytes() for p in pictures}) > 1
    # Something is drawn on a plain background.
    assert all(len(np.unique(p.reshape(-1, 3), axis=0)) >= 2 for p in pictures)
