"""The host loop's arithmetic, and the replica axis."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats

from jaxpg.runs.config.config import points
from jaxpg.runs.config.presets import preset
from jaxpg.runs.store.metrics import nan_mean
from jaxpg.runs.train.loop import LONGEST_CHUNK, chunk_length
from jaxpg.runs.train.replicas import make_replicas
from jaxpg.runs.train.report import table
from jaxpg.stats.seeds import summarise

CONFIG, GRID = preset("CartPole-v1", "ppo")


@pytest.mark.parametrize("updates", [1, 2, 7, 20, 60, 97, 200, 1000, 4096, 1_000_000])
def test_chunks_divide_the_updates(updates):
    chunk = chunk_length(updates)
    assert updates % chunk == 0
    assert chunk <= LONGEST_CHUNK


def test_a_round_number_of_updates_makes_about_twenty_chunks():
    assert [200 // chunk_length(200), 400 // chunk_length(400), 240 // chunk_length(240)] == [
        20
    ] * 3


def test_means_skip_updates_without_a_value():
    x = np.array([[1.0, np.nan, 3.0], [np.nan] * 3, [1.0, 2.0, 6.0]])
    np.testing.assert_array_equal(nan_mean(x), [2.0, np.nan, 3.0])
    np.testing.assert_array_equal(nan_mean(np.array([[1, 2]])), [1.5])


def test_the_interval_is_students():
    values = np.array([480.0, 500.0, 490.0, 455.0])
    summary = summarise(np.array([*values, np.nan]))
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    np.testing.assert_allclose([summary.low, summary.high], expected, rtol=1e-12)
    assert np.isnan(summarise(values[:1]).low)
    assert np.isnan(summarise(np.array([np.nan])).mean)


def test_a_seed_is_the_same_whatever_surrounds_it():
    few = make_replicas(replace(CONFIG, seeds=3), points(GRID))
    grid = GRID._replace(gamma=(0.9, 0.99))
    many = make_replicas(replace(CONFIG, seeds=5), points(grid))
    keys_few, keys_many = (np.asarray(jax.random.key_data(r.keys)) for r in (few, many))
    np.testing.assert_array_equal(keys_many[:3], keys_few)
    np.testing.assert_array_equal(keys_many[:5], keys_many[5:])
    assert len(np.unique(keys_many[:5], axis=0)) == 5
    np.testing.assert_array_equal(many.hyperparams.gamma, np.float32([0.9] * 5 + [0.99] * 5))
    assert [label["seed"] for label in many.labels] == [0, 1, 2, 3, 4] * 2
    assert [label["gamma"] for label in many.labels] == [0.9] * 5 + [0.99] * 5
    other = make_replicas(replace(CONFIG, seeds=3, seed=1), points(GRID))
    assert not np.isin(np.asarray(jax.random.key_data(other.keys)), keys_few).any()


def test_a_large_grid_shows_its_best_rows():
    grid = GRID._replace(learning_rate=tuple(0.001 * i for i in range(1, 31)))
    returns = np.arange(60.0).reshape(30, 2)
    lines = table(grid, returns)
    assert len(lines) == 14
    assert lines[1].split()[:2] == ["0.03", "58.5"]
    assert "best 12 of 30" in lines[-1]
