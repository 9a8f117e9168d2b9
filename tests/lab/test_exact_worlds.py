"""Bandits, the linear-quadratic regulator, Gaussian chains and average rewards, exactly."""

import numpy as np
import pytest

from jaxpg.envs import Lqr, Mdp
from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import exact
from jaxpg.lab.exact import bandits, gaussian, lqr, stationary
from jaxpg.types import Hyperparams

TOTAL, TO_GO = credit.total_return, credit.reward_to_go
ON = importance.from_start(importance.on_policy)


def test_the_three_armed_bandit():
    world, logits = bandits.bandit((1.0, 0.7, 0.0)), np.array([(0.3, -0.2, 0.5)])
    policy = np.array((0.35361511, 0.21447841, 0.43190648))
    average = exact.objective(world, logits, 1.0)
    assert abs(average - 0.50375) < 1e-8
    gradient = exact.gradient(world, logits, 1.0)
    np.testing.assert_allclose(gradient, (0.1754815, 0.04209139, -0.21757289), atol=5e-9)
    np.testing.assert_allclose(gradient, policy * (np.array((1.0, 0.7, 0.0)) - average), atol=1e-8)
    natural = exact.natural_gradient(world, logits, 1.0)
    np.testing.assert_allclose(natural, (0.43333333, 0.13333333, -0.56666667), atol=5e-9)
    fisher = np.diag(policy) - np.outer(policy, policy)
    np.testing.assert_allclose(exact.fisher(world, logits), fisher, atol=1e-8)
    best = exact.optimal_baselines(world, logits, TOTAL, 1.0)
    assert abs(best.scalar - 0.57501433) < 5e-9
    np.testing.assert_allclose(best.per_parameter, (0.72851856, 0.646416, 0.3829878), atol=5e-8)
    traces = [
        exact.control_variate_moments(world, logits, TOTAL, 1.0, b).trace
        for b in (0.0, average, best.scalar, best.per_parameter)
    ]
    known = (0.2476668174, 0.0385212702, 0.0352587132, 0.0199662554)
    np.testing.assert_allclose(traces, known, atol=1e-9)
    batches = [exact.leave_one_out_moments(world, logits, TOTAL, 1.0, n).trace for n in (2, 4, 8)]
    np.testing.assert_allclose(batches, (0.12504207, 0.02726056, 0.00859307), atol=5e-9)


def test_noise_adds_the_fisher_matrix():
    logits = np.array([(0.3, -0.2, 0.5)])
    arguments = logits, Estimator(TOTAL), Hyperparams()
    quiet = exact.moments(bandits.bandit((1.0, 0.7, 0.0)), *arguments)
    noisy = exact.moments(bandits.bandit((1.0, 0.7, 0.0), (4.0, 4.0, 4.0)), *arguments)
    fisher = exact.fisher(bandits.bandit((1.0, 0.7, 0.0)), logits)
    np.testing.assert_allclose(noisy.covariance - quiet.covariance, 4.0 * fisher, atol=1e-14)


def test_the_sigmoid_bandit_and_the_mean_baseline_that_hurts():
    best = bandits.sigmoid_optimal_baseline(0.9, (1.0, 0.0))
    assert best == pytest.approx(0.1)
    variances = [
        float(bandits.sigmoid_moments(0.9, (1.0, 0.0), b).covariance[0, 0])
        for b in (0.0, 0.9, best)
    ]
    np.testing.assert_allclose(variances, (0.0009, 0.0576, 0.0), atol=1e-16)
    even = [bandits.sigmoid_optimal_baseline(0.5, r) - np.mean(r) for r in ((1, 0), (3, -2))]
    np.testing.assert_allclose(even, 0.0)
    # The softmax bandit agrees: theta is the difference of two logits.
    logits = np.array([(np.log(9.0), 0.0)])
    softmax = exact.moments(bandits.bandit((1.0, 0.0)), logits, Estimator(TOTAL), Hyperparams())
    np.testing.assert_allclose(softmax.mean, [0.09, -0.09])
    np.testing.assert_allclose(softmax.covariance[0, 0], variances[0])


def test_a_million_plus_and_minus_one():
    rewards = 1e6 + 1, 1e6 - 1
    plain = bandits.sigmoid_moments(0.5, rewards)
    assert plain.mean[0] == 0.5
    np.testing.assert_allclose(plain.trace, 2.5e11, rtol=1e-15)
    wrong = bandits.wrong_sign_probability(plain, 10**6)
    np.testing.assert_allclose(wrong, 0.49960105778608893, rtol=1e-12)
    centred = bandits.sigmoid_moments(0.5, rewards, 1e6)
    assert centred.trace == 0.0
    assert bandits.wrong_sign_probability(centred, 1) == 0.0


def test_self_normalised_importance_sampling():
    target = np.exp((0.3, -0.2, 0.5)) / np.exp((0.3, -0.2, 0.5)).sum()
    known = {
        2: (0.1342386706, 0.1578287812, 0.1192161364),
        8: (0.0393752150, 0.0394571953, 0.0403011349),
        32: (0.0098960441, 0.0098642988, 0.0097637579),
    }
    for draws, (bias, leading, variance) in known.items():
        found = bandits.self_normalised_moments((1.0, 0.7, 0.0), target, (0.5, 0.3, 0.2), draws)
        got = found.bias, found.leading_bias, found.variance
        np.testing.assert_allclose(got, (bias, leading, variance), atol=5e-11)
    with pytest.raises(ValueError, match="no support"):
        bandits.self_normalised_moments((1.0, 0.7, 0.0), target, (0.5, 0.5, 0.0), 2)


PUBLIC, PARAMS, GAMMA = Lqr(), np.array([-0.6, np.log(0.5)]), 0.95


def test_the_regulator():
    assert abs(lqr.objective(PUBLIC, PARAMS, GAMMA) + 2.8797895364) < 5e-11
    gradient = lqr.gradient(PUBLIC, PARAMS, GAMMA)
    np.testing.assert_allclose(gradient, (-2.50209729, -0.91037696), atol=5e-9)
    np.testing.assert_allclose(np.diag(lqr.fisher(PUBLIC, PARAMS)), (11.28666126, 10), atol=5e-9)
    assert abs(lqr.return_variance(PUBLIC, PARAMS, GAMMA) - 4.9239725854) < 5e-11
    at_best = np.array([-1.495288224371308, np.log(0.5)])
    assert abs(lqr.gradient(PUBLIC, at_best, GAMMA)[0]) < 1e-12
    assert abs(lqr.objective(PUBLIC, at_best, GAMMA) + 2.068897889713579) < 1e-10


def test_the_table_of_the_regulator():
    best = lqr.optimal_baselines(PUBLIC, PARAMS, TOTAL, GAMMA)
    assert abs(best.scalar + 4.3016976367) < 5e-11
    np.testing.assert_allclose(best.per_parameter, (-5.23887232, -3.24394032), atol=5e-9)
    average = lqr.objective(PUBLIC, PARAMS, GAMMA)

    def slots(*estimator):
        return lqr.moments(PUBLIC, PARAMS, Estimator(*estimator), Hyperparams(gamma=GAMMA))

    found = {
        (577.6159755379, 415.3768271, 162.23914844): slots(TOTAL),
        (226.7526229241, 168.41890466, 58.33371827): slots(TOTAL, baselines.constant(average)),
        (183.7147691346, 115.51860344, 68.19616569): slots(TOTAL, baselines.constant(best.scalar)),
        (162.6132300386, 105.60556972, 57.00766032): lqr.control_variate_moments(
            PUBLIC, PARAMS, TOTAL, GAMMA, best.per_parameter
        ),
        (299.1503465347, 240.26198977, 58.88835676): slots(TO_GO, baselines.none, ON),
        (35.8225719794, 24.49461001, 11.32796197): slots(TO_GO, baselines.critic, ON),
        (25.7157015351, 16.59726441, 9.11843713): lqr.advantage_moments(PUBLIC, PARAMS, GAMMA),
    }
    for (trace, *diagonal), moments in found.items():
        np.testing.assert_allclose(moments.trace, trace, rtol=1e-11)
        np.testing.assert_allclose(np.diag(moments.covariance), diagonal, rtol=1e-8)
        np.testing.assert_allclose(
            moments.mean, lqr.gradient(PUBLIC, PARAMS, GAMMA), rtol=1e-9, atol=1e-9
        )
    with pytest.raises(ValueError, match="discrete observations"):
        slots(TO_GO, baselines.tabulated(np.zeros((5, 1))))


@pytest.mark.parametrize(
    ("gain", "to_go", "with_value"),
    [
        (-0.2, 23.4, 2.99),
        (-0.6, 38.4, 3.91),
        (-1.0, 139, 6.41),
        (-1.3, 1082, 22.4),
        (-1.45, 22188, 345),
    ],
)
def test_noise_overwhelms_the_signal_near_the_optimum(gain, to_go, with_value):
    found = []
    for baseline in (baselines.none, baselines.critic):
        estimator = Estimator(TO_GO, baseline, ON)
        params = np.array([gain, np.log(0.5)])
        moments = lqr.moments(PUBLIC, params, estimator, Hyperparams(gamma=GAMMA))
        found.append(moments.covariance[0, 0] / moments.mean[0] ** 2)
    np.testing.assert_allclose(found, (to_go, with_value), rtol=3e-3)


def test_one_step_of_the_regulator_by_hand():
    """The variance of the gain's component is a polynomial of Gaussian moments."""
    k, std, v = -0.6, 0.5, 0.25
    one = Lqr(initial_mean=0.0, initial_variance=v, horizon=1)
    alpha, beta, g = 1.0 + 0.1 * k**2, 2 * 0.1 * k * std, 0.1 * std**2
    second = 15 * alpha**2 * v**3 + 9 * beta**2 * v**2 + 15 * g**2 * v + 18 * alpha * g * v**2
    variance = second / std**2 - (2 * 0.1 * k * v) ** 2
    moments = lqr.moments(one, np.array([k, np.log(std)]), Estimator(TOTAL), Hyperparams(gamma=1.0))
    np.testing.assert_allclose(moments.covariance[0, 0], variance, rtol=1e-12)


def test_the_gaussian_chain():
    fractions = [gaussian.gaussian_chain(0.3, h).ess_fraction for h in (1, 10, 50, 100)]
    known = (0.9139311852712282, 0.40656965974059917, 0.011108996538242306, 0.00012340980408667956)
    np.testing.assert_allclose(fractions, known, rtol=1e-12)
    # By quadrature, one step: W = exp(delta x - delta^2 / 2) under a unit normal.
    x, w = np.polynomial.hermite_e.hermegauss(40)
    weight, w = np.exp(0.3 * x - 0.045), w / w.sum()
    found = gaussian.gaussian_chain(0.3, 1)
    log_mean = w @ np.log(weight)
    log_variance = w @ np.log(weight) ** 2 - log_mean**2
    square = w @ weight**2
    by_hand = w @ weight, square, 1 / square, log_mean, log_variance
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)


def test_the_score_belongs_to_the_sampled_action():
    found = gaussian.clipped_action_gradients(0.6, 0.5)
    np.testing.assert_allclose(found, (0.7874574634786875, 0.5466725020888887), rtol=1e-12)


def baxter_bartlett():
    """Three states, two actions, two features per state; arriving in the third pays 1."""
    transition = np.zeros((3, 2, 3))
    transition[0] = transition[2] = [(0.0, 0.8, 0.2), (0.0, 0.2, 0.8)]
    transition[1] = [(0.8, 0.0, 0.2), (0.2, 0.0, 0.8)]
    features = np.array([(12, 6), (6, 12), (5, 5)]) / 18
    rest = np.zeros((3, 2)), np.zeros(3, bool), np.arange(3), 1
    mdp = Mdp(np.ones(3) / 3, transition, transition[:, :, 2].copy(), *rest)
    return mdp, features


def of_features(features, theta):
    """Logits linear in features, theta [A, F]."""
    return features @ np.reshape(theta, (2, 2)).T


def test_the_average_reward_gradient_is_a_derivative():
    mdp, features = baxter_bartlett()
    theta, h = np.array([1.0, 1.0, -1.0, -1.0]), 1e-5
    by_logit = stationary.average_reward_gradient(mdp, of_features(features, theta))
    gradient = (by_logit.reshape(3, 2).T @ features).reshape(-1)
    for i, e in enumerate(np.eye(4)):
        ahead, behind = (
            stationary.average_reward(mdp, of_features(features, theta + s * e)) for s in (h, -h)
        )
        assert abs(gradient[i] - (ahead - behind) / (2 * h)) < 1e-9


@pytest.mark.parametrize(
    ("beta", "known"), [(0.0, 0.0771), (0.8, 0.0164), (0.9, 0.0083), (0.99, 0.0008)]
)
def test_the_bias_of_gpomdp_vanishes_with_beta(beta, known):
    mdp, features = baxter_bartlett()
    logits = of_features(features, [1.0, 1.0, -1.0, -1.0])
    by_logit = stationary.average_reward_gradient(mdp, logits).reshape(3, 2)
    biased = stationary.gpomdp_gradient(mdp, logits, beta).reshape(3, 2)
    true, found = by_logit.T @ features, biased.T @ features
    relative = np.linalg.norm(found - true) / np.linalg.norm(true)
    assert abs(relative - known) < 5.1e-5


def test_gpomdp_by_the_sum_over_lags():
    """sum_k beta^k E[u_0 r_k] from the stationary distribution, by powers of the kernel."""
    mdp, features = baxter_bartlett()
    logits = of_features(features, [0.3, -1.0, 0.5, 0.2])
    weight = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    kernel = np.einsum("sa,sax->sx", weight, mdp.transition)
    start = np.linalg.matrix_power(kernel, 200)[0]
    np.testing.assert_allclose(stationary.stationary_distribution(mdp, logits), start, atol=1e-12)
    ahead = sum(
        0.9**k * np.linalg.matrix_power(kernel, k - 1) @ (weight * mdp.reward).sum(axis=1)
        for k in range(1, 400)
    )
    action_value = mdp.reward + mdp.transition @ ahead
    by_hand = start[:, None] * weight * (action_value - (weight * action_value).sum(1)[:, None])
    found = stationary.gpomdp_gradient(mdp, logits, 0.9)
    np.testing.assert_allclose(found, by_hand.reshape(-1), atol=1e-12)


def test_chains_without_an_average_are_refused():
    mdp, features = baxter_bartlett()
    logits = of_features(features, np.zeros(4))
    ends = mdp._replace(initial=np.eye(3)[0], terminal=np.array([0, 1, 0], bool))
    with pytest.raises(ValueError, match="terminal states"):
        stationary.average_reward(ends, logits)
    stuck = mdp._replace(transition=np.repeat(np.eye(3)[:, None], 2, axis=1))
    with pytest.raises(ValueError, match="several recurrent classes"):
        stationary.average_reward(stuck, logits)
    with pytest.raises(ValueError, match=r"beta=1.0 must be in \[0, 1\)"):
        stationary.gpomdp_gradient(mdp, logits, 1.0)
