"""Statistics of a few seeds, against SciPy, closed forms and synthetic data with known answers."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from jaxpg.stats import intervals
from jaxpg.stats.intervals import bootstrap
from jaxpg.stats.reliability import (
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)


@pytest.mark.parametrize("shape", [(8, 1), (10, 2), (32, 5)])
def test_interquartile_mean_is_the_trimmed_mean(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    assert np.isclose(interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=None))


def test_interquartile_mean_weighs_the_scores_at_the_quartiles():
    # The middle half, [1.25, 3.75] of [0, 5], holds 3/4 of the second and fourth score, and all of the third.
    scores = np.array([[100.0], [1.0], [2.0], [3.0], [-7.0]])
    assert np.isclose(interquartile_mean(scores), (0.75 * 1 + 2 + 0.75 * 3) / 2.5)


def test_interquartile_mean_of_normal_data_is_their_mean():
    scores = np.random.default_rng(1).normal(3.0, 2.0, size=(4000, 5))
    estimate = bootstrap(interquartile_mean, scores, num_resamples=200)
    assert estimate.low < 3.0 < estimate.high


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["normal", "lognormal"])
def test_bootstrap_intervals_cover_the_truth(draw):
    # The binomial standard error of 2000 repetitions at 95 % is 0.5 %; the band is 4 of them either side.
    rng = np.random.default_rng(2)
    draws = getattr(rng, draw)(size=(2000, 32, 5)) + np.arange(5.0)
    grid = (np.arange(200_000) + 0.5) / 200_000
    dist = stats.norm if draw == "normal" else stats.lognorm(1.0)
    pooled = np.concatenate([dist.ppf(grid) + task for task in range(5)])
    truth = interquartile_mean(pooled[:, None])
    inside = 0
    for seed, scores in enumerate(draws):
        estimate = bootstrap(interquartile_mean, scores, num_resamples=400, seed=seed)
        inside += estimate.low <= truth <= estimate.high
    assert 0.93 < inside / len(draws) < 0.97


def test_intervals_that_ignore_strata_are_too_wide():
    # Negative control: tasks have very different means, and their spread is not noise.
    scores = np.random.default_rng(3).normal(size=(16, 4)) + 100.0 * np.arange(4)
    stratified = bootstrap(lambda x: x.mean(axis=(-2, -1)), scores)
    mixed = bootstrap(lambda x: x.mean(axis=(-2, -1)), scores.reshape(-1, 1))
    assert mixed.high - mixed.low > 20 * (stratified.high - stratified.low)


def test_performance_profile_counts_runs_above():
    scores = np.array([[0.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(performance_profile(scores, [-1, 0, 1.5, 3]), [1, 0.75, 0.5, 0])


def test_probability_of_improvement_is_mann_whitney():
    rng = np.random.default_rng(4)
    one, other = rng.normal(0.3, size=(20, 1)), rng.normal(size=(15, 1)).round(1)
    one[:5] = other[:5]
    known = stats.mannwhitneyu(one[:, 0], other[:, 0]).statistic / 300
    assert np.isclose(probability_of_improvement(one, other), known)


def test_probability_of_improvement_of_normals():
    rng = np.random.default_rng(5)
    one, other = rng.normal(0.5, size=(2, 200, 3)) - np.array([0.0, 0.5])[:, None, None]
    estimate = bootstrap(probability_of_improvement, one, other, num_resamples=300)
    assert estimate.low < stats.norm.cdf(0.5 / np.sqrt(2)) < estimate.high


def test_thousands_of_runs_are_resampled_in_parts(monkeypatch):
    """Parts give the same draws, and no array holds all resamples, or all pairs of runs."""
    scores = np.random.default_rng(6).normal(size=(30, 4))
    whole = bootstrap(interquartile_mean, scores, num_resamples=200)
    for most in (1, 1000):
        monkeypatch.setattr(intervals, "MOST_SCORES", most)
        parts = bootstrap(interquartile_mean, scores, num_resamples=200)
        np.testing.assert_allclose(parts, whole, rtol=1e-13)
    monkeypatch.setattr(intervals, "MOST_SCORES", 10**4)
    many = np.random.default_rng(7).normal(size=(1000, 1))
    tracemalloc.start()
    bootstrap(probability_of_improvement, many, many[:500], num_resamples=20)
    assert tracemalloc.get_traced_memory()[1] < 20 * many.size * 500  # a byte for each pair
    tracemalloc.stop()


def test_an_interval_needs_two_runs():
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*2 runs or more"):
        bootstrap(interquartile_mean, np.zeros((1, 3)))


# The examples of rliable's own tests: four runs and three, on two tasks.
ONE, OTHER = np.array([[1, 2], [2, 2], [1, 1], [2, 1]]), np.array([[1, 1], [2, 2], [3, 3]])


def test_the_numbers_that_rliable_publishes():
    assert interquartile_mean(ONE) == pytest.approx(1.5)
    assert interquartile_mean(OTHER) == pytest.approx(2.0)
    assert probability_of_improvement(ONE, OTHER) == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("ignore")  # those of its dependencies
def test_rliable_agrees():
    """Agarwal et al., 2021: estimates, profiles and, to sampling error, stratified bootstrap intervals."""
    metrics, library = (pytest.importorskip(f"rliable.{x}") for x in ("metrics", "library"))
    rng = np.random.default_rng(8)
    one, other = rng.normal(size=(2, 8, 4)) + np.arange(4.0) * np.array([1.0, 0.9])[:, None, None]
    points, ends = library.get_interval_estimates(
        {"one": one}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=4000
    )
    found = bootstrap(interquartile_mean, one, num_resamples=4000)
    np.testing.assert_allclose(found.value, points["one"][0], rtol=1e-12)
    width = found.high - found.low
    np.testing.assert_allclose([found.low, found.high], ends["one"][:, 0], atol=0.06 * width)
    better = metrics.probability_of_improvement(one, other)
    assert probability_of_improvement(one, other) == pytest.approx(better)
    limits = np.linspace(-2, 5, 15)
    profiles, _ = library.create_performance_profile({"one": one}, limits, reps=10)
    np.testing.assert_allclose(performance_profile(one, limits), profiles["one"])
