"""Measured gradients against exact ones, at an N large enough to show the bugs they guard against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from instances import instance_a, instance_t
from jax.flatten_util import ravel_pytree
from worlds import clock

from jaxpg import Hyperparams
from jaxpg.envs import from_gymnax, from_mdp
from jaxpg.estimators import (
    Estimator,
    assess,
    baselines,
    control_variates,
    credit,
    importance,
    objective,
    surrogates,
)
from jaxpg.lab import exact
from jaxpg.lab.measure.samples import Source, couples, gradient_samples, roll
from jaxpg.policies import Agent, AgentParams, gru, mlp, tabular
from jaxpg.rollout import episodes

GAMMA = 0.9
HP = Hyperparams(gamma=GAMMA, lambda_=0.95)
START = importance.from_start
ON = START(importance.on_policy)
N = 100_000  # catches every bug of over 2.4 % relative bias at five standard errors


def rows(instance, estimator, num=N, key=0, behaviour=None, hyperparams=HP, **settings):
    env = from_mdp(instance.mdp)
    params = {"logits": jnp.asarray(instance.logits, jnp.float32)}
    acting = None if behaviour is None else {"logits": jnp.asarray(behaviour, jnp.float32)}
    policy = tabular(env.observation, env.action)
    source = Source(env, policy, estimator, params, jax.random.key(key), hyperparams, acting)
    return np.asarray(jax.jit(lambda: gradient_samples(source, num, **settings))(), np.float64)


def z_of_trace(samples, trace):
    squares = ((samples - samples.mean(0)) ** 2).sum(1)
    return (squares.mean() - trace) / (squares.std() / len(samples) ** 0.5)


def z_of_mean(samples, mean):
    return np.abs((samples.mean(0) - mean) / (samples.std(0) / len(samples) ** 0.5 + 1e-12)).max()


A = instance_a()
CASES = {
    "total": (Estimator(credit.total_return), None),
    "constant": (Estimator(credit.total_return, baselines.constant(2.0)), None),
    "to go": (Estimator(importance=ON), None),
    "trajectory": (Estimator(credit.total_return, importance=importance.trajectory), A[2]),
    "per decision": (Estimator(importance=START(importance.per_decision)), A[2]),
    "prefix": (Estimator(importance=START(importance.prefix)), A[2]),
    "one step": (Estimator(importance=START(importance.one_step)), A[2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_means_and_traces_match_the_exact_ones(name):
    estimator, behaviour = CASES[name]
    truth = exact.moments(A.mdp, A.logits, estimator, HP, behaviour)
    samples = rows(A, estimator, behaviour=behaviour)
    assert samples.shape == (N, 6)
    assert z_of_mean(samples, truth.mean) < 5
    assert abs(z_of_trace(samples, np.trace(truth.covariance))) < 5
    if name in ("prefix", "one step"):
        gradient = exact.gradient(A.mdp, A.logits, GAMMA)
        assert z_of_mean(samples, gradient) > 5, "documented as biased, and measured to be"


@pytest.mark.slow
def test_a_mixture_of_behaviours_is_unbiased_even_without_common_support():
    """The second behaviour never takes action 1 in state 0, which the target does half the time."""
    narrow = np.array([(0.0, -1e9), (0.0, 0.0), (0.0, 0.0)])
    behaviours = tuple({"logits": jnp.asarray(b, jnp.float32)} for b in (A[2], narrow))
    env = from_mdp(A.mdp)
    params = {"logits": jnp.asarray(A.logits, jnp.float32)}
    estimator = Estimator(importance=START(importance.per_decision))
    policy = tabular(env.observation, env.action)
    run = jax.jit(
        lambda key: gradient_samples(Source(env, policy, estimator, params, key, HP, behaviours), N)
    )
    samples = np.asarray(run(jax.random.key(5)), np.float64)
    gradient = exact.gradient(A.mdp, A.logits, GAMMA)
    assert z_of_mean(samples, gradient) < 5
    alone = rows(A, estimator, behaviour=narrow)
    assert z_of_mean(alone, gradient) > 5, "control: without support the weights cannot help"


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [1, 3])
def test_a_trajectory_has_its_own_key_and_behaviour_wherever_a_chunk_begins(kinds):
    env = from_gymnax("CartPole-v1", max_steps_in_episode=20)
    policy = mlp(env.observation, env.action, (4,))
    behaviours = tuple(policy.init(jax.random.key(10 + k)) for k in range(kinds))
    key = jax.random.key(1)
    source = Source(env, policy, Estimator(), behaviours[0], key, HP, behaviours)
    found = jax.jit(lambda start: roll(source, start, 7))(5)
    alone = jax.jit(lambda params, key: episodes(env, Agent(policy), params, key, 1)[0])
    for lane, number in enumerate(range(5, 12)):
        params = AgentParams(behaviours[number % kinds], ())
        one = alone(params, jax.random.fold_in(key, number))
        for field in ("obs", "action", "reward", "mask"):
            np.testing.assert_allclose(
                getattr(found, field)[:, lane], getattr(one, field)[:, 0], 1e-5, 1e-6
            )


@pytest.mark.slow
def test_negative_controls_fail():
    gradient = exact.gradient(A.mdp, A.logits, GAMMA)
    dropped = rows(A, Estimator())  # gamma^t dropped
    assert z_of_mean(dropped, gradient) > 5
    # The inverted ratio: behaviour and target exchanged.
    exchanged = instance_a()._replace(logits=A.behaviour_logits)
    inverted = rows(exchanged, Estimator(importance=START(importance.per_decision)), behaviour=A[1])
    assert z_of_mean(inverted, gradient) > 5
    # With the own sample in the mean, a batch of 8 gives 7/8 of the gradient.
    own = rows(A, Estimator(baseline=baselines.batch_mean, importance=ON), 64_000, 1)
    per_batch = rows_in_batches(baselines.batch_mean)
    assert z_of_mean(per_batch, gradient) > 5
    assert z_of_mean(per_batch, 7 / 8 * gradient) < 5
    assert z_of_mean(rows_in_batches(baselines.leave_one_out), gradient) < 5
    assert z_of_mean(own, gradient) < 5, "in a batch of 64 000 the own sample is negligible"


def rows_in_batches(baseline, size=8, num=40_000):
    env = from_mdp(A.mdp)
    params = {"logits": jnp.asarray(A.logits, jnp.float32)}
    policy = tabular(env.observation, env.action)
    estimator = Estimator(baseline=baseline, importance=ON)

    def batch(key):
        return gradient_samples(Source(env, policy, estimator, params, key, HP), size).mean(0)

    keys = jax.random.split(jax.random.key(2), num)
    return np.asarray(jax.jit(jax.vmap(batch))(keys), np.float64)


@pytest.mark.slow
def test_an_unmasked_terminal_score_would_be_caught_by_the_trace():
    masked, unmasked = instance_t(), instance_t(unmasked=True)
    plain = Hyperparams(gamma=1.0)
    samples = rows(masked, Estimator(credit.total_return), hyperparams=plain)
    assert abs(z_of_trace(samples, 73.76380316)) < 5
    lived = rows(unmasked, Estimator(credit.total_return), hyperparams=plain)
    assert abs(z_of_trace(lived, 102.04677065)) < 5
    assert z_of_mean(lived, samples.mean(0)) < 8, "the mean does not show it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "estimator"),
    [
        (mlp, Estimator(baseline=baselines.leave_one_out)),
        (
            gru,
            Estimator(
                surrogate=surrogates.standardised(surrogates.clipped), reduce=surrogates.per_step
            ),
        ),
    ],
)
def test_the_mean_over_rows_is_the_batch_gradient(build, estimator):
    """This holds for all slots, with per-step means, standardisation and a network with memory."""
    env = from_gymnax("CartPole-v1", max_steps_in_episode=12)
    policy = build(env.observation, env.action, (8,))
    params = policy.init(jax.random.key(0))
    key = jax.random.key(1)

    def batch_gradient(params):
        def one(index):
            trajectory, _ = episodes(
                env, Agent(policy), AgentParams(params, ()), jax.random.fold_in(key, index), 1
            )
            return jax.tree.map(lambda x: x[:, 0], trajectory)

        trajectory = jax.vmap(one, out_axes=1)(jnp.arange(6))
        batch = assess(estimator, trajectory, trajectory.log_prob, HP, policy, params)
        carry = policy.initial_carry(6)
        return jax.grad(lambda p: objective(estimator, policy, p, carry, batch, HP)[0])(params)

    samples = jax.jit(lambda p: gradient_samples(Source(env, policy, estimator, p, key, HP), 6))(
        params
    )
    flat = ravel_pytree(jax.jit(batch_gradient)(params))[0]
    assert np.allclose(samples.mean(0), flat, atol=1e-4 * np.abs(flat).max())


@pytest.mark.slow
def test_rows_do_not_depend_on_how_many_are_asked_for():
    env = from_mdp(A.mdp)
    policy = tabular(env.observation, env.action)
    params = {"logits": jnp.asarray(A.logits, jnp.float32)}
    few, many = (
        gradient_samples(Source(env, policy, Estimator(), params, jax.random.key(3), HP), n)
        for n in (5, 1000)
    )
    assert np.allclose(few, many[:5], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [importance.trajectory, importance.per_decision])
def test_importance_with_the_own_behaviour_is_on_policy(weight):
    env = from_mdp(A.mdp)
    policy = tabular(env.observation, env.action)
    params = {"logits": jnp.asarray(A.logits, jnp.float32)}
    source = Source(env, policy, Estimator(), params, jax.random.key(4), HP)
    plain = gradient_samples(source, 64)
    weighing = Estimator(credit.reward_to_go, importance=weight)
    weighted = gradient_samples(source._replace(estimator=weighing, behaviour_params=params), 64)
    assert np.allclose(weighted, plain, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "trace"),
    [
        (Estimator(credit.total_return, baselines.optimal_constant), 9.08978052),
        (Estimator(baseline=baselines.optimal_per_time, importance=ON), 3.93200929),
    ],
)
def test_estimated_optimal_baselines_reach_the_optimum(estimator, trace):
    samples = rows(A, estimator, 200_000)
    assert abs(z_of_trace(samples, trace)) < 5
    assert z_of_mean(samples, exact.gradient(A.mdp, A.logits, GAMMA)) < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variate", "estimator", "trace"),
    [
        (control_variates.optimal_per_parameter, Estimator(credit.total_return), 8.08111393),
        (control_variates.peters_schaal, Estimator(importance=ON), 3.33286747),
    ],
)
def test_per_parameter_baselines_reach_their_traces(variate, estimator, trace):
    samples = rows(A, estimator, 200_000, control_variate=variate)
    assert abs(z_of_trace(samples, trace)) < 5
    assert z_of_mean(samples, exact.gradient(A.mdp, A.logits, GAMMA)) < 5


def test_what_couples_a_batch():
    assert not couples(Estimator(importance=ON))
    assert couples(Estimator(baseline=baselines.leave_one_out))
    assert couples(Estimator(surrogate=surrogates.standardised(surrogates.score)))
    assert couples(Estimator(reduce=surrogates.per_step))
    assert couples(Estimator(importance=START(importance.self_normalised(importance.trajectory))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "num", "message"),
    [
        (Estimator(), 0, "num_trajectories=0"),
        (Estimator(baseline=baselines.critic), 4, "pass critic="),
        (Estimator(baseline=baselines.leave_one_out), 1, "must be at least 2"),
        (Estimator(importance=importance.per_decision), 4, "per_decision needs the log-prob"),
    ],
)
def test_requests_that_make_no_sense(estimator, num, message):
    env = clock(3)
    policy = mlp(env.observation, env.action, (4,))
    with pytest.raises(ValueError, match=message):
        gradient_samples(
            Source(env, policy, estimator, policy.init(jax.random.key(0)), jax.random.key(1), HP),
            num,
        )


def test_rows_that_would_not_fit_are_refused_before_anything_runs():
    env = clock(3)
    policy = mlp(env.observation, env.action)
    params = policy.init(jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"GiB of memory; gradient_statistics needs only chunks of \d+"
    ):
        gradient_samples(Source(env, policy, Estimator(), params, jax.random.key(1), HP), 10**9)
