"""Sweeps: the points, one compilation for all of them, the ranking, and a user's mistakes."""

import csv
import io
import json
import os
from concurrent import futures
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from pyarrow import parquet
from scipy import stats

from jaxpg.cli import main
from jaxpg.rollout import evaluate
from jaxpg.runs.config.config import points
from jaxpg.runs.config.presets import preset
from jaxpg.runs.host import health
from jaxpg.runs.host.interrupt import Interrupted
from jaxpg.runs.play.policy import load_policy
from jaxpg.runs.store import artifacts
from jaxpg.runs.sweep import best, figures, ranking, sweep
from jaxpg.runs.sweep.record import Search, description
from jaxpg.runs.sweep.search import (
    Options,
    Range,
    Rung,
    choose,
    count,
    listed,
    read_range,
    rungs,
    take_options,
)
from jaxpg.runs.train import replica_batches
from jaxpg.runs.train.replicas import Programs, make_replicas
from jaxpg.runs.train.saved import read_run
from jaxpg.training.trainer import train

SMALL = (
    "CartPole-v1 --algorithm reinforce_to_go --network linear --num-envs 4 --num-steps 30 --seeds 2 "
    "--updates 8 --evaluation-episodes 8 --schedule constant --quiet"
)
GRID = f"{SMALL} --learning-rate 1e-3:1:log3 --gamma .5,.9"
FEW = SimpleNamespace(evaluation_episodes=1, devices="all", shard=None)
DEVICES = jax.device_count()  # may be several outside this test suite


COMPILED = []  # names of programs, from a listener that older jax cannot unregister


def _listen(event, duration_secs, **rest):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(rest.get("fun_name", "")))


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def compilations():
    """Yields a list that receives the names of the programs compiled inside the block."""
    names, before = [], len(COMPILED)
    try:
        yield names
    finally:
        names += COMPILED[before:]


def of_training(names):
    return [name for name in names if "train" in name]


def run(arguments, folder):
    """The sweep, the training programs it compiled, its record, and its plan."""
    found, plans = sweep.prepare([*arguments.split(), "--run", str(folder)]), []
    plan = replica_batches.plan
    with pytest.MonkeyPatch.context() as patch, compilations() as names:
        patch.setattr(replica_batches, "plan", lambda *each: plans.append(plan(*each)) or plans[0])
        sweep.execute(found)
    record = json.loads((folder / "sweep.json").read_text())
    return found, of_training(names), record, plans[0]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return run(GRID, tmp_path_factory.mktemp("sweep") / "grid")


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    return run(f"{GRID} --halving 3", tmp_path_factory.mktemp("sweep") / "halved")


def arrays_of(folder):
    with np.load(folder / "best" / "params.npz") as params:
        return [params[name] for name in sorted(params)]


def returns_by_point(record):
    return {
        (p["hyperparameters"]["learning_rate"], p["hyperparameters"]["gamma"]): p
        for p in record["points"]
    }


@pytest.mark.slow
def test_a_sweep_is_one_program(grid):
    _, compiled, record, _ = grid
    assert len(compiled) == 1
    assert record["costs"]["batch"] == 12
    assert record["complete"]


@pytest.mark.slow
def test_rungs_and_batches_share_one_program(halved):
    _, compiled, record, _ = halved
    assert record["search"]["rungs"] == [{"points": 6, "updates": 3}, {"points": 2, "updates": 8}]
    assert record["costs"]["batch"] == 4  # three batches, then one
    assert len(compiled) == 1


def test_a_further_compilation_would_be_seen():
    # Negative control: another size is another program, the same size is not.
    def train(x):
        return x + 1

    program = jax.jit(train)
    with compilations() as names:
        for size in (3, 4, 4):
            program(np.ones(size))
    assert len(of_training(names)) == 2


@pytest.mark.slow
def test_every_point_is_what_training_it_alone_gives(grid):
    """Compares a sweep with jaxpg's functions for a single agent, without the machinery of sweeps."""
    found, _, record, _ = grid
    config, parts = found.config, found.parts
    wanted = found.search.points[3]  # the second learning rate, the second gamma
    replicas = make_replicas(config, [wanted])
    program = jax.jit(partial(train, parts.trainer, num_updates=config.updates))
    for seed in range(2):
        key, k_evaluate = replicas.keys[seed], replicas.evaluation_keys[seed]
        numbers = jax.tree.map(np.float32, wanted)
        state, _ = program(parts.trainer.init(key), numbers)
        returns = evaluate(parts.env, parts.agent, state.params, k_evaluate, 8)
        point = returns_by_point(record)[wanted.learning_rate, wanted.gamma]
        np.testing.assert_allclose(point["returns"][seed], returns.mean, rtol=1e-5)


def test_halving_goes_on_from_where_it_stood(grid, halved):
    plain, thinned = (returns_by_point(x[2]) for x in (grid, halved))
    survivors = [at for at, point in thinned.items() if point["updates"] == 8]
    assert len(survivors) == 2
    for at in survivors:
        np.testing.assert_allclose(thinned[at]["returns"], plain[at]["returns"], rtol=1e-6)
    dropped = [point for point in thinned.values() if point["updates"] == 3]
    assert [point["evaluated"] for point in dropped] == [False] * 4
    # Points that went on rank first, whatever the others had earned by then.
    assert sorted(point["rank"] for point in dropped) == [3, 4, 5, 6]


def test_the_table_is_ranked_with_intervals(grid):
    found, _, record, _ = grid
    with open(found.folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(found.folder / "table.parquet").to_pydict()
    assert [int(row["rank"]) for row in rows] == table["rank"] == [1, 2, 3, 4, 5, 6]
    means = [float(row["return"]) for row in rows]
    assert means == sorted(means, reverse=True)
    for row, point in zip(rows, record["points"], strict=True):
        assert float(row["learning_rate"]) == point["hyperparameters"]["learning_rate"]
        expected = stats.trim_mean(point["returns"], 0.25)
        assert np.isclose(float(row["return"]), expected)
        assert float(row["low"]) <= float(row["return"]) <= float(row["high"])
    assert record["versions"]["jax"] and record["config"]["seeds"] == 2
    assert {f.name for f in (found.folder / "figures").iterdir()} == {
        "response.png",
        "response.svg",
        "response.pdf",
    }
    assert {f.name for f in found.folder.iterdir()} == {
        "sweep.json", "table.csv", "table.parquet", "curves.parquet", "best", "figures"
    }  # fmt: skip


@pytest.mark.slow
def test_the_best_points_policies_are_a_run(grid):
    """They are evaluated again, on the episodes of the sweep, and one acts."""
    found, _, record, _ = grid
    run = read_run(found.folder / "best")
    best = record["points"][0]
    assert run.grid.learning_rate == (best["hyperparameters"]["learning_rate"],)
    assert run.grid.gamma == (best["hyperparameters"]["gamma"],)
    replicas = make_replicas(run.config, points(run.grid))
    play = jax.vmap(
        lambda params, key: evaluate(run.parts.env, run.parts.agent, params, key, 8).mean
    )
    means = jax.jit(play)(run.params, replicas.evaluation_keys)
    np.testing.assert_allclose(means, best["returns"], rtol=1e-5)
    policy = load_policy(found.folder / "best")
    assert policy.seed == np.argmax(best["returns"])
    assert policy.act(jax.random.key(0), np.zeros(4), first=True) in (0, 1)
    with pytest.raises(
        ValueError, match=r"has no config.json; name the run of its best point, .*/best$"
    ):
        load_policy(found.folder)


def test_agents_of_the_best_point_are_held_across_batches_and_kills(tmp_path):
    """Three points of two seeds in batches of three: the second point's seeds are in different batches."""
    found, policies = ranking.nothing_yet(3, 2, 1), {}
    found.updates[:] = 1
    returns = np.array([[3.0, 3.0], [9.0, 9.0], [5.0, 5.0]])

    def evaluate(rows):
        found.returns.reshape(-1)[rows] = returns.reshape(-1)[rows]
        found.evaluated.reshape(-1)[rows] = True
        best.hold(policies, rows, {"w": 10.0 * rows}, found, tmp_path)
        return sorted(policies)

    assert best.held(tmp_path, {"w": np.zeros(())}) == {}
    assert evaluate(np.arange(3)) == [0, 1, 2]
    policies = best.held(tmp_path, {"w": np.zeros(())})  # as after a kill
    assert {row: x["w"] for row, x in policies.items()} == {0: 0.0, 1: 10.0, 2: 20.0}
    assert evaluate(np.arange(3, 6)) == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["grid", "halved"])
def test_the_curve_of_every_seed_is_kept(which, request):
    found, _, record, _ = request.getfixturevalue(which)
    table = parquet.read_table(found.folder / "curves.parquet").to_pandas()
    for point in record["points"]:
        numbers = point["hyperparameters"]
        mine = table[
            (table.learning_rate == numbers["learning_rate"]) & (table.gamma == numbers["gamma"])
        ]
        for _, own in mine.groupby("seed"):
            assert own["update"].tolist() == list(range(1, point["updates"] + 1))
            assert own["env_steps"].is_monotonic_increasing and own["env_steps"].iloc[0] >= 4
        # Every update ends episodes, so that the area is the mean of the curve.
        areas = mine.groupby("seed")["episode_return"].mean()
        assert point["area"] == pytest.approx(stats.trim_mean(areas, 0.25), rel=1e-6)


@pytest.mark.parametrize("totals", [[1], [7], [60], [1000], [270, 90, 30, 10], [36, 12, 4]])
@pytest.mark.parametrize("free", [None, 1e3, 7e3, 1e5, 1e9])
def test_batches_fit_the_memory_that_there_is(monkeypatch, totals, free):
    """Fakes programs that need 30 bytes plus 200 per agent, including a state of 40."""
    tried = []
    done = futures.Future()
    done.set_result(None)

    def start(job, size):
        tried.append(size)
        return Programs(train=done, init=done, evaluate=done)

    monkeypatch.setattr(replica_batches, "_start", start)
    monkeypatch.setattr(replica_batches, "state_bytes", lambda parts: 40)
    monkeypatch.setattr(health, "available_bytes", lambda: free)
    monkeypatch.setattr(health, "needed_bytes", lambda train: 30 + 200 * tried[-1])
    job = replica_batches.SweepJob(FEW, *[None] * 5)
    plan = replica_batches.plan(job, totals, lambda: None)
    assert plan.size == tried[-1] and len(tried) <= 2
    assert free is None or plan.bytes <= 0.9 * free
    wanted = totals[0] if len(totals) == 1 else totals[-1]
    room = float("inf") if free is None else (0.9 * free - 30) / 200
    if room >= wanted:
        assert tried == [-(-wanted // DEVICES) * DEVICES]
    else:
        # As many agents as fit, apart from making batches equal and using every device.
        fewest = -(-totals[0] // plan.size)
        assert fewest <= -(-totals[0] // max(1, int(0.95 * room) // DEVICES * DEVICES))


def test_an_agent_that_does_not_fit_is_refused(monkeypatch):
    done = futures.Future()
    done.set_result(None)
    monkeypatch.setattr(replica_batches, "_start", lambda job, size: Programs(done, done, done))
    monkeypatch.setattr(replica_batches, "state_bytes", lambda parts: 40)
    monkeypatch.setattr(health, "available_bytes", lambda: 2e9)
    monkeypatch.setattr(health, "needed_bytes", lambda train: 3e9)
    with pytest.raises(
        ValueError, match=r"one agent needs 3.0 GB of memory, and 2.0 GB are free; give fewer"
    ):
        replica_batches.plan(replica_batches.SweepJob(FEW, *[None] * 5), [8], lambda: None)


def test_a_signal_ranks_what_is_known(halved, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(replica_batches, "plan", lambda job, totals, poll: halved[3])

    @contextmanager
    def signals():
        yield lambda: calls.append(0) or (2 if len(calls) > 6 else 0)

    monkeypatch.setattr(sweep, "signals", signals)
    monkeypatch.setattr(replica_batches, "wait_for", lambda future, poll: future.result())
    found = sweep.prepare([*f"{GRID} --halving 3".split(), "--run", str(tmp_path / "r")])
    with pytest.raises(Interrupted, match=r"before the end; \d of 6 points are ranked in") as stop:
        sweep.execute(found)
    assert stop.value.status == 130
    record = json.loads((tmp_path / "r" / "sweep.json").read_text())
    assert not record["complete"]
    assert 1 <= len(record["points"]) < 6
    assert "best: --learning-rate" in capsys.readouterr().out


def test_a_signal_while_drawing_finds_a_finished_sweep(halved, tmp_path, monkeypatch):
    stopped, folder = [], tmp_path / "r"

    @contextmanager
    def signals():
        yield lambda: len(stopped) and 15

    monkeypatch.setattr(replica_batches, "plan", lambda job, totals, poll: halved[3])
    monkeypatch.setattr(sweep, "signals", signals)
    monkeypatch.setattr(ranking, "draw", lambda *each: stopped.append(each))
    sweep.execute(sweep.prepare([*f"{GRID} --halving 3".split(), "--run", str(folder)]))
    assert stopped and json.loads((folder / "sweep.json").read_text())["complete"]
    assert not (folder / "batches").exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_trains_nothing_twice(halved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replica_batches, "plan", lambda job, totals, poll, size=None: halved[3])
    write, written, folder = replica_batches.write, [], tmp_path / "r"
    command = f"{GRID} --halving 3 --checkpoint-seconds 0 --run {folder} --resume-or-start"

    class Killed(BaseException):
        pass

    def attempt(most):
        """Kills a sweep after `most` writes: a batch of 3 updates makes 3, one of 5 and evaluation 6."""
        before = len(written)

        def counted(path, *rest):
            write(path, *rest)
            written.append(path.name)
            if len(written) - before == most:
                raise Killed

        monkeypatch.setattr(replica_batches, "write", counted)
        sweep.execute(sweep.prepare(command.split()))

    shown = []
    monkeypatch.setattr(sweep, "display", lambda quiet: nullcontext(shown.append))
    before = os.environ.get("XLA_FLAGS", "")
    # Kills within a batch, at its end, within another batch, and within the last rung.
    for most, flags, changed in (
        (2, "", False),
        (1, " -x", True),
        (5, " -x", False),
        (3, "", True),
    ):
        monkeypatch.setenv("XLA_FLAGS", before + flags)
        shown.clear()
        with pytest.raises(Killed):
            attempt(most)
        assert not (folder / "sweep.json").exists()
        # The comparison is with the last process that saved, not only with the first.
        said = f"xla_flags was {before}{'' if flags else ' -x'}, is {before}{flags}"
        assert any(said in str(each) for each in shown) == changed
    for other in (command.replace("--updates 8", "--updates 16"), command.replace(".9", ".8")):
        with pytest.raises(ValueError, match=r"has a sweep with another (updates|gamma)"):
            sweep.prepare(other.split())
    with pytest.raises(ValueError, match="is not empty"):
        sweep.prepare(command.removesuffix("--resume-or-start").split())
    attempt(None)
    record = json.loads((folder / "sweep.json").read_text())
    assert record["points"] == halved[2]["points"]  # every seed's return, to the last digit
    assert record["costs"]["env_steps"] == halved[2]["costs"]["env_steps"]
    last = ["1-0.npz"] * 4 + ["best.npz", "1-0.npz"]
    assert written == [f"0-{i}.npz" for i in range(3) for _ in range(3)] + last
    for own, whole in zip(*map(arrays_of, (folder, halved[0].folder)), strict=True):
        np.testing.assert_array_equal(own, whole)
    assert not (folder / "batches").exists()
    capsys.readouterr()
    main(["sweep", *command.split()])
    assert capsys.readouterr().out == f"the sweep in {folder} has finished\n"


def test_a_damaged_batch_is_said(tmp_path):
    (tmp_path / "0-0.npz").write_bytes(b"PK")
    job: Any = None
    with pytest.raises(ValueError, match=r"0-0.npz.*remove it, to train its batch again"):
        replica_batches.read(job, tmp_path / "0-0.npz", np.arange(2), {})


# Tests without training


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4:1e-2:log3", [1e-4, 1e-3, 1e-2]),
        ("1e-4:1e-2:log8", 1e-4 * 100 ** (np.arange(8) / 7)),
        ("0:1:lin5", [0, 0.25, 0.5, 0.75, 1]),
        ("0.9:0.99:lin", [0.9, 0.99]),
    ],
)
def test_ranges_are_listed_to_six_digits(text, expected):
    np.testing.assert_allclose(listed(read_range("x", text)), expected, rtol=5e-6)
    assert all(float(f"{x:g}") == x for x in listed(read_range("x", text)))


def test_own_flags_are_taken_and_ranges_written_out():
    argv = "E --lambda=0:1:lin3 --learning-rate 1e-3:1e-1:log --random 7 --seeds 3 --halving=4"
    options, rest = take_options(argv.split())
    assert options == Options({"learning_rate": Range(1e-3, 1e-1, True, None)}, 7, 4.0)
    assert rest == ["E", "--lambda", "0.0,0.5,1.0", "--learning-rate", "0.001,0.1", "--seeds", "3"]


def test_random_points_lie_in_their_ranges():
    _, grid = preset("CartPole-v1", "ppo")
    grid = grid._replace(learning_rate=(1e-4, 1e-2), gamma=(0.9, 0.99), clip_eps=(0.1, 0.2, 0.3))
    spans = {"learning_rate": Range(1e-4, 1e-2, True, None), "gamma": Range(0.9, 0.99, False, None)}
    options = Options(spans, 400, None)
    drawn = choose(grid, options, 0)
    assert count(grid, options) == len(drawn) == 400
    rates, gammas = (np.array([getattr(p, n) for p in drawn]) for n in ("learning_rate", "gamma"))
    assert stats.kstest(np.log10(rates), stats.uniform(-4, 2).cdf).pvalue > 1e-3
    assert stats.kstest(gammas, stats.uniform(0.9, 0.09).cdf).pvalue > 1e-3
    # Negative control: the rates are not uniform.
    assert stats.kstest(rates, stats.uniform(1e-4, 1e-2).cdf).pvalue < 1e-9
    assert {p.clip_eps for p in drawn} == {0.1, 0.2, 0.3}
    assert {p.lambda_ for p in drawn} == {grid.lambda_[0]}
    assert choose(grid, options, 0) == drawn != choose(grid, options, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((27, 200, 10, None), [(27, 200)]),
        ((27, 270, 10, 3.0), [(27, 10), (9, 30), (3, 90), (1, 270)]),
        ((8, 80, 4, 2.0), [(8, 8), (4, 20), (2, 40), (1, 80)]),
        ((64, 600, 30, 4.0), [(64, 30), (16, 150), (4, 600)]),  # no room for a fourth
        ((5, 9, 1, 3.0), [(5, 3), (2, 9)]),
    ],
)
def test_rungs(arguments, expected):
    assert rungs(*arguments) == [Rung(*each) for each in expected]


def outcomes(returns, updates):
    returns = np.array(returns, float)
    empty = ranking.nothing_yet(*returns.shape, 1)
    return empty._replace(returns=returns, updates=np.array(updates))


def test_the_order_of_points():
    nan = np.nan
    found = outcomes(
        [[1, 2, 3], [500, 500, nan], [9, 9, 9], [nan, nan, nan], [7, 7, 7]], [8, 8, 3, 8, 0]
    )
    # A seed that diverged earns the least of all, 1; without it the second would lead by more.
    np.testing.assert_array_equal(ranking.order(found), [1, 0, 3, 2])
    assert ranking.best_of(found, np.array([0, 2, 3]), 2).tolist() == [1, 0]
    with pytest.raises(ValueError, match="no episode ended in the last chunk before update 8"):
        ranking.best_of(found, np.array([3]), 1)


def test_ties_are_broken_by_the_area_under_the_learning_curve_and_said():
    """Two chunks of two updates; an update in which no episode ended has no part in the area."""
    nan = np.nan
    curves = np.array([[10, 500, nan, 500], [500, 500, 400, nan], [nan, nan, 3, 5], [1, 1, 1, 1]])
    loss = np.ones((4, 4))
    loss[3, 1] = np.inf
    found, rows = ranking.nothing_yet(4, 1, 2), np.arange(4)
    for k in (0, 2):
        chunk = {"episode_return": curves[:, k : k + 2], "objective": loss[:, k : k + 2]}
        chunk["env_steps"] = np.full((4, 2), 5 + k)
        ranking.note(found, rows, k + 2, chunk)
    np.testing.assert_allclose(found.areas[:, 0], [1010 / 3, 1400 / 3, 4, nan], rtol=1e-12)
    np.testing.assert_array_equal(found.returns[:, 0], [500, 400, 4, nan])
    assert found.diverged[:, 0].tolist() == [0, 0, 0, 2]
    mean = [[255, 500], [500, 400], [nan, 4], [nan, nan]]
    np.testing.assert_array_equal(found.curves[:, 0], mean)
    assert found.steps[:, 0].tolist() == [[10, 24]] * 4


def swept(returns, areas, diverged):
    """A search over learning rates of one seed each, with its outcomes and its configuration."""
    config, grid = preset("CartPole-v1", "reinforce")
    config = replace(config, seeds=1)
    rates = tuple(0.1 * (1.0 + np.arange(len(returns))))
    grid = grid._replace(learning_rate=rates)
    points = choose(grid, Options({}, None, None), 0)
    search = Search(grid, Options({}, None, None), ("learning_rate",), points, [Rung(1, 1)])
    found = outcomes(np.array(returns, float)[:, None], [config.updates] * len(returns))
    found = found._replace(
        areas=np.array(areas, float)[:, None], diverged=np.array(diverged)[:, None]
    )
    return config, search, found


def test_a_sweep_with_ties_and_divergence(tmp_path, monkeypatch):
    nan, costs = np.nan, ranking.Costs(0, 0.0, 0.0, 1, None)
    config, search, found = swept([500, 500, nan, 9], [300, 400, nan, 500], [0, 0, 7, 0])
    assert ranking.order(found).tolist() == [1, 0, 3, 2]
    assert ranking.best_of(found, np.arange(4), 1).tolist() == [1]
    said = " ".join(" ".join(ranking.report(config, search, found, costs)).split())
    assert "best: --learning-rate 0.2 ties with 1 other point at 500.0; it has the largest" in said
    ranking.write(tmp_path, description(config, search), search, found, costs, True)
    table = parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert table["rank"] == [1, 2, 3, None] and table["tied"] == [1, 1, 0, 0]
    assert table["area"][:3] == [400, 300, 500] and table["diverged"] == [0, 0, 0, 1]
    best, *_, last = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert (best["area"], best["tied"], best["rank"], last["rank"]) == (400, 1, 1, None)
    # The picture marks the same one, and says that others tie with it.
    drawn = []
    monkeypatch.setattr(artifacts, "write_figure", lambda folder, draw, name: drawn.append(draw))
    ranking.draw(tmp_path, config, search, found)
    figure = Figure()
    drawn[0](figure)
    (ring,) = [x for x in figure.axes[0].lines if x.get_markerfacecolor() == "none"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (pytest.approx(0.2), 500)
    assert "ring: best of 2 that tie, by area" in " ".join(x.get_text() for x in figure.texts)
    # A diverged point is never best, even if every point has diverged.
    config, search, found = swept([nan, nan], [nan, nan], [1, 2])
    assert not any("best" in line for line in ranking.report(config, search, found, costs))
    # The report also says when all points are equal.
    config, search, found = swept([5, 5, 5], [2, 2, 2], [0, 0, 0])
    said = " ".join(" ".join(ranking.report(config, search, found, costs)).split())
    assert "ties with 2 other points at 5.0; the areas under their learning curves tie too" in said


def test_a_sweep_that_diverges_everywhere_says_so_and_exits_1(tmp_path, monkeypatch, capsys):
    """Runs everything but training itself, in this process."""
    found = sweep.prepare([*GRID.split(), "--run", str(tmp_path / "r")])

    def climb(job, search, outcomes, *rest):
        at = np.arange(outcomes.diverged.size).reshape(outcomes.diverged.shape)
        ranking.note(outcomes, at.reshape(-1), 8, {
            "episode_return": np.ones((at.size, 8)), "objective": np.full((at.size, 8), np.nan),
            "env_steps": np.ones((at.size, 8)),
        })  # fmt: skip
        return ranking.Costs(0, 0.0, 0.0, 1, None)

    monkeypatch.setattr(sweep, "_climb", climb)
    with pytest.raises(health.Diverged, match="nothing is ranked: all 6 points diverged"):
        sweep.execute(found)
    assert "best:" not in capsys.readouterr().out
    points = json.loads((tmp_path / "r" / "sweep.json").read_text())["points"]
    assert [p["rank"] for p in points] == [None] * 6 and [p["diverged"] for p in points] == [2] * 6
    assert (tmp_path / "r" / "figures" / "response.png").is_file()


def test_a_picture_that_fails_costs_a_sweep_nothing(tmp_path, monkeypatch, capsys):
    found = sweep.prepare([*GRID.split(), "--run", str(tmp_path / "r")])

    def climb(job, search, outcomes, *rest):
        outcomes.updates[:], outcomes.evaluated[:] = 8, True
        outcomes.returns[:] = np.arange(outcomes.returns.size).reshape(outcomes.returns.shape)
        return ranking.Costs(0, 0.0, 0.0, 1, None)

    def fail(*arguments, **options):
        raise RuntimeError("no font")

    monkeypatch.setattr(sweep, "_climb", climb)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    sweep.execute(found)
    said = capsys.readouterr()
    assert said.err == f"jaxpg: warning: cannot draw {tmp_path}/r/figures/response: no font\n"
    assert "best: --learning-rate" in said.out and f"saved in {tmp_path / 'r'}" in said.out
    record = json.loads((tmp_path / "r" / "sweep.json").read_text())
    assert record["complete"] and len(record["points"]) == 6
    assert (tmp_path / "r" / "table.csv").is_file() and (tmp_path / "r" / "table.parquet").is_file()


def test_a_grid_of_two_is_a_heat_map():
    rates, gammas = [0.1, 0.1, 0.2, 0.2, 0.4, 0.4], [0.9, 0.99] * 3
    values = np.array([10.0, 20, 30, 60, 50, 40])
    estimates = np.stack([values, values - 1, values + 1])
    updates = np.array([8] * 5 + [4])
    figure = Figure()
    numbers = {"learning_rate": rates, "gamma": gammas}
    figures.draw(figure, figures.Points(numbers, estimates, updates, 8, 5, True, best=3), "")
    axis = figure.axes[0]
    cells = {tuple(map(int, text.get_position())): text for text in axis.texts}
    written = {at: text.get_text().split("\n") for at, text in cells.items()}
    assert written[0, 0] == ["10", "[9, 11]"]
    assert {at: value for at, (value, _) in written.items()} == {
        (0, 0): "10", (0, 1): "20", (1, 0): "30", (1, 1): "60", (2, 0): "50", (2, 1): "(40)"
    }  # fmt: skip
    assert [at for at, text in cells.items() if text.get_fontweight() == "bold"] == [(1, 1)]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.1", "0.2", "0.4"]


@pytest.mark.parametrize(
    ("names", "gridded", "panels"), [("a", True, 1), ("ab", False, 2), ("abc", True, 3)]
)
def test_other_sweeps_have_a_panel_for_each_number(names, gridded, panels):
    rng = np.random.default_rng(0)
    numbers = {name: list(rng.uniform(1, 100, 6)) for name in names}
    estimates = np.sort(rng.normal(size=(3, 6)), axis=0)[[1, 0, 2]]
    figure = Figure()
    figures.draw(figure, figures.Points(numbers, estimates, np.full(6, 8), 8, 5, gridded), "")
    figure.savefig(io.BytesIO())  # matplotlib warns of panels that it cannot lay out
    assert [axis.get_xlabel() for axis in figure.axes] == list(names)
    assert len(figure.axes) == panels
    assert figure.axes[0].get_xscale() == "log"


BAD = {
    "CartPole-v1": "nothing is swept; give a hyperparameter several values",
    "CartPole-v1 --gamma .9": "nothing is swept",
    "CartPole-v1 --learning-rate 1e-2:1e-4:log0": "has 0 values; a range has 2 or more",
    "CartPole-v1 --learning-rate 1e-2:1e-4:log8": "0.01 is not below 0.0001; give the lower end",
    "CartPole-v1 --learning-rate 1e-4:1e-2": "is not a range; write LOW:HIGH:logN",
    "CartPole-v1 --learning-rate 1e-4:1e-2:geo8": "is not a range",
    "CartPole-v1 --learning-rate 1e-4:x:log8": "is not a range",
    "CartPole-v1 --learning-rate 1e-4:inf:log8": "a range has finite ends",
    "CartPole-v1 --learning-rate 0:1e-2:log8": "starts above 0; use lin",
    "CartPole-v1 --learning-rate 1e-4:1e-2:log": "has no count; write one, as in log8, or draw with",
    "CartPole-v1 --gamma .9:1.1:lin3": "gamma=1.1 must lie in [0, 1]",
    "CartPole-v1 --gamma .9,.99 --random 0": "--random 0 must be at least 1",
    f"CartPole-v1 --gamma .9,.99 --random {10**400}": "must be at most 2147483647",
    "CartPole-v1 --gamma .9,.99 --random many": "--random many takes a number of points",
    "CartPole-v1 --gamma .9,.99 --random": "--random takes a number of points",
    "CartPole-v1 --gamma .9,.99 --halving 1": "--halving 1 must be above 1",
    "CartPole-v1 --gamma .9,.99 --halving 3": "cannot thin 2 points",
    "CartPole-v1 --learning-rate 1:2:99999999999999": "learning_rate=1:2:99999999999999 is not a range",
    "CartPole-v1 --gamma 0:1:log1000000000": "has 1,000,000,000 values; at most 100,000 are possible",
    "CartPole-v1 --gamma 0:1:lin8 --halving 1.0000001": "keeps all of 8 points; 1.14286 or more keeps fewer",
    "CartPole-v1 --gamma .9,.99 --part 0/3": "--part 0/3 does not exist; the parts are 1/3 to 3/3",
    "CartPole-v1 --gamma .9,.99 --part": "--part takes I/N, such as 2/8",
    "CartPole-v1 --gamma .9,.99 --part 3/3": "--part 3/3 divides 2 points into 3 parts; at most 2 parts",
    "CartPole-v1 --gamma 0:1:lin8 --part 1/2 --halving 2": "--part does not go with --halving",
    "CartPole-v1 --join full": "unrecognized arguments: CartPole-v1",
    "CartPole-v1 --gamma .9,.99 --critic-epochs 2147483647": "critic_epochs=2147483647 must be at most",
    "CartPole-v1 --gamma .9,.99 --study s.db": "--study s.db takes a storage, such as sqlite:///study.db",
    "CartPole-v1 --gamma .9,.99 --part 1/2 --study sqlite:///s.db": "--study does not go with --part",
    "CartPole-v1 --gamma .9,.99 --tensorboard": "--tensorboard means nothing to a sweep",
    "CartPol-v1 --gamma .9,.99": "did you mean CartPole-v1",
    "CartPole-v1 --gamma .9,.99 --run full": "full is not empty",
    "CartPole-v1 --gamma 0:1:lin40000 --lambda 0:1:lin40000": "points fit",
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *arguments.split()])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("jaxpg: error: ") and error.count("\n") == 1
    assert BAD[arguments] in error
    assert set(tmp_path.rglob("*")) == before


def test_unknown_flags_are_refused_and_help_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", "CartPole-v1", "--gamma", ".9,.99", "--halfing", "3"])
    assert exit_.value.code == 2
    assert "--halfing" in capsys.readouterr().err
    main(["sweep", "--help"])
    text = capsys.readouterr().out
    assert "--halving" in text and max(map(len, text.splitlines())) <= 80
