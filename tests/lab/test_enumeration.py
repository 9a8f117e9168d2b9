"""Enumeration through the slots that training uses, against the recursions, which never call them."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from instances import instance_a, instance_t, random_instance
from listing import listing, weighted
from listing import moments as moments_of
from worlds import bandit

from jaxpg.estimators import Estimator, Weights, baselines, credit, importance, surrogates
from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration
from jaxpg.types import Hyperparams, Trajectory

pytestmark = pytest.mark.usefixtures("x64")
HP = Hyperparams(gamma=0.8, lambda_=0.7, clip_eps=0.2, kl_coef=0.3)
TABLE = np.random.default_rng(7).normal(size=(3, 3))
TOTAL, TO_GO, LAMBDA = credit.total_return, credit.reward_to_go, credit.lambda_return

COMPOSITIONS = [
    Estimator(TOTAL),
    Estimator(TO_GO, baselines.constant(0.4), importance.from_start(importance.on_policy)),
    Estimator(LAMBDA, baselines.critic),
    Estimator(TO_GO, baselines.tabulated(TABLE), importance.one_step),
    Estimator(LAMBDA, baselines.critic, importance.from_start(importance.prefix)),
    Estimator(LAMBDA, baselines.none, importance.per_decision),
    Estimator(LAMBDA, baselines.critic, importance.truncated(1.1)),
    Estimator(TOTAL, baselines.critic, importance.from_start(importance.trajectory)),
    Estimator(LAMBDA, baselines.tabulated(TABLE), importance.trajectory),
    Estimator(TOTAL, baselines.tabulated(TABLE), importance.per_decision),
    Estimator(TO_GO, baselines.critic, surrogate=surrogates.ratio),
    Estimator(LAMBDA, baselines.critic, importance.one_step, surrogates.kl_penalised),
    Estimator(credit.unit, importance=importance.prefix),
    Estimator(TO_GO, importance=importance.from_start(importance.capped(importance.one_step, 1.2))),
    Estimator(TOTAL, importance=importance.dropped_above(importance.one_step, 1.2)),
]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_recursion_and_enumeration_agree(index):
    """Each composition has another world: with and without terminal states, aliased, off-policy."""
    ends, seen = index % 3 > 0, ((0, 1, 2), (0, 1, 0))[index % 2]
    mdp, logits, behaviour = random_instance(index, 3, ends, seen)
    critic = np.random.default_rng(index).normal(size=(3, 3))
    arguments = mdp, logits, COMPOSITIONS[index], HP, behaviour
    listed = enumeration.moments(*arguments, critic=critic)
    found = exact.moments(*arguments, critic=critic)
    np.testing.assert_allclose(found.mean, listed.mean, atol=1e-11)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-10)


def test_a_clip_that_never_cuts_is_the_plain_ratio():
    mdp, logits, _ = random_instance(5)
    behaviour, wide = logits + 0.05, HP._replace(clip_eps=5.0)
    behaviour[:, 0] += 0.1
    arguments = Estimator(surrogate=surrogates.clipped), wide, behaviour
    listed = enumeration.moments(mdp, logits, *arguments)
    found = exact.moments(mdp, logits, *arguments)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-10)


def test_the_reduction_over_steps():
    mdp, logits, _ = random_instance(6, terminal=False)
    arguments = mdp, logits, Estimator(reduce=surrogates.per_step), HP
    listed, found = enumeration.moments(*arguments), exact.moments(*arguments)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-10)


@pytest.mark.parametrize("name", ["A", "T"])
def test_enumeration_of_the_worked_instances(name):
    mdp, logits, _ = {"A": instance_a, "T": instance_t}[name]()
    assert enumeration.count_trajectories(mdp) == {"A": 7776, "T": 5460}[name]
    listed = enumeration.moments(mdp, logits, Estimator(TOTAL), Hyperparams(gamma=0.9))
    found = exact.moments(mdp, logits, Estimator(TOTAL), Hyperparams(gamma=0.9))
    np.testing.assert_allclose(listed.covariance, found.covariance, atol=1e-10)
    np.testing.assert_allclose(listed.mean, exact.gradient(mdp, logits, 0.9), atol=1e-12)


def test_a_capped_trajectory_weight():
    """Any function with the signature of a slot can be enumerated."""

    def capped(log_ratio, trajectory, hyperparams):
        weights = importance.trajectory(log_ratio, trajectory, hyperparams)
        return Weights(jnp.minimum(weights.step, 2.0), weights.trace)

    mdp, logits, behaviour = instance_a()
    estimator, hyperparams = Estimator(TOTAL, importance=capped), Hyperparams(gamma=1.0)
    listed = enumeration.moments(mdp, logits, estimator, hyperparams, behaviour)
    each = listing(mdp, logits, 1.0, behaviour)
    weight = each.rho.prod(axis=0).clip(max=2.0) * each.to_go[0]
    mean, covariance = moments_of(each, weighted(each, np.broadcast_to(weight, each.rho.shape)))
    np.testing.assert_allclose(listed.mean, mean, atol=1e-12)
    np.testing.assert_allclose(listed.covariance, covariance, atol=1e-10)


def test_an_inverted_ratio_is_seen():
    """Negative control: beta / pi where pi / beta belongs."""

    def inverted(log_ratio, trajectory, hyperparams):
        return importance.trajectory(-log_ratio, trajectory, hyperparams)

    mdp, logits, behaviour = random_instance(0)
    hyperparams = Hyperparams(gamma=1.0)
    bias = []
    for slot in (importance.trajectory, inverted):
        estimator = Estimator(TOTAL, importance=slot)
        listed = enumeration.moments(mdp, logits, estimator, hyperparams, behaviour)
        bias.append(np.linalg.norm(listed.mean - exact.gradient(mdp, logits, 1.0)))
    assert bias[0] < 1e-12
    assert bias[1] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("slot", [TOTAL, TO_GO])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_leave_one_out_has_its_closed_form(slot, batch_size):
    mdp, logits, _ = random_instance(11, horizon=2)
    start = importance.on_policy if slot is TOTAL else importance.from_start(importance.on_policy)
    estimator = Estimator(slot, baselines.leave_one_out, start)
    listed = enumeration.moments(mdp, logits, estimator, HP, batch_size=batch_size)
    found = exact.leave_one_out_moments(mdp, logits, slot, HP.gamma, batch_size)
    np.testing.assert_allclose(found.mean, listed.mean, atol=1e-12)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-11)


def test_the_own_sample_in_the_mean_shrinks_the_gradient():
    mdp, logits, _ = random_instance(12, horizon=2)
    true = exact.gradient(mdp, logits, HP.gamma)
    for batch_size in (2, 3):
        estimator = Estimator(TOTAL, baselines.batch_mean)
        listed = enumeration.moments(mdp, logits, estimator, HP, batch_size=batch_size)
        np.testing.assert_allclose(listed.mean, true * (batch_size - 1) / batch_size, atol=1e-12)
        # Each vector is (N-1)/N of leave-one-out's, so the covariance shrinks by the square.
        other = exact.leave_one_out_moments(mdp, logits, TOTAL, HP.gamma, batch_size)
        shrunk = other.covariance * ((batch_size - 1) / batch_size) ** 2
        np.testing.assert_allclose(listed.covariance, shrunk, atol=1e-11)


@pytest.mark.parametrize(
    "slot", [baselines.time_mean, baselines.optimal_constant, baselines.optimal_per_time]
)
def test_baselines_from_the_others_are_unbiased(slot):
    mdp, logits, _ = random_instance(13, horizon=2)
    start = importance.from_start(importance.on_policy)
    estimator = Estimator(TO_GO, slot, start)
    listed = enumeration.moments(mdp, logits, estimator, HP, batch_size=2)
    np.testing.assert_allclose(listed.mean, exact.gradient(mdp, logits, HP.gamma), atol=1e-11)


def test_independent_episodes_divide_the_covariance():
    mdp, logits, behaviour = random_instance(14, horizon=2)
    arguments = mdp, logits, Estimator(TO_GO, importance=importance.per_decision), HP, behaviour
    one, two = (enumeration.moments(*arguments, batch_size=n) for n in (1, 2))
    np.testing.assert_allclose(two.mean, one.mean, atol=1e-12)
    np.testing.assert_allclose(two.covariance, one.covariance / 2, atol=1e-12)


@pytest.mark.slow
def test_self_normalised_weights_are_consistent():
    """The bias falls with the number of draws, here of one-step episodes."""
    mdp, logits = bandit((1.0, 0.7, 0.0)), np.array([(0.3, -0.2, 0.5)])
    behaviour = np.log([(0.5, 0.3, 0.2)])
    true = exact.gradient(mdp, logits, 1.0)
    estimator = Estimator(importance=importance.self_normalised(importance.trajectory))
    bias = [
        np.linalg.norm(
            enumeration.moments(mdp, logits, estimator, HP, behaviour, batch_size=n).mean - true
        )
        for n in (2, 8, 32)
    ]
    # O(1/N): the bias falls by nearly 4 from 8 draws to 32.
    assert bias[0] > bias[1] > bias[2]
    assert 3.5 < bias[1] / bias[2] < 4.5


def test_normalised_advantages_of_the_three_armed_bandit():
    mdp, logits = bandit((1.0, 0.7, 0.0)), np.array([(0.3, -0.2, 0.5)])
    true = exact.gradient(mdp, logits, 1.0)
    estimator = Estimator(surrogate=surrogates.standardised(surrogates.score))
    known = {2: (1.188, 0.99255), 4: (1.812, 0.99953), 8: (2.046, 0.999995)}
    for batch_size, (scale, cosine) in known.items():
        mean = enumeration.moments(mdp, logits, estimator, HP, batch_size=batch_size).mean
        length, own = np.linalg.norm(mean), np.linalg.norm(true)
        assert abs(length / own - scale) < 5e-4
        assert abs(mean @ true / (length * own) - cosine) < 5e-6


def test_what_cannot_be_listed_is_refused_with_the_count():
    mdp, logits, _ = instance_a(horizon=12)
    with pytest.raises(ValueError, match="2176782336 batches of 1"):
        enumeration.moments(mdp, logits, Estimator(), HP)
    with pytest.raises(ValueError, match="2176782336 trajectories"):
        enumeration.enumerate_trajectories(mdp, logits)
    mdp, logits, _ = instance_a()
    with pytest.raises(ValueError, match="30236976 batches of 2"):
        enumeration.moments(mdp, logits, Estimator(), HP, batch_size=2)
    noisy = mdp._replace(reward_variance=np.ones((3, 2)))
    with pytest.raises(ValueError, match="reward noise"):
        enumeration.moments(noisy, logits, Estimator(), HP)


def test_probabilities_of_trajectories_and_batches():
    mdp, _, behaviour = random_instance(1)
    listed = enumeration.enumerate_trajectories(mdp, behaviour)
    assert len(listed.probability) == enumeration.count_trajectories(mdp)
    np.testing.assert_allclose(listed.probability.sum(), 1.0, rtol=1e-14)
    rewards = listed.trajectory.reward.sum(axis=0) @ listed.probability
    np.testing.assert_allclose(rewards, exact.objective(mdp, behaviour, 1.0), rtol=1e-12)
    index, weight = enumeration._batches(np.array([0.2, 0.5, 0.3]), 3)
    assert len(index) == 10
    np.testing.assert_allclose(weight.sum(), 1.0, rtol=1e-14)


def test_a_tabulated_baseline_counts_steps_from_each_reset():
    first = jnp.array([[1, 1], [0, 0], [1, 0], [0, 0]], bool)
    zeros = jnp.zeros((4, 2))
    steps = Trajectory(*[zeros] * 10)._replace(first=first, obs=jnp.array([[0, 1]] * 4))
    table = np.array([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)])
    found = baselines.tabulated(table)(zeros, lambda psi: psi, steps, HP)
    # Beyond the table, its last row is used.
    np.testing.assert_allclose(found, [(1, 2), (3, 4), (1, 6), (3, 6)])
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        baselines.tabulated(table[:, 0])


def test_weights_that_are_no_weights_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        importance.truncated(0.0)
    with pytest.raises(ValueError, match="cannot wrap per_decision"):
        importance.self_normalised(importance.per_decision)


def test_weights_of_a_long_episode_stay_in_range():
    """Ratios of e^0.5 over 1000 steps overflow as a product, but not as a share of the batch."""
    log_ratio = jnp.full((1000, 4), 0.5) * jnp.array([1.0, 0.5, -1.0, 1.0])[None, :]
    trajectory = SimpleNamespace(mask=jnp.ones_like(log_ratio, bool))
    weights = importance.self_normalised(importance.prefix)(log_ratio, trajectory, HP)
    np.testing.assert_allclose(weights.step.sum(axis=1), 4.0, rtol=1e-12)
    np.testing.assert_allclose(weights.step[-1], (2.0, 0.0, 0.0, 2.0), atol=1e-12)
    with np.errstate(over="ignore"):
        assert np.isinf(importance.prefix(3 * log_ratio, None, HP).step[-1, 0])
