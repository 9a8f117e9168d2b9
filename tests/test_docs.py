"""Reference and pages build, nothing is lost between angle brackets, and the glossary is the code's."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpg.lab.studies.estimators import ESTIMATORS
from jaxpg.lab.worlds.instances import INSTANCES
from jaxpg.training.algorithm import ALGORITHMS

ROOT = Path(__file__).parent.parent
# The tags that Markdown and pdoc write.
TAGS = re.compile(
    r"a|br|code|div|em|h[1-6]|img|input|label|li|main|ol|p|pre|section|span|strong|t(able|body|d|h|head|r)|ul|wbr"
)


def text(page):
    """The body of a page, without code."""
    body = page.read_text().partition("<main")[2].partition("</main>")[0]
    return re.sub(r"<pre.*?</pre>", "", body, flags=re.DOTALL)


def lost(body):
    """Names in angle brackets, which a browser does not show."""
    return {name for name in re.findall(r"<(\w+)", body) if not TAGS.fullmatch(name)}


@pytest.mark.slow
def test_the_reference_builds_and_shows_all(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc builds the reference; install the test extra")
    command = [sys.executable, "-W", "error", str(ROOT / "scripts/docs.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = {page.stem: text(page) for page in tmp_path.rglob("*.html") if page.stem != "index"}
    assert {"jaxpg", "envs", "estimators", "lab", "exact", "training", "types"} <= set(pages)
    assert {name: lost(body) for name, body in pages.items() if lost(body)} == {}
    assert "nabla" in pages["jaxpg"] and "How to choose" in pages["jaxpg"]
    assert "nabla" in pages["methods"] and "Glossary" in pages["glossary"]
    assert {path.stem for path in (ROOT / "scripts/pages").glob("*.md")} <= set(pages)
    linked = re.findall(r'href="pages/(\w+)\.html"', (tmp_path / "jaxpg.html").read_text())
    assert {*linked} == {path.stem for path in (tmp_path / "pages").glob("*.html")}
    assert "0 where terminated, else 1" in pages["types"], "the comment beside a field"
    assert "discount per step" in pages["types"], "what a hyperparameter is"


def test_the_glossary_is_what_the_code_says():
    pytest.importorskip("pdoc", reason="pdoc builds the reference; install the test extra")
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts/docs.py")
    assert spec and spec.loader
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    text = docs.GLOSSARY.read_text()
    assert text == docs.glossary(), "write it again: scripts/docs --glossary"
    named = {*re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)}
    assert {*ALGORITHMS, *ESTIMATORS, *INSTANCES, "A", "T", "C", "rtg_time_mean"} <= named


def test_what_a_browser_would_hide_is_seen():
    assert lost("<p>b = E<sum_t g_t, G></p>") == {"sum_t"}
