"""The examples of the public docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from types import UnionType
from typing import get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpg
from jaxpg.estimators import Slot

# Packages whose __all__ is public.
PUBLIC = (
    "jaxpg",
    "jaxpg.algorithms",
    "jaxpg.envs",
    "jaxpg.estimators",
    "jaxpg.estimators.baselines",
    "jaxpg.estimators.control_variates",
    "jaxpg.estimators.credit",
    "jaxpg.estimators.importance",
    "jaxpg.estimators.surrogates",
    "jaxpg.lab",
    "jaxpg.lab.exact",
    "jaxpg.natural",
    "jaxpg.optimizers",
    "jaxpg.policies",
    "jaxpg.rollout",
)
# Names that every example may assume to be imported.
COMMON = {"jax": jax, "jnp": jnp, "np": np, "jaxpg": jaxpg}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = ["jaxpg"] + [
    found.name
    for found in pkgutil.walk_packages(jaxpg.__path__, "jaxpg.")
    if found.name != "jaxpg.__main__"
]
PARSER = doctest.DocTestParser()


def names_of(module):
    """The public names of a module: of __all__, or else its own functions, classes and slot values."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and home(value) == module.__name__
    ]


def home(value):
    """The module that defines a value."""
    return getattr(value.function if isinstance(value, Slot) else value, "__module__", None)


def documented(module):
    """The docstrings of a module: its own, and those of what it defines."""
    yield module.__name__, module.__doc__ or ""
    for name, value in vars(module).items():
        if home(value) == module.__name__ and isinstance(value.__doc__, str):
            yield f"{module.__name__}.{name}", value.__doc__


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    said = []
    for place, text in documented(module):
        example = PARSER.get_doctest(text, COMMON | vars(module), place, module.__file__, 0)
        runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


def uses(text, name):
    """Whether an example in a docstring uses a name or prints it."""
    shown = "".join(each.source + each.want for each in PARSER.get_examples(text))
    return re.search(rf"\b{name}\b", shown)


def missing(package):
    """The public names without an example, either in the package or in the module that defines them.

    A module may have its examples inside. Type aliases are skipped: they have no docstring.
    """
    module = importlib.import_module(package)
    found = []
    for name in names_of(module):
        value = getattr(module, name)
        if get_origin(value) or isinstance(value, UnionType):
            continue
        place = home(value) or package
        texts = [x.__doc__ for x in (value, module, *vars(module).values())]
        texts += [sys.modules[x].__doc__ for x in (place, place.rpartition(".")[0]) if x]
        shown = any(uses(text, name) for text in texts if isinstance(text, str))
        if inspect.ismodule(value) and not shown:
            within = [x.__doc__ for x in (value, *vars(value).values())]
            shown = any(PARSER.get_examples(text) for text in within if isinstance(text, str))
        found += [] if shown else [name]
    return found


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_example(package):
    assert missing(package) == []


def test_a_wrong_example_is_seen():
    example = PARSER.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(example, out=lambda text: None).failed == 1
    assert uses(">>> f(1)\n1", "f") and not uses("f is f. >>> g", "f")
