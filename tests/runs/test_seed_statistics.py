"""Statistics over seeds agree with their definitions, also where values are missing."""

import numpy as np
import pytest
from scipy import stats

from jaxpg.stats.intervals import attained, mean_interval
from jaxpg.stats.seeds import band, number, robust, scaled, summarise


def test_robust_is_the_trimmed_mean_of_the_seeds_that_have_a_value():
    values = np.random.default_rng(0).normal(size=20)
    estimate = robust(np.append(values, np.nan))
    assert np.isclose(estimate.value, stats.trim_mean(values, 0.25))
    assert estimate.low < estimate.value < estimate.high
    # Not the mean: one seed that fails moves it little.
    values[0] = -1e6
    assert abs(robust(values).value) < 1


def test_one_seed_has_no_interval_and_none_has_no_value():
    assert robust(np.array([3.0]))[0] == 3.0
    assert np.isnan(robust(np.array([3.0]))[1:]).all()
    assert np.isnan(robust(np.array([np.nan, np.nan]))).all()


def test_robust_over_tasks_is_stratified():
    # Tasks differ by a hundred, which must not count as noise.
    scores = np.random.default_rng(1).normal(size=(16, 4)) + 100.0 * np.arange(4)
    apart, mixed = robust(scores), robust(scores.ravel())
    assert apart.value == pytest.approx(mixed.value)
    assert mixed.high - mixed.low > 20 * (apart.high - apart.low)


def test_a_band_is_the_statistic_at_every_point():
    curves = np.random.default_rng(2).normal(size=(24, 5)) + np.arange(5.0)
    curves[:3, 1] = np.nan
    found = band(curves)
    for t in range(5):
        alone = robust(curves[:, t])
        assert np.isclose(found.value[t], alone.value)
        spread = alone.high - alone.low
        assert abs(found.low[t] - alone.low) < 0.25 * spread
        assert abs(found.high[t] - alone.high) < 0.25 * spread


def test_a_band_says_nothing_about_survivors():
    curves = np.ones((8, 3))
    curves[:5, 0] = np.nan  # three of eight have ended an episode
    curves[:4, 1] = np.nan
    np.testing.assert_array_equal(band(curves).value, [np.nan, 1.0, 1.0])


def test_one_seed_has_a_curve_without_a_band():
    found = band(np.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(found.value, [1.0, 2.0])
    assert np.isnan(found.low).all()


def test_scaling_is_per_task_over_all_runs():
    one, other = np.array([[0.0, 5.0], [10.0, 5.0]]), np.array([[5.0, 5.0]])
    found = scaled({"one": one, "other": other})
    np.testing.assert_array_equal(found["one"], [[0, 0], [1, 0]])
    np.testing.assert_array_equal(found["other"], [[0.5, 0]])


def test_the_interval_of_a_mean_is_students_within_the_attainable_and_never_beyond():
    near, far = np.array([500.0] * 7 + [289.0]), np.random.default_rng(3).normal(size=8)
    # Eight seeds of CartPole, where 500 is the most: by Student's t up to 536.
    student = stats.t.interval(0.95, 7, near.mean(), stats.sem(near))
    assert student[1] > 535
    np.testing.assert_allclose(summarise(near)[1:3], student)
    found = summarise(near, attained([8.0, 289.0], 500.0, np.nan))
    assert found.mean == near.mean() and student[0] < found.low < near.mean() < found.high <= 500
    # A column for each: the one that stays inside keeps its interval, and so does the mean in the middle.
    both = mean_interval(np.stack([near, far], axis=1), (-500.0, 500.0))
    np.testing.assert_allclose([both.low[0], both.high[0]], found[1:3])
    expected = stats.t.interval(0.95, 7, far.mean(), stats.sem(far))
    np.testing.assert_allclose([both.low[1], both.high[1]], expected)
    assert np.isnan(summarise(np.array([3.0]))[1:3]).all()
    assert attained(np.array([np.nan])) == (-np.inf, np.inf)


def test_the_bootstrapped_interval_holds_the_mean_as_often_as_it_may():
    """Returns at a ceiling: 70 % of 20 seeds at 1, the others uniform below, so that the mean is 0.85."""
    rng, inside = np.random.default_rng(4), 0
    for _ in range(300):
        values = np.where(rng.random(20) < 0.7, 1.0, rng.random(20))
        _, low, high = mean_interval(values, (0.0, 1.0))
        assert low >= 0 and high <= 1
        inside += low <= 0.85 <= high
    assert inside > 0.88 * 300


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (499.96, "500.0"),
        (0.0, "0.0"),
        (5e-4, "0.0005"),
        (0.9998, "1.0"),
        (-0.8349, "-0.835"),
        (np.nan, "-"),
    ],
)
def test_small_numbers_keep_their_digits(value, said):
    assert number(value) == said
