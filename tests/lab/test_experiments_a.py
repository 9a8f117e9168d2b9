"""Experiments of the laboratory: their key numbers, measured against exact ones, and the command."""

import csv
import json
import re

import jax
import numpy as np
import pytest
from instances import instance_a, instance_c, instance_t
from printed import printed

from jaxpg.cli import main
from jaxpg.lab import exact
from jaxpg.lab.studies import (
    EXPERIMENTS,
    decomposition,
    horizons,
    hurts,
    ladder,
    learning,
    sampling,
    streams,
    training,
)
from jaxpg.lab.studies.estimators import ESTIMATORS, available, batch_moments, form, gradient
from jaxpg.lab.studies.forms import lambda_form
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import COLUMNS, Settings
from jaxpg.lab.studies.training import own_rate
from jaxpg.lab.worlds.instances import INSTANCES
from jaxpg.lab.worlds.world import lifted, tabular_world, world
from jaxpg.optimizers import OPTIMIZERS
from jaxpg.runs.play.policy import load
from jaxpg.runs.store import artifacts
from jaxpg.training.algorithm import algorithm

KEY = jax.random.key(3)


def run(name, **settings):
    """Run an experiment at its quick size; its table by rows, and its summary."""
    asked = EXPERIMENTS[name].quick._replace(**settings)
    result = EXPERIMENTS[name].run(asked, lambda line: None)
    names = list(result.table)
    rows = [
        dict(zip(names, values, strict=True)) for values in zip(*result.table.values(), strict=True)
    ]
    assert set(COLUMNS) <= set(names)
    # Every entry is a number, a bound, or the reason for having neither.
    assert "null" not in json.dumps(result.summary, allow_nan=False)
    for draw in (result.draw, *result.others.values()):
        printed(draw, "page")
    for r in rows:
        numbers = [r[k] for k in ("measured", "low", "high", "exact") if r[k] is not None]
        assert r["warning"] or np.isfinite(numbers).all(), r
    return rows, result.summary


def covered(rows, least=0.75):
    """Most intervals of 95 % hold the exact value, and none is far off."""
    seen = [r for r in rows if r["measured"] is not None and r["exact"] is not None]
    seen = [r for r in seen if np.isfinite(r["low"]) and r["high"] > r["low"]]
    assert seen
    inside = [r["low"] <= r["exact"] <= r["high"] for r in seen]
    for r in seen:
        assert abs(r["measured"] - r["exact"]) < 3.5 * (r["high"] - r["low"]) / 2 + 1e-6, r
    assert np.mean(inside) >= least, [r for r, ok in zip(seen, inside, strict=True) if not ok]


def test_worlds_hold_the_worked_instances():
    for name, instance in (("A", instance_a()), ("T", instance_t()), ("C", instance_c())):
        found = INSTANCES[name]()
        for one, other in zip(found[0], instance.mdp, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(found[1], instance.logits)


@pytest.mark.slow
def test_a_network_on_a_table_has_exact_moments():
    # The linear policy sees one-hot observations, so J^T J is known, and sampling is the check.
    place = world("T", "linear", gamma=0.9)
    forms = [form(name, place) for name in ("total", "rtg", "rtg_optimal_state")]
    found = measure(place, forms, KEY, 2**15)
    truth = lifted(place, gradient(place))
    for each in forms:
        measured, known = found[each.name], each.exact()
        assert abs(measured.trace().value / known.trace - 1) < 0.06
        error = measured.mean - truth
        assert error @ error < 4 * known.trace / measured.trajectories


def test_every_named_estimator_has_the_gradient_for_mean_or_a_warning():
    place = world("A", gamma=0.9)
    truth = gradient(place)
    for name in available(place):
        each = form(name, place)
        moments = batch_moments(each, place, 8)
        if (
            moments is None
        ):  # estimated optima have exact moments only where all groups can be listed
            assert "loo" in name or name == "rtg_optimal_token"
            continue
        biased = np.linalg.norm(moments.mean - truth) > 1e-9
        assert biased == bool(each.warning), name


@pytest.mark.slow
def test_batch_size():
    rows, summary = run("batch-size", seed=1)
    covered(rows)
    for name, number in (("total", 23.99647586), ("rtg", 10.78416704), ("rtg_value", 6.17171746)):
        assert abs(summary[name]["slope"]["value"] + 1) < 0.02
        assert summary[name]["exact_trace_at_one"] == pytest.approx(number, abs=1e-8)
        assert summary[name]["trace_at_one"]["value"] == pytest.approx(number, rel=0.03)


@pytest.mark.slow
def test_batch_size_of_coupled_batches():
    rows, _ = run("batch-size", estimators=("total_mean", "total_own_mean"), trajectories=2**12)
    covered(rows)
    two = {r["estimator"]: r["exact"] for r in rows if r["batch"] == 2}
    assert two["total_mean"] == pytest.approx(27.25 / 2, abs=5e-3)
    assert two["total_own_mean"] == pytest.approx(two["total_mean"] / 4)


def test_shared_keys_are_seen():
    # Negative control of the slope: batches made of copies of one trajectory.
    place = world("A")
    each = [form("rtg", place)]
    found = measure(place, each, KEY, 2**12, (1, 4))["rtg"]
    copies = found._replace(levels={1: found.levels[1], 4: found.levels[1]})
    assert copies.trace(4).value > 3 * found.trace(4).value


def test_ladder():
    rows, summary = run("ladder", seed=1)
    covered(rows)
    trace = {name: each["exact"] for name, each in summary["trace"].items()}
    for name, number in (
        ("total", 23.99647586),
        ("total_constant", 13.96264449),
        ("total_optimal", 13.61498921),
        ("rtg", 10.78416704),
        ("rtg_constant", 13.04368559),
        ("rtg_optimal", 8.19389831),
        ("rtg_time", 7.15040973),
        ("rtg_value", 6.17171746),
        ("rtg_optimal_state", 5.40105255),
        ("gae_0.95", 5.49702005),
        ("exact_advantage", 1.64738298),
        ("all_action", 1.23208613),
    ):
        assert trace[name] == pytest.approx(number, abs=1e-8)
    noise = {name: each["exact"] for name, each in summary["noise_scale"].items()}
    for name, number in (("total", 10.25), ("rtg_value", 2.64), ("exact_advantage", 0.70)):
        assert noise[name] == pytest.approx(number, abs=5e-3)


@pytest.mark.slow
def test_gae():
    rows, summary = run("gae", seed=1)
    covered(rows)
    best = summary["best_lambda_by_batch"]
    expected = {"1": 0.0, "10": 0.0, "100": 0.45, "1000": 0.83, "10000": 0.97, "100000": 1.0}
    assert best == pytest.approx(expected)
    place = world("A")
    poor = lambda_form(place, 0.95, 0.5, 0.3).exact()
    assert poor.trace == pytest.approx(5.69306982, abs=1e-8)
    assert np.linalg.norm(poor.mean - gradient(place)) == pytest.approx(0.00879463, abs=1e-8)


@pytest.mark.slow
def test_offset():
    rows, summary = run("offset", seed=1)
    covered([r for r in rows if r["quantity"] != "variance of the reward"])
    assert summary["quadratic"]["cross"] == pytest.approx(4.95057615, abs=1e-8)
    assert summary["quadratic"]["score_square"] == pytest.approx(2.36076056, abs=1e-8)
    assert summary["bandit_variance_at_1e6"] == pytest.approx(2.5e11)
    wrong = [r for r in rows if r["quantity"] == "wrong sign" and r["batch"] == 10**6]
    assert {r["offset"]: r["exact"] for r in wrong}[1e6] == pytest.approx(0.4996, abs=1e-5)
    traces = {
        r["offset"]: r["exact"]
        for r in rows
        if r["estimator"] == "none" and r["quantity"] == "trace"
    }
    assert np.log10(traces[1e6] / traces[1e5]) == pytest.approx(2, abs=1e-4)
    assert len({round(r["exact"], 6) for r in rows if r["estimator"] == "optimal"}) == 1
    bad = {r["estimator"] for r in rows if r["warning"]}
    assert bad == {"E x² − (E x)², float32"}


@pytest.mark.slow
def test_never_hurts():
    rows, summary = run("never-hurts", seed=1)
    covered([r for r in rows if r["exact"]])
    at_nine = summary["bandit_at_0.9"]
    assert at_nine == pytest.approx({"b = 0": 0.0009, "b = E[r]": 0.0576, "b = b*": 0.0}, abs=1e-12)
    cases = summary["cases"]
    assert cases["A rtg_constant"] > cases["A rtg"]
    assert cases["C total"] == pytest.approx(0) and cases["C rtg"] == pytest.approx(0.4763020666)


@pytest.mark.slow
def test_horizon_is():
    rows, summary = run("horizon-is", seed=1)
    covered([r for r in rows if r["horizon"] <= 10])
    for r in rows:
        if r["estimator"] == "gaussian" and r["quantity"] == "ESS / N":
            assert r["exact"] == pytest.approx(np.exp(-0.09 * r["horizon"]))
        if r["estimator"] == "gaussian" and r["quantity"] == "Var log W":
            assert r["exact"] == pytest.approx(0.09 * r["horizon"])
    assert summary["A_growth"] == pytest.approx(0.101730, abs=1e-6)
    assert summary["A_second_moment"]["10"] == pytest.approx(2.679, abs=1e-3)
    assert summary["A_second_moment"]["50"] == pytest.approx(156.7, abs=0.1)


@pytest.mark.slow
def test_degenerate_weights_have_no_interval():
    rows, _ = run("horizon-is", trajectories=2**8, seed=2)
    worst = [r for r in rows if r["horizon"] == 50 and r["quantity"] == "ESS / N"]
    assert all("no interval" in r["warning"] and np.isnan(r["low"]) for r in worst)


@pytest.mark.slow
def test_weights_with_a_heavy_tail_are_flagged():
    """If a few weights dominate the fourth moment, intervals of a variance miss the truth too often."""
    mdp, logits, behaviour = instance_a()
    for lag, heavy in ((0.0, False), (0.5, False), (2.0, True)):
        place = tabular_world("A", mdp, behaviour + lag * (logits - behaviour), behaviour)
        found = measure(place, [form("is_total", place)], KEY, 2**14)["is_total"]
        assert found.effective_sample_size > 50
        assert ("interval too narrow" in found.warning) == heavy, (lag, found.warning)


@pytest.mark.slow
def test_importance():
    rows, summary = run("importance", seed=1)
    covered([r for r in rows if "interval" not in (r["warning"] or "")], least=0.7)
    known = summary["exact_at_lag_1"]
    for name, bias, trace in (
        ("is_total", 0.0, 53.20788435),
        ("is_pdis", 0.0, 18.65836570),
        ("is_first_order", 0.16991121, 14.50276358),
        ("is_marginal", 0.16991121, 12.63949661),
        ("is_step", 0.21452269, 12.43899572),
    ):
        assert known[f"{name} trace"] == pytest.approx(trace, abs=1e-8)
        assert known[f"{name} squared_bias"] ** 0.5 == pytest.approx(bias, abs=1e-8)
    assert summary["weights_at_lag_1"]["square"] == pytest.approx(1.61168126)
    # Where policy and behaviour are equal, every form is plain reward to go, or total return.
    at_zero = {
        r["estimator"]: r["exact"] for r in rows if r["lag"] == 0 and r["quantity"] == "trace"
    }
    total = at_zero.pop("is_total")
    assert len({round(x, 9) for x in at_zero.values()}) == 1 and total > max(at_zero.values())


@pytest.mark.slow
def test_clipping():
    rows, summary = run("clipping", seed=1)
    covered(rows)
    for name, lag, bias, trace in (
        ("clipped_0.2", 1, 0.82743670, 2.57088662),
        ("unclipped", 1, 0.21452269, 2.83231297),
        ("clipped_0.2", 1.5, 0.8925880, None),
        ("unclipped", 1.5, 0.3390881, None),
    ):
        found = summary[f"{name} at lag {lag:g}"]
        assert found["bias"] == pytest.approx(bias, abs=1e-7)
        assert trace is None or found["trace"] == pytest.approx(trace, abs=1e-8)
    assert summary["clipped_0.2 at lag 0.5"] == summary["unclipped at lag 0.5"]


@pytest.mark.slow
def test_stale():
    rows, summary = run("stale", seed=1)
    covered([r for r in rows if r["lag"] == 1])
    assert summary["slopes"]["gradient error"] == pytest.approx(1.007, abs=2e-3)
    assert summary["slopes"]["objective gap"] == pytest.approx(2.002, abs=1e-3)
    tenth = {r["quantity"]: r["exact"] for r in rows if abs(r["lag"] - 0.1) < 1e-9}
    assert tenth == pytest.approx({"gradient error": 0.01724, "objective gap": 3.32e-4}, rel=1e-3)


@pytest.mark.slow
def test_cosine():
    rows, _ = run("cosine", seed=1)
    clt = {(r["quantity"], r["batch"]): r["exact"] for r in rows if r["estimator"] == "total"}
    assert clt["to truth", 1] == pytest.approx(0.280, abs=1e-3)
    assert clt["between batches", 1] == pytest.approx(0.079, abs=1e-3)
    # The central limit is useless for one trajectory, but accurate for batches of 64.
    covered([r for r in rows if r["batch"] >= 64])
    dense = exact.cosine(batch_moments(form("total", world("A")), world("A"), 10**4)).to_truth
    later = exact.cosine(batch_moments(form("total", world("A")), world("A"), 10**5)).to_truth
    assert np.log10((1 - later) / (1 - dense)) == pytest.approx(-1, abs=0.01)


@pytest.mark.slow
def test_noise_scale():
    rows, summary = run("noise-scale", seed=1)
    covered(rows)
    noise = summary["regulator_noise_to_signal"]
    for name, k, number in (
        ("rtg", -0.2, 23.4),
        ("rtg", -1.3, 1082),
        ("rtg", -1.45, 22188),
        ("rtg_value", -0.6, 3.91),
        ("rtg_value", -1.45, 345),
    ):
        assert noise[f"{name} k={k:g}"] == pytest.approx(number, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["importance", "clipping", "stale", "offset", "gae", "horizon-is"])
def test_worlds_without_tables_are_measured_only(name):
    rows, _ = run(name, env="CartPole-v1", policy="linear", trajectories=2**8)
    own_world = ("gaussian", "wrong sign", "variance of the reward")  # rows of a bandit or a walk
    seen = [r for r in rows if not {r["estimator"], r["quantity"]} & set(own_world)]
    assert seen
    for r in seen:
        assert r["exact"] is None and r["trajectories"] == 2**8
        assert 2**8 <= r["env_steps"] <= 50 * 2**8
        assert r["low"] <= r["measured"] <= r["high"]
    # Where policy and behaviour are equal, the weights change nothing, up to rounding.
    for r in seen:
        if name == "importance" and r["lag"] == 0 and r["estimator"] != "is_total":
            at_zero = r["quantity"] == "squared_distance_to_on_policy"
            assert not at_zero or abs(r["measured"]) < 1e-3
    if name == "offset":
        traces = {r["offset"]: r["measured"] for r in seen}
        assert np.log10(traces[1e6] / traces[1e5]) == pytest.approx(2, abs=1e-3)


@pytest.mark.slow
def test_networks_are_not_destroyed_by_the_steps_of_tables():
    """With rates meant for tables, every CartPole episode would end within ten steps after a few updates."""
    rows, _ = run("optimizers", env="CartPole-v1", policy="mlp", repeats=4)
    for name in ("sgd", "adam"):
        score = [r["measured"] for r in rows if (r["estimator"], r["reward_scale"]) == (name, 1)]
        assert min(score) > 0.8 * score[0] > 15, name


def test_aliased_worlds_take_the_value_of_what_is_seen():
    mdp, logits, behaviour = INSTANCES["A"](observation=(0, 1, 0))
    place = tabular_world("aliased", mdp, logits, behaviour)
    truth = [1.3682438082, -1.3682438082, -0.4989263193, 0.4989263193]
    np.testing.assert_allclose(gradient(place), truth, atol=1e-9)
    assert form("rtg", place).exact().trace == pytest.approx(9.91994022, abs=1e-8)
    for name in ("rtg_value", "exact_advantage", "all_action", "rtg_optimal_state"):
        np.testing.assert_allclose(form(name, place).exact().mean, truth, atol=1e-9)
    assert form("rtg_optimal_state", place).exact().trace < form("rtg_value", place).exact().trace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imprtance"], "unknown experiment 'imprtance'; did you mean importance"),
        (["ladder", "--estimators", "rgt"], "unknown estimator 'rgt'; did you mean rtg"),
        (["ladder", "--env", "CartPol"], "unknown environment 'CartPol'; did you mean CartPole-v1"),
        (["ladder", "--policy", "mpl"], "unknown policy 'mpl'; did you mean mlp"),
        (["ladder", "--trajectories", "10"], "interval needs; use --trajectories"),
        (["ladder", "--devices", "99"], "devices=99, but there are"),
        (["ladder", "--estimators", "is_step", "--env", "T"], "needs a behaviour policy"),
        (["importance", "--trajectories", "64"], "below 50: an interval would mean nothing"),
        (["behaviour", "--env", "CartPole-v1"], "tables of probabilities; not on CartPole-v1"),
        (["optimizers", "--trajectories", "64"], "--trajectories means nothing to optimizers"),
        (["offset", "--estimators", "rtg"], "--estimators means nothing to offset"),
        (["seeds", "--estimators", ","], "--estimators names none"),
        (["ladder", "--gamma", "1.5"], "must lie in [0, 1]"),
        (["ladder", "--checkpoint", "nowhere"], "no config.json"),
        (["ladder", "--bogus"], "unrecognized arguments: --bogus"),
        (
            ["ladder", "--env", "CartPole-v1", "--estimators", "rtg", "--trajectories", "2**30"],
            "GB of memory is needed for the gradients of 1,073,741,824 episodes, and there is ",
        ),
        (["windows", "--trajectories", "2**31"], "2**31 must be at most 2147483647"),
        (["seeds", "--repeats", "100001"], "100001 must be at most 100000"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["lab", *arguments, "--quick", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("jaxpg: error:") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [x for x, each in EXPERIMENTS.items() if "trajectories" not in each.ignores]
)
def test_sizes_are_bounded_before_anything_is_drawn(name, capsys, tmp_path, monkeypatch):
    for place in (sampling, training):
        monkeypatch.setattr(place, "available_bytes", lambda: 10**9)
    for place in (sampling, horizons, decomposition):
        monkeypatch.setattr(place, "roll", None)
    monkeypatch.setattr(streams, "init_stream", None)
    monkeypatch.setattr(hurts, "_bandit", None)
    with pytest.raises(SystemExit) as stop:
        main(
            ["lab", name, "--quick", "--trajectories", "2147483647", "--out", str(tmp_path / "out")]
        )
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("jaxpg: error: about ")
    assert "of 2,147,483,647 episodes, and there is 1.0 GB, enough for " in error
    assert not (tmp_path / "out").exists()


def test_repeats_are_bounded_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(training, "available_bytes", lambda: 10**6)
    message = "training 500 repeats, and there is 0.0 GB, enough for [0-9]"
    with pytest.raises(ValueError, match=message) as error:
        run("optimizers", repeats=500)
    fits = int(re.search("for ([0-9,]+);", str(error.value))[1].replace(",", ""))
    assert 2 < fits < 500


def test_the_command_writes_its_files(tmp_path, capsys):
    from pyarrow import parquet

    out = tmp_path / "out"
    main(["lab", "ladder", "--env", "T", "--estimators", "total,rtg", "--quick", "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed[:-1])) <= 80 and str(out) in printed[-1]
    names = {"table.parquet", "table.csv", "summary.json", "figure.png", "figure.svg", "figure.pdf"}
    assert {f.name for f in out.iterdir()} == names
    with open(out / "table.csv") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(out / "table.parquet")
    assert table.num_rows == len(rows) == 6
    trace = {r["estimator"]: float(r["exact"]) for r in rows if r["quantity"] == "trace"}
    assert trace["total"] == pytest.approx(73.76, abs=5e-3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["env"] == "T" and summary["seconds"] > 0
    assert summary["versions"]["jax"] == jax.__version__
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


FROZEN = "train FrozenLake-misc --algorithm reinforce --num-envs 8 --hidden 8 --quiet --updates 2"


@pytest.mark.slow
def test_a_checkpoint_is_measured_where_it_was_trained(tmp_path, capsys):
    run_folder, out = tmp_path / "run", tmp_path / "out"
    numbers = "--seeds 2 --gamma 0.8,0.9 --lambda 0.7"
    main([*FROZEN.split(), *numbers.split(), "--run", str(run_folder)])
    with pytest.raises(SystemExit):
        main(["lab", "ladder", "--env", "A", "--checkpoint", str(run_folder)])
    assert "was trained on FrozenLake-misc, not on A" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lab", "ladder", "--checkpoint", str(run_folder), "--replica", "4"])
    assert "replicas 0 to 3, not 4" in capsys.readouterr().err
    command = ["lab", "ladder", "--estimators", "rtg", "--trajectories", "4096", "--out"]
    command += [str(out), "--checkpoint", str(run_folder), "--replica", "3"]
    main(command)
    summary = json.loads((out / "summary.json").read_text())
    rows = summary["summary"]["trace"]["rtg"]
    # The parameters are an mlp's, and there still is an exact trace to compare with.
    assert rows["measured"] == pytest.approx(rows["exact"], rel=0.5) and rows["exact"] > 0
    origin = summary["settings"]["checkpoint"]
    assert [origin[k] for k in ("run", "update", "replica", "seed")] == [str(run_folder), 2, 3, 1]
    assert summary["settings"]["gamma"] == 0.9 == origin["hyperparameters"]["gamma"]
    assert f"seed 1 of {run_folder} at update 2" in " ".join(capsys.readouterr().out.split())
    # A gamma that differs from the run's is reported in the terminal and on every row.
    main([*command[:-5], str(tmp_path / "other"), *command[-4:], "--gamma", "0.5"])
    assert "warning: --gamma 0.5, not the run's 0.9" in capsys.readouterr().out
    with open(tmp_path / "other" / "table.csv") as file:
        noted = list(csv.DictReader(file))
    note = "--gamma 0.5, not the run's 0.9"
    assert noted and all(r["warning"].split("; ")[0] == note for r in noted)
    found = load(str(run_folder), 3)
    here, there = (form("rtg", world("FrozenLake-misc", None, found, g)) for g in (None, 0.5))
    assert rows["exact"] == pytest.approx(here.exact().trace, rel=1e-5)
    assert there.exact().trace < 0.8 * here.exact().trace
    # The estimators read all hyperparameters of the run, and the ladder uses its lambda.
    assert here.hyperparams.lambda_ == 0.7
    assert "gae_0.7" in ladder._default(world("FrozenLake-misc", None, found))


@pytest.mark.slow
def test_settings_of_training_that_differ_from_the_run_are_reported(tmp_path, capsys):
    """Optimizer and learning rate are the run's, and every row names the settings that are not."""
    folder, out = tmp_path / "run", tmp_path / "out"
    flags = "--optimizer sgd --learning-rate 0.3 --max-grad-norm 2 --seeds 1 --run"
    main([*FROZEN.split(), *flags.split(), str(folder)])
    capsys.readouterr()
    command = ["lab", "optimizers", "--quick", "--repeats", "2", "--checkpoint", str(folder)]
    main([*command, "--out", str(out), "--gamma", "0.5"])
    said = (
        "--gamma 0.5, not the run's 0.99; adam's learning rate is the laboratory's; batches of 16, not the "
        "run's 8; a constant learning rate, not the run's linear schedule; no limit of the gradient's norm, "
        "not the run's 2"
    )
    assert json.loads((out / "summary.json").read_text())["settings"]["not_the_runs"] == said
    with open(out / "table.csv") as file:
        assert all(r["warning"].startswith(said) for r in csv.DictReader(file))
    printed = capsys.readouterr().out
    assert all(f"warning: {each}" in printed for each in said.split("; "))
    settings = EXPERIMENTS["seeds"].quick._replace(checkpoint=load(str(folder)))
    assert own_rate(settings, "sgd") == pytest.approx(0.3) and own_rate(settings, "adam") is None
    others = EXPERIMENTS["seeds"].replaces(
        settings._replace(estimators=("reinforce", "ppo", "vpg")), settings.checkpoint
    )
    ppo, vpg = algorithm("ppo"), algorithm("vpg")
    assert others == [
        "a constant learning rate, not the run's linear schedule",
        f"num_epochs {ppo.num_epochs} of ppo, not the run's 1",
        f"num_minibatches {ppo.num_minibatches} of ppo, not the run's 1",
        f"critic_epochs {vpg.critic_epochs} of vpg, not the run's 0",
    ]
    row = learning._as_the_run(algorithm("a2c"), {"optimizer": "sgd"})
    assert row.policy_optimizer is row.critic_optimizer is OPTIMIZERS["sgd"]
    natural = learning._as_the_run(algorithm("npg"), {"optimizer": "sgd"})
    assert natural.policy_optimizer is algorithm("npg").policy_optimizer


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_the_figure_of_seeds_has_any_number_of_algorithms(count, tmp_path):
    """A single one has no pairs to compare, and five make more pairs than there are markers."""
    rng, names = np.random.default_rng(0), [f"row_{i}" for i in range(count)]
    curves = {name: rng.random((4, 1, 20)) for name in names}
    rows = learning._curve_rows(curves, names, 8, {name: np.arange(20) for name in names})
    finals = {name: curve[..., -1] for name, curve in curves.items()}
    rows += learning._final_rows(finals, 160)
    assert artifacts.write_figure(tmp_path, lambda f: learning._draw_seeds(f, rows, names))
    drawn = (tmp_path / "figure.svg").read_text()
    assert ("none to compare it with" in drawn) == (count == 1)


@pytest.mark.slow
def test_a_checkpoints_tables_are_those_of_its_own_environment(tmp_path):
    """If the run changed the lake, the table of the usual lake does not describe it."""
    usual = world("FrozenLake-misc").mdp
    for i, (flags, transition) in enumerate(
        (
            ("--settings max_steps_in_episode=9", usual.transition),
            ("--repeat 2", None),
            ("--num-steps 5", None),
        )
    ):
        folder = tmp_path / str(i)
        main([*FROZEN.split(), "--seeds", "1", *flags.split(), "--run", str(folder)])
        found = load(str(folder))
        place = world("FrozenLake-misc", None, found)
        if transition is None:
            assert not place.is_tabular
            assert place.env.horizon == {1: 50, 2: 5}[i]
        else:
            assert place.mdp.horizon == place.env.horizon == 9


def test_the_list_names_every_experiment(capsys):
    main(["lab", "list"])
    printed = capsys.readouterr().out
    # Each name stands in a column of its own.
    names = {
        line.split()[0] for line in printed.splitlines() if line.startswith("  ") and line[2] != " "
    }
    assert names == {*EXPERIMENTS, *ESTIMATORS, *INSTANCES}
    assert max(map(len, printed.splitlines())) <= 80
    assert isinstance(EXPERIMENTS["ladder"].defaults, Settings)
