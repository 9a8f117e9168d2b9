"""What a user's environment must be, and the one line that says where it is not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import clock, random_mdp

from jaxpg import Hyperparams, episodes, evaluate, make_trainer, train
from jaxpg.envs import (
    Box,
    Discrete,
    Env,
    Lqr,
    MultiDiscrete,
    check_env,
    from_gymnax,
    from_lqr,
    from_mdp,
)
from jaxpg.lab import Source, gradient_samples
from jaxpg.policies import Agent, actor_critic, init_params, mlp
from jaxpg.rollout import init_stream
from jaxpg.training.algorithm import algorithm
from jaxpg.types import TimeStep

BIG = float(np.finfo(np.float32).max)


def box(*bounds):
    low, high = zip(*bounds, strict=True)
    return Box(np.array(low, np.float32), np.array(high, np.float32))


def pushed(action: Box, target=0.5) -> Env:
    """A one-step world that pays for a first entry near the target, and keeps the action that arrived."""

    def reset(key):
        del key
        return jnp.zeros(action.shape), jnp.zeros(1)

    def step(key, state, chosen):
        del key, state
        reward = -jnp.abs(chosen[0] - target)
        return chosen, TimeStep(jnp.zeros(1), reward, jnp.bool_(True), jnp.bool_(False))

    return Env(reset, step, box((-1, 1)), action, 1)


def learnt(env, name="reinforce_baseline"):
    trainer = make_trainer(
        env,
        actor_critic(env, hidden=(4,)),
        algorithm(name),
        num_envs=32,
        num_steps=1 + (name == "ppo"),
    )
    learn = jax.jit(partial(train, trainer, num_updates=60))
    return learn(trainer.init(jax.random.key(0)), Hyperparams(learning_rate=0.03))


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds",
    [
        ((-1, 1), (0.25, 0.25)),
        ((-BIG, BIG),),
        ((-1e38, 1e38),),
        ((-np.inf, np.inf), (-2.0, -2.0)),
        ((-1.0, BIG),),
    ],
)
def test_whatever_the_bounds_the_policy_moves(bounds):
    env = pushed(box(*bounds))
    state, metrics = learnt(env)
    assert np.isfinite(metrics["episode_return"]).all()
    assert metrics["episode_return"][-5:].mean() > metrics["episode_return"][0] + 0.1
    policy = mlp(env.observation, env.action, hidden=(4,))
    _, distribution = policy.apply(
        state.params.policy, (), jnp.zeros((1, 1, 1)), jnp.zeros((1, 1), bool)
    )
    action = distribution.sample(jax.random.key(1))
    assert action.shape == (1, 1, len(bounds)), "the environment is given the whole action"
    for i, (low, high) in enumerate(bounds):
        if low == high:
            assert action[0, 0, i] == low
    free = sum(low < high for low, high in bounds)
    assert distribution.mean.shape[-1] == free and np.isfinite(distribution.log_prob(action)).all()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (box((np.nan, 1)), "leave nothing to choose from"),
        (box((1, -1)), "leave nothing to choose from"),
        (box((np.inf, np.inf)), "leave nothing to choose from"),
        (Box(-1.0, 1.0), "must be a real array of the space's shape"),
        (Box(np.zeros(2, np.float32), np.ones(3, np.float32)), r"low has shape \(2,\)"),
        (box((0.5, 0.5)), "every entry of the action is fixed"),
        (Discrete(0), "at least 1"),
        (MultiDiscrete(()), "at least 1"),
        ("left or right", "must be a Box, Discrete or MultiDiscrete"),
    ],
)
def test_spaces_that_are_none_are_refused(action, message):
    env = clock(5)._replace(action=action)
    with pytest.raises(ValueError, match=message) as error:
        actor_critic(env, hidden=(4,))
    assert "\n" not in str(error.value)


# One small environment of every adapter.
ADAPTERS = {
    "from_gymnax": lambda: from_gymnax("CartPole-v1", max_steps_in_episode=30),
    "from_gymnax, continuous": lambda: from_gymnax("Pendulum-v1", max_steps_in_episode=30),
    "from_mdp": lambda: from_mdp(random_mdp(0, horizon=30)),
    "from_lqr": lambda: from_lqr(Lqr(horizon=30)),
}


def restarting() -> Env:
    """A clock that its own step resets."""
    env = clock(30)

    def step(key, state, action):
        after, result = env.step(key, state, action)
        ended = result.terminated | result.truncated
        fresh = env.reset(key)[0]
        return jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, after), result

    return env._replace(step=step)


def check_adapter(env, afterwards=True):
    """Episodes end by the horizon, with one flag, and stay ended: the environment does not reset itself.

    afterwards: its numbers stay finite after the end, too.
    """
    check_env(env)
    assert isinstance(env.horizon, int)

    def run(key):
        state, _ = env.reset(key)
        if isinstance(env.action, Discrete):
            actions = jax.random.randint(key, (env.horizon + 5,), 0, env.action.n)
        elif isinstance(env.action, MultiDiscrete):
            shape = env.horizon + 5, *env.action.shape
            actions = jax.random.randint(key, shape, 0, jnp.array(env.action.nvec)[None])
        else:
            # Mostly outside the bounds: the environment clips.
            actions = 9.0 * jax.random.normal(key, (env.horizon + 5, *env.action.shape))
        keys = jax.random.split(key, env.horizon + 5)
        return jax.lax.scan(lambda state, x: env.step(x[0], state, x[1]), state, (keys, actions))[1]

    steps = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8))
    assert not (steps.terminated & steps.truncated).any()
    ended = np.asarray(steps.terminated | steps.truncated)
    assert ended[:, env.horizon - 1 :].all(), "the horizon is the longest episode"
    assert (np.maximum.accumulate(ended, axis=1) == ended).all(), "an end is no reset"
    over = np.roll(ended, 1, axis=1) & (np.arange(ended.shape[1]) > 0) & (not afterwards)
    assert np.isfinite(steps.reward[~over]).all() and np.isfinite(steps.obs[~over]).all()
    return steps


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_keeps_the_contract(name):
    check_adapter(ADAPTERS[name]())


def test_an_environment_that_resets_itself_is_seen():
    check_adapter(clock(30))
    with pytest.raises(AssertionError, match=r"an end is no reset|longest episode"):
        check_adapter(restarting())


def replaced(**changes):
    """The clock with fields of its steps changed, as a user might write them."""
    env = clock(5)

    def step(key, state, action):
        after, result = env.step(key, state, action)
        return after, result._replace(**{k: f(getattr(result, k)) for k, f in changes.items()})

    return env._replace(step=step)


def after_reset(change):
    env = clock(5)
    return env._replace(reset=lambda key: change(*env.reset(key)))


def floating_state():
    env = clock(5)

    def step(key, state, action):
        after, result = env.step(key, state, action)
        return (after[0].astype(jnp.float32), after[1]), result

    return env._replace(step=step)


WRONG = {
    "reward [1]": (
        replaced(reward=lambda x: x[None]),
        r"reward is float32 \[1\]; it must be a float32",
    ),
    "reward bool": (replaced(reward=lambda x: x > 0), "reward is bool"),
    "integer flag": (replaced(terminated=lambda x: x.astype(jnp.int32)), "terminated is int32"),
    "float flag": (replaced(truncated=lambda x: x.astype(float)), "truncated is float32"),
    "size": (replaced(obs=lambda x: jnp.zeros(3)), r"obs is float32 \[3\]; by Env.observation"),
    "dictionary": (replaced(obs=lambda x: {"x": x}), "obs is a dict; it must be one array"),
    "kind": (clock(5)._replace(observation=Discrete(3)), "obs is float32"),
    "reset": (after_reset(lambda state, obs: (state, obs[:1])), r"Env.reset: obs is float32 \[1\]"),
    "one result": (after_reset(lambda state, obs: obs), r"must give \(state, obs\)"),
    "state": (floating_state(), r"the state\[0\] is int32 \[\] after Env.reset and float32"),
    "horizon": (clock(5)._replace(horizon=2.5), "Env.horizon=2.5 must be a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_one_line_wherever_an_environment_enters(name):
    env, message = WRONG[name]
    good = clock(5)
    agent = actor_critic(good, hidden=(4,))
    params, key = init_params(agent, jax.random.key(0)), jax.random.key(1)
    for use in (
        lambda: make_trainer(env, agent, algorithm("ppo"), num_envs=4, num_steps=4),
        lambda: episodes(env, agent, params, key, 2),
        lambda: evaluate(env, agent, params, key, 2),
        lambda: init_stream(env, agent, key, 2),
        lambda: gradient_samples(
            Source(
                env,
                agent.policy,
                algorithm("reinforce").estimator,
                params.policy,
                key,
                Hyperparams(),
            ),
            2,
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


def test_numbers_in_place_of_arrays_are_taken():
    """A reward of 1.0 is as good as an array, because jax makes one of it."""
    env = replaced(reward=lambda x: 1.0)
    make_trainer(env, actor_critic(env, hidden=(4,)), algorithm("ppo"), num_envs=4, num_steps=4)


def test_a_policy_for_other_actions_is_refused():
    env, other = clock(5), clock(5, continuous=True)
    agent = Agent(mlp(env.observation, other.action, hidden=(4,)))
    with pytest.raises(ValueError, match=r"build the policy for env\.action"):
        episodes(env, agent, init_params(agent, jax.random.key(0)), jax.random.key(1), 2)


@pytest.mark.slow
def test_a_pole_length_for_every_seed():
    """Environments are built inside vmap, and each replica learns as it would alone."""

    def learn(key, length):
        env = from_gymnax("CartPole-v1", length=length, max_steps_in_episode=20)
        agent = actor_critic(env, hidden=(4,))
        trainer = make_trainer(env, agent, algorithm("reinforce_baseline"), num_envs=4)
        return train(trainer, trainer.init(key), Hyperparams(), num_updates=2)

    keys, lengths = jax.random.split(jax.random.key(0), 3), jnp.array([0.1, 0.5, 2.0])
    states, metrics = jax.jit(jax.vmap(learn))(keys, lengths)
    alone, _ = jax.jit(learn)(keys[2], 2.0)
    assert len(set(np.asarray(metrics["episode_length"][:, 0]).tolist())) > 1
    for many, one in zip(
        jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True
    ):
        assert np.allclose(many[2], one, atol=1e-5)


def test_numbers_that_decide_a_shape_are_not_traced():
    with pytest.raises(ValueError, match="max_steps_in_episode is traced"):
        jax.jit(lambda n: from_gymnax("CartPole-v1", max_steps_in_episode=n).horizon)(5)
