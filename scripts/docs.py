"""The API reference as pages of HTML: scripts/docs [FOLDER], by default build/docs."""

import inspect
import pkgutil
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc
from pdoc import render

import jaxpg

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "jaxpg", "jaxpg.lab.exact.enumeration", "jaxpg.natural", "jaxpg.rollout", "jaxpg.training", "jaxpg.types"
)  # fmt: skip
EQUATION = r"""
$$ g = \nabla_\\theta \\, \mathrm{reduce}_t \\left[ \mathrm{surrogate}\\big( \log \pi_\\theta(a_t|s_t),\\;
w_t \\, (\psi_t - b_t) \\big) \\right] $$
"""


def front() -> str:
    """The README, its equation typeset and its links leading out of the folder of pages."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\n    g = grad reduce_t .*\n", lambda _: EQUATION, text)
    return re.sub(r"\]\((?!https?:)([^)]+)\)", lambda link: f"]({ROOT.as_uri()}/{link[1]})", text)


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
    print(folder / "index.html")


if __name__ == "__main__":
    main()
