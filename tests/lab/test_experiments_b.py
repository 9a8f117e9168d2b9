"""Key numbers of the experiments on decompositions, batches, windows, discount and learning."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from printed import printed

from jaxpg.lab import exact
from jaxpg.lab.exact.tables import softmax
from jaxpg.lab.studies import (
    ascent,
    coupling,
    decomposition,
    discounting,
    groups,
    learning,
    observability,
    precision,
    ratios,
    reference,
    samplers,
    streams,
    windows,
)
from jaxpg.lab.studies.estimators import batch_moments, form, gradient
from jaxpg.lab.studies.lags import lag_of
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import COLUMNS, Settings
from jaxpg.lab.studies.training import best_objective, objective_of
from jaxpg.lab.worlds.world import at_horizon, world

ALL = {
    name: experiment
    for module in (
        decomposition,
        coupling,
        windows,
        discounting,
        observability,
        learning,
        precision,
        ratios,
        groups,
        reference,
        samplers,
    )
    for name, experiment in module.EXPERIMENTS.items()
}
A = world("A")


def silent(line):
    del line


# Every experiment has a figure and a tidy table with measurements that agree with exact values.


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_measurements_agree_with_exact_values(name):
    result = ALL[name].run(ALL[name].quick, silent)
    table = result.table
    assert set(COLUMNS) <= set(table)
    assert len({len(column) for column in table.values()}) == 1
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    for row in rows:
        if row["measured"] is None or row["exact"] is None or not np.isfinite(row["high"]):
            continue
        # Intervals of 95 % reach about 2 standard errors either way; allow 5, and rounding.
        reach = 2.5 * (row["high"] - row["low"]) + 1e-5 * abs(row["exact"]) + 1e-9
        assert abs(row["measured"] - row["exact"]) <= reach, row
    # Every entry is a number, a bound, or the reason for having neither.
    assert "null" not in json.dumps(result.summary, allow_nan=False)
    printed(result.draw, "column")


# The law of total variance.


@pytest.mark.parametrize(
    ("name", "trace"), [("rtg", 10.78416704), ("rtg_constant", 13.04368559), ("rtg_value", 6.17171746),
                        ("rtg_optimal_state", 5.40105255)],
)  # fmt: skip
def test_components_sum_to_the_trace(name, trace):
    known = decomposition.decompositions(A, name)
    total = form(name, A).exact().trace
    parts = sum(known["doob", part, None] for part in ("initial", "action", "transition"))
    assert abs(parts - total) < 1e-10
    assert abs(total - trace) < 1e-8
    by_step = sum(v for (_, part, t), v in known.items() if t is not None and part == "action")
    assert abs(by_step - known["doob", "action", None]) < 1e-10


def test_a_baseline_changes_only_what_the_action_decides():
    none, value = (decomposition.decompositions(A, name) for name in ("rtg", "rtg_value"))
    for part in [
        ("doob", "initial"),
        ("doob", "transition"),
        ("tucker", "trajectory"),
        ("tucker", "state"),
    ]:
        assert abs(none[(*part, None)] - value[(*part, None)]) < 1e-12
    assert round(none["tucker", "action", None], 8) == 0.95317384
    assert round(value["tucker", "action", None], 8) == 0.06430514


@pytest.mark.slow
def test_split_by_initial_state_on_a_gymnax_environment():
    catch = world("Catch-bsuite")
    settings = Settings(env="Catch-bsuite", trajectories=2**13, estimators=("rtg",), quick=True)
    result = decomposition.total_variance(settings, silent)
    rows = {r: i for i, r in enumerate(result.table["component"][:3])}
    measured = [result.table["measured"][rows[part]] for part in ("initial", "rest", "total")]
    # The two parts and the total come from different episodes.
    assert abs(measured[0] + measured[1] - measured[2]) < 0.1 * measured[2]
    assert abs(measured[2] - form("rtg", catch).exact().trace) < 0.1 * measured[2]


# Horizons.


def test_the_trace_grows_with_the_horizon():
    rows = []
    for steps in (20, 50):
        at = at_horizon(A, steps)
        for name in ("total", "rtg", "rtg_value", "exact_advantage"):
            rows.append(
                {"estimator": name, "horizon": steps, "exact": form(name, at).exact().trace}
            )
    slopes = [round(x, 2) for x in decomposition.growth(rows).values()]
    np.testing.assert_allclose(slopes, [2.87, 2.82, 1.99, 1.03], atol=0.011)


@pytest.mark.slow
def test_every_kind_of_world_has_its_horizons():
    """A regulator can be extended, with its critic; a bare environment cannot go beyond its own end."""
    long = at_horizon(world("LQR"), 12)
    each = form("rtg_value", long)
    found = measure(long, [each], jax.random.key(0), 2**13)["rtg_value"].trace()
    half = (found.high - found.low) / 2
    assert abs(found.value - each.exact().trace) < 2.5 * half < 0.5 * each.exact().trace
    assert each.exact().trace > 1.5 * form("rtg_value", world("LQR")).exact().trace
    settings = Settings(env="LQR", policy="mlp", trajectories=64, quick=True, estimators=("rtg",))
    table = decomposition.horizon(settings, silent).table
    assert table["horizon"] == [5] and table["exact"] == [None]
    assert np.isfinite(table["measured"]).all()


# Coupled batches.


@pytest.mark.parametrize(("size", "trace"), [(2, 27.25), (8, 15.86), (64, 14.17)])
def test_the_price_of_leaving_one_out(size, trace):
    others, own = (batch_moments(form(n, A), A, size) for n in ("total_mean", "total_own_mean"))
    assert round(size * others.trace, 2) == trace
    np.testing.assert_allclose(own.mean, (size - 1) / size * gradient(A), atol=1e-12)
    assert np.isclose(own.trace, ((size - 1) / size) ** 2 * others.trace)


def test_the_own_mean_shrinks_a_measured_gradient():
    names = ("total_own_mean", "total_mean")
    found = measure(A, [form(n, A) for n in names], jax.random.key(0), 2**14, (2,))
    own, others = (found[name].mean for name in names)
    # This holds for every sample, not only on average.
    np.testing.assert_allclose(own, others / 2, atol=1e-5)


def test_standardised_advantages_scale_and_turn():
    rows = coupling.standardised_bandit()
    found = {(r["quantity"], r["batch"]): r["exact"] for r in rows}
    np.testing.assert_allclose(
        [found["scale", n] for n in (2, 4, 8)], [1.188, 1.812, 2.046], atol=6e-4
    )
    cosines = [found["cosine", n] for n in (2, 4, 8)]
    np.testing.assert_allclose(cosines, [0.99255, 0.99953, 0.999995], atol=6e-6)


# Behaviours.


def test_the_best_behaviour_of_a_bandit_is_proportional_to_what_moves_the_gradient():
    bandit = coupling._bandit_world()
    policy, reward = np.array(coupling.RARE_POLICY), np.array(coupling.RARE_REWARDS)
    length = np.linalg.norm(np.eye(3) - policy, axis=1)
    share = policy * length * reward
    np.testing.assert_allclose(
        np.exp(coupling.tilted(bandit, 1.0))[0], share / share.sum(), atol=1e-12
    )
    best = coupling._trace(bandit, coupling.tilted(bandit, 1.0))
    true = exact.gradient(bandit.mdp, bandit.logits, 1.0)
    assert abs(best - (share.sum() ** 2 - true @ true)) < 1e-12
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = coupling.tilted(bandit, 1.0) + 0.1 * rng.normal(size=(1, 3))
        assert coupling._trace(bandit, other) > best
    assert abs(coupling._trace(bandit, coupling.best_behaviour(bandit)) - best) < 1e-6


# Windows.

WINDOW_TABLE = {
    2: (-0.25, -0.5, -0.1875, -0.5, 1.0),
    4: (0.75, 0.46774, 0.52865, 0.1875, 2.16129),
    8: (0.75, 0.57972, 0.60966, 0.11328, 2.29566),
    16: (0.75, 0.67085, 0.70144, 0.79762, 2.40502),
    24: (0.75, 0.69736, 0.71730, 1.28019, 2.43683),
}


@pytest.mark.parametrize("length", WINDOW_TABLE)
def test_window_table(length):
    known = streams.exact_windows(length)
    np.testing.assert_allclose(list(known.values()), WINDOW_TABLE[length], atol=6e-6)


def test_pooling_more_environments_is_more_biased():
    known = [streams.exact_pooled(8, n) for n in (1, 2, 4, 16, 64)]
    np.testing.assert_allclose(known, [0.75, 0.66121, 0.61952, 0.58951, 0.58216], atol=6e-6)


def test_simulated_windows_agree_with_the_table():
    direction = {"preference": jnp.ones(())}
    lengths, number = (2, 4, 8), 2**16
    measured = streams.measure_windows(
        streams.long_short(), direction, jax.random.key(1), number, lengths
    )
    for length, lanes in zip(lengths, measured, strict=True):
        known = streams.exact_windows(length)
        own = np.where(lanes.ends > 0, lanes.completed / np.maximum(lanes.ends, 1), 0.0)
        for values, name in ((own, "per_environment"), (lanes.started / lanes.starts, "partial_as_full"),
                             (lanes.unmasked, "unmasked")):  # fmt: skip
            error = values.std() / np.sqrt(number)
            assert abs(values.mean() - known[name]) < 5 * error, (length, name)
        # The standard error of a ratio of means, by the delta method.
        for total, name in ((lanes.completed, "pooled"), (lanes.returns, "pooled_return")):
            ratio = total.sum() / lanes.ends.sum()
            error = (total - ratio * lanes.ends).std() / np.sqrt(number) / lanes.ends.mean()
            assert abs(ratio - known[name]) <= 5 * error, (length, name)


# Discount.


def test_dropping_the_discount_is_no_gradient():
    known = discounting.discount_bias(A, 0.9)
    assert round(known["bias"], 5) == 0.28413
    assert round(known["relative_bias"], 3) == 0.228
    assert round(known["asymmetry_without_start"], 4) == 0.0478
    assert known["asymmetry_from_start"] < 1e-9


# Partial observability.


def test_bootstrapping_from_what_looks_alike_is_biased():
    result = observability.partial_observability(Settings(trajectories=2**13), silent)
    known = result.summary
    for lambda_, bias, trace in ((0, 0.1465, 1.844), (0.5, 0.0823, 2.613), (0.95, 0.0092, 5.819)):
        found = known[f"gae_{lambda_}"]
        assert round(found["relative_bias"], 4) == bias
        assert round(found["trace"], 3) == trace
    assert known["gae_1"]["relative_bias"] < 1e-12
    assert round(known["gae_1"]["trace"], 3) == 6.6
    assert known["rtg"]["relative_bias"] < 1e-12
    assert round(known["rtg"]["trace"], 8) == 9.91994022


# Learning.


def test_the_objective_of_training_is_exact():
    for name in ("A", "T", "C"):
        found = world(name, gamma=0.9)
        known = exact.objective(found.mdp, found.logits, 0.9)
        assert abs(float(objective_of(found)(found.params)) - known) < 1e-5


def test_the_best_objective_is_an_upper_bound_that_ascent_approaches():
    best = best_objective(A)
    logits = ascent.ascend(A, "natural", 300)[-1].reshape(3, 2)
    assert 0.99 * best < exact.objective(A.mdp, logits, 1.0) <= best


@pytest.mark.parametrize("name", ["natural", "trpo"])
def test_the_natural_gradient_ignores_the_parameterisation(name):
    matrix = ascent.mixing(6, 0)
    assert ascent.reparameterisation_gap(A, name, matrix) < 1e-5
    # Negative control: steepest ascent does not.
    assert ascent.reparameterisation_gap(A, "sgd", matrix) > 1e-2


def test_adam_ignores_the_unit_of_the_reward():
    one, thousand = (ascent.ascend(A, "adam", 10, scale=scale) for scale in (1.0, 1000.0))
    moved = np.abs(one[-1] - one[0]).max()
    assert np.abs(thousand - one).max() < 1e-3 * moved
    one, thousand = (ascent.ascend(A, "sgd", 1, scale=scale) for scale in (1.0, 1000.0))
    np.testing.assert_allclose(thousand[1] - thousand[0], 1000 * (one[1] - one[0]), rtol=1e-4)


@pytest.mark.slow
def test_baselines_of_equal_variance_commit_differently():
    # 2000 runs against fractions from 4000 runs, known to .007: allow 5 standard errors of the difference.
    number, known = 2000, np.array([0.2245, 0.1205, 0.0793, 0.0318, 0.0])
    final, _ = ascent.commit(jax.random.key(0), np.array(ascent.DELTAS), number)
    stuck = (final[:, :, 0] < 0.5).mean(axis=1)
    error = np.sqrt(known * (1 - known) * (1 / number + 1 / 4000))
    assert (np.abs(stuck - known) <= 5 * error + 1e-12).all(), stuck
    assert (np.diff(stuck) < 0).all()


# Groups of episodes from one start.


@pytest.mark.slow
def test_groups_on_an_environment_without_tables_are_measured(monkeypatch):
    some = {"grpo": groups.group_estimators(2)["grpo"]}
    monkeypatch.setattr(groups, "group_estimators", lambda size: some)
    settings = Settings(env="Pendulum-v1", quick=True, trajectories=2**12)
    (row,) = groups._rows(groups._points(settings)[0], 2, settings)
    assert row["exact"] is None and row["quantity"] == groups.TRACE and row["low"] > 0


def test_what_biases_a_group_and_what_does_not():
    point = groups._points(Settings(env="tokens", quick=True))[2]
    rows = groups._rows(point, 4, Settings())
    found = {(row["estimator"], row["quantity"]): row["exact"] for row in rows}
    for name in ("rloo", "no_baseline", "own_sample", "dr_grpo"):
        assert found[name, "cosine"] == pytest.approx(1, abs=1e-9)
    assert found["own_sample", "length_of_mean"] == pytest.approx(3 / 4)
    assert found["dr_grpo", "length_of_mean"] == pytest.approx(3 / 4 / 4), "over the longest length"
    assert found["length", "cosine"] < 0.96 < found["all_steps", "cosine"] < 1
    assert found["std", "cosine"] < 1 - 1e-5
    # Longer answers differ more in length, so a mean over each turns the gradient further.
    turned = []
    for limit in (1, 3, 5):
        point = groups._tokens(Settings(env="tokens"), groups.SIZES._replace(length=limit), 1.0)
        moments = groups._moments(point, "grpo", groups.group_estimators(4)["grpo"], 4)
        truth = exact.gradient(point.world.mdp, point.world.logits, 1.0)
        turned.append(groups._quantities(moments, truth)["cosine"])
    assert 1 > turned[0] > turned[1] + 0.02 > turned[2] + 0.04


def test_the_causes_of_a_group_row_s_bias_are_its_bias():
    point = groups._points(Settings(env="tokens", quick=True))[2]
    assert groups.SKILLS[::2][2] == groups.SKILL == groups.SKILLS[4]
    truth = exact.gradient(point.world.mdp, point.world.logits, 1.0)
    rows = groups._cause_rows(point, 4)
    for name in groups.ROWS:
        mine = [r for r in rows if r["estimator"] == name and r["quantity"] == groups.ALONG]
        mean = groups._moments(point, name, groups.group_estimators(4)[name], 4).mean
        whole = (mean - truth) @ truth / (truth @ truth)
        assert sum(r["exact"] for r in mine) == pytest.approx(whole, abs=1e-12)
    found = {
        (r["estimator"], r["cause"]): r["exact"] for r in rows if r["quantity"] == groups.ALONG
    }
    assert found["dr_grpo", "own_sample"] == pytest.approx(-1 / 4)
    assert found["dapo", "dropping"] > 0.1 > found["grpo", "dropping"] == 0


def test_groups_respect_the_number_of_trajectories():
    settings = Settings(env="tokens", quick=True, trajectories=2**11)
    with pytest.raises(ValueError, match="gives 32 independent samples; an interval needs 64"):
        groups.group_study(settings, silent)


def test_the_optimal_token_baseline_shrinks_and_turns_the_gradient_and_the_unbiased_one_does_not():
    point = groups._points(Settings(env="tokens", quick=True))[2]
    listed = {name: groups.group_estimators(2)[name] for name in groups.LISTED}
    found = {
        name: groups._quantities(
            groups._moments(point, name, estimator, 2),
            exact.gradient(point.world.mdp, point.world.logits, 1.0),
        )
        for name, estimator in listed.items()
    }  # fmt: skip
    assert found["optimal_per_time"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["optimal_per_time"]["length_of_mean"] == pytest.approx(1, abs=1e-6)
    token = found["optimal_token"]
    assert token["cosine"] < 1 - 1e-4 and token["length_of_mean"] < 0.7
    assert groups._moments(point, "optimal_token", listed["optimal_token"], 8) is None


# The KL to a reference policy.


def test_near_the_reference_only_some_estimates_have_any_gradient():
    summary = reference.estimates(Settings(env="A", quick=True), silent).summary
    bias = {name: found["relative_bias_near"] for name, found in summary.items()}
    assert bias["k1_reward"] < 1e-10
    for name in ("k2_penalty", "k3_penalty"):
        assert bias[name] < 0.05, "the directions of the KL agree there"
        assert summary[name]["relative_bias_far"] > 0.04, "further away they do not"
    for name in ("k1_penalty", "k2_reward", "k3_reward"):
        assert abs(bias[name] - 1) < 0.05, "nothing is left of the gradient"
    assert summary["k2_penalty"]["trace_near"] < summary["k1_reward"]["trace_near"]


# Samplers that are not the trainer.


def test_a_sampler_s_moments_are_those_of_the_recursions_and_its_shares_those_of_the_tables():
    there = lag_of(Settings(env="T")).at(0.7)
    forms = [samplers._form(name, there) for name in samplers.CHOICES]
    found = samplers.exactly(there, forms)
    mdp, behaviour = there.mdp, there.table.behaviour_logits
    for each in forms:
        if each.name.startswith("sequence_"):
            continue
        known = exact.moments(mdp, there.logits, each.estimator, each.hyperparams, behaviour)
        np.testing.assert_allclose(found[each.name][0].mean, known.mean, atol=1e-10)
        np.testing.assert_allclose(found[each.name][0].covariance, known.covariance, atol=1e-9)
    truth = gradient(there)
    bias = {name: np.linalg.norm(each[0].mean - truth) for name, each in found.items()}
    assert bias["sequence"] < 1e-10 < bias["token"] < bias["none"]
    assert bias["sequence_capped"] < bias["sequence_dropped"]
    own, ratio = exact.occupancy(mdp, behaviour), softmax(there.logits) / softmax(behaviour)
    seen = own * ~np.asarray(mdp.terminal)
    chosen = (softmax(behaviour) * np.minimum(ratio, 2.0) ** np.arange(3)[:, None, None]).sum(-1)
    count, first, second = (seen @ x[mdp.observation] for x in chosen)
    share = first.sum() ** 2 / count.sum() / second.sum()
    assert found["token_capped"][1] == pytest.approx(share, abs=1e-12)
    assert found["none"][1] == pytest.approx(1.0)


@pytest.mark.slow
def test_without_tables_samplers_are_measured(monkeypatch):
    for name, value in (("LAGS", (1.5,)), ("CHIPS", ("bf16",))):
        monkeypatch.setattr(samplers, name, value)
    monkeypatch.setattr(samplers, "CHOICES", {"token": samplers.CHOICES["token"]})
    settings = Settings(env="CartPole-v1", quick=True, trajectories=2**8)
    table = samplers.stale_sampler(settings, silent).table
    assert table["sampler"] == ["older"] * 3 + ["bf16"] * 3
    shares = [x for x, q in zip(table["measured"], table["quantity"], strict=True) if "share" in q]
    assert 0.8 < shares[0] < 0.97 < 0.99 < shares[1] < 1 + 1e-6


@pytest.mark.slow
def test_where_groups_are_too_many_to_sum_they_are_measured(monkeypatch):
    some = {name: groups.group_estimators(2)[name] for name in ("rloo", "optimal_token")}
    monkeypatch.setattr(groups, "group_estimators", lambda size: some)
    monkeypatch.setattr(groups, "MOST", 10)
    (point,) = groups._points(Settings(env="T"))
    rows = groups._rows(point, 2, Settings(env="T", trajectories=2**12))
    assert {row["estimator"] for row in rows} == {"rloo"}, "the other only where it is asked for"
    assert all(row["exact"] is None and row["low"] <= row["high"] for row in rows)
    assert groups._cause_rows(point, 2) == []
