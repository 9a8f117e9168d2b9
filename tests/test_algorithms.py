"""Properties that every row of the algorithm table must have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing import take, traced_once, trained
from worlds import bandit, clock

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import Box, Env, Lqr, MultiDiscrete, from_gymnax, from_lqr, from_mdp, history
from jaxpg.estimators import (
    Estimator,
    baselines,
    control_variates,
    credit,
    importance,
    objective,
    surrogates,
)
from jaxpg.estimators.estimator import Batch
from jaxpg.optimizers import OPTIMIZERS, SCHEDULES, linear, scheduled, sgd
from jaxpg.policies import Agent, actor_critic, init_params, mlp
from jaxpg.policies import linear as linear_network
from jaxpg.rollout import episodes
from jaxpg.training import data
from jaxpg.training.algorithm import ALGORITHMS, Algorithm, algorithm
from jaxpg.types import TimeStep

NUM_ENVS, NUM_STEPS = 8, 16
# The fast tier has one row for each kind of data and of step.
FAST = ("reinforce_baseline", "ppo", "trpo", "off_policy")
ROWS = [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in ALGORITHMS]


def cartpole():
    return from_gymnax("CartPole-v1", max_steps_in_episode=24)


def demonstrations(env, num_episodes=NUM_ENVS):
    agent = Agent(mlp(env.observation, env.action, (8,)))

    def shown(k_params, k_episodes):
        return episodes(env, agent, init_params(agent, k_params), k_episodes, num_episodes)[0]

    return jax.jit(shown)(jax.random.key(99), jax.random.key(98))


def build(name, env, network="mlp", shows=True, **settings):
    row = algorithm(name)
    agent = actor_critic(env, network, **({"hidden": (8,)} if network != "tabular" else {}))
    num_steps = None if row.data.whole_episodes else NUM_STEPS
    trainer = make_trainer(env, agent, row, num_envs=NUM_ENVS, num_steps=num_steps, **settings)
    return trainer, demonstrations(env) if shows and row.data.demonstrations else None


def assert_trees_equal(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if tolerance:
            assert np.allclose(a, b, equal_nan=True, **tolerance)
        else:
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("name", ROWS)
def test_properties_of_every_row(name):
    env = cartpole()
    trainer, demos = build(name, env)
    trainer, traces = traced_once(trainer), []

    def run(state, hyperparams, num_updates):
        traces.append(num_updates)
        return train(trainer, state, hyperparams, demos, num_updates=num_updates)

    two = jax.jit(partial(run, num_updates=2))
    four = jax.jit(partial(run, num_updates=4))
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.vmap(trainer.init)(keys)
    # Strong types: a Python number and an array would be two signatures.
    hyperparams = jax.tree.map(jnp.float32, Hyperparams(learning_rate=1e-2, schedule_updates=8.0))
    first = take(states, 0)

    # Chunks are invisible, bitwise; the metrics are stacked.
    halfway, early = two(first, hyperparams)
    end, late = two(halfway, hyperparams)
    whole, metrics = four(first, hyperparams)
    assert_trees_equal(end, whole)
    assert_trees_equal(jax.tree.map(lambda a, b: np.concatenate([a, b]), early, late), metrics)
    assert int(whole.num_updates) == 4 and metrics["objective"].shape == (4,)
    finite = [k for k in metrics if not k.startswith("episode") and "_lag" not in k]
    assert all(np.isfinite(metrics[k]).all() for k in finite)

    # Other numbers run in the same program, and they do change what is learnt.
    other, _ = two(first, jax.tree.map(lambda x: 0.5 * x, hyperparams))
    assert traces == [2, 4], "one compile for two hyperparameter values"
    moved = jax.tree.map(
        lambda a, b: np.abs(np.subtract(a, b)).max(), other.params.policy, halfway.params.policy
    )
    assert max(jax.tree.leaves(moved)) > 0

    # vmap over seeds and over every hyperparameter at once equals a loop.
    grid = jax.tree.map(lambda x: x * jnp.array([1.0, 0.5, 0.9], jnp.float32), hyperparams)
    together, _ = jax.jit(jax.vmap(partial(run, num_updates=2)))(states, grid)
    for i in range(3):
        alone, _ = two(take(states, i), take(grid, i))
        replica = take(together, i)
        assert_trees_equal(replica.params, alone.params, rtol=1e-3, atol=1e-4)


def test_behaviour_cloning_is_maximum_likelihood_bit_for_bit():
    env = cartpole()
    demos = demonstrations(env)
    policy = mlp(env.observation, env.action, (8,))
    params = policy.init(jax.random.key(5))
    estimator = algorithm("behaviour_cloning").estimator
    ones = jnp.where(demos.mask, 1.0, 0.0)
    batch = Batch(demos, ones, 0 * ones, demos.reward)
    hyperparams = Hyperparams()

    def surrogate(params):
        return -objective(estimator, policy, params, (), batch, hyperparams)[0]

    def negative_log_likelihood(params):
        _, distribution = policy.apply(params, (), demos.obs, demos.first)
        log_prob = jnp.where(demos.mask, distribution.log_prob(demos.action), 0.0)
        return -log_prob.sum() / demos.mask.shape[1]

    assert_trees_equal(
        jax.jit(jax.grad(surrogate))(params), jax.jit(jax.grad(negative_log_likelihood))(params)
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["steps", "lanes"])
def test_ppo_starts_each_update_at_ratio_one(layout):
    """With one epoch and one minibatch, the KL to the behaviour at the first step is rounding."""
    env = cartpole()
    agent = actor_critic(env, "gru" if layout == "lanes" else "mlp", hidden=(8,))

    def kl(num_epochs):
        row = algorithm("ppo")._replace(num_epochs=num_epochs, num_minibatches=1)
        trainer = make_trainer(env, agent, row, num_envs=4, num_steps=40)
        return trained(trainer, Hyperparams(learning_rate=1e-2), 3)[1]["kl"]

    assert np.abs(kl(1)).max() < 1e-9
    assert kl(4).min() > 1e-6, "control: later epochs have moved away"


@pytest.mark.slow
def test_metrics_have_no_value_until_an_episode_has_ended():
    env = clock(12)
    trainer = make_trainer(env, actor_critic(env), algorithm("ppo"), num_envs=4, num_steps=8)
    _, metrics = trained(trainer, Hyperparams(), 3)
    assert np.isnan(metrics["episode_return"][0]) and metrics["episodes"].tolist() == [0, 4, 4]
    assert metrics["episode_return"][1:].tolist() == [12.0, 12.0]
    assert metrics["env_steps"].tolist() == [32, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variate", [control_variates.optimal_per_parameter, control_variates.peters_schaal]
)
def test_per_parameter_baselines_train(variate):
    """Noise is measured at the same time; on a bandit both are the same optimal baseline."""
    env = from_mdp(bandit((10.0, 11.0)))
    row = algorithm("reinforce")._replace(control_variate=variate, measure_noise=True)
    trainer = make_trainer(env, actor_critic(env, "tabular"), row, num_envs=64)
    states, metrics = trained(trainer, Hyperparams(learning_rate=0.1), 60, seeds=4)
    assert (jax.nn.softmax(states.params.policy["logits"][:, 0])[:, 1] > 0.9).all()
    # At the start pi = 1/2: g = +-(10 or 11)/2 for both logits, tr Cov = 2 * 110.25 / 4 per episode.
    noise, signal = metrics["noise"][:, 0].mean(), metrics["signal"][:, 0].mean()
    assert noise * 64 == pytest.approx(55.1, rel=1.0)
    assert abs(signal - 0.125) < 1.0


def test_measured_noise_is_that_of_the_gradient():
    """Averages over many updates at a learning rate of 0 match the exact |E g|^2 and tr Cov."""
    env = from_mdp(bandit((0.0, 1.0)))
    row = algorithm("reinforce")._replace(measure_noise=True, policy_optimizer=sgd)
    trainer = make_trainer(env, actor_critic(env, "tabular"), row, num_envs=8)
    _, metrics = trained(trainer, Hyperparams(learning_rate=0.0), 4000)
    # One episode: g = +-(0, 1) R/2 with mean (-1/4, 1/4): E|g|^2 = 1/4, |E g|^2 = 1/8, tr Cov = 1/8.
    for name, value in (("noise", 0.125 / 8), ("signal", 0.125)):
        error = metrics[name].std() / 4000**0.5
        assert abs(metrics[name].mean() - value) < 5 * error


def test_schedules_and_optimizers_read_traced_numbers():
    hyperparams = Hyperparams(learning_rate=2.0, critic_learning_rate=4.0, schedule_updates=10.0)
    half = scheduled(hyperparams, linear, jnp.int32(5))
    assert half.learning_rate == 1.0 and half.critic_learning_rate == 2.0
    assert scheduled(hyperparams, linear, jnp.int32(15)).learning_rate == 0.0
    for schedule in SCHEDULES.values():
        assert schedule(jnp.float32(0)) == 1.0
    # Clipping is by the global norm: the direction stays.
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    numbers = Hyperparams(learning_rate=1.0, max_grad_norm=0.5)
    optimizer = sgd(numbers)
    step, _ = optimizer.update(gradient, optimizer.init(gradient))
    assert np.allclose(step["a"], -0.3) and np.allclose(step["b"], -0.4)
    # Adam does not care about the scale of the reward, SGD does.
    for name, same in (("adam", True), ("sgd", False)):
        optimizer = OPTIMIZERS[name](numbers._replace(max_grad_norm=1e9))
        start = optimizer.init(gradient)
        small, _ = optimizer.update(gradient, start)
        large, _ = optimizer.update(jax.tree.map(lambda x: 1000.0 * x, gradient), start)
        assert np.allclose(small["a"], large["a"], rtol=1e-3) == same


PLAIN = Estimator(credit.reward_to_go)


FROM_START = importance.from_start(importance.on_policy)
TOO_FEW_STEPS = "num_envs x num_steps=9 is not a multiple of num_minibatches=4; use 8 or 12"


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (algorithm("ppo"), {"num_envs": 3, "num_steps": 3}, TOO_FEW_STEPS),
        (algorithm("ppo"), {"num_envs": 0}, "num_envs=0 must be at least 1"),
        (algorithm("ppo"), {"num_steps": 0}, "num_steps=0 must be at least 1"),
        (algorithm("reinforce_baseline"), {"num_envs": 1}, "num_envs=1 must be at least 2"),
        # Structures under which the policy could never move.
        (Algorithm(PLAIN._replace(baseline=baselines.batch_mean)), {"num_envs": 1}, "at least 2"),
        (algorithm("ppo"), {"num_envs": 4, "num_steps": 1}, "standardises to an advantage of 0"),
        (algorithm("reinforce")._replace(data=data.stream), {}, "total_return needs whole episodes"),
        (Algorithm(PLAIN, data.stream), {}, "per_episode needs whole episodes"),
        (
            Algorithm(
                PLAIN._replace(importance=FROM_START, reduce=surrogates.per_step),
                data.stream,
            ),
            {},
            r"from_start\(on_policy\) needs whole episodes",
        ),
        (
            algorithm("ppo")._replace(
                estimator=algorithm("ppo").estimator._replace(importance=importance.prefix)
            ),
            {},
            "prefix needs whole episodes",
        ),
        (Algorithm(PLAIN._replace(baseline=baselines.critic)), {}, "reads a critic"),
        (Algorithm(PLAIN, num_epochs=2), {}, "which the score surrogate cannot correct"),
        (Algorithm(PLAIN, num_epochs=0), {}, "num_epochs=0"),
        (Algorithm(PLAIN, measure_noise=True), {"num_envs": 5}, "num_envs=5 must be even"),
        (
            algorithm("ppo")._replace(control_variate=control_variates.peters_schaal),
            {},
            "acts on the gradients of whole episodes",
        ),
        (algorithm("vpg")._replace(critic_epochs=-1), {}, "critic_epochs=-1"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_at_build_time(row, settings, message):
    env = clock(10)
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(env, actor_critic(env), row, **{"num_envs": 8, **settings})
    assert "\n" not in str(error.value)


def test_recurrent_minibatches_are_whole_lanes():
    env = clock(10)
    with pytest.raises(
        ValueError, match=r"num_envs=10 is not a multiple of num_minibatches=4; use 8 or 12"
    ):
        make_trainer(env, actor_critic(env, "gru"), algorithm("ppo"), num_envs=10, num_steps=4)


def test_wrong_kinds_of_policy_are_refused():
    env, other = clock(10), clock(10, continuous=True)
    for this, that in ((env, other), (other, env)):
        agent = Agent(linear_network(this.observation, that.action))
        with pytest.raises(ValueError, match="action space"):
            make_trainer(this, agent, algorithm("reinforce"), num_envs=4)


def test_unknown_algorithms_list_near_matches():
    with pytest.raises(ValueError, match="unknown algorithm 'reinforced'; did you mean reinforce"):
        algorithm("reinforced")
    with pytest.raises(ValueError, match="behaviour_cloning"):
        algorithm("zzz")


def test_imitation_needs_demonstrations():
    env = clock(10)
    trainer = make_trainer(env, actor_critic(env), algorithm("behaviour_cloning"), num_envs=4)
    with pytest.raises(ValueError, match="learns from demonstrations"):
        train(trainer, trainer.init(jax.random.key(0)), Hyperparams(), num_updates=1)


def parts_env(action):
    """One step; pays 1 where every part of the action is right: [1, 2], or near (0.3, -0.3)."""
    target = jnp.array([1.0, 2.0]) if isinstance(action, MultiDiscrete) else jnp.array([0.3, -0.3])

    def step(key, state, chosen):
        del key
        near = jnp.exp(-4.0 * ((chosen - target) ** 2).sum())
        over = jnp.bool_(True)
        return state, TimeStep(jnp.zeros(1), near, over, ~over)

    bound = np.ones(1, np.float32)
    return Env(lambda key: (jnp.int32(0), jnp.zeros(1)), step, Box(-bound, bound), action, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", [MultiDiscrete((2, 4)), Box(-np.ones(2, np.float32), np.ones(2, np.float32))]
)
@pytest.mark.parametrize("name", ["reinforce_baseline", "ppo"])
def test_action_vectors_are_learnt(action, name):
    env = parts_env(action)
    row = algorithm(name)
    agent = actor_critic(env, hidden=(8,))
    trainer = make_trainer(
        env, agent, row, num_envs=64, num_steps=None if row.data.whole_episodes else 4
    )
    hyperparams = Hyperparams(learning_rate=0.01, critic_learning_rate=0.01)
    # Without an entropy bonus ppo's sigma vanishes soon, and the last bits decide what happens then.
    _, metrics = trained(trainer, hyperparams, 100 if name == "ppo" else 300)
    assert metrics["episode_return"][-5:].mean() > 0.85
    assert metrics["episode_return"][0] < 0.5


@pytest.mark.slow
def test_every_row_traces_in_64_bits_on_a_world_that_has_them(x64):
    env = from_lqr(Lqr())
    shown = jax.eval_shape(lambda: demonstrations(env))
    for name in ALGORITHMS:
        trainer, _ = build(name, env, shows=False)

        def run(key, shown, trainer=trainer):
            state = trainer.init(key)
            return state, train(trainer, state, Hyperparams(), shown, num_updates=1)

        before, (after, metrics) = jax.eval_shape(run, jax.random.key(0), shown)
        assert before == after, name
        found = jax.tree.leaves((before.params, before.opt_state, metrics))
        assert {x.dtype.name for x in found} <= {"float64", "int32", "int64"}, name


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "gru"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_rows_trace_in_64_bits_and_keep_the_state_they_began_with(x64, env, network):
    env = history(from_gymnax(env), 1)
    agent = actor_critic(env, network, hidden=(4,))
    for name in ("off_policy", "impala", "ppo"):
        row = algorithm(name)._replace(measure_noise=True)
        trainer = make_trainer(env, agent, row, num_envs=4, num_steps=4)

        def run(key, trainer=trainer):
            state = trainer.init(key)
            return state, train(trainer, state, Hyperparams(), num_updates=2)[0]

        before, after = jax.eval_shape(run, jax.random.key(0))
        assert before == after
        assert {x.dtype for x in jax.tree.leaves(before.params)} == {jnp.dtype(jnp.float64)}
