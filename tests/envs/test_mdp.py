import jax
import numpy as np
import pytest
from worlds import bandit, random_mdp

from jaxpg.envs import check_mdp, from_mdp


def test_frequencies_match_the_tables():
    mdp = random_mdp(0, terminal=False)._replace(reward_variance=np.full((3, 2), 0.25))
    env = from_mdp(mdp)
    num = 200_000

    @jax.jit
    def sample(key):
        k_reset, k_step = jax.random.split(key)
        (s, _), obs = env.reset(k_reset)
        (after, _), result = env.step(k_step, (s, 0), 1)
        return s, obs, after, result.reward

    s, obs, after, reward = map(
        np.asarray, jax.vmap(sample)(jax.random.split(jax.random.key(0), num))
    )
    assert (s == obs).all()
    bound = 5 * 0.5 / np.sqrt(num)
    assert np.abs(np.bincount(s, minlength=3) / num - mdp.initial).max() < bound
    for state in range(3):
        here = s == state
        bound = 5 * 0.5 / np.sqrt(here.sum())
        share = np.bincount(after[here], minlength=3) / here.sum()
        assert np.abs(share - mdp.transition[state, 1]).max() < bound
        assert abs(reward[here].mean() - mdp.reward[state, 1]) < bound
        assert abs(reward[here].var() - 0.25) < 5 * 0.25 * np.sqrt(2 / here.sum())


def test_ends_at_terminal_states_and_at_the_horizon_by_termination():
    env = from_mdp(random_mdp(1, horizon=4))
    key = jax.random.key(0)
    _, result = env.step(key, (np.int32(0), np.int32(3)), 0)
    assert result.terminated and not result.truncated, "V_H = 0: the horizon is part of the process"
    for seed in range(20):
        (after, _), result = env.step(jax.random.key(seed), (np.int32(0), np.int32(0)), 0)
        assert bool(result.terminated) == (int(after) == 2)


def test_observation_aliases_states():
    env = from_mdp(random_mdp(2, terminal=False)._replace(observation=np.array([0, 1, 0])))
    assert env.observation.n == 2
    for seed in range(10):
        (s, _), obs = env.reset(jax.random.key(seed))
        assert int(obs) == [0, 1, 0][int(s)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": np.array([0.5, 0.6, 0.0])}, "initial has a row that is not a distribution"),
        ({"initial": np.array([0.5, 0.25, 0.25])}, "starts in a terminal state"),
        ({"transition": np.ones((3, 2, 2))}, r"Mdp.transition has shape \(3, 2, 2\)"),
        ({"reward": np.full((3, 2), np.nan)}, "not finite"),
        ({"reward_variance": np.full((3, 2), -1.0)}, "negative"),
        ({"observation": np.array([0.0, 1.0, 2.0])}, "integers"),
        ({"horizon": 0}, "horizon=0"),
    ],
)
def test_a_malformed_mdp_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_mdp(random_mdp(3)._replace(**change))


def test_check_returns_float64():
    assert check_mdp(bandit()).reward.dtype == np.float64
