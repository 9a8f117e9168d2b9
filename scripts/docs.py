"""The API reference and the pages of scripts/pages as HTML: scripts/docs [FOLDER], by default build/docs.

scripts/docs --glossary   writes the page of names again, from the tables of the code
scripts/docs --pictures   draws the README's figures again, in a minute
"""

import inspect
import io
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc
from pdoc import doc, render
from PIL import Image

import jaxpg
from jaxpg.estimators import (
    baselines,
    credit,
    describe,
    groups,
    importance,
    reference,
    surrogates,
)
from jaxpg.lab.studies.estimators import ESTIMATORS
from jaxpg.lab.worlds.instances import INSTANCES
from jaxpg.training.algorithm import ALGORITHMS

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "scripts/pages"
GLOSSARY = GUIDE / "glossary.md"
# What the tables of the glossary do not say.
TERMS = """\
# Glossary

Every name that flags, tables and figures use. `scripts/docs --glossary` writes this page from the code.

| term | meaning |
|---|---|
| slot | one of the five choices that make an estimator: credit, baseline, importance, surrogate, reduce |
| row | a method: an estimator, a source of data and a rule for stepping; an entry of `ALGORITHMS` |
| lane | one of the B environments that are stepped side by side |
| replica | one agent of a run: one seed at one point of the grid |
| trace | tr Cov of the gradient of one episode: the sum of the variances of its components |
| noise scale, B_simple | tr Cov g / norm(E g)^2: the episodes until noise equals signal |
| pi, beta | the policy, and the policy that gathered the data |
| rho_t, W | pi(a_t given s_t) / beta(a_t given s_t), and its product over an episode |
| psi, b, w | the credit, the baseline and the importance weight of the equation |
| g_t, G | the score grad log pi(a_t given s_t), and a whole gradient |
| J | the expected discounted return of an episode |
"""
PAGES = (
    "jaxpg", "jaxpg.lab.exact.enumeration", "jaxpg.natural", "jaxpg.rollout", "jaxpg.training", "jaxpg.types"
)  # fmt: skip
EQUATION = r"""
$$ g = \nabla_\\theta \\, \mathrm{reduce}_t \\left[ \mathrm{surrogate}\\big( \log \pi_\\theta(a_t|s_t),\\;
w_t \\, (\psi_t - b_t) \\big) \\right] $$
"""


def front() -> str:
    """The README, its equation typeset and its links leading out of the folder of pages."""
    text = typeset((ROOT / "README.md").read_text())
    text = re.sub(r"\]\(scripts/pages/(\w+)\.md\)", r"](pages/\1.html)", text)
    return re.sub(
        r"\]\((?!https?:|pages/)([^)]+)\)", lambda link: f"]({ROOT.as_uri()}/{link[1]})", text
    )


def typeset(text: str) -> str:
    return re.sub(r"\n    g = grad reduce_t .*\n", lambda _: EQUATION, text)


def glossary() -> str:
    """The page of names: terms, worked instances, slot values, rows, named estimators."""
    parts = [TERMS]
    worlds = {name: str(make.__doc__).partition(": ")[2] for name, make in INSTANCES.items()}
    parts.append(table("Worked instances", worlds))
    for module in (credit, baselines, importance, surrogates, groups, reference):
        functions = {
            name: getattr(value, "function", value) for name, value in vars(module).items()
        }
        own = {name: f.__doc__ for name, f in functions.items() if belongs(f, module)}
        parts.append(table(f"In `jaxpg.{module.__name__.partition('.')[2]}`", own))
    rows = {name: ", ".join(map(describe, row.estimator)) for name, row in ALGORITHMS.items()}
    parts.append(table("Rows: credit, baseline, importance, surrogate, reduce", rows))
    estimators = {name: each.summary for name, each in ESTIMATORS.items()}
    parts.append(table("Estimators of the laboratory", estimators))
    return "\n".join(parts)


def belongs(value: Any, module: ModuleType) -> bool:
    own = inspect.isfunction(value) and value.__module__ == module.__name__
    return own and not value.__name__.startswith("_")


def table(title: str, entries: Mapping[str, str | None]) -> str:
    """A table of names and the first line of what is said of each."""
    first = {name: str(said).partition("\n")[0].rstrip(".") for name, said in entries.items()}
    lines = [f"| `{name}` | {said} |" for name, said in escaped(first).items()]
    return "\n".join([f"## {title}", "", "| name | what it is |", "|---|---|", *lines, ""])


def escaped(entries: Mapping[str, str]) -> dict[str, str]:
    """Without the signs that Markdown would take for its own."""
    return {
        # What is in back-quotes stays.
        name: re.sub(r"`[^`]*`|[|*_<]", lambda x: x[0] if x[0][0] == "`" else f"\\{x[0]}", said)
        for name, said in entries.items()
    }


def pictures() -> None:
    """Draws the README's two figures: the first command's run, and the ladder."""
    with tempfile.TemporaryDirectory() as folder:
        run = jaxpg.run("CartPole-v1", folder=f"{folder}/run")
        drawn = {"run": run._repr_png_(), "ladder": jaxpg.lab.run("ladder")._repr_png_()}
    for name, data in drawn.items():
        with Image.open(io.BytesIO(data)) as picture:
            picture.convert("RGB").quantize(64).save(GUIDE / f"{name}.png", optimize=True)


def with_files(package: ModuleType) -> None:
    """Add the docstrings of a package's files to its own, because a page has only what `__all__` names."""
    for found in pkgutil.iter_modules(getattr(package, "__path__", ())):
        module = import_module(f"{package.__name__}.{found.name}")
        if hasattr(package, "__all__") and found.name not in package.__all__:
            package.__doc__ = f"{package.__doc__}\n\n### {found.name}\n\n{module.__doc__}"


def with_fields(cls: Any) -> None:
    """Give each field of a NamedTuple its comment, or the help in its annotation, as docstring."""
    said = dict(
        re.findall(r"^    (\w+): [^\n#]*(?:# *(.*))?$", inspect.getsource(cls), re.MULTILINE)
    )
    for name in cls.__annotations__.keys() & set(cls._fields):
        kind = cls.__annotations__[name]
        if hasattr(kind, "__metadata__"):
            said[name] = kind.__metadata__[0].help
            cls.__annotations__[name] = cls.__new__.__annotations__[name] = kind.__origin__
        getattr(cls, name).__doc__ = said.get(name) or ""
    cls.__new__.__doc__ = ""


def main() -> None:
    if "--glossary" in sys.argv:
        GLOSSARY.write_text(glossary())
        return
    if "--pictures" in sys.argv:
        pictures()
        return
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/docs"
    modules = [import_module(x.name) for x in pkgutil.walk_packages(jaxpg.__path__, "jaxpg.")
               if not x.name.startswith(("jaxpg.runs", "jaxpg.__main__", "jaxpg.experiment"))]  # fmt: skip
    for module in modules:
        with_files(module)
        for cls in vars(module).values():
            if (
                hasattr(cls, "_fields")
                and inspect.isclass(cls)
                and cls.__module__ == module.__name__
            ):
                with_fields(cls)
    jaxpg.__doc__ = front()
    render.configure(math=True)
    # pdoc warns of a NamedTuple that refers to itself, as envs.Env does.
    warnings.filterwarnings("ignore", "Error parsing type annotation")
    pdoc.pdoc(*PAGES, output_directory=folder)
    (folder / "pages").mkdir(exist_ok=True)
    for path in GUIDE.glob("*.md"):
        page = doc.Module(ModuleType(path.stem, typeset(path.read_text())))
        (folder / "pages" / f"{path.stem}.html").write_text(render.html_module(page, {}))
    print(folder / "index.html")


if __name__ == "__main__":
    main()
