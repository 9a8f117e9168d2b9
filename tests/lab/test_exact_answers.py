"""Exact values, gradients, baselines, geometry, decompositions and batches of instances A and T."""

import numpy as np
import pytest
from exact_answers import ANSWERS
from instances import instance_a, instance_t, random_instance

from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.types import Hyperparams

TOTAL, TO_GO = credit.total_return, credit.reward_to_go
ON = importance.from_start(importance.on_policy)
A, T = instance_a(), instance_t()
INSTANCES = {"A": A, "T": T}


def pairs(*x):
    """Two actions: the second component of each state's pair is minus the first."""
    return np.stack([np.array(x), -np.array(x)], axis=1).reshape(-1)


def assert_close(found, known, digits=1e-8):
    np.testing.assert_allclose(found, known, atol=0.51 * digits, rtol=1e-9)


def test_objective_and_gradient():
    assert_close(exact.objective(*A[:2], 1.0), 2.480775998790833, 1e-12)
    assert_close(exact.objective(*A[:2], 0.9), 2.0548474653769913, 1e-12)
    assert_close(exact.objective(*T[:2], 1.0), 5.347268964574804, 1e-12)
    gradient = exact.gradient(*A[:2], 1.0)
    assert_close(gradient, pairs(0.5787724603, -0.5082332583, 0.7599159233), 1e-10)
    assert_close(gradient @ gradient, 2.3415016322, 1e-10)
    gradient = exact.gradient(*A[:2], 0.9)
    assert_close(gradient, pairs(0.4878949581, -0.4260244387, 0.5968034231), 1e-10)
    assert_close(gradient @ gradient, 1.5514252767, 1e-10)
    gradient = exact.gradient(*T[:2], 1.0)
    assert_close(gradient, pairs(-0.1014827601, -0.1851121344, 0.0), 1e-10)
    assert_close(exact.return_variance(*A[:2], 1.0), 4.6369400541, 1e-10)
    assert_close(exact.return_variance(*A[:2], 0.9), 3.1247724780, 1e-10)
    assert_close(exact.return_variance(*T[:2], 0.9), 4.7756167017, 1e-10)
    assert_close(exact.values(*A[:2], 1.0)[0][0], (2.44637376, 3.15195935, 1.56000657))


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


def test_optimal_baselines():
    mdp, logits, _ = A
    total = exact.optimal_baselines(mdp, logits, TOTAL, 1.0)
    assert_close(total.scalar, 2.097025949704979, 1e-12)
    twice = np.repeat((2.923688531578791, 2.429443899896724, 0.9947763384670942), 2)
    assert_close(total.per_parameter, twice, 1e-12)
    assert_close(exact.optimal_baselines(mdp, logits, TOTAL, 0.9).scalar, 1.7468068522, 1e-10)
    to_go = exact.optimal_baselines(mdp, logits, TO_GO, 1.0)
    assert_close(to_go.scalar, 1.0474816938204192, 1e-12)
    assert_close(to_go.per_time, (2.20083635, 1.56725532, 0.96627504, 0.47857691, 0.0211093), 1e-8)
    assert_close(to_go.per_state_time[0], (2.49400183, 2.58996081, 0.91649128))
    assert_close(exact.optimal_baselines(mdp, logits, TO_GO, 0.9).scalar, 1.0543303320, 1e-9)
    # The absorbing state has no score: 0 / 0 is 0.
    terminal = exact.optimal_baselines(*T[:2], TOTAL, 1.0)
    twice = np.repeat((6.366250785917526, 6.828726702329626, 0.0), 2)
    assert_close(terminal.per_parameter, twice, 1e-12)
    with pytest.raises(ValueError, match="not lambda_return"):
        exact.optimal_baselines(mdp, logits, credit.lambda_return, 1.0)


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
        # Aliased or not, a baseline may know the state: tabulated on worlds that show it.
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


def test_fisher_natural_gradient_and_trust_region():
    mdp, logits, _ = A
    fisher = exact.fisher(mdp, logits)
    assert_close(np.diag(fisher), np.repeat((0.42379122, 0.33709388, 0.41949518), 2))
    natural = exact.natural_gradient(mdp, logits, 1.0)
    assert_close(natural, pairs(0.6828509379041765, -0.7538452738561999, 0.9057504829), 1e-10)
    assert_close(natural @ exact.gradient(mdp, logits, 1.0), 2.9332775432, 1e-10)
    step = exact.trpo_step(mdp, logits, 1.0, max_kl=0.01)
    assert_close(step.step, pairs(0.12608091, -0.13918923, 0.16723686))
    assert_close((step.mean_kl, step.objective), (0.00975187, 2.9990634251), 1e-8)
    step = exact.trpo_step(*T[:2], 0.9, max_kl=0.01)
    assert_close(step.step, pairs(-0.14265802, -0.27636835, 0.0))
    assert_close((step.mean_kl, step.objective), (0.00968101, 4.7209241551), 1e-8)
    assert np.trace(fisher) == pytest.approx(2.36076056, rel=1e-8)


@pytest.mark.parametrize(("name", "gamma"), ANSWERS)
def test_every_answer_of_the_other_instances(name, gamma):
    mdp, logits, _ = INSTANCES[name]
    gradient = exact.gradient(mdp, logits, gamma)
    total = exact.optimal_baselines(mdp, logits, TOTAL, gamma)
    to_go = exact.optimal_baselines(mdp, logits, TO_GO, gamma)
    natural = exact.natural_gradient(mdp, logits, gamma)
    step = exact.trpo_step(mdp, logits, gamma, max_kl=0.01)
    doob = exact.doob_decomposition(mdp, logits, gamma)
    found = {
        "objective": exact.objective(mdp, logits, gamma),
        "gradient": gradient,
        "gradient_square": gradient @ gradient,
        "return_variance": exact.return_variance(mdp, logits, gamma),
        "total_scalar": total.scalar,
        "total_per_parameter": total.per_parameter,
        "scalar": to_go.scalar,
        "per_time": to_go.per_time,
        "per_state": to_go.per_state_time[0],
        "value": exact.values(mdp, logits, gamma)[0][0],
        "fisher": np.diag(exact.fisher(mdp, logits)),
        "natural": natural,
        "natural_square": natural @ gradient,
        "step": step.step,
        "mean_kl": step.mean_kl,
        "objective_after": step.objective,
        "doob": (doob.initial, doob.action.sum(), doob.transition.sum()),
        "tucker": exact.tucker_decomposition(mdp, logits, gamma),
        "tucker_without": exact.tucker_decomposition(mdp, logits, gamma, 0.0),
    }
    for quantity, known in ANSWERS[name, gamma].items():
        np.testing.assert_allclose(found[quantity], known, atol=5.1e-9, err_msg=quantity)


def test_the_natural_gradient_is_a_regression():
    """eNAC: regress the return on the score with an intercept; here by its normal equations."""
    mdp, logits, _ = A
    covariance = exact.moments(mdp, logits, Estimator(credit.unit), Hyperparams()).covariance
    np.testing.assert_allclose(covariance, exact.fisher(mdp, logits), atol=1e-14)
    weight = exact.natural_gradient(mdp, logits, 0.9)
    np.testing.assert_allclose(covariance @ weight, exact.gradient(mdp, logits, 0.9), atol=1e-12)


def test_doob_decomposition():
    doob = exact.doob_decomposition(*A[:2], 1.0)
    parts = doob.initial, doob.action.sum(), doob.transition.sum()
    assert_close(parts, (0.27475339, 3.65801853, 2.23894554))
    assert_close(doob.total, 6.171717455670793, 1e-12)
    doob = exact.doob_decomposition(*T[:2], 0.9)
    parts = doob.initial, doob.action.sum(), doob.transition.sum()
    assert_close(parts, (0.00595656, 0.47664642, 3.87261772))


@pytest.mark.parametrize("from_start", [True, False])
def test_doob_parts_sum_to_the_trace(from_start):
    """With reward noise and any baseline, and discounting states or not."""
    mdp, logits, _ = random_instance(9, 5)
    noise = np.array([[0.5, 1.0], [0.2, 2.0], [0.0, 0.0]])
    table = np.random.default_rng(1).normal(size=(5, 3))
    mdp = mdp._replace(reward_variance=noise)
    slot = ON if from_start else importance.on_policy
    estimator = Estimator(TO_GO, baselines.tabulated(table), slot)
    trace = exact.moments(mdp, logits, estimator, Hyperparams(gamma=0.7)).trace
    doob = exact.doob_decomposition(mdp, logits, 0.7, table, from_start=from_start)
    np.testing.assert_allclose(doob.total, trace, rtol=1e-11)


def test_tucker_decomposition():
    mdp, logits, _ = A
    assert_close(exact.tucker_decomposition(mdp, logits, 1.0), (0.89464028, 0.06430514, 0.18731733))
    without = exact.tucker_decomposition(mdp, logits, 1.0, 0.0)
    assert_close(without, (0.89464028, 0.95317384, 0.18731733))
    found = exact.tucker_decomposition(*T[:2], 0.9)
    assert_close(found, (0.82746090, 0.01031398, 0.03350885))
    # The trace of a single step's estimate at a uniform t, by a sum over the same steps.
    value, action_value = exact.values(mdp, logits, 1.0)
    assert_close(found.total, 0.8712837337622185, 1e-12)
    assert value.shape == (6, 3)
    assert action_value.shape == (5, 3, 2)


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
    """Where nothing is aliased they are the values; where all is, the mean over the states met."""
    value, action_value = exact.values(*A[:2], 0.9)
    found, found_action = exact.observation_values(*A[:2], 0.9)
    np.testing.assert_allclose(found, value[:-1])
    np.testing.assert_allclose(found_action, action_value)
    mdp, logits, _ = instance_a(observation=(0, 0, 0))
    found, _ = exact.observation_values(mdp, logits, 0.9)
    value = exact.values(mdp, logits, 0.9)[0][:-1]
    mean = (exact.occupancy(mdp, logits) * value).sum(axis=1)
    np.testing.assert_allclose(found, np.repeat(mean[:, None], 3, axis=1))
