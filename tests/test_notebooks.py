"""The notebooks run from top to bottom, with the sizes in their first cell made small."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
from PIL import Image as Picture

NOTEBOOKS = sorted((Path(__file__).parent.parent / "scripts" / "notebooks").glob("*.ipynb"))
SMALL = {
    "quickstart": {"SEEDS": 2, "UPDATES": 4, "EVALUATION_EPISODES": 4, "RATES": [1e-3, 1e-2]},
    "variance_study": {
        "EXACT_TRAJECTORIES": 2**12,
        "CARTPOLE_TRAJECTORIES": 2**9,
        "EXACT_RUNGS": ("total", "rtg_value"),
        "CARTPOLE_RUNGS": ("total", "rtg"),
    },
}


def cells(path, kind="code"):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def smaller(cell, sizes):
    """The cell of sizes with other values; only names that it sets can be replaced."""
    tree = ast.parse(source(cell))
    names = {target.id: statement for statement in tree.body for target in statement.targets}
    assert sizes.keys() <= names.keys()
    for name, value in sizes.items():
        names[name].value = ast.parse(repr(value), mode="eval").body
    return ast.unparse(tree)


@pytest.fixture
def displayed(monkeypatch):
    """Collect what is shown, through a stand-in for IPython's two names, which bare Python does not have."""
    shown = []
    package, module = ModuleType("IPython"), ModuleType("IPython.display")
    vars(package).update(version_info=(9, 0))  # which matplotlib asks for

    def image(data):
        return data if isinstance(data, bytes) else Path(data).read_bytes()

    vars(module).update(Image=image, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, displayed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in cells(path):
        code = source(cell)
        if "parameters" in cell["metadata"].get("tags", ()):
            code = smaller(cell, SMALL[path.stem])
        code = re.sub(r"^%pip .*$", "", code, flags=re.MULTILINE)
        exec(compile(code, path.name, "exec"), namespace)
    out = capsys.readouterr().out
    for number, content in enumerate(displayed):
        file = tmp_path / f"shown-{number}"
        file.write_bytes(content)
        with Picture.open(file) as picture:
            assert picture.size[0] > 200
            if picture.format == "PNG":
                assert matplotlib.image.imread(file, format="png")[..., :3].std() > 0.03
    if path.stem == "quickstart":
        assert len(displayed) == 3
        assert displayed[-1].startswith(b"GIF8")
        assert "mean return" in out
    else:
        assert len(displayed) == 4
        for summary in (namespace["exact_sizes"].summary, namespace["cartpole_sizes"].summary):
            assert all(
                found["slope"]["low"] < -1 < found["slope"]["high"] for found in summary.values()
            )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_says_nothing_of_a_machine(path):
    text = path.read_text()
    assert path.stat().st_size < 1e6
    assert not re.search(r"/(home|root|tmp|work|Users|content)/|[A-Z]:\\\\", text)
    installs = re.findall(r"^.?pip install.*$", "\n".join(map(source, cells(path))), re.MULTILINE)
    assert installs == ["%pip install -q jaxpg"]  # plain, for the accelerator's sake


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["quickstart", "variance_study"]


def test_a_size_that_is_not_there_is_seen():
    (cell,) = (c for c in cells(NOTEBOOKS[0]) if c["metadata"].get("tags"))
    assert "SEEDS = 3" in smaller(cell, {"SEEDS": 3})
    with pytest.raises(AssertionError):
        smaller(cell, {"SEED": 3})
