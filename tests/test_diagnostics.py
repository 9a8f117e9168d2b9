"""Metrics beside the losses, against a few lines of NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gradients import data
from worlds import random_mdp

from jaxpg import Hyperparams, make_trainer, rollout, train
from jaxpg.envs import from_gymnax, from_mdp
from jaxpg.estimators import Estimator, assess, facts_of, groups, surrogates
from jaxpg.estimators.estimator import Batch
from jaxpg.optimizers import adaptation, linear, sgd
from jaxpg.policies import actor_critic
from jaxpg.training.accumulation import gradient_of
from jaxpg.training.algorithm import algorithm
from jaxpg.training.diagnostics import explained_variance
from jaxpg.types import Trajectory

LOW, HIGH = 0.002, 0.004
NUMBERS = Hyperparams(clip_eps=LOW, clip_eps_high=HIGH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("surrogate", "low", "high"),
    [
        (surrogates.clipped, LOW, LOW),
        (surrogates.standardised(surrogates.clipped), LOW, LOW),
        (groups.group_scaled(surrogates.clipped_apart, 2), LOW, HIGH),
        (surrogates.weighted_score, 1.0, HIGH),
        (surrogates.sequence_clipped, LOW, HIGH),
    ],
)
@pytest.mark.parametrize("block", [None, 60])
def test_the_share_of_clipped_ratios(surrogate, low, high, block, x64):
    policy, params, trajectory = data()
    params = jax.tree.map(lambda x: 3.0 * x, params)  # far enough that ratios differ
    estimator = Estimator(surrogate=surrogate)
    batch = assess(estimator, trajectory, trajectory.log_prob, NUMBERS)
    _, metrics = gradient_of(estimator, policy, params, (), batch, NUMBERS, block)
    _, distribution = policy.apply(params, (), trajectory.obs, trajectory.first)
    log_ratio = np.asarray(distribution.log_prob(trajectory.action) - trajectory.log_prob)
    mask = np.asarray(trajectory.mask)
    outside = []
    for t, i in zip(*np.nonzero(mask), strict=True):
        own = log_ratio[mask[:, i], i] if surrogate.name == "sequence_clipped" else log_ratio[t, i]
        ratio = np.exp(np.mean(own))
        outside.append(ratio < 1 - low or ratio > 1 + high)
    assert metrics["clip_fraction"] == pytest.approx(np.mean(outside))
    assert 0.02 < np.mean(outside) < 0.98


def test_what_clips_nothing_has_no_share():
    clips = [
        facts_of(x).clips for x in (surrogates.score, surrogates.ratio, surrogates.kl_penalised)
    ]
    assert clips == [None] * 3


@pytest.mark.parametrize("level", [0.0, 1e4])  # large returns have squares that would cancel
def test_explained_variance(level):
    rng, shape = np.random.default_rng(0), (20, 6)
    target = (level + rng.normal(size=shape)).astype(np.float32)
    value = (target + 0.5 * rng.normal(size=shape) - 3.0).astype(np.float32)
    mask = rng.random(shape) < 0.7
    trajectory = Trajectory(*[jnp.asarray(mask)] * 10)._replace(value=jnp.asarray(value))

    def of(target):
        return float(explained_variance(Batch(trajectory, *[jnp.asarray(target)] * 3)))

    error = (target - value)[mask].astype(float)
    assert of(target) == pytest.approx(1 - error.var() / target[mask].astype(float).var(), abs=1e-3)
    assert of(value - 7.0) == pytest.approx(1.0, abs=1e-3), "a constant error is no variance"
    assert np.isnan(of(np.full(shape, 2.0, np.float32)))


@pytest.mark.slow
def test_explained_variance_of_a_batch(x64):
    """The lambda-return of every step and the value that the critic had for it, in a loop."""
    env = from_gymnax("CartPole-v1", max_steps_in_episode=6)
    agent, row = actor_critic(env, hidden=(4,)), algorithm("a2c")
    trainer = make_trainer(env, agent, row, num_envs=5, num_steps=9)
    state = jax.jit(trainer.init)(jax.random.key(0))
    key, _ = jax.random.split(jax.random.fold_in(state.key, 0))
    _, (seen, _) = rollout.unroll(env, agent, state.params, state.data, key, 9)
    numbers = Hyperparams(gamma=0.9, lambda_=0.8)
    target, following = np.zeros((9, 5)), np.zeros(5)
    reward, value, after, alive, last = (
        np.asarray(x, float)
        for x in (seen.reward, seen.value, seen.next_value, seen.discount, seen.last)
    )
    for t in reversed(range(9)):
        ahead = (
            after[t]
            if t == 8
            else np.where(last[t] > 0, after[t], 0.2 * after[t] + 0.8 * following)
        )
        following = target[t] = reward[t] + 0.9 * alive[t] * ahead
    metrics = jax.jit(trainer.update)(state, numbers)[1]
    error = (target - value)[np.asarray(seen.mask)]
    expected = 1 - error.var() / target[np.asarray(seen.mask)].var()
    assert metrics["explained_variance"] == pytest.approx(expected)


@pytest.mark.slow
def test_learning_rates_and_clipped_gradients(x64):
    """SGD at a rate of r moves by r times the clipped norm; the rate follows schedule and adaptation."""
    env = from_mdp(random_mdp(0, horizon=4))
    row = algorithm("a2c")._replace(
        policy_optimizer=sgd, schedule=linear, measure_kl=True, adaptation=adaptation.learning_rate
    )
    trainer = make_trainer(env, actor_critic(env, "tabular"), row, num_envs=8, num_steps=8)
    numbers = Hyperparams(
        learning_rate=0.5, critic_learning_rate=0.25, max_grad_norm=0.3, schedule_updates=8
    )
    step = jax.jit(partial(train, trainer, num_updates=1))
    state, scale, clipped = trainer.init(jax.random.key(0)), 1.0, set()
    for k in range(6):
        before = state.params.policy
        state, found = step(state, numbers)
        found = {name: float(x[0]) for name, x in found.items()}
        rate = 0.5 * (1 - k / 8) * scale
        assert found["scheduled_learning_rate"] == pytest.approx(rate)
        assert found["scheduled_critic_learning_rate"] == pytest.approx(0.25 * (1 - k / 8))
        norm = min(found["grad_norm"], 0.3)
        clipped.add(norm < found["grad_norm"])
        assert found["grad_norm_clipped"] == pytest.approx(norm)
        moved = jax.tree.leaves(jax.tree.map(jnp.subtract, state.params.policy, before))
        assert np.sqrt(sum((x**2).sum() for x in moved)) == pytest.approx(rate * norm)
        scale = found["learning_rate_scale"]
    assert scale != 1.0 and clipped == {True, False}


@pytest.mark.slow
def test_a_row_has_the_metrics_of_its_own_parts():
    def names(name, **settings):
        env = from_mdp(random_mdp(0, horizon=4))
        agent = actor_critic(env, "mlp", hidden=(4,), **settings)
        trainer = make_trainer(env, agent, algorithm(name), num_envs=8, num_steps=4)
        state = jax.eval_shape(trainer.init, jax.random.key(0))
        found = {*jax.eval_shape(trainer.update, state, NUMBERS)[1]}
        return found & {
            "clip_fraction", "explained_variance", "grad_norm_clipped", "scheduled_learning_rate",
            "scheduled_critic_learning_rate",
        }  # fmt: skip

    policy, critic = {"scheduled_learning_rate", "grad_norm_clipped"}, {"explained_variance"}
    assert names("reinforce") == policy
    assert names("ppo", shared_torso=True) == policy | critic | {"clip_fraction"}
    assert names("trpo") == critic | {"scheduled_critic_learning_rate"}
    assert names("gspo") == policy | {"clip_fraction"}
