"""Environments by name: gymnax's, those of other suites, those that a package declares, your own.

>>> make_env("CartPole-v1", max_steps_in_episode=9).horizon
9
>>> SUITES["playground"].package
'mujoco_playground'
>>> make_env("nethack/Dungeon")
Traceback (most recent call last):
ValueError: unknown suite 'nethack' in 'nethack/Dungeon'; the suites are brax, craftax, ...
"""

import difflib
import re
import shlex
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from jaxpg.envs.env import Env
from jaxpg.envs.factory import from_factory, names_factory, refused
from jaxpg.envs.gymnax import from_gymnax, gymnax_names

GROUP = "jaxpg.envs"  # of entry points


class Suite(NamedTuple):
    """A suite whose adapter in this folder and whose extra have its name."""

    package: str
    summary: str


SUITES = {
    "brax": Suite("brax", "physics of rigid bodies, such as brax/reacher"),
    "craftax": Suite("craftax", "survival, such as craftax/Craftax-Classic-Symbolic-v1"),
    "gymnasium": Suite("gymnasium", "Python environments, such as gymnasium/LunarLander-v3"),
    "jumanji": Suite("jumanji", "puzzles and routing, such as jumanji/Snake-v1"),
    "navix": Suite("navix", "MiniGrid, such as navix/Navix-DoorKey-5x5-v0"),
    "pgx": Suite("pgx", "games for one player, such as pgx/2048"),
    "playground": Suite("mujoco_playground", "robots, such as playground/CartpoleBalance"),
    "xminigrid": Suite("xminigrid", "XLand-MiniGrid, such as xminigrid/MiniGrid-Empty-8x8"),
}


def make_env(name: str, **settings) -> Env:
    """The Env of a name: `NAME` of gymnax or of an entry point, `SUITE/NAME`, or `MODULE:FACTORY`.

    settings: as `from_gymnax` says; of a suite, `horizon` (the longest episode) and what its own constructor
    takes; of a factory, its arguments. An entry point of the group `jaxpg.envs` names a factory. Suites run
    in 32 bits. Raises ValueError for a name that is unknown (with near matches), for a suite that is not
    installed (with its extra), and for whatever an environment raises when it is made.
    """
    suite, _, inside = name.partition("/")
    if inside:
        return _from_suite(suite, inside, settings)
    if names_factory(name):
        return from_factory(name, **settings)
    declared = _declared()
    if name in declared:
        return from_factory(declared[name], **settings)
    if name not in (known := gymnax_names()):
        others = {}
        for suite, (_, summary) in SUITES.items():  # of those that are absent, the example
            names = env_names(suite) if installed(suite) else [summary.rpartition(" ")[2]]
            others |= {other.partition("/")[2].lower(): other for other in names}
        others |= {other.lower(): other for other in (*known, *declared)}
        near = difflib.get_close_matches(name.lower(), others, n=3, cutoff=0.4)
        near = [others[other] for other in near]
        hint = f"did you mean {', '.join(near)}?" if near else "jaxpg envs lists what there is"
        if not near and re.search(r"-v\d+$", name):
            hint = f"gymnasium's is gymnasium/{name}; {hint}"
        raise ValueError(f"unknown environment {name!r}; {hint}")
    return from_gymnax(name, **settings)


def env_names(suite: str | None = None) -> list[str]:
    """The names of a suite's environments; None: the bare names, of gymnax and of entry points.

    Raises ValueError for a suite that is unknown or not installed.

    >>> "CartPole-v1" in env_names()
    True
    """
    if suite is None:
        return [*gymnax_names(), *_declared()]
    return [f"{suite}/{name}" for name in _names(_adapter(suite, suite))]


def installed(suite: str) -> bool:
    """Whether a suite's package is there; it is not imported.

    >>> installed("gymnasium")
    True
    """
    return find_spec(SUITES[suite].package) is not None


def installing(extra: str) -> str:
    """The command that installs an extra, for this Python and for a checkout where this is one."""
    root = Path(__file__).parents[3]
    if (root / "pyproject.toml").is_file():
        return f"{shlex.quote(sys.executable)} -m pip install -e '{root}[{extra}]'"
    return f"pip install 'jaxpg[{extra}]'"


def _declared() -> dict[str, str]:
    """MODULE:FACTORY of every entry point."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def _from_suite(suite, name, settings) -> Env:
    adapter = _adapter(suite, f"{suite}/{name}")
    known = _names(adapter)
    if name not in known and ":" not in name:  # gymnasium imports what stands before a colon
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        meant = ", ".join(f"{suite}/{other}" for other in near)
        raise ValueError(
            f"unknown environment {suite}/{name}; did you mean {meant}?{getattr(adapter, 'NOTE', '')}"
        )
    horizon = settings.get("horizon")
    if horizon is not None and not (
        isinstance(horizon, int) and not isinstance(horizon, bool) and horizon >= 1
    ):
        raise ValueError(f"{suite}/{name}: horizon={horizon} must be a whole number, at least 1")
    with refused(f"{suite}/{name}", settings):
        return adapter.make(name, **settings)


def _adapter(suite, asked) -> ModuleType:
    if suite == "gymnax":
        raise ValueError(f"gymnax's environments have bare names: {asked.partition('/')[2]}")
    if suite not in SUITES:
        raise ValueError(
            f"unknown suite {suite!r} in {asked!r}; the suites are {', '.join(SUITES)}"
        )
    if not installed(suite):
        raise ValueError(
            f"{asked} needs {SUITES[suite].package}, which is not installed: {installing(suite)}"
        )
    return import_module(f"jaxpg.envs.suites.{suite}")


def _names(adapter) -> list[str]:
    with refused(adapter.__name__.rpartition(".")[2], {}):
        return adapter.names()
