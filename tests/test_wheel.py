"""Source archive and wheel: both hold the whole package, build, install and train without a checkout."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxpg

ROOT = Path(__file__).parent.parent
# Import every module, train one update, and print the files of the package that were used. An editable
# installation would put the checkout on the path, with whatever else is in it.
ALONE = """
import importlib, os, pkgutil, sys
target, *arguments = sys.argv[1:]
sys.path[:] = [x for x in sys.path if x == target or not os.path.isdir(os.path.join(x, "jaxpg"))]
import jaxpg
from jaxpg.cli import main
for module in pkgutil.walk_packages(jaxpg.__path__, "jaxpg."):
    if module.name != "jaxpg.__main__":
        importlib.import_module(module.name)
try:
    main(arguments)
finally:
    print(*(m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "jaxpg"), sep="\\n")
"""
TRAIN = (
    "train CartPole-v1 --algorithm reinforce --updates 1 --seeds 1 --num-envs 2 --num-steps 4 --hidden 2 "
    "--evaluation-episodes 1 --quiet --run run"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive that the checkout builds."""
    pytest.importorskip("hatchling", reason="hatchling builds the archives; install the test extra")
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """The wheel that the source archive builds."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(archive), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "-q"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)


def test_the_source_archive_holds_what_is_kept_in_git(archive):
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        pytest.skip("no git repository to compare with")
    with tarfile.open(archive) as found:
        names = {name.partition("/")[2] for name in found.getnames()}
    # The folder of continuous integration stays behind; PKG-INFO is the archive's own.
    wanted = {name for name in kept.stdout.split() if not name.startswith(".ci/")}
    assert {name for name in wanted if (ROOT / name).exists()} <= names
    assert {
        name for name in names - wanted if not name.startswith(("jaxpg/", "scripts/", "tests/"))
    } == {"PKG-INFO"}


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert jaxpg.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version
    assert f"version: {version}\n" in citation and f"date-released: {newest[2]}\n" in citation


def test_the_changelog_has_dates_and_entries_of_one_line():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    heads = [line for line in lines if line.startswith("## ")]
    assert all(re.fullmatch(r"## \d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", head) for head in heads)
    entries = lines[lines.index(heads[0]) :]
    assert all(not line or line.startswith(("#", "- ")) for line in entries), (
        "an entry of two lines"
    )
    assert max(map(len, entries)) <= 120


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "jaxpg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == package and "jaxpg/py.typed" in names


@pytest.mark.slow
def test_the_wheel_trains_where_there_is_no_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", str(wheel), "--no-deps", "--target", str(target))
    environment = os.environ | {"PYTHONPATH": str(target)}

    def python(*arguments):
        found = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    version = wheel.name.split("-")[1]
    assert python("-m", "jaxpg", "--version").split() == ["jaxpg", version]
    used = python("-c", ALONE, str(target), *TRAIN.split()).splitlines()
    used = [Path(line) for line in used if line.endswith(".py")]
    assert target / "jaxpg/runs/train/loop.py" in used
    assert all(path.is_relative_to(target) for path in used)
    assert (elsewhere / "run/metrics.jsonl").stat().st_size > 0
