import re
import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Box, Discrete, from_gymnax, gymnax_names, mdp_from_gymnax

OFFLINE = "MNISTBandit-bsuite"  # downloads its images


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in gymnax_names() if n != OFFLINE])
def test_every_environment_steps_in_a_scan(name):
    env = from_gymnax(name)
    assert isinstance(env.horizon, int) and env.horizon >= 1

    def action(key):
        if isinstance(env.action, Discrete):
            return jax.random.randint(key, (), 0, env.action.n)
        return 3.0 * jax.random.normal(key, env.action.shape)  # mostly outside the bounds

    @jax.jit
    def run(key):
        state, obs = env.reset(key)

        def step(state, key):
            return env.step(key, state, action(key))

        return obs, jax.lax.scan(step, state, jax.random.split(key, 20))[1]

    with jax.numpy_rank_promotion("allow"):  # Swimmer relies on it
        obs, steps = run(jax.random.key(0))
    assert steps.obs.shape == (20, *env.observation.shape) and steps.obs.dtype == obs.dtype
    assert steps.reward.dtype == jnp.float32 and steps.reward.shape == (20,)
    assert steps.terminated.dtype == steps.truncated.dtype == bool
    assert not (steps.terminated & steps.truncated).any()
    assert np.isfinite(np.asarray(steps.reward)).all()
    integer = isinstance(env.observation, Discrete)
    assert obs.dtype == (jnp.int32 if integer else jnp.float32)


def test_time_limit_is_truncation_and_observation_is_the_true_successor():
    env = from_gymnax("Pendulum-v1", max_steps_in_episode=3)
    assert env.horizon == 3
    state, first = env.reset(jax.random.key(1))
    for t in range(3):
        state, result = env.step(jax.random.key(t), state, jnp.zeros(1))
        assert not result.terminated and bool(result.truncated) == (t == 2)
    # The successor follows from the state before it, where a reset would have drawn a new angle.
    assert np.allclose(result.obs, [jnp.cos(state.theta), jnp.sin(state.theta), state.theta_dot])
    assert not np.allclose(result.obs, first)


def test_termination_wins_where_gymnax_flags_both():
    env = from_gymnax("DeepSea-bsuite", size=4)
    assert env.horizon == 4 and env.observation.shape == (4, 4)
    state, _ = env.reset(jax.random.key(0))
    for _ in range(4):
        state, result = env.step(jax.random.key(0), state, jnp.int32(0))
    assert result.terminated and not result.truncated


def test_continuous_actions_are_clipped_before_the_step():
    env = from_gymnax("Pendulum-v1")
    state, _ = env.reset(jax.random.key(0))
    at_bound = env.step(jax.random.key(0), state, jnp.array([2.0]))[1]
    beyond = env.step(jax.random.key(0), state, jnp.array([50.0]))[1]
    assert at_bound.reward == beyond.reward


def test_accepts_a_made_environment_and_its_parameters():
    made, params = gymnax.make("CartPole-v1")
    env = from_gymnax(made, params.replace(max_steps_in_episode=7))
    assert env.horizon == 7 and isinstance(env.observation, Box)
    assert np.isinf(env.observation.high[1]), "the largest float means unbounded"


@pytest.mark.parametrize("name", [n for n in gymnax_names() if n != OFFLINE])
def test_every_environment_computes_in_32_bits_whatever_the_default(name, x64):
    """gymnax supports only this precision: in another, some of its environments do not even trace."""
    env = from_gymnax(name)

    def both(key, action):
        state, obs = env.reset(key)
        return obs, env.step(key, state, action)

    kind = jnp.float32 if isinstance(env.action, Box) else jnp.int32
    with jax.numpy_rank_promotion("allow"):  # Swimmer relies on it
        program = jax.make_jaxpr(both)(jax.random.key(0), jnp.zeros(env.action.shape, kind))
    assert not re.search(r"[iuf]64\[", str(program))


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [
        ("CartPole-v1", "length", (0.2, 2.0)),
        ("MountainCarContinuous-v0", "max_action", (0.5, 1.0)),
        ("MemoryChain-bsuite", "memory_length", (1, 5)),
    ],
)
def test_a_traced_setting_is_the_number_that_it_is(name, setting, values):
    def after(value):
        env = from_gymnax(name, **{setting: value})
        kind = jnp.float32 if isinstance(env.action, Box) else jnp.int32
        state, _ = env.reset(jax.random.key(0))
        for _ in range(2):
            state, result = env.step(jax.random.key(0), state, jnp.ones(env.action.shape, kind))
        return result.obs, result.reward, jax.tree.leaves(state)

    many = jax.jit(jax.vmap(after))(jnp.array(values))
    alone = [jax.jit(lambda value=value: after(value))() for value in values]
    for i, one in enumerate(alone):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, 1e-6), many, one)


def test_what_was_wide_steps_and_is_tabulated_in_64_bits(x64):
    env = from_gymnax("UmbrellaChain-bsuite")
    state, _ = env.reset(jax.random.key(0))
    # Actions and parameters may come in the caller's wider dtypes.
    after, result = jax.jit(env.step)(jax.random.key(0), state, jnp.int64(0))
    assert result.reward.dtype == jnp.float32 and result.obs.dtype == jnp.float32
    dtypes = [jax.tree.map(lambda x: x.dtype, s) for s in (state, after)]
    assert dtypes[0] == dtypes[1]

    def reward(gravity):
        env = from_gymnax("Pendulum-v1", g=gravity)
        state, _ = env.reset(jax.random.key(0))
        state, _ = env.step(jax.random.key(0), state, jnp.zeros(1))
        return env.step(jax.random.key(0), state, jnp.zeros(1))[1].reward

    rewards = jax.jit(jax.vmap(reward))(jnp.array([0.0, 10.0]))
    assert rewards.dtype == jnp.float32 and rewards[0] != rewards[1]
    table = mdp_from_gymnax("DiscountingChain-bsuite", max_steps_in_episode=12)
    jax.config.update("jax_enable_x64", False)
    again = mdp_from_gymnax("DiscountingChain-bsuite", max_steps_in_episode=12)
    jax.tree.map(np.testing.assert_array_equal, table, again)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("CartPole", {}, "CartPole-v1"),
        ("zzzzzzz", {}, "gymnax_names"),
        ("CartPole-v1", {"gravitas": 1.0}, "no setting 'gravitas'.*gravity"),
        ("CartPole-v1", {"max_steps_in_episode": 0}, "=0 must be a whole number of at least 1"),
        ("CartPole-v1", {"max_steps_in_episode": 2.5}, "=2.5 must be a whole number, as 500 is"),
        (
            "BernoulliBandit-misc",
            {"max_steps_in_episode": 2.5},
            "=2.5 must be a whole number of at",
        ),
        (
            "CartPole-v1",
            {"gravity": float("nan")},
            "=nan must be a number that float32 holds, as 9.8",
        ),
        ("CartPole-v1", {"gravity": 1e39}, r"gravity=1e\+39 must be a number that float32 holds"),
        ("CartPole-v1", {"gravity": -1e-50}, "gravity=-1e-50 must be a number that float32 holds"),
        ("CartPole-v1", {"gravity": 10**400}, "gravity=1000+ must be a number that float32 holds"),
        ("CartPole-v1", {"max_steps_in_episode": 10**400}, "=1000+ must be a whole number, as 500"),
        ("CartPole-v1", {"gravity": "high"}, "gravity=high must be a number"),
        ("DeepSea-bsuite", {"deterministic": 2}, "deterministic=2 must be true or false"),
        ("DeepSea-bsuite", {"size": 2.5}, "size=2.5 must be a whole number, as 8 is"),
        ("DeepSea-bsuite", {"size": 0}, "max_steps_in_episode=0 must be"),
        ("SimpleBandit-bsuite", {"num_actions": 0}, "does not run with num_actions=0: .* is empty"),
        ("FrozenLake-misc", {"map_name": "9x9"}, "does not run with map_name=9x9: map_name must"),
    ],
)
def test_mistakes_are_one_clear_line(name, settings, message):
    makers = (from_gymnax, mdp_from_gymnax) if name == "FrozenLake-misc" else (from_gymnax,)
    for maker in makers:
        with pytest.raises(ValueError, match=message) as error:
            maker(name, **settings)
        assert "\n" not in str(error.value)


def test_settings_are_numbers_of_the_kind_of_their_default():
    """As in JSON: 4.0 is a size, 0 is false, and 7 is a number of steps although the default is 100.0."""
    assert from_gymnax("DeepSea-bsuite", size=4.0, deterministic=0).observation.shape == (4, 4)
    assert from_gymnax("BernoulliBandit-misc", max_steps_in_episode=7).horizon == 7


def test_a_data_set_that_cannot_be_fetched_is_said(monkeypatch):
    def offline(name, **settings):
        raise OSError("Name or service not known")

    monkeypatch.setattr(gymnax, "make", offline)
    with pytest.raises(ValueError, match="MNISTBandit-bsuite needs a data set"):
        from_gymnax(OFFLINE)


DRAWS = """
import sys
from jaxpg.envs import from_gymnax
from_gymnax("CartPole-v1")
drawing = {"matplotlib", "matplotlib.pyplot", "matplotlib.colors", "seaborn", "pandas"}
assert not drawing & set(sys.modules), drawing & set(sys.modules)
import gymnax, jax, matplotlib
matplotlib.use("agg")
for name in ("Catch-bsuite", "Pong-misc"):
    env, params = gymnax.make(name)
    _, state = env.reset(jax.random.key(0), params)
    env.render(state, params)
assert drawing <= set(sys.modules)
from matplotlib import pyplot
assert len(pyplot.get_fignums()) == 2
"""


@pytest.mark.slow
def test_libraries_of_pictures_are_imported_when_one_is_drawn():
    done = subprocess.run([sys.executable, "-c", DRAWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
