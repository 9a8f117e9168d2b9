"""Parts of a sweep: each has the whole sweep's points and results, and joined they are the whole sweep."""

import csv
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_runs import prepared, write_part

from jaxpg.cli import main
from jaxpg.runs.store import folder as files
from jaxpg.runs.sweep import figures, ranking, sweep
from jaxpg.runs.sweep.search import Part, places, read_part
from jaxpg.runs.train import replica_batches

SMALL = (
    "CartPole-v1 --algorithm reinforce_to_go --network linear --num-envs 4 --num-steps 30 --seeds 2 "
    "--updates 8 --evaluation-episodes 8 --schedule constant --quiet"
)
GRID = f"{SMALL} --learning-rate 1e-3:1:log3 --gamma .5,.9"
DRAWN = f"{SMALL} --learning-rate 1e-3:1:log --gamma .5:.9:lin --random 7"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole sweep and its two parts, all trained by one compiled program, in batches of three points."""
    place, plans = tmp_path_factory.mktemp("trained"), []
    plan = replica_batches.plan

    def once(job, totals, poll, size=None):
        if not plans:
            plans.append(plan(job, totals, poll, size))
        return plans[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_batches, "plan", once)
        for flags, name in (("--part 1/2", "one"), ("--part 2/2", "two"), ("", "whole")):
            sweep.execute(prepared(f"{GRID} {flags}", place / name))
    return place


def record(folder):
    return json.loads((folder / "sweep.json").read_text())


def columns(folder):
    with open(folder / "table.csv") as file:
        return {name: values for name, *values in zip(*csv.reader(file), strict=True)}


@pytest.mark.slow
def test_the_parts_joined_are_the_whole_sweep(trained, tmp_path, monkeypatch, capsys):
    def no_devices(*arguments):
        raise AssertionError("a join asks for no device")

    for name in ("devices", "device_count", "device_put"):
        monkeypatch.setattr(jax, name, no_devices)
    joined = tmp_path / "joined"
    main(["sweep", "--join", str(trained / "two"), str(trained / "one"), "--run", str(joined)])
    said, whole = capsys.readouterr().out.splitlines(), trained / "whole"
    assert {x.relative_to(joined) for x in joined.rglob("*")} == {
        x.relative_to(whole) for x in whole.rglob("*")
    }
    ours, theirs = columns(joined), columns(whole)
    assert ours.keys() == theirs.keys() and len(set(ours["return"])) > 1
    for name, values in theirs.items():
        if name == "evaluated":
            assert ours[name] == values == ["True"] * 6
        else:
            np.testing.assert_allclose(
                *(np.array(x, float) for x in (ours[name], values)), rtol=1e-5
            )
    best = [json.loads((x / "best" / "config.json").read_text()) for x in (joined, whole)]
    assert best[0]["hyperparameters"] == best[1]["hyperparameters"]
    found, expected = record(joined), record(whole)
    for mine, other in zip(found["points"], expected["points"], strict=True):
        assert mine["hyperparameters"] == other["hyperparameters"]
        np.testing.assert_allclose(mine["returns"], other["returns"], rtol=1e-5)
    assert found["search"] == expected["search"] and found["complete"]
    assert found["costs"]["env_steps"] == expected["costs"]["env_steps"]
    assert [part["folder"] for part in found["joined"]] == [
        str(trained / x) for x in ("one", "two")
    ]
    assert said[0].endswith("6 points x 2 seeds, 8 updates, 2 parts")
    assert said[-1] == f"saved in {joined}" and max(map(len, said[:-1])) <= 80


def test_a_part_has_the_points_and_results_of_the_whole_sweep(trained):
    whole = {str(p["hyperparameters"]): p for p in record(trained / "whole")["points"]}
    seen = []
    for name in ("one", "two"):
        assert record(trained / name)["search"]["parts"] == 2
        for point in record(trained / name)["points"]:
            same = whole[str(point["hyperparameters"])]
            np.testing.assert_allclose(point["returns"], same["returns"], rtol=1e-5)
            np.testing.assert_allclose(point["area"], same["area"], rtol=1e-5)
            seen.append(str(point["hyperparameters"]))
    assert sorted(seen) == sorted(whole)


# Tests without training


@pytest.mark.parametrize(("total", "count"), [(6, 1), (6, 4), (7, 3), (7, 7), (100, 9)])
def test_parts_divide_the_points_evenly(total, count):
    shares = [range(total)[places(Part(i + 1, count), total)] for i in range(count)]
    assert sorted(k for share in shares for k in share) == [*range(total)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert range(total)[places(None, total)] == range(total)


def joined(folder, *names):
    return [
        "sweep",
        "--join",
        *(str(folder / name) for name in names),
        "--run",
        str(folder / "all"),
    ]


@pytest.mark.parametrize("arguments", [GRID, DRAWN])
def test_a_join_equals_the_whole_sweep_to_the_last_digit(arguments, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda figure, points, title: drawn.append(points))
    for i in (1, 2, 3):
        write_part(tmp_path / f"p{i}", arguments, f"--part {i}/3")
    whole = write_part(tmp_path / "whole", arguments)
    main(joined(tmp_path, "p3", "p1", "p2"))
    for name in ("table.csv", "table.parquet"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found, expected = record(tmp_path / "all"), record(tmp_path / "whole")
    assert found["points"] == expected["points"]
    assert drawn[0].gridded == (arguments == GRID)
    assert drawn[0].numbers["gamma"] == [point.gamma for point in whole.search.points]
    total = len(found["points"])
    costs = {
        "env_steps": 10 * total,
        "seconds": 1.5,
        "compile_seconds": 6,
        "batch": 4,
        "bytes": None,
    }
    assert found["costs"] == costs
    # It is what the command without --part would have made, and is finished.
    assert prepared(f"{arguments} --resume-or-start", tmp_path / "all").done


def test_a_part_is_named_drawn_and_resumed_as_a_part(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = sweep.prepare([*GRID.split(), "--part", "2/3"]).folder
    assert folder.name.startswith("sweep-CartPole-v1-reinforce_to_go-part-2-of-3-")
    found, drawn = write_part(folder / "p", GRID, "--part 2/3"), []
    assert "part 2 of 3, of 6 points" in ranking.headline(found.config, found.search, "")
    monkeypatch.setattr(figures, "draw", lambda figure, points, title: drawn.append(points))
    ranking.draw(folder / "p", found.config, found.search, ranking.nothing_yet(2, 2, 2))
    assert not drawn[0].gridded  # a heat map would show holes
    main(["sweep", *GRID.split(), *f"--part 2/3 --run {folder}/p --resume-or-start".split()])
    assert capsys.readouterr().out == f"the sweep in {folder}/p has finished\n"
    with pytest.raises(ValueError, match="has a sweep with another part; use the flags"):
        prepared(f"{GRID} --part 1/3 --resume-or-start", folder / "p")


def test_settings_of_many_digits_are_kept(tmp_path):
    many = GRID.replace(".9", "0.12345678901")
    write_part(tmp_path / "whole", many)
    assert prepared(f"{many} --resume-or-start", tmp_path / "whole").done
    write_part(tmp_path / "p1", many, "--part 1/1")
    main(joined(tmp_path, "p1"))
    points = record(tmp_path / "all")["points"]
    assert {p["hyperparameters"]["gamma"] for p in points} == {0.5, 0.12345679}


@pytest.fixture(scope="module")
def places_of_parts(tmp_path_factory):
    place = tmp_path_factory.mktemp("parts")
    for i in (1, 2, 3):
        write_part(place / f"p{i}", GRID, f"--part {i}/3")
    write_part(place / "again", GRID, "--part 2/3")
    write_part(place / "cut", GRID, "--part 2/3", complete=False)
    write_part(place / "whole", GRID)
    write_part(place / "quarter", GRID, "--part 2/4")
    write_part(place / "other", GRID.replace(".9", ".99"), "--part 2/3")
    write_part(place / "longer", GRID.replace("--updates 8", "--updates 16"), "--part 2/3")
    for i in (1, 12):
        write_part(place / f"of12-{i}", f"{SMALL} --gamma 0:1:lin12", f"--part {i}/12")
    (place / "nothing").mkdir()
    return place


BAD = {
    "p1": "not all 3 parts are there: missing 2, 3 (name every folder, or run --part 2/3)",
    "p1 cut": "missing 3 (name every folder, or run --part 3/3); unfinished P/cut (its command with --run "
    "P/cut --resume-or-start resumes it)",
    "of12-12 of12-1": "not all 12 parts are there: missing 2, 3, 4, 5, 6 and 5 more (",
    "p1 p2 again": "part 2 is given twice, as P/p2 and P/again; leave one out",
    "p1 p1": "part 1 is given twice, as P/p1 and P/p1",
    "p1 nowhere": "P/nowhere has no sweep.json; name the folders that jaxpg sweep --part I/N has written",
    "nothing": "P/nothing has no sweep.json",
    "p1 whole": "P/whole is a whole sweep, not a part of one, and has its own table",
    "p1 quarter p3": "P/quarter is part of another sweep than P/p1: it has parts=4 instead of 3",
    "p1 other p3": "P/other is part of another sweep than P/p1: it has gamma=0.5,0.99 instead of 0.5,0.9",
    "p1 longer p3": "P/longer is part of another sweep than P/p1: it has updates=16 instead of 8",
}


@pytest.mark.parametrize("names", BAD)
def test_what_cannot_be_joined_is_one_line(names, places_of_parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", "--join", *(str(places_of_parts / name) for name in names.split())])
    error = capsys.readouterr().err.replace(str(places_of_parts), "P")
    assert exit_.value.code == 2
    assert error.startswith("jaxpg: error: ") and error.count("\n") == 1 and BAD[names] in error
    assert not any(tmp_path.iterdir())


def edited(change):
    def damage(folder):
        found = record(folder)
        change(found)
        (folder / "sweep.json").write_text(json.dumps(found))

    return damage


def resaved(**changes):
    def damage(folder):
        with np.load(folder / "outcomes.npz") as arrays:
            np.savez(folder / "outcomes.npz", **(dict(arrays) | changes))

    return damage


DAMAGES = {
    "cannot read P/p/sweep.json: search.part must be": edited(lambda x: x["search"].update(part="1")),
    "sweep.json: it is part 1 of 0, of 6 points": edited(lambda x: x["search"].update(parts=0)),
    "part 1 of 9, of 6 points": edited(lambda x: x["search"].update(parts=9)),
    "cannot read P/p/sweep.json: costs.env_steps must be": edited(lambda x: x.pop("costs")),
    "cannot read P/p/sweep.json: search is missing": edited(lambda x: x.pop("search")),
    "cannot read P/p/outcomes.npz": lambda folder: (folder / "outcomes.npz").unlink(),
    "outcomes.npz does not hold returns": resaved(returns=np.zeros((2, 2))),
    "does not hold points of P/p/sweep.json, float64(6, 2): it has": resaved(points=np.zeros((6, 3))),
    "P/p/outcomes.npz does not hold the 8 updates of P/p/sweep.json": resaved(updates=np.full(6, 7)),
    "does not hold the 8 updates of P/p/sweep.json": resaved(diverged=np.full((6, 2), 9)),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_part_is_one_line(message, tmp_path, capsys):
    write_part(tmp_path / "p", GRID, "--part 1/1")
    DAMAGES[message](tmp_path / "p")
    with pytest.raises(SystemExit) as exit_:
        main(joined(tmp_path, "p"))
    error = capsys.readouterr().err.replace(str(tmp_path), "P")
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "all").exists()


def test_parts_of_unlike_machines_are_said_and_recorded(tmp_path, capsys):
    for i in (1, 2):
        write_part(tmp_path / f"p{i}", GRID, f"--part {i}/2")
    edited(lambda x: x["device"].update(kind="H100"))(tmp_path / "p2")
    main(joined(tmp_path, "p1", "p2"))
    said = "not all parts were computed with the same device kind (see sweep.json)"
    assert said in capsys.readouterr().out.splitlines()
    assert record(tmp_path / "all")["joined"][1]["device"]["kind"] == "H100"


def test_a_join_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, capsys):
    write_part(tmp_path / "p", GRID, "--part 1/1")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)  # the last of all files
    with pytest.raises(SystemExit) as exit_:
        main(joined(tmp_path, "p"))
    assert exit_.value.code == 1
    assert capsys.readouterr().err == (
        f"jaxpg: error: cannot write {tmp_path}/all: No space left on device\n"
    )
    assert not (tmp_path / "all").exists()


def test_parts_that_all_diverged_are_joined_and_exit_with_1(tmp_path, monkeypatch, capsys):
    write_part(tmp_path / "p", GRID, "--part 1/1", diverged=3)

    def left(status):
        raise SystemExit(status)

    monkeypatch.setattr("jaxpg.cli.os", SimpleNamespace(_exit=left))
    with pytest.raises(SystemExit) as exit_:
        main(joined(tmp_path, "p"))
    assert exit_.value.code == 1
    assert "nothing is ranked: all 6 points diverged" in capsys.readouterr().err
    assert record(tmp_path / "all")["complete"]


def test_a_joined_sweep_is_drawn_like_any_sweep(tmp_path, capsys):
    write_part(tmp_path / "p", GRID, "--part 1/1")
    main(joined(tmp_path, "p"))
    assert (tmp_path / "all" / "figures" / "response.svg").is_file()
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path / "all")])
    assert f"its figures are in {tmp_path}/all/figures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/3", "--part 0/3 does not exist; the parts are 1/3 to 3/3"),
        ("4/3", "--part 4/3 does not exist"),
        *((x, "takes I/N, such as 2/8")
          for x in ("x", "", "1", "1/0", "-1/3", "1/3/3", "²/3", "1/" + "9" * 99)),
    ],
)  # fmt: skip
def test_what_is_no_part_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_part(text)
    assert read_part("2/8") == Part(2, 8)
