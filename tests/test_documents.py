"""Every name and path in back-quotes on the pages for developers exists."""

import ast
import builtins
import dataclasses
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from jaxpg import estimators
from jaxpg.cli import COMMANDS
from jaxpg.envs import SUITES, check_env
from jaxpg.runs.config.config import Config
from jaxpg.training.algorithm import ALGORITHMS, check_algorithm

ROOT = Path(__file__).parent.parent
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
PACKAGES = ("jaxpg.", "jaxpg.estimators.", "")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
PATH = re.compile(r"[\w.-]*/[\w./-]*|\w+\.(py|md|toml|sh|txt)")


@cache
def words():
    """Every name in the source and in the other tests."""
    found = set(dir(builtins))
    for file in {*ROOT.glob("jaxpg/**/*.py"), *ROOT.glob("tests/**/*.py")} - {Path(__file__)}:
        for node in ast.walk(ast.parse(file.read_text())):
            for field in ("name", "id", "arg", "attr"):
                found.add(getattr(node, field, None))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)  # keys of tables, such as "reinforce"
    return found | {path.name for path in (ROOT / "jaxpg").iterdir()}


def imports(name):
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", ()):
                return False
            found = getattr(found, part, None)
        return True
    return False


def missing(span):
    """The names in a span of code that do not exist."""
    if span.startswith(("scripts/", "jaxpg ")):
        command, *rest = shlex.split(span)
        if command == "jaxpg":
            return [] if rest[0] in COMMANDS else [span]
        text = "".join(path.read_text() for path in ROOT.glob(f"{command}*") if path.is_file())
        flags = [word for word in rest if word.startswith("--") and word not in text]
        return flags if (ROOT / command).exists() else [command]
    if span.startswith("tests/") and " " not in span:
        span, _, test = span.partition("::")
        path = ROOT / span
        found = path.exists() and (not test or f"def {test}(" in path.read_text())
        return [] if found else [span]
    if PATH.fullmatch(span):
        return [] if any((base / span).exists() for base in (ROOT, ROOT / "jaxpg")) else [span]
    return [
        each.group()
        for each in NAME.finditer(span)
        if not (
            any(imports(f"{package}{each.group()}") for package in PACKAGES)
            if "." in each.group()
            else len(each.group()) == 1 or each.group() in words()
        )
    ]


def spans(page):
    """The code in back-quotes, outside fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", prose)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    found = spans(page)
    assert len(found) > 40
    assert [name for span in found for name in missing(span)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_additions_of_the_checklists_work():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    found = {}
    exec("\n".join(blocks), found)
    check_algorithm(found["row"], has_critic=False)
    check_env(found["make_walk"]())
    (study,) = found["EXPERIMENTS"].values()
    result = study.run(study.quick, lambda line: None)
    # At gamma 0, world A pays E r_0; by hand, with 0.5, 0.3 and 0.2 for the three states.
    assert result.table["exact"][0] == pytest.approx(
        0.5 * 0.3617 + 0.3 * 1.3364 + 0.2 * -0.1018, abs=1e-3
    )


def test_every_row_and_slot_value_is_on_the_page_of_methods_and_in_the_help():
    methods, (algorithm,) = (
        (ROOT / "scripts/pages/methods.md").read_text(),
        [f for f in dataclasses.fields(Config) if f.name == "algorithm"],
    )
    named = set(re.findall(r"\w+", algorithm.metadata["help"]))
    assert set(ALGORITHMS) <= named
    shown = {x for span in re.findall(r"`([^`\n]+)`", methods) for x in re.findall(r"\w+", span)}
    assert set(ALGORITHMS) <= shown
    for module in ("credit", "baselines", "importance", "surrogates"):
        values = vars(getattr(estimators, module))
        own = {name for name, value in values.items() if isinstance(value, estimators.Slot)}
        assert own <= shown, module


def test_the_readme_counts_the_rows_and_names_the_suites():
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"the {len(ALGORITHMS)} rows made of them" in readme
    listed = re.search(r"Environments of ([\w, ]+) have names", readme)
    assert listed and {*re.split(", | and ", listed[1])} == {"gymnax", *SUITES}


@pytest.mark.parametrize(
    "span",
    ["estimators.assay", "training/pieces.py", "gatherer", "tests/test_cli.py::test_no_such",
     "scripts/tests", "scripts/test --quickest", "jaxpg practise", "(gain, veil) -> scalar"],
)  # fmt: skip
def test_what_does_not_exist_is_seen(span):
    assert missing(span)
