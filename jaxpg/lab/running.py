"""Studies asked for by name: their settings, checked, for the command and for Python."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpg.hints import python_hints
from jaxpg.stats import shown
from jaxpg.stats.lines import lines

if TYPE_CHECKING:
    from jaxpg.lab.studies.study import Draw, Experiment, Progress, Settings, Table

# The least and the most of whole numbers.
LIMITS = {"trajectories": (1, 2**31 - 1), "repeats": (1, 100_000), "seed": (0, 2**32 - 1)}

WIDEST = 120  # columns of a table in a notebook
COUNTED = ("trajectories", "repeats")


class Study(NamedTuple):
    """What an experiment of the laboratory found: its tidy table, its numbers and its figure."""

    name: str
    settings: "Settings"
    table: "Table"  # column -> values, as pandas.DataFrame takes it
    summary: dict[str, Any]  # the numbers that the experiment is about
    draw: "Draw"  # fills a matplotlib Figure
    others: Mapping[str, "Draw"] = {}  # further figures by name

    def __repr__(self) -> str:
        return f"<{self.name} on {self.settings.env}: {len(self.table['estimator'])} rows>"

    def _repr_html_(self) -> str:
        pictures = (shown.picture(shown.png(draw)) for draw in (self.draw, *self.others.values()))
        return "".join(pictures) + shown.text(lines(self.table, WIDEST, "the attribute table"))

    def _repr_png_(self) -> bytes:
        return shown.png(self.draw)


def run(
    name: str,
    *,
    quick: bool = False,
    estimators: str | Sequence[str] | None = None,
    checkpoint: Any = None,
    progress: "Progress" = lambda line: None,
    **settings: Any,
) -> Study:
    """Runs an experiment of the laboratory: `jaxpg lab NAME`, without files.

    name: one of `jaxpg lab list`. quick: smaller sizes. estimators: names, one or several. checkpoint: what
    `jaxpg.Run(FOLDER).checkpoint()` gives, whose policy then acts in its environment. settings: env, policy,
    trajectories, repeats, seed and gamma. A notebook shows the result as a figure and a table. Raises
    ValueError for what the experiment cannot do.

    >>> run("laddr")
    Traceback (most recent call last):
    ValueError: unknown experiment 'laddr'; did you mean ladder?
    >>> run("ladder", estimators="rtg", trajectories=10)
    Traceback (most recent call last):
    ValueError: trajectories=10 gives fewer than ...; use trajectories=... or more
    """
    from jaxpg.lab.studies import EXPERIMENTS

    given = {**settings, "checkpoint": checkpoint}
    if estimators is not None:
        given["estimators"] = (estimators,) if isinstance(estimators, str) else tuple(estimators)
    with python_hints():
        experiment = EXPERIMENTS[known(name, EXPERIMENTS)]
        asked = settings_of(name, experiment, given, quick)
        found = experiment.run(asked, progress)
    return Study(name, asked, noted(found.table, departure(experiment, asked)), *found[1:])


def settings_of(
    name: str, experiment: "Experiment", given: Mapping[str, Any], quick: bool
) -> "Settings":
    """The settings of an experiment with those that are given. Raises ValueError for what it cannot have."""
    base = experiment.quick if quick else experiment.defaults
    given = {each: value for each, value in given.items() if value is not None}
    if checkpoint := given.get("checkpoint"):
        if not hasattr(checkpoint, "environment"):
            raise ValueError(
                f"checkpoint={str(checkpoint)!r} is no policy; jaxpg.Run({str(checkpoint)!r}).checkpoint() is"
            )
        given.setdefault("env", checkpoint.environment)
    for each, value in given.items():
        if each not in base._fields:
            near = difflib.get_close_matches(each, base._fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(base._fields)}"
            raise ValueError(f"unknown setting {each!r}; {hint}")
        least, most = LIMITS.get(each, (-math.inf, math.inf))
        if each in LIMITS and (not isinstance(value, int) or not least <= value <= most):
            raise ValueError(f"{each}={value} must be a whole number from {least} to {most}")
    if not 0 <= given.get("gamma", 1) <= 1:
        raise ValueError(f"--gamma {given['gamma']} must lie in [0, 1]")
    if not given.get("estimators", True):
        raise ValueError("--estimators names none; give at least one, or leave it out")
    if said := refusal(name, experiment, given):
        raise ValueError(said)
    asked = base._replace(quick=quick, **given)
    if quick and (asked.env != base.env or asked.policy is not None):
        from jaxpg.lab.studies.study import affordable

        sizes = affordable(asked)
        asked = asked._replace(**{x: getattr(sizes, x) for x in COUNTED if x not in given})
    return asked


def refusal(name: str, experiment: "Experiment", given: Mapping[str, Any]) -> str:
    """Why an experiment cannot run as asked; "" if it can."""
    for flag in experiment.ignores:
        if flag in given and flag != "env":
            return f"--{flag} means nothing to {name}; leave it out"
    wanted = given.get("env", experiment.defaults.env)
    if experiment.worlds and wanted not in experiment.worlds:
        needed = ", which have tables of probabilities" if len(experiment.worlds) > 1 else ""
        return f"{name} runs on {', '.join(experiment.worlds)}{needed}; not on {wanted}"
    if "env" in experiment.ignores and "env" in given and wanted != experiment.defaults.env:
        return f"{name} has a world of its own; leave out --env"
    return ""


def known(name: str, experiments: Mapping[str, Any]) -> str:
    """The name of an experiment. Raises ValueError, with near matches, for another one."""
    if name not in experiments:
        near = difflib.get_close_matches(name, experiments, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see jaxpg lab list"
        raise ValueError(f"unknown experiment {name!r}; {hint}")
    return name


def departure(experiment: "Experiment", settings: "Settings") -> str:
    """How the settings or the measurement depart from a checkpoint's run; "" if they do not."""
    if settings.checkpoint is None:
        return ""
    own, said = settings.checkpoint.hyperparams.gamma, []
    if settings.gamma not in (None, own):
        said = [f"--gamma {settings.gamma:g}, not the run's {own:g}"]
    return "; ".join([*said, *experiment.replaces(settings, settings.checkpoint)])


def noted(table: "Table", note: str) -> "Table":
    """The table with a note on every row."""
    if not note:
        return table
    return table | {"warning": ["; ".join(filter(None, (note, x))) for x in table["warning"]]}
