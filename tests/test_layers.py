"""Imports point down the list of folders, and down the list of files in them, in one direction only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxpg"
RANKS = {
    "types": 0,
    "devices": 0,
    "hints": 0,
    "batching": 1,
    "memory": 1,
    "stats": 1,
    "envs": 1,
    "policies": 2,
    "rollout": 3,
    "estimators": 3,
    "optimizers": 3,
    "training": 4,
    "algorithms": 5,
    "natural": 5,
    "lab": 6,
    "runs": 7,
    "experiment": 8,
    "cli": 8,
    "__init__": 9,
    "__main__": 9,
}
# In these folders a file or folder imports only from those before it.
ORDER = {
    "rollout": ["packing", "stepping", "episodic", "stream", "evaluation", "__init__"],
    "training": [
        "data",
        "scaling",
        "algorithm",
        "accumulation",
        "diagnostics",
        "improvement",
        "trainer",
        "imitation",
        "__init__",
    ],
    "lab": ["exact", "worlds", "measure", "studies", "experiments", "running", "__init__"],
    "runs": [
        "console",
        "config",
        "host",
        "store",
        "train",
        "sweep",
        "play",
        "plot",
        "laboratory",
        "listing",
        "entries",
        "__init__",
    ],
}
FILES = sorted(ROOT.rglob("*.py"))


def place(file: Path) -> tuple[str, str]:
    """The name of a file's part at the top level, and in its folder."""
    top, inner, *_ = (*file.relative_to(ROOT).with_suffix("").parts, "__init__")
    return top, inner


def imports(source: str) -> set[tuple[str, str]]:
    """The parts of jaxpg that a module imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [(*name.split("."), "__init__", "__init__") for name in names]
    return {(top, inner) for root, top, inner, *_ in parts if root == "jaxpg"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    top, inner = place(file)
    for other, part in imports(file.read_text()):
        if other != top:
            assert RANKS.get(other, 9) < RANKS[top], f"{top} imports {other}"
        elif top in ORDER:
            order = ORDER[top]
            part = part if part in order else "__init__"  # a name of the folder's own
            assert order.index(part) <= order.index(inner), f"{top}: {inner} imports {part}"


def test_every_part_has_a_rank():
    assert {place(f)[0] for f in FILES} <= set(RANKS)
    for folder, order in ORDER.items():
        assert {place(f)[1] for f in FILES if place(f)[0] == folder} <= set(order)


def test_a_violation_is_seen():
    found = imports("def f():\n    from jaxpg.runs.train import run")
    assert found == {("runs", "train")}
    assert imports("from jaxpg import lab, types") == {("lab", "__init__"), ("types", "__init__")}


def test_the_import_paths_of_scripts_stay():
    from jaxpg.experiment.run import execute

    from jaxpg import algorithms, natural
    from jaxpg.lab.experiments import EXPERIMENTS
    from jaxpg.lab.studies import EXPERIMENTS as studies
    from jaxpg.runs.train import run

    assert execute is run.execute and EXPERIMENTS is studies
    assert algorithms.algorithm("npg").policy_optimizer is natural.npg
