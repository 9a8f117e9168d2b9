"""Two estimators on common trajectories: the interval of the ratio of their variances."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from instances import instance_a
from listing import listing, moments, weighted

from jaxpg.lab.running import settings_of
from jaxpg.lab.studies import EXPERIMENTS, ratios
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.sampling import measurer
from jaxpg.lab.studies.study import Settings
from jaxpg.lab.worlds.world import world
from jaxpg.stats.lines import lines

SEEDS = 20


@pytest.fixture(scope="module")
def found():
    """Measurements of `total` and `rtg` on A, for many seeds."""
    place = world("A")
    run = measurer(place, [form(name, place) for name in ("total", "rtg")], 2**12)
    return [run(jax.random.key(seed)) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def known():
    """The ratio of variances over every trajectory of A, undiscounted."""
    instance = instance_a()
    each = listing(instance.mdp, instance.logits, 1.0)
    of_total, of_rest = (
        np.trace(moments(each, weighted(each, weight))[1])
        for weight in (each.to_go[:1] + 0 * each.to_go, each.to_go)
    )
    return of_total / of_rest


def test_the_interval_covers_the_ratio_over_all_trajectories(found, known):
    intervals = [ratios.paired_ratio(each["total"], each["rtg"]) for each in found]
    # 17 of 20 or more cover with a probability of 98 %, if 95 % do.
    assert sum(low <= known <= high for _, low, high in intervals) >= 17
    assert not any(low <= 1.1 * known <= high for _, low, high in intervals)
    inverse = ratios.paired_ratio(found[0]["rtg"], found[0]["total"])
    assert np.isclose(inverse.value * intervals[0].value, 1)


def test_separate_trajectories_tell_less(found):
    """The negative control: what is common to both no longer cancels."""

    def width(one, other):
        value, low, high = ratios.paired_ratio(one["total"], other["rtg"])
        return (high - low) / value

    together = np.mean([width(each, each) for each in found])
    apart = np.mean([width(*pair) for pair in pairwise(found)])
    assert together < 0.8 * apart


def test_two_estimators_are_asked_for():
    for names in ((), ("rtg",), ("rtg", "rtg"), ("rtg", "total", "rtg_value")):
        with pytest.raises(ValueError, match="ratio compares two estimators"):
            ratios.ratio(Settings(estimators=names), lambda line: None)
    with pytest.raises(ValueError, match="all_action is computed, not sampled"):
        ratios.ratio(Settings(estimators=("rtg", "all_action")), lambda line: None)


def test_the_table_has_one_row_for_each_estimator_and_equal_decimals():
    rows = [("rtg", "trace", 10.6, 10.78), ("rtg", "noise_scale", 4.5712, 4.606),
            ("total", "trace", 23.67, 24.0), ("total", "noise_scale", 10.19, 10.25)]  # fmt: skip
    names, quantities, measured, exact = map(list, zip(*rows, strict=True))
    table = {"estimator": names, "quantity": quantities, "measured": measured,
             "low": [x - 0.4 for x in measured], "high": [x + 0.4 for x in measured],
             "exact": exact, "warning": [None] * 4}  # fmt: skip
    assert lines(table) == [
        "estimator        trace  exact  noise_scale  exact",
        "rtg        10.60 ±0.40  10.78   4.57 ±0.40   4.61",
        "total      23.67 ±0.40  24.00  10.19 ±0.40  10.25",
    ]
    assert lines(table, 40)[-1] == "(also in table.csv: noise_scale)"


def test_a_quick_run_is_smaller_where_episodes_are_long_and_networks_large():
    small, large = (settings_of("ladder", EXPERIMENTS["ladder"], {"env": env}, quick=True)
                    for env in ("T", "Breakout-MinAtar"))  # fmt: skip
    quick = EXPERIMENTS["ladder"].quick
    assert small.trajectories == quick.trajectories > large.trajectories >= 2**12
    asked = settings_of(
        "ladder", EXPERIMENTS["ladder"], {"env": "Breakout-MinAtar", "trajectories": 2**20}, True
    )
    assert asked.trajectories == 2**20
    runs = EXPERIMENTS["large-batch"]
    assert (
        settings_of("large-batch", runs, {"policy": "gru"}, quick=True).repeats < runs.quick.repeats
    )
