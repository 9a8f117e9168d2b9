"""Rewards in units of their returns' deviation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import Hyperparams, evaluate, make_trainer, train
from jaxpg.envs import Env, from_gymnax
from jaxpg.policies import actor_critic
from jaxpg.training.algorithm import algorithm
from jaxpg.training.data import Moment, Task, demonstrations, episodes, replay, stream
from jaxpg.training.scaling import scaled

GAMMA = 0.9
NUMBERS = Hyperparams(learning_rate=3e-3, critic_learning_rate=3e-3, gamma=0.98, lambda_=0.8)


def paid(factor, name="CartPole-v1", **settings) -> Env:
    """The environment with rewards in another unit."""
    env = from_gymnax(name, **settings)

    def step(key, state, action):
        after, result = env.step(key, state, action)
        return after, result._replace(reward=result.reward * factor)

    return env._replace(step=step)


@pytest.mark.slow
@pytest.mark.parametrize("source", [stream, episodes])
def test_the_scale_is_the_deviation_of_all_returns_so_far(source, x64):
    env = paid(3.0, "Pendulum-v1", max_steps_in_episode=7)
    agent = actor_critic(env, hidden=(4,))
    task = Task(env, agent, algorithm("ppo").estimator, 3, 7 if source is episodes else 5)
    data = scaled(source)
    params = make_trainer(env, agent, algorithm("ppo"), num_envs=4).init(jax.random.key(0)).params
    state = data.init(task, params, jax.random.key(1))
    plain = source.init(task, params, jax.random.key(1))
    numbers, running, returns = Hyperparams(gamma=GAMMA), np.zeros(3), []
    both = jax.jit(lambda m, s, p: (data.gather(task, m, s), source.gather(task, m, p)))
    for update in range(4):
        moment = Moment(params, numbers, jax.random.key(2 + update), jnp.int32(update))
        (state, found), (plain, own) = both(moment, state, plain)
        for t in range(len(own.trajectory.reward)):
            running = own.trajectory.reward[t] + GAMMA * np.where(
                own.trajectory.first[t], 0, running
            )
            returns.append(running)
        scale = np.std(returns)
        np.testing.assert_allclose(found.metrics["reward_scale"], scale, 1e-6)
        np.testing.assert_allclose(found.trajectory.reward, own.trajectory.reward / scale, 1e-6)
        np.testing.assert_array_equal(found.new.reward, own.trajectory.reward)
    assert np.ptp([np.std(returns[:5]), np.std(returns)]) > 0.1, "it moves from batch to batch"


@pytest.mark.slow
def test_the_unit_of_reward_changes_nothing():
    """Powers of two are exact, so everything learnt is the same bit by bit; the control is not."""

    @partial(jax.jit, static_argnums=1)
    def learnt(factor, scales):
        row = algorithm("ppo")._replace(num_minibatches=2)
        row = row._replace(data=scaled(row.data)) if scales else row
        env = paid(factor, max_steps_in_episode=50)
        agent = actor_critic(env, hidden=(8,))
        trainer = make_trainer(env, agent, row, num_envs=4, num_steps=16)
        state, metrics = train(trainer, trainer.init(jax.random.key(0)), NUMBERS, num_updates=4)
        seen = evaluate(env, agent, state.params, jax.random.key(1), 8)
        return state.params, metrics["episode_return"], seen.mean

    found = {}
    for exponent in (0, 20, -20):
        for scales in (True, False):
            *found[exponent, scales], mean = learnt(jnp.float32(2.0**exponent), scales)
            assert mean > 8 * 2.0**exponent, "evaluations keep the environment's unit"
    for exponent in (20, -20):
        same = jax.tree.map(jnp.array_equal, found[exponent, True][0], found[0, True][0])
        assert all(jax.tree.leaves(same))
        np.testing.assert_array_equal(
            found[exponent, True][1], 2.0**exponent * found[0, True][1], "metrics keep theirs"
        )
        same = jax.tree.map(jnp.array_equal, found[exponent, False][0], found[0, False][0])
        assert not all(jax.tree.leaves(same))


def test_rewards_that_never_differ_keep_their_unit():
    env = paid(0.0)
    agent = actor_critic(env, hidden=(4,))
    row = algorithm("ppo")._replace(data=scaled(stream), num_minibatches=1)
    trainer = make_trainer(env, agent, row, num_envs=2, num_steps=4)
    _, metrics = jax.jit(trainer.update)(trainer.init(jax.random.key(0)), NUMBERS)
    assert metrics["reward_scale"] == 1.0 and np.isfinite(metrics["objective"])


def test_only_the_policys_own_rewards_are_scaled():
    with pytest.raises(ValueError, match="not by those of demonstrations; leave normalise_rewards"):
        scaled(demonstrations)
    assert scaled(replay(stream, 3)).num_batches == 3


@pytest.mark.slow
def test_scaled_episodes_may_be_rolled_out_again(x64):
    env = from_gymnax("CartPole-v1", max_steps_in_episode=20)
    agent = actor_critic(env, hidden=(4,))
    row = algorithm("reinforce_baseline")._replace(data=scaled(episodes))
    after = []
    for recompute in (False, True):
        trainer = make_trainer(env, agent, row, num_envs=6, recompute=recompute)
        learn = jax.jit(partial(train, trainer, num_updates=2))
        after.append(learn(trainer.init(jax.random.key(0)), NUMBERS)[0].params.policy)
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, 1e-9, 1e-12)
