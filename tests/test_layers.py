"""Imports point down the list of folders in one direction only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxpg"
RANKS = {
    "types": 0,
    "devices": 0,
    "intervals": 0,
    "envs": 1,
    "policies": 2,
    "rollout": 3,
    "estimators": 3,
    "optimizers": 3,
    "natural": 3,
    "adaptation": 3,
    "algorithms": 4,
    "data": 3.5,
    "gradients": 4.3,
    "improvement": 4.6,
    "trainer": 5,
    "imitation": 5.5,
    "lab": 6,
    "experiment": 7,
    "cli": 8,
    "__init__": 9,
    "__main__": 9,
}
FILES = sorted(ROOT.rglob("*.py"))


def noun(parts: tuple[str, ...]) -> str:
    return parts[0] if parts else "__init__"


def imports(source: str) -> set[str]:
    """The top-level nouns of jaxpg that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "jaxpg":
                names = [f"jaxpg.{alias.name}" for alias in node.names]
        found |= {noun(tuple(n.split(".")[1:])) for n in names if n.split(".")[0] == "jaxpg"}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    own = noun(file.relative_to(ROOT).with_suffix("").parts)
    for other in imports(file.read_text()) - {own}:
        assert RANKS.get(other, 9) < RANKS[own], f"{own} imports {other}"


def test_every_part_has_a_rank():
    assert {noun(f.relative_to(ROOT).with_suffix("").parts) for f in FILES} <= set(RANKS)


def test_a_violation_is_seen():
    assert imports("def f():\n    from jaxpg.experiment import run") == {"experiment"}
    assert imports("from jaxpg import lab, types") == {"lab", "types"}
