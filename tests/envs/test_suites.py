"""Environments of other suites, by name: each adapter against its suite's own loop."""

import sys
import tomllib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import check_adapter

from jaxpg import Hyperparams, episodes, make_trainer, train
from jaxpg.envs import SUITES, check_env, env_names, installed, make_env, suites
from jaxpg.envs.suites.gymnasium import on_host
from jaxpg.policies import actor_critic, init_params
from jaxpg.rollout import init_stream, unroll
from jaxpg.runs.listing import described, execute
from jaxpg.training.algorithm import algorithm

# One environment of every suite, small where it can be.
SMALL = {
    "brax": "inverted_pendulum",
    "craftax": "Craftax-Classic-Symbolic-v1",
    "gymnasium": "CartPole-v1",
    "jumanji": "Snake-v1",
    "navix": "Navix-Empty-5x5-v0",
    "pgx": "2048",
    "playground": "CartpoleBalance",
    "xminigrid": "MiniGrid-Empty-5x5",
}


def needs(suite):
    if not installed(suite):
        pytest.skip(f"{suite} is not installed: {suites.installing(suite)}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the suites' own code
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_keeps_the_contract(suite):
    needs(suite)
    assert f"{suite}/{SMALL[suite]}" in env_names(suite)
    env = make_env(f"{suite}/{SMALL[suite]}", horizon=12)
    assert env.horizon == 12
    steps = check_adapter(env, afterwards=False)
    assert (steps.obs[:, 0] != steps.obs[:, 5]).any(), "something moves"


def test_every_suite_has_an_extra_of_its_name():
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for suite in SUITES:
        (requirement,) = extras[suite]
        assert requirement.startswith(suite) and set(SUITES) == set(SMALL)


@pytest.mark.slow
def test_a_game_of_pgx_is_its_own():
    needs("pgx")
    import pgx

    env, game, key = make_env("pgx/2048"), pgx.make("2048"), jax.random.key(3)
    state, obs = jax.jit(env.reset)(key)
    raw = jax.jit(game.init)(key)
    step, by_hand = jax.jit(env.step), jax.jit(game.step)
    total = 0.0
    for t in range(40):
        seen, allowed = env.observation.split(obs)
        np.testing.assert_array_equal(seen, raw.observation)
        np.testing.assert_array_equal(allowed, raw.legal_action_mask)
        action = jnp.int32(np.flatnonzero(raw.legal_action_mask)[0] if t < 39 else t % 4)
        state, result = step(jax.random.key(t), state, action)
        raw = by_hand(raw, action, jax.random.key(t))
        obs, total = result.obs, total + raw.rewards[0]
        assert result.reward == raw.rewards[0] and result.terminated == raw.terminated
    assert total > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_puzzle_of_jumanji_is_its_own_and_its_clock_is_no_death():
    needs("jumanji")
    import jumanji

    env, own = make_env("jumanji/Snake-v1", horizon=6), jumanji.make("Snake-v1", time_limit=6)
    grid = make_env("jumanji/Snake-v1", part="grid")
    assert grid.observation.inner.shape == own.observation_spec.grid.shape
    state, obs = jax.jit(env.reset)(jax.random.key(1))
    raw, seen = jax.jit(own.reset)(jax.random.key(1))
    step, by_hand = jax.jit(env.step), jax.jit(own.step)
    # A snake that turns in a circle stays alive.
    for t in range(6):
        parts = seen.observation.grid.ravel(), seen.observation.step_count[None]
        parts = *parts, seen.observation.action_mask
        np.testing.assert_array_equal(obs, np.concatenate(parts), "in jumanji's order")
        action = jnp.int32(t % 4)
        state, result = step(jax.random.key(t), state, action)
        raw, seen = by_hand(raw, action)
        obs = result.obs
        assert result.reward == seen.reward
        if seen.last():
            break
    assert seen.last() and seen.discount == 0, "jumanji calls its clock a death"
    assert t == 5 and result.truncated and not result.terminated


def play(env, params, agent, key):
    return jax.jit(partial(episodes, env, agent, num_episodes=3))(params, key)[0]


@pytest.mark.slow
def test_python_environments_play_the_episodes_of_gymnasium():
    import gymnasium

    env = make_env("gymnasium/CartPole-v1", horizon=30)
    agent = actor_critic(env, hidden=(4,))
    params = init_params(agent, jax.random.key(0))
    found = play(env, params, agent, jax.random.key(1))
    own = gymnasium.make("CartPole-v1", max_episode_steps=30)
    assert found.mask.sum() > 10
    for lane in range(3):
        steps = int(found.mask[:, lane].sum())
        # The seed is in no trajectory: look for the start among those of the state.
        state, opening = _openings(env, lane)
        np.testing.assert_array_equal(found.obs[0, lane], opening)
        seen, _ = own.reset(seed=int(state[0]) // 2)
        for t in range(steps):
            np.testing.assert_allclose(found.obs[t, lane], seen, 1e-6)
            seen, reward, terminated, truncated, _ = own.step(int(found.action[t, lane]))
            assert found.reward[t, lane] == reward
            assert found.last[t, lane] == (terminated or truncated)
            assert found.discount[t, lane] == (not terminated)


def _openings(env, lane):
    """The seed and first observation of a lane, drawn as `episodes` draws them from key 1."""
    k_reset, _ = jax.random.split(jax.random.key(1))
    state, obs = env.reset(jax.random.split(k_reset, 3)[lane])
    return state[0], obs


@pytest.mark.slow
def test_seeds_side_by_side_play_each_its_own_episodes():
    env = make_env("gymnasium/CartPole-v1", horizon=20)
    agent = actor_critic(env, hidden=(4,))
    params = init_params(agent, jax.random.key(0))

    def run(key):
        state = init_stream(env, agent, key, 3)
        return unroll(env, agent, params, state, key, 40)[1][0]

    keys = jax.random.split(jax.random.key(5), 2)
    together = jax.jit(jax.vmap(run))(keys)
    for i, key in enumerate(keys):
        alone = jax.jit(run)(key)
        np.testing.assert_allclose(together.obs[i], alone.obs, 1e-5)
        np.testing.assert_array_equal(together.last[i], alone.last)
    assert together.last.sum() > 6 and (together.obs[0] != together.obs[1]).any()

    trainer = make_trainer(env, agent, algorithm("reinforce_baseline"), num_envs=16)
    learn = jax.jit(jax.vmap(partial(train, trainer, num_updates=3), (0, None)))
    _, metrics = learn(jax.vmap(trainer.init)(keys), Hyperparams(learning_rate=1e-2))
    assert np.isfinite(metrics["objective"]).all() and (metrics["episodes"] == 16).all()


def test_a_step_on_the_host_twice_is_one_step_and_a_lost_episode_is_cut():
    env = make_env("gymnasium/CartPole-v1")
    check_env(env)
    state, obs = env.reset(jax.random.key(0))
    key, push = jax.random.key(1), jnp.int32(1)
    once, one = env.step(key, state, push)
    again, other = env.step(key, state, push)
    np.testing.assert_array_equal(one.obs, other.obs)
    _, further = env.step(key, once, push)
    _, repeated = env.step(key, again, push)
    np.testing.assert_array_equal(further.obs, repeated.obs)
    lost = state[0] + 1, jnp.int32(7), obs  # no host plays it, as after a resume
    _, cut = env.step(key, lost, push)
    assert cut.truncated and not cut.terminated and cut.reward == 0
    np.testing.assert_array_equal(cut.obs, obs)


def test_one_call_on_the_host_for_everything_that_is_mapped():
    calls = []

    def double(x):
        calls.append(x.shape)
        return [np.asarray(2 * x)]

    run = on_host(double, [jax.ShapeDtypeStruct((), np.float32)])
    x = jnp.arange(6.0).reshape(2, 3)
    (found,) = jax.jit(jax.vmap(jax.vmap(run)))(x)
    np.testing.assert_array_equal(found, 2 * x)
    assert calls == [(6,)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("CartPol-v1", {}, "unknown environment 'CartPol-v1'; did you mean CartPole-v1"),
        ("gymnax/CartPole-v1", {}, "gymnax's environments have bare names: CartPole-v1"),
        ("nethack/X", {}, "unknown suite 'nethack' in 'nethack/X'; the suites are brax"),
        ("gymnasium/CartPol-v1", {}, "did you mean gymnasium/CartPole-v1"),
        ("gymnasium/CartPole-v1", {"size": 3}, "cannot be made with size=3: "),
        ("gymnasium/CartPole-v1", {"horizon": 2.5}, "horizon=2.5 must be a whole number"),
        ("gymnasium/CartPole-v1", {"horizon": 0}, "horizon=0 must be a whole number"),
        ("pgx/chess", {}, r"games of several players, and self-play, are left out"),
        ("jumanji/Connector-v3", {}, "it rewards several agents apart"),
        ("jumanji/Snake-v1", {"part": "gird"}, "shows no part 'gird'; it shows grid"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_name_that_cannot_be_made_is_one_line(name, settings, message):
    if name.partition("/")[0] in SUITES:
        needs(name.partition("/")[0])
    with pytest.raises(ValueError, match=message) as error:
        make_env(name, **settings)
    assert "\n" not in str(error.value)


def test_a_suite_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setitem(SUITES, "brax", SUITES["brax"]._replace(package="no_such_package"))
    with pytest.raises(ValueError, match=r"brax/ant needs .* -m pip install -e '/.*\[brax\]'"):
        make_env("brax/ant")
    monkeypatch.setattr(suites, "__file__", "/usr/lib/python3/site-packages/jaxpg/envs/suites/x.py")
    with pytest.raises(ValueError, match=r"brax/ant needs .*: pip install 'jaxpg\[brax\]'"):
        make_env("brax/ant")


def test_the_list_shows_what_can_be_made(capsys):
    execute(["mountain"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["environment", "observation", "action", "steps", "presets"]
    assert lines[1].split() == ["MountainCar-v0", "Box", "2", "Discrete", "3", "200", "ppo"]
    assert any(line.startswith("gymnasium/MountainCar-v0") for line in lines)
    assert "cannot be made" in described("gymnasium/Adventure-v9") or "unknown" in described(
        "gymnasium/Adventure-v9"
    )
    with pytest.raises(ValueError, match="no environment here has 'zzz' in its name"):
        execute(["zzz"])
    with pytest.raises(ValueError, match="takes one word"):
        execute(["a", "b"])


WORLDS = '''
import jax.numpy as jnp, numpy as np
from jaxpg.envs import Box, Discrete, Env
from jaxpg.types import TimeStep

def make(size=4):
    """Pays for steps to the right."""
    def reset(key):
        return jnp.int32(0), jnp.zeros(1)
    def step(key, state, action):
        reward = jnp.float32(action)
        return state + 1, TimeStep(jnp.ones(1) * (state + 1), reward, jnp.bool_(False), state + 1 >= size)
    anywhere = np.full(1, np.inf, np.float32)
    return Env(reset, step, Box(-anywhere, anywhere), Discrete(2), int(size))

def nothing():
    return 3

def gymnaxs():
    import gymnax
    return gymnax.make("CartPole-v1")
'''


@pytest.fixture
def worlds(tmp_path, monkeypatch):
    """The name of a module in the working directory, whose folder is on no path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"worlds_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(WORLDS)
    yield name
    sys.modules.pop(name, None)


def test_a_factory_is_found_in_the_working_directory(worlds):
    check_adapter(make_env(f"{worlds}:make", size=9))
    assert make_env(f"{worlds}:gymnaxs").horizon == 500
    for name, message in {
        f"{worlds}:nothing": "gives a int; it must give a jaxpg.Env",
        f"{worlds}:mak": "has no 'mak'; did you mean make",
        f"{worlds}_:make": "cannot import .*: ModuleNotFoundError",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_env(name)
    with pytest.raises(ValueError, match=r"cannot be made with width=3: .*unexpected keyword"):
        make_env(f"{worlds}:make", width=3)


def test_an_entry_point_names_a_factory(worlds, monkeypatch):
    from importlib.metadata import EntryPoint

    declared = EntryPoint("Walk-v0", f"{worlds}:make", suites.GROUP)
    monkeypatch.setattr(suites, "entry_points", lambda group: [declared])
    assert make_env("Walk-v0", size=3).horizon == 3 and "Walk-v0" in env_names()
