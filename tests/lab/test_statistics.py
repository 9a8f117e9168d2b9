"""Statistics of measured gradients, with their intervals, against exact moments and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from instances import instance_a
from worlds import bandit

from jaxpg import Hyperparams
from jaxpg.devices import built_for
from jaxpg.envs import from_gymnax, from_mdp
from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.lab.measure import samples
from jaxpg.lab.measure.samples import Source
from jaxpg.lab.measure.statistics import gradient_statistics
from jaxpg.lab.measure.traces import ROUTES, gradient_trace
from jaxpg.policies import mlp, tabular
from jaxpg.stats.moments import SampleMoments, jackknife, merge, merge_groups, moments_of

A = instance_a()
HP = Hyperparams(gamma=0.9)
ON = importance.from_start(importance.on_policy)
TO_GO = Estimator(importance=ON)


def measure(estimator=TO_GO, num=64_000, behaviour=None, instance=A, hyperparams=HP, **settings):
    env = from_mdp(instance.mdp)
    params = {"logits": jnp.asarray(instance.logits, jnp.float32)}
    acting = None if behaviour is None else {"logits": jnp.asarray(behaviour, jnp.float32)}
    policy = tabular(env.observation, env.action)
    return gradient_statistics(
        Source(env, policy, estimator, params, jax.random.key(0), hyperparams, acting),
        num,
        **settings,
    )


def within(estimate, value, errors=5.0):
    """Whether the estimate is within `errors` standard errors; 95 % limits of 32 groups are 2.04 of them."""
    half = (estimate.high - estimate.low) / 2
    return abs(estimate.value - value) < errors / 2.04 * half


@pytest.mark.slow
def test_statistics_match_the_exact_moments():
    truth = exact.moments(A.mdp, A.logits, TO_GO, HP)
    trace, signal = np.trace(truth.covariance), truth.mean @ truth.mean
    result = measure(reference=truth.mean)
    assert within(result.trace, trace)
    assert within(result.signal, signal)
    assert within(result.squared_norm, trace + signal)
    assert within(result.noise_scale, trace / signal)
    assert within(result.layers["logits"], signal / trace)
    assert 0.999 < result.cosine.value <= 1.0
    error = np.sqrt(np.diag(truth.covariance) / 64_000)
    assert np.abs((result.mean - truth.mean) / error).max() < 5
    assert np.allclose(result.variance, np.diag(truth.covariance), rtol=0.05)
    assert result.effective_sample_size == pytest.approx(64_000, rel=1e-3)
    assert (result.num_trajectories, result.num_steps) == (64_000, 5 * 64_000)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_five_routes_to_one_trace(route):
    env = from_mdp(A.mdp)
    params = {"logits": jnp.asarray(A.logits, jnp.float32)}
    found = gradient_trace(
        Source(env, tabular(env.observation, env.action), TO_GO, params, jax.random.key(1), HP),
        64_000,
        route=route,
    )
    assert within(found, 6.32241314)
    assert found.high - found.low < 1.5, "tight enough to mean something"


@pytest.mark.slow
def test_a_coupling_baseline_of_the_users_own_is_measured_by_batches_too():
    """A plain function carries no facts, so its rows are not assumed to be independent."""

    def mine(psi, scores, trajectory, hyperparams):
        del scores, trajectory, hyperparams
        return (psi.sum(axis=1, keepdims=True) - psi) / (psi.shape[1] - 1)

    own, built_in = (
        measure(Estimator(baseline=slot, importance=ON), 4096, batch_size=16)
        for slot in (mine, baselines.leave_one_out)
    )
    assert own.batch_size == 16 and own.num_trajectories == 4096
    assert own.trace.value == pytest.approx(built_in.trace.value, rel=1e-4)


@pytest.mark.slow
def test_both_kinds_of_key_measure_the_same():
    env = from_mdp(A.mdp)
    policy, params = tabular(env.observation, env.action), {"logits": jnp.asarray(A.logits)}
    typed, raw = (
        gradient_statistics(Source(env, policy, TO_GO, params, key, HP, (params, params)), 64)
        for key in (jax.random.key(3), jax.random.PRNGKey(3))
    )
    jax.tree.map(np.testing.assert_array_equal, typed, raw)
    assert typed.trace.value > 0


@pytest.mark.slow
def test_coupled_estimators_are_measured_by_replicated_batches():
    loo = Estimator(credit.total_return, baselines.leave_one_out)
    plain = Hyperparams(gamma=1.0)
    result = measure(loo, 160_000, hyperparams=plain, batch_size=8)
    assert within(result.trace, 1.9826199686)
    assert not within(result.trace, 13.96264449 / 8), "control: rows are not independent"
    assert result.batch_size == 8


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [Estimator(), Estimator(baseline=baselines.leave_one_out)])
def test_chunks_do_not_change_the_result(estimator, monkeypatch):
    """Small chunks, whole groups side by side as on an accelerator, and what fills a cache."""
    whole = measure(estimator, 3000, batch_size=8)
    monkeypatch.setattr(samples, "CHUNK_BYTES", {"cpu": 2**13})
    chunked = measure(estimator, 3000, batch_size=8)
    with built_for("gpu"):
        beside = measure(estimator, 3000, batch_size=8)
    for found in (chunked, beside):
        assert np.allclose(whole.mean, found.mean, rtol=1e-5, atol=1e-6)
        assert whole.trace.value == pytest.approx(found.trace.value, rel=1e-6)
        assert whole.num_steps == found.num_steps


def test_merging_survives_a_million_plus_minus_one():
    """In float32, E[x^2] - E[x]^2 would give 131 072 for a variance of 1."""
    rng = np.random.default_rng(0)
    x = (1e6 + rng.choice([-1.0, 1.0], (64, 512, 1))).astype(np.float32)
    merged = moments_of(jnp.asarray(x[0]))
    for chunk in x[1:]:
        merged = merge(merged, moments_of(jnp.asarray(chunk)))
    exact_mean = x.astype(np.float64).mean()
    assert float(merged.mean[0]) == pytest.approx(exact_mean, rel=1e-7)
    assert float(merged.squares[0] / (merged.count - 1)) == pytest.approx(1.0, rel=1e-2)
    naive = (x.reshape(-1) ** 2).mean() - x.reshape(-1).mean() ** 2
    assert abs(naive - 1.0) > 100, "control: the textbook formula"


@pytest.mark.slow
def test_the_offset_bandit_in_float32():
    """Rewards 10^6 +- 1: variance 2.5e11 without a baseline, 0 with b = 10^6."""
    world = from_mdp(bandit((1e6 + 1, 1e6 - 1)))
    policy = tabular(world.observation, world.action)
    params = {"logits": jnp.zeros((1, 2))}
    source = Source(world, policy, Estimator(), params, jax.random.key(0), Hyperparams(gamma=1.0))
    plain = gradient_statistics(source, 6400)
    known = Estimator(baseline=baselines.constant(1e6))
    centred = gradient_statistics(source._replace(estimator=known), 6400)
    # Two equal and opposite logits: twice the variance of one.
    assert plain.trace.value == pytest.approx(2 * 2.5e11, rel=0.05)
    assert centred.trace.value == pytest.approx(0.0, abs=1e-9)
    assert centred.mean[0] == pytest.approx(0.5)


def test_moments_and_jackknife_against_numpy():
    rows = np.random.default_rng(1).normal(2.0, 3.0, (32, 100, 4))
    each = [moments_of(jnp.asarray(g, jnp.float32)) for g in rows]
    groups = SampleMoments(
        *(np.stack([np.asarray(m[i], np.float64) for m in each]) for i in range(3))
    )
    whole = merge_groups(groups)
    flat = rows.reshape(-1, 4)
    assert np.allclose(whole.mean, flat.mean(0), atol=1e-5)
    assert np.allclose(whole.squares / (whole.count - 1), flat.var(0, ddof=1), rtol=1e-5)
    found = jackknife(lambda m: m.mean[0], groups)
    # For a mean the jackknife is the standard error between groups.
    error = rows[..., 0].mean(1).std(ddof=1) / 32**0.5
    assert (found.high - found.value) == pytest.approx(2.0395 * error, rel=1e-3)
    masked = moments_of(jnp.asarray(flat, jnp.float32), jnp.arange(len(flat)) < 10)
    assert np.allclose(masked.mean, flat[:10].mean(0), atol=1e-5)
    assert int(masked.count) == 10


@pytest.mark.slow
def test_works_for_any_network_without_holding_all_rows():
    env = from_gymnax("CartPole-v1", max_steps_in_episode=20)
    policy = mlp(env.observation, env.action, (8,))
    params = policy.init(jax.random.key(0))
    result = gradient_statistics(
        Source(env, policy, Estimator(), params, jax.random.key(1), HP), 200
    )
    rows = samples.gradient_samples(
        Source(env, policy, Estimator(), params, jax.random.key(1), HP), 200
    )
    assert np.allclose(result.mean, rows.mean(0), atol=1e-3 * np.abs(rows.mean(0)).max())
    assert result.trace.value == pytest.approx(float(rows.var(0, ddof=1).sum()), rel=1e-3)
    layers = [f"body/params/layers_0/{x}" for x in ("bias", "kernel")]
    assert list(result.layers) == layers + [f"head/dense/params/{x}" for x in ("bias", "kernel")]


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        (TO_GO, {"num": 20}, "num_trajectories=20 gives 20 independent samples"),
        (
            Estimator(baseline=baselines.leave_one_out),
            {"num": 640, "batch_size": 1},
            "batch_size=1",
        ),
        (
            Estimator(importance=importance.trajectory),
            {"num": 320, "behaviour": 12 * A.behaviour_logits},
            "effective sample size",
        ),
        (
            Estimator(importance=importance.trajectory),
            {"num": 320, "behaviour": np.array([[0.0, -1e9], [0.0, 0.0], [0.0, 0.0]])},
            "the behaviour never takes actions",
        ),
    ],
)
def test_unreliable_requests_are_refused(estimator, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(estimator, **settings)


def test_unknown_routes_and_coupled_traces_are_refused():
    env = from_mdp(A.mdp)
    source = Source(env, tabular(env.observation, env.action), TO_GO, {}, jax.random.key(0), HP)
    with pytest.raises(ValueError, match="unknown route 'hutchinson'"):
        gradient_trace(source, 640, route="hutchinson")
    coupled = Estimator(baseline=baselines.leave_one_out)
    with pytest.raises(ValueError, match="couples the trajectories"):
        gradient_trace(source._replace(estimator=coupled), 640)


@pytest.mark.slow
@pytest.mark.parametrize(("lag", "heavy"), [(0.5, False), (2.0, True)])
def test_a_heavy_tail_is_said(lag, heavy):
    """If a few weights dominate the fourth moment, intervals of a variance miss the truth too often."""
    ahead = A._replace(logits=A.behaviour_logits + lag * (A.logits - A.behaviour_logits))
    weighed = Estimator(credit.total_return, importance=importance.trajectory)
    result = measure(weighed, 2**14, A.behaviour_logits, ahead)
    assert result.effective_sample_size > 50
    assert any("interval too narrow" in each for each in result.warnings) == heavy
