"""The notebooks run from top to bottom, with the sizes in their cell of parameters made small."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import matplotlib.image
import pytest
from PIL import Image as Picture

FOLDER = Path(__file__).parent.parent / "scripts" / "notebooks"
spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
assert spec and spec.loader
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)
cells, source = notebooks.cells, notebooks.source

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TINY = {"seeds": 2, "num_envs": 4, "hidden": (4,), "evaluation_episodes": 2}
SMALL = {
    "lecture": {
        "EPISODES": 2**12,
        "CARTPOLE_EPISODES": 2**12,
        "LONGEST": 8,
        "SETTINGS": TINY,
        "ROWS": {"reinforce_baseline": 2, "ppo": 2},
    },
    "quickstart": {"SEEDS": 4, "UPDATES": 4, "EVALUATION_EPISODES": 4, "RATES": [1e-3, 1e-2]},
    "variance_study": {
        "EXACT_TRAJECTORIES": 2**12,
        "CARTPOLE_TRAJECTORIES": 2**9,
        "EXACT_RUNGS": ("total", "rtg_value"),
        "CARTPOLE_RUNGS": ("total", "rtg"),
    },
}


def read(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook


def tagged(notebook, tag):
    (cell,) = (c for c in cells(notebook) if tag in c["metadata"].get("tags", ()))
    return cell


def smaller(cell, sizes):
    """The cell of sizes with other values; only names that it sets can be replaced."""
    tree = ast.parse(source(cell))
    names = {target.id: statement for statement in tree.body for target in statement.targets}
    assert sizes.keys() <= names.keys()
    for name, value in sizes.items():
        names[name].value = ast.parse(repr(value), mode="eval").body
    return ast.unparse(tree)


def printed(outputs):
    return "".join("".join(each["text"]) for each in outputs if each["output_type"] == "stream")


def pictures(outputs):
    """The images that are shown, as bytes."""
    data = [each["data"] for each in outputs if each["output_type"] == "display_data"]
    html = "".join("".join(each.get("text/html", ())) for each in data)
    found = [each["image/png"] for each in data if "image/png" in each]
    return [b64decode(each) for each in (*found, *re.findall(r"base64,([^\"]+)", html))]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    notebook = read(path)
    sizes = tagged(notebook, "parameters")

    def change(cell):
        return smaller(cell, SMALL[path.stem]) if cell is sizes else source(cell)

    names, outputs = notebooks.execute(notebook, change)
    flat = [each for several in outputs for each in several]
    shown, text = pictures(flat), printed(flat)
    for number, content in enumerate(shown):
        file = tmp_path / f"shown-{number}"
        file.write_bytes(content)
        with Picture.open(file) as picture:
            assert picture.size[0] > 200
            if picture.format == "PNG":
                assert matplotlib.image.imread(file, format="png")[..., :3].std() > 0.03
    if path.stem == "quickstart":
        assert len(shown) == 3 and shown[-1].startswith(b"GIF8") and "mean return" in text
    elif path.stem == "variance_study":
        assert len(shown) == 4
        for summary in (names["exact_sizes"].summary, names["cartpole_sizes"].summary):
            assert all(
                found["slope"]["low"] < -1 < found["slope"]["high"] for found in summary.values()
            )
    else:
        assert len(shown) == 4
        check_the_lecture(text)


def check_the_lecture(text):
    """Every step on A measures what it computes, and only the first-order form is biased."""
    found = re.findall(r"bias (\S+)%, variance (\S+) exactly, (\S+) \[(\S+), (\S+)\]", text)
    rows = [[float(x.replace(",", "")) for x in row] for row in found]
    assert [row[0] for row in rows] == [0.0] * 7 + [14.0]
    assert rows[0][1] == 24.0 and rows[1][1] == 10.78 and rows[3][1] == 6.17
    # One of eight intervals of 95 % may miss, but not by as much again as it is wide.
    within = [low - (high - low) < exact < high + (high - low) for _, exact, _, low, high in rows]
    assert all(within) and sum(low < exact < high for _, exact, _, low, high in rows) >= 6
    assert "T = 100: E[W^2] =  25,364" in text and text.count("CartPole: variance") == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reads_without_running(path):
    """Equations, the results of a run, no word of the machine that ran it, and no part of the host layer."""
    notebook, text = read(path), path.read_text()
    assert path.stat().st_size < 5e5
    assert not re.search(r"/(home|root|tmp|work|Users|content)/|[A-Z]:\\\\", text)
    assert "$$" in "".join(map(source, cells(notebook, "markdown")))
    code = "\n".join(map(source, cells(notebook)))
    assert not re.search(r"jaxpg\.(runs|experiment|cli)|IPython", code)
    kept = [cell["outputs"] for cell in cells(notebook)]
    assert sum(map(len, kept)) >= 4 and len(pictures([x for each in kept for x in each])) >= 3
    assert [cell["execution_count"] for cell in cells(notebook)] == list(range(1, len(kept) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jaxpg_is_installed_only_where_it_is_missing(path, monkeypatch):
    cell = tagged(read(path), "install")
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(source(cell), {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="set JAXPG above to a name, a path or a URL"):
        exec(source(cell), {})
    exec(source(cell).replace('JAXPG = ""', 'JAXPG = "../.."'), {})
    # Plain, for the accelerator's sake.
    assert commands == [[sys.executable, "-m", "pip", "install", "-q", "../.."]]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["lecture", "quickstart", "variance_study"]


def test_a_size_that_is_not_there_is_seen():
    cell = tagged(read(FOLDER / "quickstart.ipynb"), "parameters")
    assert "SEEDS = 3" in smaller(cell, {"SEEDS": 3})
    with pytest.raises(AssertionError):
        smaller(cell, {"SEED": 3})
