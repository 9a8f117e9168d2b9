"""Figures of runs: reading folders, drawing, and the errors of the plot command."""

import json
from dataclasses import asdict
from itertools import combinations
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from printed import printed
from scipy import stats

from jaxpg.cli import main
from jaxpg.lab.studies import EXPERIMENTS
from jaxpg.lab.studies.study import Result
from jaxpg.runs import laboratory
from jaxpg.runs.config.config import Grid, points
from jaxpg.runs.config.presets import preset
from jaxpg.runs.plot import figures
from jaxpg.runs.plot.records import MOST_POINTS, best, read, score
from jaxpg.runs.store import metrics
from jaxpg.runs.store.folder import CONFIG, EVALUATION, METRICS, TABLE, write_json

SEEDS = 5


def returns_of(rate, updates):
    """[SEEDS, updates]: a curve that ends at 100 x rate + seed."""
    level = 100 * rate + np.arange(SEEDS)[:, None]
    return level * np.linspace(0, 1, updates)[None]


def write_run(
    folder,
    algorithm="ppo",
    rates=(0.1, 0.2),
    updates=4,
    *,
    world="CartPole-v1",
    measured=None,
    **more,
):
    """A run folder as jaxpg train leaves it, written chunk by chunk."""
    config, grid = preset(world, algorithm)
    grid = Grid(*grid)._replace(learning_rate=rates)
    labels = [{"seed": i, **p._asdict()} for p in points(grid) for i in range(SEEDS)]
    folder.mkdir(parents=True)
    description = {"config": asdict(config) | more, "hyperparameters": grid._asdict()}
    write_json(folder / CONFIG, description | {"replicas": labels})
    returns = np.concatenate([returns_of(rate, updates) for rate in rates])
    count = len(labels)
    table = metrics.parquet(folder / TABLE, labels, ["learning_rate"])
    lines = metrics.json_lines(folder / METRICS, config.num_envs)
    for k in range(updates):
        record = metrics.Records(
            np.array([k + 1]),
            np.arange(count)[:, None] + 100 * (k + 1),
            np.array([0.5 * (k + 1)]),
            {
                "episode_return": returns[:, k : k + 1],
                "kl": np.full((count, 1), np.nan if k == 0 else 0.01),
                "grad_norm": 10.0 ** np.full((count, 1), k - 2.0),
                "noise": np.full((count, 1), 6.0),
                "signal": np.full((count, 1), 2.0),
            }
            | {name: values[:, k : k + 1] for name, values in (measured or {}).items()},
        )
        table.write(record)
        lines.write(record)
        if k == 1:
            table.flush()
    table.flush()
    write_json(folder / EVALUATION, {"mean_return": returns[:, -1]})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one", updates=4)


@pytest.mark.parametrize("parquet", [True, False])
def test_both_files_tell_the_same_run(tmp_path, parquet):
    folder = write_run(tmp_path / "r")
    if not parquet:
        for part in (folder / TABLE).iterdir():
            part.unlink()
        (folder / TABLE).rmdir()
        with open(folder / METRICS, "a") as file:
            file.write('{"update": 5, "env_st')  # a crash cut the line short
    one, other = read([folder])
    assert [one.label, other.label] == ["learning_rate=0.1", "learning_rate=0.2"]
    np.testing.assert_array_equal(one.update, [1, 2, 3, 4])
    np.testing.assert_array_equal(one.env_steps[:, 0], 100 + np.arange(SEEDS))
    np.testing.assert_array_equal(other.env_steps[:, 3], 400 + SEEDS + np.arange(SEEDS))
    np.testing.assert_array_equal(one.seconds, [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(other.metrics["episode_return"], returns_of(0.2, 4))
    np.testing.assert_array_equal(np.isnan(one.metrics["kl"]), [[True] + [False] * 3] * SEEDS)
    np.testing.assert_allclose(one.final, 10 + np.arange(SEEDS))
    # A run of fewer than ten updates is averaged over all of them; 16 is num_envs of the preset.
    np.testing.assert_allclose(one.ratios["noise_scale"].value, [np.nan] * 3 + [16 * 3.0])


def test_a_flipped_byte_of_a_table_is_no_other_curve(tmp_path):
    folder = write_run(tmp_path / "r", rates=(0.1,), updates=250)
    (part,) = (x for x in (folder / TABLE).iterdir() if x.stat().st_size > 20_000)
    (truth,), whole, refused = read([folder]), part.read_bytes(), 0
    for place in range(100, len(whole), 997):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            (found,) = read([folder])
        except ValueError as error:
            refused += str(folder) in str(error)
            continue
        for name, values in truth.metrics.items():
            np.testing.assert_array_equal(found.metrics[name], values)
    assert refused > 5


def test_long_runs_are_averaged_over_windows(tmp_path):
    (series,) = read([write_run(tmp_path / "r", rates=(0.1,), updates=250)])
    assert series.metrics["kl"].shape == (SEEDS, MOST_POINTS)
    assert series.update[-1] == 250
    truth = returns_of(0.1, 250)
    starts = np.concatenate([[0], series.update[:-1]]).astype(int)
    windows = zip(starts, series.update.astype(int), strict=True)
    means = np.stack([truth[:, a:b].mean(axis=1) for a, b in windows], axis=1)
    np.testing.assert_allclose(series.metrics["episode_return"], means)


def test_the_noise_scale_is_a_ratio_of_averages_or_a_bound(tmp_path):
    """Averages over seeds and ten updates; if the signal is not clear of 0, only a bound is drawn."""
    rng = np.random.default_rng(0)
    updates, clear = 40, np.arange(40) < 20
    noise = rng.gamma(9.0, size=(SEEDS, updates))
    signal = np.where(clear, 2.0, 0.0) + rng.normal(size=(SEEDS, updates))
    measured = {"noise": noise, "signal": signal}
    (series,) = read([write_run(tmp_path / "r", rates=(0.1,), updates=updates, measured=measured)])
    found = series.ratios["noise_scale"]
    for update in (10, 17, 20, 38):
        some = slice(update - 10, update)
        above, below = noise[:, some].mean(), signal[:, some].mean()
        if update <= 20:
            np.testing.assert_allclose(found.value[update - 1], 16 * above / below)
            assert found.low[update - 1] < 16 * above / below < found.high[update - 1]
        else:
            assert np.isnan(found.value[update - 1]) and found.high[update - 1] == np.inf
            # The smallest ratio that both intervals allow.
            n, reach = 10 * SEEDS, stats.t.ppf(0.975, 10 * SEEDS - 1)
            low = above - reach * noise[:, some].std(ddof=1) / n**0.5
            high = below + reach * signal[:, some].std(ddof=1) / n**0.5
            np.testing.assert_allclose(found.low[update - 1], 16 * low / high)
    assert np.isnan(found.value[:9]).all()
    figure = Figure()
    figures.diagnostics(figure, [series])
    assert "arrows: not resolved" in figure.texts[-1].get_text()
    (axis,) = (a for a in figure.axes if a.get_title().startswith("noise scale"))
    heights = np.concatenate([each.get_ydata() for each in axis.get_lines()])
    assert np.nanmin(heights) > 0 and np.isfinite(found.low[30:]).all()
    assert {*found.low[30:]} <= {*heights} and max(axis.get_ylim()) > found.low[30:].max()
    # The run's own lines and events have no number there either.
    record = metrics.Records(np.arange(30, 40), np.zeros((SEEDS, 10)), np.arange(10.0), {
        name: each[:, 30:] for name, each in measured.items()
    })  # fmt: skip
    line = metrics.means(record, 16)
    assert np.isnan(line["noise_scale"]).all() and (line["noise_scale_above"] > 0).any()


def test_what_was_recorded_in_vain_is_not_drawn(tmp_path):
    """Earlier versions recorded a KL of 0 and a share of 1 for a single step on on-policy data."""
    recorded = {"ess": np.ones((SEEDS, 4))}
    for name, kept in (("ppo", {"kl", "ess"}), ("trpo", {"kl"}), ("vpg", set())):
        (series,) = read([write_run(tmp_path / name, name, rates=(0.1,), measured=recorded)])
        assert {"kl", "ess"} & series.metrics.keys() == kept


def test_labels_are_what_differs(tmp_path):
    ppo = write_run(tmp_path / "ppo", rates=(0.1,))
    vpg = write_run(tmp_path / "vpg", "vpg", rates=(0.1,))
    again = write_run(tmp_path / "again", rates=(0.1,), seed=3)
    assert [s.label for s in read([ppo, vpg])] == ["ppo", "vpg"]
    assert [s.label for s in read([ppo, again])] == ["seed=0", "seed=3"]
    assert [s.label for s in read([ppo, vpg, again])] == [
        "ppo, seed=0",
        "vpg, seed=0",
        "ppo, seed=3",
    ]
    # Only the folder differs; settings of what a run prints and logs do not distinguish series.
    twin = write_run(tmp_path / "twin", rates=(0.1,), quiet=True)
    assert [
        s.label.endswith(name) for s, name in zip(read([ppo, twin]), ("ppo", "twin"), strict=True)
    ]
    assert len({s.label for s in read([ppo, twin])}) == 2


def test_labels_say_every_difference_and_updates_last(tmp_path):
    longer = write_run(tmp_path / "a", rates=(0.1,), updates=4)
    other = write_run(tmp_path / "b", rates=(0.2,), updates=4, num_envs=8)
    saved = json.loads((longer / CONFIG).read_text())
    saved["config"]["updates"] = 400  # it was extended
    saved["replicas"] = [each | {"schedule_updates": 400.0} for each in saved["replicas"]]
    write_json(longer / CONFIG, saved)
    assert [s.label for s in read([longer, other])] == [
        "num_envs=16, learning_rate=0.1, updates=400",
        "num_envs=8, learning_rate=0.2, updates=100",
    ]
    # Another algorithm's own defaults follow from its name; settings that were asked for do not.
    vpg = write_run(tmp_path / "vpg", "vpg", rates=(0.3,))
    assert [s.label for s in read([other, vpg])] == [
        "ppo, num_envs=8, learning_rate=0.2",
        "vpg, num_envs=16, learning_rate=0.3",
    ]


def test_of_many_series_the_best_are_drawn(tmp_path):
    rates = tuple(round(0.1 * i, 1) for i in range(1, 13))
    series = read([write_run(tmp_path / "r", rates=rates)])
    assert [s.label for s in best(series, 3)] == [f"learning_rate={x:g}" for x in (1.0, 1.1, 1.2)]


def test_curves_are_the_interquartile_mean_at_mean_steps(run):
    series = read([run])
    figure = Figure()
    figures.curves(figure, series)
    (axis,) = figure.axes
    for line, s, rate in zip(axis.get_lines(), series, (0.1, 0.2), strict=True):
        expected = stats.trim_mean(returns_of(rate, 4), 0.25, axis=0)
        # A quarter of five seeds is 1.25, which trim_mean rounds down to one.
        middle = np.sort(returns_of(rate, 4), axis=0)
        weights = np.array([0, 0.75, 1, 0.75, 0])[:, None]
        np.testing.assert_allclose(line.get_ydata(), (weights * middle).sum(axis=0) / 2.5)
        assert np.allclose(expected, line.get_ydata(), atol=0.1)
        np.testing.assert_array_equal(line.get_xdata(), s.env_steps.mean(axis=0))
        assert line.get_label() == s.label
    # Grey print: no two series share a line style or a marker.
    assert len({(line.get_linestyle(), line.get_marker()) for line in axis.get_lines()}) == 2
    assert len({line.get_marker() for line in axis.get_lines()}) == 2


@pytest.mark.parametrize(("x", "end"), [("updates", 4), ("seconds", 2.0)])
def test_curves_are_drawn_against_what_was_asked(run, x, end):
    figure = Figure()
    figures.curves(figure, read([run]), x, "kl")
    assert figure.axes[0].get_lines()[0].get_xdata()[-1] == end


def test_diagnostics_have_a_panel_for_every_other_metric_that_changes(tmp_path):
    rng, updates = np.random.default_rng(0), 30
    varied = {name: 5 + rng.random((SEEDS, updates)) for name in ("kl", "noise", "signal")}
    constant = {"entropy": np.full((SEEDS, updates), 0.5)}
    folder = write_run(tmp_path / "r", rates=(0.1,), updates=updates, measured=varied | constant)
    figure = Figure()
    figures.diagnostics(figure, read([folder]))
    titles = {axis.get_title(): axis.get_yscale() for axis in figure.axes}
    assert titles == {
        "KL divergence (nats)": "linear",
        "gradient norm": "log",
        "noise scale (episodes or lanes)": "linear",
        "signal to noise": "linear",
    }


def test_comparison_of_two_runs(tmp_path):
    one = write_run(tmp_path / "one", rates=(1.0,))
    other = write_run(tmp_path / "other", "vpg", rates=(1.02,))
    scores, unit = figures.final_scores(read([one, other]))
    assert unit == "final return"
    one_name, other_name = "ppo, learning_rate=1", "vpg, learning_rate=1.02"
    np.testing.assert_array_equal(scores[other_name][:, 0], 102 + np.arange(SEEDS))
    figure = Figure()
    figures.comparison(figure, read([one, other]))
    means, profile, improvement = figure.axes
    assert [t.get_text() for t in means.get_yticklabels()] == [
        name.replace(", ", ",\n") for name in (one_name, other_name)
    ]
    # Of 5 x 5 pairs, seed i of ppo at 100 + i beats seed j of vpg at 102 + j where i > j + 2.
    better = np.array([(i > j + 2) + 0.5 * (i == j + 2) for i in range(5) for j in range(5)]).mean()
    assert [t.get_text() for t in improvement.get_yticklabels()] == [
        f"{other_name}\nover {one_name}".replace(", ", ",\n")
    ]
    assert np.isclose(improvement.get_lines()[0].get_xdata()[0], 1 - better)
    at, above = profile.get_lines()[0].get_data()
    np.testing.assert_allclose(above, [(100 + np.arange(5) > x).mean() for x in at])


def test_long_names_fit(tmp_path):
    """Rows that name many settings do not overlap, and a legend stays inside the figure."""
    settings = {"schedule": "constant", "hidden": [64, 64], "entropy_coef": 0.123456789}
    runs = [
        write_run(tmp_path / f"{i}", name, rates=(0.1 * (i + 1),), num_envs=4 * (i + 1), **more)
        for i, (name, more) in enumerate(
            (
                ("ppo", {}),
                ("vpg", settings),
                ("a2c", {"optimizer": "rmsprop"}),
                ("reinforce", settings),
            )
        )
    ]
    for draw in (figures.comparison, figures.diagnostics):
        figure = printed(lambda figure, draw=draw: draw(figure, read(runs)), "page")
        renderer = figure.canvas.get_renderer()
        width, height = figure.canvas.get_width_height()
        texts = [t for axis in figure.axes for t in axis.get_yticklabels() if "=" in t.get_text()]
        boxes = [t.get_window_extent(renderer) for t in texts]
        assert boxes or draw is figures.diagnostics
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height


def test_several_environments_are_rescaled_and_stratified(tmp_path):
    runs = [
        write_run(tmp_path / f"{a}-{w}", a, rates=(r,), world=w)
        for a, r in (("ppo", 1.0), ("vpg", 2.0))
        for w in ("CartPole-v1", "Acrobot-v1")
    ]
    series = read(runs)
    ppo, vpg = "ppo, learning_rate=1", "vpg, learning_rate=2"
    assert [s.label for s in series] == [ppo, ppo, vpg, vpg]
    scores, unit = figures.final_scores(series)
    assert {name: x.shape for name, x in scores.items()} == {ppo: (5, 2), vpg: (5, 2)}
    assert scores[ppo].min() == 0 and scores[vpg].max() == 1
    assert "worst" in unit
    with pytest.raises(ValueError, match=r"=2 was run on CartPole-v1 and not on Acrobot-v1"):
        figures.final_scores(series[:3])


def test_a_policy_that_earns_no_number_earns_the_least(run):
    series = read([run])
    final = np.array(series[0].final)
    final[1] = np.nan
    scores, _ = figures.final_scores([series[0]._replace(final=final), series[1]])
    assert scores["learning_rate=0.1"][1, 0] == 10.0


@pytest.mark.slow
def test_the_command_writes_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one")
    write_run(tmp_path / "other", "vpg", rates=(0.15,))
    main(["plot", "one", "other", "--x", "seconds"])
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    names = {
        f"{name}.{kind}"
        for name in ("curves", "diagnostics", "comparison")
        for kind in ("png", "svg", "pdf")
    }
    assert {f.name for f in folder.iterdir()} == names
    for name in ("curves", "comparison"):
        image = matplotlib.image.imread(folder / f"{name}.png")
        assert image[..., :3].std() > 0.05  # something is drawn
    assert "vpg, learning_rate=0.15" in out
    assert max(map(len, out.splitlines())) <= 80
    main(["plot", "one"])
    assert (tmp_path / "one" / "figures" / "curves.png").is_file()


def test_a_picture_that_fails_costs_nothing_that_came_before_it(tmp_path, monkeypatch, capsys):
    """Both the table of plot and the numbers of a laboratory experiment survive."""

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    folder = write_run(tmp_path / "r")
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(SystemExit) as exit_:
        main(["plot", str(folder)])
    said = capsys.readouterr()
    assert exit_.value.code == 1 and "learning_rate=0.2" in said.out
    assert "figures: none of 3 figures could be drawn\n" in said.err
    assert said.err.count("warning: cannot draw") == 3 and said.err.count("\n") == 4

    def only_curves(figure, file, **options):
        return savefig(figure, file, **options) if "curves" in file.name else fail()

    monkeypatch.setattr(Figure, "savefig", only_curves)
    main(["plot", str(folder)])
    said = capsys.readouterr()
    assert {f.name for f in (folder / "figures").iterdir()} == {
        "curves.png",
        "curves.svg",
        "curves.pdf",
    }
    assert f"saved curves in {folder / 'figures'}" in said.out
    assert said.err.count("warning: cannot draw") == said.err.count("\n") == 2

    table = {"estimator": ["rtg"], "quantity": ["trace"], "measured": [1.5], "exact": [None],
             "low": [1.0], "high": [2.0], "warning": [""]}  # fmt: skip
    result = Result(table, {"found": 1.5}, lambda figure: None)
    experiment = SimpleNamespace(summary="a stub", run=lambda settings, progress: result)
    job = laboratory.LabJob("stub", experiment, EXPERIMENTS["gae"].quick, "")
    laboratory.execute(laboratory.LabPlan([job], str(tmp_path / "lab"), False))
    said = capsys.readouterr()
    assert "saved in" in said.out and "1.5" in said.out and said.err.count("\n") == 1
    assert json.loads((tmp_path / "lab" / "summary.json").read_text())["summary"] == {"found": 1.5}
    assert {f.name for f in (tmp_path / "lab").iterdir()} == {
        "summary.json",
        "table.csv",
        "table.parquet",
    }


def test_one_series_is_compared_with_nothing(tmp_path, capsys):
    folder = write_run(tmp_path / "r", rates=(0.1,))
    main(["plot", str(folder)])
    assert "no comparison: there is one series; name several runs" in capsys.readouterr().out
    assert {f.stem for f in (folder / "figures").iterdir()} == {"curves", "diagnostics"}


def test_an_unfinished_run_has_curves_and_no_comparison(tmp_path, capsys):
    folder = write_run(tmp_path / "r")
    (folder / EVALUATION).unlink()
    main(["plot", str(folder)])
    out = capsys.readouterr().out
    assert "no comparison:" in out and "unfinished" in out
    assert not (folder / "figures" / "comparison.png").exists()


def test_what_diverged_is_named_and_the_rest_is_drawn(tmp_path, capsys):
    """Of three settings, one diverges in all seeds at update 1 and one in a single seed at update 3."""
    loss = np.ones((3 * SEEDS, 4))
    loss[:SEEDS], loss[SEEDS, 2:] = np.nan, np.inf
    folder = write_run(tmp_path / "r", rates=(0.1, 0.2, 0.3), measured={"objective": loss})
    final = np.concatenate([returns_of(rate, 4)[:, -1] for rate in (0.1, 0.2, 0.3)])
    final[: SEEDS + 1] = np.nan
    write_json(folder / EVALUATION, {"mean_return": final})
    gone, partly, well = read([folder])
    assert (gone.diverged, partly.diverged, well.diverged) == ([1] * SEEDS, [3], [])
    assert np.isnan(gone.metrics["episode_return"]).all()
    curve = partly.metrics["episode_return"]
    assert np.isfinite(curve[0, :2]).all() and np.isnan(curve[0, 2:]).all()
    assert np.isnan(score(partly._replace(final=None))[0])
    assert [s.label for s in best([gone, partly, well], 1)] == [well.label]
    main(["plot", str(folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert "diverged: 5 of 5 seeds of learning_rate=0.1, the first at update 1" in out
    assert "diverged: 1 of 5 seeds of learning_rate=0.2, the first at update 3" in out
    names = {"curves", "diagnostics", "comparison"}
    assert {f.name for f in (folder / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")
    }
    assert [*figures.final_scores([gone, partly, well])[0]] == [partly.label, well.label]
    with pytest.raises(ValueError, match="of 2 series, the agents of all but 1 have diverged"):
        figures.final_scores([gone, well])


def test_a_run_that_diverged_at_once_is_refused(tmp_path, capsys):
    bad = {"objective": np.full((SEEDS, 4), np.nan)}
    folder = write_run(tmp_path / "r", rates=(0.1,), measured=bad)
    with pytest.raises(SystemExit) as stop:
        main(["plot", str(folder)])
    assert stop.value.code == 2 and not (folder / "figures").exists()
    assert "nothing to draw: all agents of" in capsys.readouterr().err


BAD = {
    "missing": "missing is not a folder; name the folder of a jaxpg train run",
    "bare": "bare has no config.json",
    "empty": "is empty: the run ended before its first chunk of updates",
    "good good": "good is named twice",
    "good --metric klx": "unknown metric 'klx'; did you mean kl",
    "good --x epochs": "invalid choice: 'epochs'",
    "good --smooth 3": "unrecognized arguments: --smooth 3 (see jaxpg plot --help)",
    "": "required: RUN",
    "single acrobot": "nothing to compare: every run has a different environment",
    "garbled": "cannot read garbled/config.json",
    "foreign": "cannot read foreign/config.json: config is missing",
    "sweep": "sweep is a sweep; its figures are in sweep/figures",
    "good --out file/x": "cannot write file/x: Not a directory",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    write_run(root / "good")
    write_run(root / "single", rates=(0.1,))
    write_run(root / "acrobot", rates=(0.1,), world="Acrobot-v1")
    empty = write_run(root / "empty")
    for part in (empty / TABLE).iterdir():
        part.unlink()
    (empty / TABLE).rmdir()
    (empty / METRICS).write_text("")
    for name in ("bare", "garbled", "foreign", "sweep"):
        (root / name).mkdir()
    (root / "garbled" / CONFIG).write_text('{"config": ')
    (root / "foreign" / CONFIG).write_text(json.dumps({"model": "resnet"}))
    (root / "sweep" / "sweep.json").write_text("{}")
    (root / "file").touch()
    return root


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_one_line(arguments, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    before = set(folders.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(["plot", *arguments.split()])
    error = capsys.readouterr().err
    assert exit_.value.code == (1 if "--out" in arguments else 2)
    assert error.startswith("jaxpg: error: ") and error.count("\n") == 1
    assert BAD[arguments] in error
    assert set(folders.rglob("*")) == before
