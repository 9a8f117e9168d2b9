"""Files of episodes are read as they were written, and errors are one line."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from worlds import clock

from jaxpg.envs import Box, from_gymnax, from_mdp, mdp_from_gymnax
from jaxpg.policies import Agent, actor_critic, init_params, mlp
from jaxpg.rollout import episodes
from jaxpg.runs.config.config import Config, Grid
from jaxpg.runs.play import playback
from jaxpg.runs.play.experts import SLIP, expert
from jaxpg.runs.store.trajectories import read_demonstrations, read_trajectories, write_trajectories
from jaxpg.runs.train.build import build, instructed, settings_of
from jaxpg.runs.train.saved import Run
from jaxpg.training.data import log_prob_of

T, B = 5, 3


def recorded():
    env = clock(T, death=4)
    agent = actor_critic(env, hidden=(4,))._replace(critic=None)
    return env, episodes(env, agent, init_params(agent, jax.random.key(0)), jax.random.key(1), B)[0]


def arrays(**changes):
    """The fields of a file of episodes of the two-action clock, with changes."""
    _, trajectory = recorded()
    names = ("obs", "action", "reward", "discount", "mask", "log_prob")
    fields = {name: np.array(getattr(trajectory, name)) for name in names}
    fields |= {"environment": np.array("Clock")} | changes
    return {name: value for name, value in fields.items() if value is not None}


def test_a_file_gives_back_what_was_recorded(tmp_path):
    env, trajectory = recorded()
    write_trajectories(tmp_path / "a.npz", trajectory, "Clock")
    found, name = read_trajectories(tmp_path / "a.npz")
    assert name == "Clock" and [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    for field, kept, was in zip(trajectory._fields, found, trajectory, strict=True):
        assert np.array_equal(kept, was), field
    again = read_demonstrations(tmp_path / "a.npz", env, "Clock")
    assert np.array_equal(again.action, trajectory.action)


def test_fixed_and_unbounded_entries_of_an_action_are_read_back(tmp_path):
    largest = float(np.finfo(np.float32).max)
    bounds = np.array([[-1, 0.25, -largest], [1, 0.25, largest]], np.float32)
    env = clock(T, continuous=True)._replace(action=Box(*bounds))
    agent = Agent(mlp(env.observation, env.action, hidden=(4,)))
    params = init_params(agent, jax.random.key(0))
    trajectory, _ = episodes(env, agent, params, jax.random.key(1), B)
    write_trajectories(tmp_path / "a.npz", trajectory, "Clock")
    found = read_demonstrations(tmp_path / "a.npz", env, "Clock")
    assert (found.action[..., 1] == 0.25).all() and np.isfinite(found.action).all()
    again = log_prob_of(agent.policy, params.policy, (), found)
    np.testing.assert_allclose(again, trajectory.log_prob, rtol=1e-5)


@pytest.mark.slow
def test_episodes_are_those_of_a_runs_wrappers(tmp_path, monkeypatch):
    """Recordings are of what the agent saw, and only a run that sees the same may learn from them."""
    met = Config("CartPole-v1", hidden=(4,), seeds=1, keep=(0, 2), repeat=2, history=3)
    parts = build(met)
    params = jax.vmap(lambda key: init_params(parts.agent, key))(
        jax.random.split(jax.random.key(0), 1)
    )
    run = Run(tmp_path, met, Grid(), parts, params, None, np.array([False]), "float32")
    monkeypatch.setattr(playback, "read_run", lambda folder, update: run)
    out = tmp_path / "a.npz"
    playback.record(["r", "--episodes", "2", "--out", str(out)])
    name = "CartPole-v1 --keep 0,2 --repeat 2 --history 3"
    trajectory, found = read_trajectories(out)
    assert found == name
    obs, action = np.asarray(trajectory.obs), np.asarray(trajectory.action)
    assert obs.shape[2:] == (3 * (2 + 2),) == parts.env.observation.shape
    # A window's last row has the action that led there, one-hot, and the two kept entries.
    led = obs[1:, :, -4:-2].argmax(-1)
    assert (led == action[:-1])[np.asarray(trajectory.mask)[1:]].all()

    def learn(**flags):
        config = replace(met, algorithm="behaviour_cloning", demonstrations=str(out), **flags)
        return instructed(build(config), config).demonstrations

    demonstrations = learn()
    assert demonstrations is not None and np.array_equal(demonstrations.obs, obs)
    for flags, other in (
        ({"repeat": 1}, "--keep 0,2 --history 3"),
        ({"keep": (0, 1)}, "--keep 0,1 "),
    ):
        with pytest.raises(
            ValueError, match=f"holds episodes of {name}, not of CartPole-v1 {other}"
        ):
            learn(**flags)


def test_log_probs_may_be_absent(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(log_prob=None, environment=None))
    found = read_demonstrations(tmp_path / "a.npz", clock(T, death=4), "Clock")
    assert np.isnan(np.asarray(found.log_prob)[np.asarray(found.mask)]).all()


def set_at(values, value, where=(1, 2)):
    values = values.copy()
    values[where] = value
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": np.array("CartPole-v1")}, "holds episodes of CartPole-v1, not of Clock"),
        ({"reward": None, "mask": None}, "has no reward, mask; episodes need obs, action"),
        ({"obs": np.zeros((T, B, 3))}, r"obs has shape \(3,\) per step; the environment's is \(2,\)"),
        ({"reward": np.zeros((T, 2))}, r"reward has shape \(5, 2\), and mask has \(5, 3\)"),
        ({"action": np.full((T, B), 2)}, "action 2 at step 0 of episode 0 is impossible; actions are 0 to 1"),
        ({"action": np.full((T, B), 0.5)}, "action must be whole numbers"),
        ({"obs": np.full((T, B, 2), np.nan)}, "obs is not finite"),
        ({"log_prob": np.full((T, B), -np.inf)}, "log_prob is -inf at step 0 of episode 0"),
        ({"log_prob": set_at(np.zeros((T, B)), np.nan)}, "log_prob is NaN in 1 of 12 steps"),
        ({"mask": np.zeros((T, B), bool)}, "mask must be 1 from the first step"),
        ({"mask": np.ones(T, bool)}, "it must be"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_line(changes, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message) as error:
        read_demonstrations(tmp_path / "a.npz", clock(T, death=4), "Clock")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read"):
        read_trajectories(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="cannot read"):
        read_trajectories(tmp_path / "none.npz")


def test_episodes_longer_than_the_environments_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    with pytest.raises(ValueError, match="has episodes of 5 steps; Clock ends after 3"):
        read_demonstrations(tmp_path / "a.npz", clock(3), "Clock")


@pytest.mark.slow
def test_the_optimal_expert_is_optimal():
    """Agrees with the finite-horizon optimum of the table, and has full support."""
    env = from_gymnax("DeepSea-bsuite", size=6, max_steps_in_episode=6)
    agent = Agent(expert("DeepSea-bsuite", env, size=6, max_steps_in_episode=6))
    trajectory, _ = episodes(
        env, agent, init_params(agent, jax.random.key(0)), jax.random.key(1), 400
    )
    straight = (1 - SLIP / 2) ** 6
    found = (np.asarray(trajectory.reward).sum(axis=0) > 0.5).mean()
    assert abs(found - straight) < 5 * (straight * (1 - straight) / 400) ** 0.5
    assert np.asarray(trajectory.log_prob).min() == pytest.approx(np.log(SLIP / 2), abs=1e-4)
    # FrozenLake slips two times in three, and the expert's own actions slip too.
    mdp = mdp_from_gymnax("FrozenLake-misc")
    lake = from_mdp(mdp)
    agent = Agent(expert("FrozenLake-misc", lake))
    trajectory, _ = episodes(
        lake, agent, init_params(agent, jax.random.key(0)), jax.random.key(2), 1000
    )
    reached = np.asarray(trajectory.reward).sum(axis=0).mean()
    assert 0.3 < reached < best_chance(mdp), "at random it is 0.014"
    with pytest.raises(
        ValueError, match="no scripted expert for CartPole-v1; there is one for Frozen"
    ):
        expert("CartPole-v1", env)


def best_chance(mdp):
    """The success of a policy that also sees the hidden coin, by backward induction: an upper bound."""
    value = np.zeros(len(mdp.initial))
    for _ in range(mdp.horizon):
        quality = np.asarray(mdp.reward) + np.asarray(mdp.transition) @ value
        value = np.where(mdp.terminal, 0.0, quality.max(axis=1))
    return float(mdp.initial @ value)


def config(**settings):
    return Config("DeepSea-bsuite", network="linear", seeds=1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "guided"}, "guided learns from demonstrations; give --demonstrations FILE"),
        ({"algorithm": "ppo", "demonstrations": "a.npz"}, "ppo does not read demonstrations"),
        (
            {"algorithm": "guided", "demonstrations": "a.npz"},
            "which behaviour cloning fits; give --imitate",
        ),
        (
            {"algorithm": "reinforce", "demonstrations": "a.npz", "imitate": 5},
            "nothing uses; add --warm-start",
        ),
        ({"algorithm": "reinforce", "imitate": 5}, "imitate=5 needs demonstrations"),
        ({"algorithm": "reinforce", "settings": "size"}, "'size' is not name=value"),
        ({"algorithm": "reinforce", "settings": "sise=3"}, "no setting 'sise'"),
        ({"algorithm": "ppo", "importance": "per_decision"}, "per_decision needs whole episodes"),
        ({"algorithm": "off_policy", "importance": "is"}, "unknown importance 'is'"),
        ({"algorithm": "off_policy", "num_batches": 0}, "num_batches=0 must be at least 1"),
    ],
)
def test_flags_about_data_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        build(config(**settings))


@pytest.mark.slow
def test_a_run_reads_its_demonstrations_and_starts_from_them(tmp_path):
    env = from_gymnax("DeepSea-bsuite", size=4, max_steps_in_episode=4)
    agent = Agent(expert("DeepSea-bsuite", env, size=4, max_steps_in_episode=4))
    trajectory, _ = episodes(
        env, agent, init_params(agent, jax.random.key(0)), jax.random.key(1), 9
    )
    path = tmp_path / "a.npz"
    write_trajectories(path, trajectory, "DeepSea-bsuite")
    given = config(
        settings="size=4,max_steps_in_episode=4",
        algorithm="reinforce",
        demonstrations=str(path),
        imitate=800,
        warm_start=True,
    )
    assert settings_of(given) == {"size": 4, "max_steps_in_episode": 4}
    parts = instructed(build(given), given)
    assert parts.demonstrations is None, "a warm start alone needs them no further"
    state = jax.jit(parts.trainer.init)(jax.random.key(0))
    warm, _ = episodes(env, parts.agent, state.params, jax.random.key(2), 200)
    assert np.asarray(warm.reward).sum(axis=0).mean() > 0.7
    small = config(algorithm="reinforce", demonstrations=str(path), imitate=1, warm_start=True)
    with pytest.raises(ValueError, match="obs has shape"):
        instructed(build(small), small)
