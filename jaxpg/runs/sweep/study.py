"""Studies: Optuna chooses the points of a sweep, and is told what they gave."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.envs.suites import installing
from jaxpg.runs.config.config import Config
from jaxpg.runs.sweep import ranking
from jaxpg.runs.sweep.ranking import Outcomes
from jaxpg.runs.sweep.record import Search
from jaxpg.types import Hyperparams

FOLDER = "jaxpg_folder"  # the attribute of a trial that says which sweep asked for it


class Asked(NamedTuple):
    """A study, and its trial for each point of a sweep; None: a grid, whose trials are added at the end."""

    study: Any
    trials: list[int] | None
    points: list[Hyperparams]


def check_installed() -> None:
    """Raises ValueError when Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ValueError(f"--study needs optuna: {installing('optuna')}") from None


def ask(folder: Path, config: Config, search: Search) -> Asked:
    """The points that the study asks for next: a grid's own, or else those of as many trials.

    The study is that of `search.options.study`, STORAGE#NAME, by default named after the environment and the
    algorithm; it is made if it is not there. Trials that wait in it come first, and a sweep that is resumed
    gets its own again. Raises ValueError for a storage that cannot be opened or fits other numbers.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage, _, name = str(search.options.study).partition("#")
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name or f"{config.environment} {config.algorithm}",
            direction="maximize",
            load_if_exists=True,
        )
        if search.options.random is None:
            return Asked(study, None, search.points)
        # Trials that run count as bad ones, so that a batch does not crowd in one place.
        seed = config.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        running = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
        place = str(folder.resolve())
        found: list[Any] = [x for x in running if x.user_attrs.get(FOLDER) == place]
        for _ in range(len(found), len(search.points)):
            found.append(study.ask(_space(search)))
            found[-1].set_user_attr(FOLDER, place)
    except Exception as error:  # each storage has its own
        said = (str(error).splitlines() or [""])[0] or repr(error)
        raise ValueError(f"the study in {storage} (such as sqlite:///FILE): {said}") from error
    points = [
        search.points[0]._replace(**{n: float(x.params[n.strip("_")]) for n in search.swept})
        for x in found
    ]
    return Asked(study, [trial.number for trial in found], points)


def tell(asked: Asked, search: Search, outcomes: Outcomes | None = None) -> None:
    """Ends the trials: with the points' returns, pruned by halving, or failed; None: all failed."""
    from optuna.trial import TrialState, create_trial

    if outcomes is None:
        for trial in asked.trials or ():
            asked.study.tell(trial, state=TrialState.FAIL)
        return
    values, whole = ranking.scores(outcomes), np.all(outcomes.evaluated, axis=1)
    for i, (value, evaluated) in enumerate(zip(values.tolist(), whole, strict=True)):
        state = TrialState.COMPLETE if math.isfinite(value) else TrialState.FAIL
        ended: Any = {"state": state if evaluated else TrialState.PRUNED}
        if ended["state"] == TrialState.COMPLETE:
            ended |= {"values": [value]}
        if asked.trials is None:
            numbers = {n.strip("_"): float(getattr(search.points[i], n)) for n in search.swept}
            trial = create_trial(params=numbers, distributions=_space(search), **ended)
            asked.study.add_trial(trial)
        else:
            asked.study.tell(asked.trials[i], **ended)


def _space(search: Search) -> dict[str, Any]:
    """Ranges, of a grid the ones that its values span, and the choices of a random search."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space = {}
    for name in search.swept:
        span, values = search.options.ranges.get(name), getattr(search.grid, name)
        if span is not None:
            kind = FloatDistribution(span.low, span.high, log=span.logarithmic)
        elif search.options.random is not None:
            kind = CategoricalDistribution(values)
        else:
            low, high = min(values), max(values)
            kind = FloatDistribution(low, high, log=0 < 10 * low <= high)
        space[name.strip("_")] = kind
    return space
