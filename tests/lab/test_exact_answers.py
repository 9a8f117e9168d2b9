"""Exact values, gradients, baselines, geometry, decompositions and batches of instances A and T."""

import numpy as np
import pytest
from instances import instance_a, instance_t, random_instance
from listing import (
    along,
    given_state,
    in_state,
    least,
    least_by_parameter,
    listing,
    softmax,
    weighted,
)

from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.types import Hyperparams

TOTAL, TO_GO = credit.total_return, credit.reward_to_go
ON = importance.from_start(importance.on_policy)
A, T = instance_a(), instance_t()
INSTANCES = {"A": A, "T": T}


def assert_close(found, known, digits=1e-8):
    np.testing.assert_allclose(found, known, atol=0.51 * digits, rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_the_derivative_of_the_objective(seed):
    aliased = (0, 1, 0) if seed % 2 else (0, 1, 2)
    mdp, logits, _ = random_instance(seed, 6, seed > 1, aliased)
    flat, h = logits.reshape(-1), 1e-6
    ahead, behind = (
        [exact.objective(mdp, (flat + s * e).reshape(logits.shape), 0.9) for e in np.eye(len(flat))]
        for s in (h, -h)
    )
    differences = (np.array(ahead) - np.array(behind)) / (2 * h)
    np.testing.assert_allclose(exact.gradient(mdp, logits, 0.9), differences, atol=1e-8)


def test_a_step_along_the_gradient():
    mdp, logits, _ = A
    gradient = exact.gradient(mdp, logits, 1.0)
    gain = exact.objective(mdp, logits + 0.01 * gradient.reshape(3, 2), 1.0) - 2.480775998790833
    assert_close(gain, 0.0233777, 1e-7)


def test_optimal_baselines_are_known_for_two_credits():
    with pytest.raises(ValueError, match="not lambda_return"):
        exact.optimal_baselines(*A[:2], credit.lambda_return, 1.0)


@pytest.mark.parametrize("slot", [TOTAL, TO_GO])
@pytest.mark.parametrize("aliased", [(0, 1, 2), (0, 1, 0)])
def test_optimal_baselines_are_where_the_trace_is_flat(slot, aliased):
    """The trace is quadratic in a baseline, so it is symmetric around its minimum and larger there."""
    mdp, logits, _ = random_instance(8, 4, False, aliased)
    best = exact.optimal_baselines(mdp, logits, slot, 0.8)
    rng, start = np.random.default_rng(0), ON if slot is TO_GO else importance.on_policy

    def by_parameter(b):
        return exact.control_variate_moments(mdp, logits, slot, 0.8, b)

    def by_state(b):
        # A baseline may know the state even if observations are aliased, so it is passed as a critic.
        estimator = Estimator(slot, baselines.critic, start)
        return exact.moments(mdp, logits, estimator, Hyperparams(gamma=0.8), critic=b)

    for moments, minimum in (
        (by_parameter, best.scalar),
        (by_parameter, best.per_parameter),
        (by_parameter, best.per_time[:, None]),
        (by_parameter, best.per_time_per_parameter),
        (by_state, best.per_state_time),
    ):
        shift = rng.normal(size=np.shape(minimum))
        low, least, high = (moments(minimum + s * shift) for s in (-1.0, 0.0, 1.0))
        np.testing.assert_allclose(least.mean, exact.gradient(mdp, logits, 0.8), atol=1e-12)
        np.testing.assert_allclose(low.trace, high.trace, rtol=1e-10)
        assert least.trace < low.trace


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_every_answer_is_a_sum_over_trajectories(name, gamma):
    mdp, logits, _ = INSTANCES[name]
    each = listing(mdp, logits, gamma)
    returns, everyone, discounted = (
        each.to_go[0],
        np.ones_like(each.to_go),
        each.u * each.start[..., None],
    )
    score, total = weighted(each, everyone), weighted(each, everyone * each.to_go[0])
    to_go = weighted(each, each.start * each.to_go)
    gradient, fisher = each.p @ total, (each.p[:, None] * score).T @ score
    natural = np.linalg.lstsq(fisher, gradient, rcond=1e-10)[0]
    step = np.sqrt(0.02 / (natural @ gradient) * mdp.horizon) * natural
    after = logits + step.reshape(logits.shape)
    moved = np.log(softmax(logits) / softmax(after))[mdp.observation][each.s, each.a]
    known = {
        "objective": each.p @ returns,
        "gradient": gradient,
        "return_variance": each.p @ returns**2 - (each.p @ returns) ** 2,
        "value": given_state(each, each.to_go),
        "fisher": fisher,
        "natural": natural,
        "step": step,
        "mean_kl": each.p @ np.where(each.alive, moved, 0.0).mean(axis=0),
        "objective_after": (x := listing(mdp, after, gamma)).p @ x.to_go[0],
        "total_scalar": least(each, total, score[None])[0],
        "total_per_parameter": least_by_parameter(each, total, score[None])[0],
        "scalar": least(each, to_go, discounted.sum(axis=0)[None])[0],
        "per_time": least(each, to_go, discounted),
        "per_state": least(each, to_go, in_state(each, discounted)),
    }
    whole = exact.optimal_baselines(mdp, logits, TOTAL, gamma)
    best = exact.optimal_baselines(mdp, logits, TO_GO, gamma)
    found_step = exact.trpo_step(mdp, logits, gamma, max_kl=0.01)
    found = {
        "objective": exact.objective(mdp, logits, gamma),
        "gradient": exact.gradient(mdp, logits, gamma),
        "return_variance": exact.return_variance(mdp, logits, gamma),
        "value": exact.values(mdp, logits, gamma)[0][:-1],
        "fisher": exact.fisher(mdp, logits),
        "natural": exact.natural_gradient(mdp, logits, gamma),
        "step": found_step.step,
        "mean_kl": found_step.mean_kl,
        "objective_after": found_step.objective,
        "total_scalar": whole.scalar,
        "total_per_parameter": whole.per_parameter,
        "scalar": best.scalar,
        "per_time": best.per_time,
        "per_state": best.per_state_time.reshape(-1),
    }
    assert found.keys() == known.keys()
    for quantity, number in known.items():
        np.testing.assert_allclose(found[quantity], number, atol=1e-10, err_msg=quantity)


def grouped(each, label, x):
    """E[x | label] [N, P], for labels [N]."""
    _, index = np.unique(label, return_inverse=True)
    mass = np.bincount(index, each.p)
    return np.stack([np.bincount(index, each.p * column) / mass for column in x.T], axis=1)[index]


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_parts_of_the_variance_are_those_of_conditional_means(name, gamma):
    """Check E[G | the past] draw by draw, and the estimate of one step at a uniform time."""
    mdp, logits, _ = INSTANCES[name]
    each = listing(mdp, logits, gamma)
    gain = weighted(each, each.start * (each.to_go - along(each, given_state(each, each.to_go))))
    before, past, parts = each.p @ gain, np.zeros(len(each.p), int), {"state": [], "action": []}
    for t in range(mdp.horizon):
        for drawn, draw in (("state", each.s[t]), ("action", each.a[t])):
            past = past * 3 + draw
            now = grouped(each, past, gain)
            parts[drawn].append(each.p @ ((now - before) ** 2).sum(axis=1))
            before = now
    found = exact.doob_decomposition(mdp, logits, gamma)
    np.testing.assert_allclose(found.initial, parts["state"][0], atol=1e-11)
    np.testing.assert_allclose(found.action, parts["action"], atol=1e-11)
    np.testing.assert_allclose(found.transition, [*parts["state"][1:], 0.0], atol=1e-11)
    # List each step of each trajectory with its probability at a uniform t.
    flat = each._replace(p=np.repeat(each.p[None] / mdp.horizon, mdp.horizon, axis=0).reshape(-1))
    t = np.arange(mdp.horizon)[:, None] + 0 * each.s
    state, pair = ((t * 3 + each.s).reshape(-1), ((t * 3 + each.s) * 2 + each.a).reshape(-1))
    for baseline, b in ((None, along(each, given_state(each, each.to_go))), (0.0, 0.0)):
        x = (each.u * (each.to_go - b)[..., None]).reshape(len(state), -1)
        by_pair, by_state, mean = grouped(flat, pair, x), grouped(flat, state, x), flat.p @ x
        known = [
            flat.p @ ((one - other) ** 2).sum(axis=1)
            for one, other in ((x, by_pair), (by_pair, by_state), (by_state, mean))
        ]
        found = exact.tucker_decomposition(mdp, logits, gamma, baseline)
        np.testing.assert_allclose(found, known, atol=1e-11)


def test_the_natural_gradient_is_a_regression():
    """eNAC regresses the return on the score with an intercept; here by its normal equations."""
    mdp, logits, _ = A
    covariance = exact.moments(mdp, logits, Estimator(credit.unit), Hyperparams()).covariance
    np.testing.assert_allclose(covariance, exact.fisher(mdp, logits), atol=1e-14)
    weight = exact.natural_gradient(mdp, logits, 0.9)
    np.testing.assert_allclose(covariance @ weight, exact.gradient(mdp, logits, 0.9), atol=1e-12)


@pytest.mark.parametrize("from_start", [True, False])
def test_doob_parts_sum_to_the_trace(from_start):
    """The sum holds with reward noise, any baseline, and with or without gamma^t."""
    mdp, logits, _ = random_instance(9, 5)
    noise = np.array([[0.5, 1.0], [0.2, 2.0], [0.0, 0.0]])
    table = np.random.default_rng(1).normal(size=(5, 3))
    mdp = mdp._replace(reward_variance=noise)
    slot = ON if from_start else importance.on_policy
    estimator = Estimator(TO_GO, baselines.tabulated(table), slot)
    trace = exact.moments(mdp, logits, estimator, Hyperparams(gamma=0.7)).trace
    doob = exact.doob_decomposition(mdp, logits, 0.7, table, from_start=from_start)
    np.testing.assert_allclose(doob.total, trace, rtol=1e-11)


@pytest.mark.parametrize(
    ("name", "gamma", "total", "to_go"),
    [
        (
            "A",
            1.0,
            (13.625425651616808, 1.9826199685883112, 0.2214620063639854),
            (7.227792913392671, 1.0242507896018165, 0.11353695168640573),
        ),
        (
            "A",
            0.9,
            (9.1210278334, 1.3236571487, 0.1477423323),
            (4.2369988521, 0.5974561448, 0.0661302854),
        ),
        (
            "T",
            1.0,
            (13.41774994168128, 2.030068482139945, 0.22923320835489364),
            (10.380145591688263, 1.5219188360112914, 0.1703673070586193),
        ),
        (
            "T",
            0.9,
            (7.435307455744692, 1.1098031112338134, 0.12485457866899777),
            (5.405175584145633, 0.7808604293417769, 0.08704397095115485),
        ),
    ],
)
def test_leave_one_out(name, gamma, total, to_go):
    mdp, logits, _ = INSTANCES[name]
    for slot, known in ((TOTAL, total), (TO_GO, to_go)):
        found = [exact.leave_one_out_moments(mdp, logits, slot, gamma, n).trace for n in (2, 8, 64)]
        assert_close(found, known, 1e-10)
    with pytest.raises(ValueError, match="1 must be at least 2"):
        exact.leave_one_out_moments(mdp, logits, TOTAL, gamma, 1)
    with pytest.raises(ValueError, match="not lambda_return"):
        exact.leave_one_out_moments(mdp, logits, credit.lambda_return, gamma, 2)


def test_leave_one_out_tends_to_the_mean_baseline():
    mdp, logits, _ = A
    traces = [
        n * exact.leave_one_out_moments(mdp, logits, TOTAL, 1.0, n).trace for n in (2, 8, 64, 10**7)
    ]
    np.testing.assert_allclose(traces, [27.25085130, 15.86095975, 14.17356841, 13.9626445], 1e-6)


@pytest.mark.parametrize(
    ("estimator", "to_truth", "between"),
    [
        (Estimator(TOTAL), (0.2801, 0.7099, 0.9662, 0.9966), (0.0786, 0.5043, 0.9336, 0.9933)),
        (
            Estimator(TO_GO, baselines.critic),
            (0.5253, 0.9104, 0.9905, 0.9990),
            (0.2761, 0.8289, 0.9810, 0.9981),
        ),
    ],
)
def test_expected_cosines(estimator, to_truth, between):
    moments = exact.moments(*A[:2], estimator, Hyperparams(gamma=1.0))
    found = [exact.cosine(moments, n) for n in (1, 10, 100, 1000)]
    assert_close([x.to_truth for x in found], to_truth, 1e-4)
    assert_close([x.between_batches for x in found], between, 1e-4)


def test_the_cosine_of_a_gaussian_by_simulation():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    moments = exact.Moments(np.array([0.4, -0.2, 0.7]), root @ root.T)
    x = moments.mean + rng.normal(size=(400_000, 3)) @ root.T
    cosines = x @ moments.mean / np.linalg.norm(x, axis=1) / np.linalg.norm(moments.mean)
    stderr = cosines.std() / np.sqrt(len(x))
    assert abs(cosines.mean() - exact.cosine(moments).to_truth) < 5 * stderr
    with pytest.raises(ValueError, match="no direction"):
        exact.cosine(moments._replace(mean=np.zeros(3)))


def test_weight_moments():
    found = exact.weight_moments(*A)
    assert_close(found, (1.0, 1.61168126, 0.62047008, -0.21271519, 0.39257202))
    squares = [exact.weight_moments(*instance_a(h)).square for h in (1, 2, 10, 20, 50, 100)]
    np.testing.assert_allclose(squares, [1.08855, 1.19497, 2.67892, 7.40907, 156.741, 25364], 1e-5)
    growth = exact.weight_growth(*A)
    assert_close(growth, 0.101730, 1e-6)
    long = [np.log(exact.weight_moments(*instance_a(h)).square) for h in (100, 101)]
    assert_close(long[1] - long[0], growth, 1e-9)


def test_own_data_has_no_weights():
    mdp, logits, _ = T
    found = exact.weight_moments(mdp, logits, logits)
    np.testing.assert_allclose(found, (1.0, 1.0, 1.0, 0.0, 0.0), atol=1e-14)
    hyperparams = Hyperparams(gamma=0.9)
    plain = exact.moments(mdp, logits, Estimator(TOTAL), hyperparams)
    weighted = exact.moments(
        mdp, logits, Estimator(TOTAL, importance=importance.trajectory), hyperparams, logits
    )
    np.testing.assert_allclose(plain.covariance, weighted.covariance, atol=1e-11)


def test_occupancy_is_a_distribution_at_every_step():
    mdp, logits, _ = T
    occupancy = exact.occupancy(mdp, logits)
    np.testing.assert_allclose(occupancy.sum(axis=1), 1.0)
    np.testing.assert_allclose(occupancy[0], mdp.initial)


def test_values_of_observations():
    """Without aliasing they are the values; if all states look alike, the mean over those visited."""
    value, action_value = exact.values(*A[:2], 0.9)
    found, found_action = exact.observation_values(*A[:2], 0.9)
    np.testing.assert_allclose(found, value[:-1])
    np.testing.assert_allclose(found_action, action_value)
    mdp, logits, _ = instance_a(observation=(0, 0, 0))
    found, _ = exact.observation_values(mdp, logits, 0.9)
    value = exact.values(mdp, logits, 0.9)[0][:-1]
    mean = (exact.occupancy(mdp, logits) * value).sum(axis=1)
    np.testing.assert_allclose(found, np.repeat(mean[:, None], 3, axis=1))
