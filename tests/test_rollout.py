from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from worlds import clock, random_mdp

from jaxpg import Hyperparams, batching, devices, make_trainer, train
from jaxpg.devices import built_for, compiler_options
from jaxpg.envs import Box, Discrete, Env, from_gymnax, from_mdp, repeat_action
from jaxpg.estimators import Estimator
from jaxpg.lab import Source, gradient_samples
from jaxpg.policies import Agent, Categorical, Network, actor_critic, gru, init_params, mlp
from jaxpg.rollout import episodes, episodic, evaluate, evaluation, init_stream, stream, unroll
from jaxpg.rollout.episodic import BLOCK
from jaxpg.rollout.packing import pack, unpack
from jaxpg.training.algorithm import algorithm
from jaxpg.training.imitation import imitate
from jaxpg.types import TimeStep


def reader() -> Network:
    """A critic that returns the clock's count, which it sees, plus 1/2."""
    return Network(
        lambda key: (), lambda lanes: (), lambda p, c, obs, first: (c, obs[..., 0] + 0.5)
    )


def clock_agent(env):
    return Agent(mlp(env.observation, env.action, (4,)), reader())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_episodes_truncated_by_the_clock(limit):
    env = clock(limit)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    traj, sums = jax.jit(partial(episodes, env, agent, num_episodes=3))(params, jax.random.key(1))
    assert traj.obs.shape == (limit, 3, 2) and traj.mask.all()
    assert (traj.first.sum(0) == 1).all() and traj.first[0].all()
    assert (traj.last.sum(0) == 1).all() and traj.last[-1].all()
    assert (traj.discount == 1).all(), "a time limit is not death"
    count = np.arange(limit)[:, None] + np.zeros((1, 3))
    assert np.allclose(traj.value, count + 0.5)
    assert np.allclose(traj.next_value, count + 1.5), "the value of the true successor"
    assert sums.returns == 3 * limit and sums.episodes == 3 and sums.lengths == 3 * limit
    assert len(np.unique(traj.obs[0, :, 1])) == 3, "every lane its own reset"


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "death"), [(100, 7), (100, BLOCK), (100, 64), (40, 39)])
def test_episodes_masked_after_death(limit, death):
    env = clock(limit, death)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    traj, _ = jax.jit(partial(episodes, env, agent, num_episodes=2))(params, jax.random.key(1))
    assert (traj.mask.sum(0) == death).all() and traj.mask[:death].all()
    assert traj.last[death - 1].all() and (traj.discount[death - 1] == 0).all()
    for field in (traj.action, traj.log_prob, traj.reward, traj.value, traj.next_value):
        assert (np.asarray(field[death:]) == 0).all()
    assert np.isfinite(traj.obs).all()


def test_a_shorter_rollout_truncates_and_bootstraps():
    env = clock(100)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    traj, sums = episodes(env, agent, params, jax.random.key(1), 2, num_steps=9)
    assert traj.last[-1].all() and (traj.discount[-1] == 1).all() and sums.episodes == 2
    assert np.allclose(traj.next_value[-1], 9.5)


@pytest.mark.slow
def test_early_stop_does_not_depend_on_the_replicas_beside():
    """One replica ends at once, the other late: vmap gives what each gives alone."""

    def run(limit):
        env = from_mdp(random_mdp(4, horizon=90))
        env = env._replace(
            step=lambda key, state, action: (
                lambda s, r: (s, r._replace(terminated=r.terminated | (s[1] >= limit)))
            )(*env_step(key, state, action))
        )
        agent = actor_critic(env)
        params = init_params(agent, jax.random.key(0))
        return episodes(env, agent, params, jax.random.key(1), 4)

    env_step = from_mdp(random_mdp(4, horizon=90)).step
    together = jax.jit(jax.vmap(run))(jnp.array([1, 90]))
    for i, limit in enumerate((1, 90)):
        alone = jax.jit(run)(jnp.array(limit))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert np.allclose(a[i], b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_when_it_is_asked_who_is_alive_changes_no_bit(platform, monkeypatch):
    """Steps after all have ended are masked, in the program of each kind of device."""
    env = from_gymnax("CartPole-v1", max_steps_in_episode=40)
    agent = actor_critic(env, hidden=(4,))
    params = init_params(agent, jax.random.key(0))
    monkeypatch.setattr(batching, "LANES", 2)

    def run(steps):
        monkeypatch.setattr(episodic, "BLOCK", steps)
        monkeypatch.setattr(evaluation, "BLOCK", {})

        def both(key):
            return evaluate(env, agent, params, key, 6), episodes(env, agent, params, key, 6)

        return jax.jit(both)(jax.random.key(1))

    plain = run(1)
    length = np.asarray(plain[1][0].mask).sum(axis=0)
    assert length.min() < length.max() < 32
    with built_for(platform):
        for steps in (1, 7, 32):
            for a, b in zip(jax.tree.leaves(run(steps)), jax.tree.leaves(plain), strict=True):
                # Another device's program may round in another order.
                np.testing.assert_allclose(a, b, *((0, 0) if platform == "cpu" else (1e-6, 1e-6)))


class Rolled(NamedTuple):
    """A distribution of the user's own, which only samples."""

    logits: Array

    def sample(self, key):
        return jax.random.randint(key, self.logits.shape[:-1], 0, self.logits.shape[-1])

    def log_prob(self, action):
        return jnp.full(action.shape, -jnp.log(self.logits.shape[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_a_distribution_that_only_samples_draws_from_the_key_of_its_group(make_key, monkeypatch):
    env = clock(3)

    def apply(params, carry, obs, first):
        return carry, Rolled(jnp.zeros((*first.shape, 5)))

    agent = Agent(Network(lambda key: (), lambda lanes: (), apply))
    params, key = init_params(agent, jax.random.key(0)), make_key(1)
    monkeypatch.setattr(batching, "LANES", 4)
    monkeypatch.setattr(episodic, "BLOCKS_AT_ONCE", {"cpu": 3})
    action = episodes(env, agent, params, key, 12)[0].action
    for group in range(3):
        steps = jax.random.split(jax.random.fold_in(key, group))[1]
        drawn = [jax.random.randint(jax.random.fold_in(steps, 3 * t), (4,), 0, 5) for t in range(3)]
        assert np.array_equal(action[:, 4 * group : 4 * group + 4], np.stack(drawn))
    assert evaluate(env, agent, params, key, 4).mean == 3
    stream = init_stream(env, agent, key, 4)
    assert unroll(env, agent, params, stream, key, 5)[1][0].action.shape == (5, 4)


@pytest.mark.parametrize("nested", [False, True])
def test_the_loop_of_vmapped_episodes_selects_nothing(nested):
    """Under vmap a predicate per replica would select over the whole stored trajectory each round."""
    env = from_gymnax("CartPole-v1")
    agent = Agent(mlp(env.observation, env.action))

    def run(key):
        params = init_params(agent, key)
        return episodes(env, agent, params, key, 2)[0].mask.sum(0)

    keys = jax.random.split(jax.random.key(0), 4)
    mapped, keys = (
        (jax.vmap(jax.vmap(run)), keys.reshape(2, 2)) if nested else (jax.vmap(run), keys)
    )
    loops = [e for e in jax.make_jaxpr(mapped)(keys).eqns if e.primitive.name == "while"]
    outer = [e for e in loops if any(v.aval.ndim >= 3 for v in e.invars)]
    assert outer
    for loop in outer:
        assert loop.params["cond_jaxpr"].out_avals[0].shape == ()
        selects = [e for e in loop.params["body_jaxpr"].eqns if e.primitive.name == "select_n"]
        assert all(e.outvars[0].aval.shape == () for e in selects), "a round only scans and writes"


@pytest.mark.slow
def test_stream_resets_afresh_and_keeps_the_true_successor():
    env = clock(4)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    state = init_stream(env, agent, jax.random.key(1), 3)
    state, (traj, sums) = unroll(env, agent, params, state, jax.random.key(2), 10)
    time = np.arange(10) % 4
    column = np.zeros((1, 3))
    assert np.allclose(traj.obs[..., 0], time[:, None] + column)
    assert (np.asarray(traj.first) == (time == 0)[:, None] + column).all()
    assert (np.asarray(traj.last) == (time == 3)[:, None] + column).all()
    assert np.allclose(traj.value, time[:, None] + 0.5 + column)
    assert np.allclose(traj.next_value, time[:, None] + 1.5 + column), "also at truncation"
    assert (traj.discount == 1).all() and traj.mask.all()
    starts = np.asarray(traj.obs[::4, :, 1])
    assert len(np.unique(starts)) == starts.size, "fresh resets, never one cached start"
    assert sums.episodes == 6 and sums.returns == 24 and sums.lengths == 24
    # It carries on where it stopped: two steps into the third episode.
    _, (after, _) = unroll(env, agent, params, state, jax.random.key(3), 2)
    assert np.allclose(after.obs[:, :, 0], np.array([[2.0], [3.0]]) + column)
    assert np.allclose(after.obs[0, :, 1], traj.obs[-1, :, 1])


@pytest.mark.slow
def test_stream_at_death_has_discount_zero():
    env = clock(100, death=3)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    state = init_stream(env, agent, jax.random.key(1), 2)
    _, (traj, _) = unroll(env, agent, params, state, jax.random.key(2), 7)
    dead = (np.arange(7) % 3 == 2)[:, None] + np.zeros((1, 2))
    assert (np.asarray(traj.discount) == 1 - dead).all() and (np.asarray(traj.last) == dead).all()


@pytest.mark.slow
def test_recurrent_critic_values_the_successor_with_its_own_carry():
    """next_value at truncation equals running the critic one step further, without a restart."""
    env = clock(3)
    agent = Agent(gru(env.observation, env.action), gru(env.observation, None))
    params = init_params(agent, jax.random.key(0))
    shift = jax.tree.map(lambda x: x + 0.2, params)
    state = init_stream(env, agent, jax.random.key(1), 2)
    _, (stream, _) = unroll(env, agent, shift, state, jax.random.key(2), 3)
    whole, _ = episodes(env, agent, shift, jax.random.key(2), 2)
    for traj in (stream, whole):
        successor = jnp.concatenate([traj.obs, traj.obs[-1:].at[..., 0].set(3.0)])
        first = jnp.zeros((4, 2), bool).at[0].set(True)
        carry = agent.critic.initial_carry(2)
        _, value = agent.critic.apply(shift.critic, carry, successor, first)
        assert np.allclose(traj.value, value[:3], atol=1e-5)
        assert np.allclose(traj.next_value, value[1:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "gru"])
@pytest.mark.parametrize("kind", ["episodes", "stream"])
def test_log_probs_at_update_equal_log_probs_at_rollout(network, kind):
    env = from_gymnax("CartPole-v1", max_steps_in_episode=30)
    agent = actor_critic(env, network)
    params = init_params(agent, jax.random.key(0))
    gather = jax.jit(partial(unroll, env, agent), static_argnames="num_steps")
    if kind == "episodes":
        carry = agent.policy.initial_carry(4)
        rollout = jax.jit(partial(episodes, env, agent, num_episodes=4))
        traj, _ = rollout(params, jax.random.key(1))
    else:
        state = init_stream(env, agent, jax.random.key(2), 4)
        # A second window, so that it opens in the middle of episodes.
        state, _ = gather(params, state, jax.random.key(1), num_steps=17)
        carry = state.carry.policy
        _, (traj, _) = gather(params, state, jax.random.key(1), num_steps=40)
    _, again = jax.jit(agent.policy.apply)(params.policy, carry, traj.obs, traj.first)
    difference = jnp.where(traj.mask, again.log_prob(traj.action) - traj.log_prob, 0.0)
    assert np.abs(difference).max() < 1e-5


@pytest.mark.slow
def test_evaluate_weighs_every_episode_alike():
    """LONG (3 steps) pays 4 and SHORT (1 step) pays 1: the mean of episodes is 2.5, whatever their length."""

    def reset(key):
        return jnp.int32(0), jnp.float32([0.0])

    def step(key, state, action):
        long = (state > 0) | (action == 1)
        over = jnp.where(long, state + 1 >= 3, True)
        reward = jnp.where(over, jnp.where(long, 4.0, 1.0), 0.0)
        return state + 1, TimeStep(jnp.float32([0.0]), reward, over, jnp.zeros_like(over))

    env = Env(reset, step, Box(-np.ones(1), np.ones(1)), Discrete(2), 3)
    uniform = Network(
        lambda key: (),
        lambda lanes: (),
        lambda p, c, obs, first: (c, Categorical(jnp.zeros((*obs.shape[:2], 2)))),
    )
    agent = Agent(uniform)
    params = init_params(agent, jax.random.key(0))
    result = jax.jit(lambda key: evaluate(env, agent, params, key, 20_000))(jax.random.key(1))
    assert result.episodes == 20_000
    assert abs(result.mean - 2.5) < 5 * result.standard_error
    assert np.isclose(result.standard_error, 1.5 / np.sqrt(20_000), rtol=0.01)
    # Control: pooling whatever ends in a window of 8 steps over-counts the short ones (2.29566).
    state = init_stream(env, agent, jax.random.key(2), 20_000)
    _, (_, sums) = unroll(env, agent, params, state, jax.random.key(3), 8)
    assert abs(sums.returns / sums.episodes - 2.29566) < 0.02


def test_the_horizon_ends_an_evaluation_as_it_ends_an_episode():
    """Test a task that never ends, and one that may: it ends with a chance of 1/5 in each of 5 steps."""
    env = clock(50)._replace(horizon=10)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    result = evaluate(env, agent, params, jax.random.key(1), 4)
    assert result == (10, 0, 4, 10, 10)
    env = lottery(0.2)._replace(horizon=5)
    result = jax.jit(lambda key: evaluate(env, agent, params, key, 20_000))(jax.random.key(1))
    # sum_t 0.8^t = 3.36; episodes that ended by themselves within 5 steps average 2.56.
    assert abs(result.mean - (1 - 0.8**5) / 0.2) < 5 * result.standard_error < 0.1
    assert result.episodes == 20_000 and (result.smallest, result.largest) == (1, 5)


def test_one_episode_has_a_mean_and_no_spread_and_none_is_refused():
    env = clock(3)
    agent = clock_agent(env)
    params = init_params(agent, jax.random.key(0))
    with jax.debug_nans(True):
        assert evaluate(env, agent, params, jax.random.key(1), 1) == (3, np.inf, 1, 3, 3)
    for run in (evaluate, episodes):
        with pytest.raises(ValueError, match="num_episodes=0 must be at least 1"):
            run(env, agent, params, jax.random.key(1), 0)
        with pytest.raises(ValueError, match="the longest episode=0 must be at least 1"):
            run(env._replace(horizon=0), agent, params, jax.random.key(1), 1)


def test_greedy_evaluation_takes_the_mode():
    env = from_mdp(random_mdp(5, terminal=False))
    policy = Network(
        lambda key: (),
        lambda lanes: (),
        lambda p, c, obs, first: (
            c,
            Categorical(jnp.broadcast_to(jnp.array([0.0, 1.0]), (*obs.shape, 2))),
        ),
    )
    agent = Agent(policy)
    params = init_params(agent, jax.random.key(0))
    forced = env._replace(
        step=lambda key, state, action: env.step(key, state, jnp.ones_like(action))
    )
    for greedy in (True, False):
        same = [
            float(evaluate(e, agent, params, jax.random.key(1), 64, greedy=greedy).mean)
            for e in (env, forced)
        ]
        assert (same[0] == same[1]) == greedy


def lottery(chance):
    """An environment that ends with this chance in every step, and shows what its reset drew."""

    def reset(key):
        start = jax.random.uniform(key, (2,))
        return start, start

    def step(key, start, action):
        del action
        over = jax.random.uniform(key) < chance
        return start, TimeStep(start, jnp.float32(1), over, ~over & False)

    bound = np.full(2, np.inf, np.float32)
    return Env(reset, step, Box(-bound, bound), Discrete(2), 10**6)


# Lanes that end less often than starts are drawn ahead for them, about as often, and more often.
@pytest.mark.slow
@pytest.mark.parametrize(("num_envs", "chance"), [(64, 0.02), (64, 0.12), (64, 0.9), (4, 0.3)])
def test_every_episode_of_a_stream_starts_afresh(num_envs, chance, monkeypatch):
    env = lottery(chance)
    agent = Agent(mlp(env.observation, env.action, (4,)))
    params = init_params(agent, jax.random.key(0))

    def run(key):
        state = init_stream(env, agent, key, num_envs)
        return unroll(env, agent, params, state, key, 60)[1][0]

    keys = jax.random.split(jax.random.key(1), 2)
    found = jax.jit(jax.vmap(run))(keys)
    # As an accelerator draws them: the same starts.
    monkeypatch.setattr(stream, "STEPS_PER_START", {})
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(jax.vmap(lambda k: run(k)))(keys))
    starts = np.asarray(found.obs)[np.asarray(found.first)]
    assert len(starts) > 2 * num_envs * 60 * chance * 0.7
    assert len(np.unique(starts, axis=0)) == len(starts)
    # A lane shows the same start until its episode ends.
    same = np.asarray(found.obs)[:, 1:] == np.asarray(found.obs)[:, :-1]
    assert np.array_equal(same.all(axis=-1), ~np.asarray(found.last)[:, :-1])
    assert abs(starts.mean() - 0.5) < 5 * 0.29 / starts.size**0.5


@pytest.mark.slow
def test_both_kinds_of_key_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr(batching, "LANES", 3)
    env = repeat_action(from_mdp(random_mdp(2, horizon=4)), 2)
    agent = actor_critic(env, "tabular")
    trainer = make_trainer(env, agent, algorithm("a2c"), num_envs=2, num_steps=3)
    shown = episodes(env, agent, init_params(agent, jax.random.key(7)), jax.random.key(8), 2)[0]

    def everything(key):
        params = init_params(agent, key)
        stream = init_stream(env, agent, key, 2)
        policy = agent.policy, Estimator(), params.policy, key
        found = {
            "init": params,
            "episodes": episodes(env, agent, params, key, 3),
            "groups": episodes(env, agent, params, key, 6),
            "again": episodic.episodes_again(env, agent, params, key, 6, 2, 1),
            "stream": unroll(env, agent, params, stream, key, 5),
            "evaluate": evaluate(env, agent, params, key, 3),
            "train": train(trainer, trainer.init(key), Hyperparams(), num_updates=2),
            "imitate": imitate(env, agent.policy, shown, key, 1),
            "samples": gradient_samples(Source(env, *policy, Hyperparams()), 3),
        }
        state, metrics = found["train"]
        found["train"] = state._replace(key=jax.random.key_data(state.key)), metrics
        return found

    def run(key):
        return jax.jit(everything).lower(key).compile(compiler_options(0))(key)

    typed, raw = run(jax.random.key(3)), run(jax.random.PRNGKey(3))
    jax.tree.map(np.testing.assert_array_equal, typed, raw)
    assert (typed["episodes"][0].log_prob != 0).any()


def test_parameters_without_a_critics_are_refused_for_an_agent_with_one():
    env = clock(3)
    agent = actor_critic(env)
    state = make_trainer(env, agent, algorithm("reinforce"), num_envs=2).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"an algorithm without one; use Agent\(agent.policy\)"):
        episodes(env, agent, state.params, jax.random.key(1), 2)
    episodes(env, Agent(agent.policy), state.params, jax.random.key(1), 2)


def test_packing_keeps_every_bit(x64, monkeypatch):
    """A GPU's rows lie in one array of words; large and shared fields stay as they are."""
    monkeypatch.setattr(devices, "_told", ["gpu"])
    odd = np.array([np.nan, -np.inf, -0.0, 5e-324, 0.1])
    whole = np.array([-(2**63), 2**63 - 1, 0, -1, 7])
    row = {
        "double": odd[:, None] * np.ones(2),
        "single": odd.astype(np.float32),
        "long": whole,
        "flag": whole > 0,
        "short": whole.astype(np.int8),
        "image": np.ones((5, 8, 8), np.float32),
        "shared": np.arange(3.0)[None],
        "scalar": np.float32(2),
    }
    rows = jax.jit(lambda row: pack(jax.tree.map(jnp.asarray, row), 5))(row)
    assert rows.words.shape == (5, 4 + 1 + 2 + 1) and len(rows.rest) == 4
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), rows)
    for name, found in unpack(stacked).items():
        assert found.dtype == row[name].dtype
        assert np.array_equal(found, np.stack([row[name]] * 2), equal_nan=name != "image")
    assert np.signbit(unpack(rows)["single"][2])
