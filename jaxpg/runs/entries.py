"""What the commands train, sweep and plot do, called from Python: the same checks, the same folders.

What they return shows itself in a notebook.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpg.hints import python_hints
from jaxpg.runs.config.flags import request
from jaxpg.stats import shown

if TYPE_CHECKING:
    import numpy as np

    from jaxpg.lab.worlds.world import Checkpoint
    from jaxpg.rollout import Evaluation
    from jaxpg.runs.play.policy import Policy
    from jaxpg.runs.plot.records import Series

MOST_ROWS = 12  # of a sweep's table


class Run(NamedTuple):
    """A run in its folder, finished or not.

    >>> Run("runs/none").returns
    Traceback (most recent call last):
    ValueError: runs/none has ...
    """

    folder: str | Path

    @property
    def returns(self) -> "np.ndarray":
        """The mean returns of the final evaluation [points, seeds]; NaN where an agent diverged."""
        import numpy as np

        from jaxpg.runs.config.config import load_config, num_points
        from jaxpg.runs.store.evaluation import read_evaluation

        config, grid = load_config(self.folder)
        shape = num_points(grid), config.seeds
        found = read_evaluation(Path(self.folder), shape[0] * shape[1])
        if found is None:
            raise ValueError(f"{self.folder} is not finished: it has no evaluation")
        return np.array(found["mean_return"], float).reshape(shape)

    @property
    def series(self) -> list["Series"]:
        """The curves of each point of the grid: `env_steps` and every one of `metrics`, [seeds, T]."""
        from jaxpg.runs.plot.records import read

        return read([Path(self.folder)])

    def policy(
        self, replica: int | str | None = None, *, greedy: bool = False, update: Any = None
    ) -> "Policy":
        """What `jaxpg.load_policy` loads: by default, that of the best evaluation."""
        from jaxpg.runs.play.policy import load_policy

        return load_policy(self.folder, replica, greedy=greedy, update=update)

    def evaluate(
        self, episodes: int, *, greedy: bool = False, seed: int = 0, update: Any = None
    ) -> "Evaluation":
        """Fresh episodes of every agent, as `jaxpg evaluate` plays them; each field is [points x seeds]."""
        from jaxpg.runs.play.playback import evaluation
        from jaxpg.runs.train.saved import read_run

        with python_hints():
            return evaluation(read_run(self.folder, update), episodes, greedy, seed)

    def render(self, out: str | Path | None = None, **options: Any) -> "Film":
        """Draws an episode, as `jaxpg render` does; out: FILE.gif or .mp4, by default in the folder.

        options: replica, greedy, seed, update.
        """
        from jaxpg.runs.play.playback import render

        path = Path(self.folder, "episode.gif") if out is None else Path(out)
        with python_hints():
            render([str(self.folder), *flags(options | {"out": path})])
        return Film(path)

    def checkpoint(self, replica: int = 0) -> "Checkpoint":
        """One of the agents, for `jaxpg.lab.run(..., checkpoint=)`."""
        from jaxpg.runs.play.policy import load

        return load(str(self.folder), replica)

    def __repr__(self) -> str:
        return f"<run in {self.folder}>"

    def _repr_png_(self) -> bytes:
        from jaxpg.runs.plot import figures
        from jaxpg.runs.plot.command import METRIC, X
        from jaxpg.runs.plot.records import best

        series = best(self.series, figures.MOST_SERIES)
        return shown.png(lambda figure: figures.curves(figure, series, X[0], METRIC))


class Sweep(NamedTuple):
    """A finished sweep in its folder.

    >>> Sweep("runs/none")
    <sweep in runs/none>
    """

    folder: str | Path

    @property
    def table(self) -> dict[str, list]:
        """The points, best first: a column for each number, as pandas.DataFrame takes it."""
        from pyarrow import parquet

        from jaxpg.runs.store.artifacts import TABLE

        return parquet.read_table(Path(self.folder, TABLE)).to_pydict()

    @property
    def best(self) -> Run:
        """The run of the best point, with its policies."""
        from jaxpg.runs.sweep.best import BEST

        return Run(Path(self.folder, BEST))

    def __repr__(self) -> str:
        return f"<sweep in {self.folder}>"

    def _repr_html_(self) -> str:
        best = {name: column[:MOST_ROWS] for name, column in self.table.items()}
        return shown.table(best) + _pictures(Path(self.folder, "figures").glob("*.png"))


class Figures(NamedTuple):
    """The figures of runs, as files."""

    files: tuple[Path, ...]

    def __repr__(self) -> str:
        return f"<figures {', '.join(map(str, self.files))}>"

    def _repr_html_(self) -> str:
        return _pictures(self.files)


class Film(NamedTuple):
    """An episode as a film."""

    file: Path

    def __repr__(self) -> str:
        return f"<film {self.file}>"

    def _repr_html_(self) -> str:
        kind, data = self.file.suffix[1:], self.file.read_bytes()
        if kind == "gif":
            return shown.picture(data, kind)
        return (
            shown.picture(data, kind).replace("<img", "<video controls").replace("image/", "video/")
        )


def run(
    env: str | Callable[..., Any] | None = None,
    agent: str | Callable[..., Any] | None = None,
    algorithm: str | None = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Run:
    """Trains, evaluates and fills a folder, as `jaxpg train` does.

    env: a name, or a function that makes one. agent: the network of policy and critic: a name, or a function
    of the spaces that makes one. algorithm: the name of a row. folder: new or empty; by default under runs/.
    resume: goes on with the run in the folder if there is one; without an env, with its own settings.
    settings: the flags of `jaxpg train`, such as seeds, updates, hidden, checkpoint_seconds,
    evaluation_episodes and quiet; a hyperparameter may have several values, for a grid. Functions are found
    again by module and name. Raises ValueError for what cannot be, and Interrupted at a signal, once the
    run so far is saved.

    >>> run("CartPole-v1", learning_rat=1e-3)
    Traceback (most recent call last):
    ValueError: unknown setting learning_rat; did you mean learning_rate? (see jaxpg train --help)
    """
    from jaxpg.runs.train.run import begin, execute

    with python_hints():
        if resume and folder is None:
            raise ValueError("resume=True goes on with the run in a folder; name it with folder")
        own = {"resume": folder} if resume and env is None else {"run": folder}
        both = {"resume_or_start": resume and env is not None}
        named = {"network": agent, "algorithm": algorithm, **own, **both}
        asked = request(_words(env, named | settings), prog="jaxpg train")
        prepared = begin(asked)
        if prepared is None:
            return Run(Path(str(folder)))
        _cached(asked.config)
        execute(prepared)
    return Run(prepared.folder)


def sweep(
    env: str | Callable[..., Any],
    agent: str | Callable[..., Any] | None = None,
    algorithm: str | None = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Sweep:
    """Trains and ranks points of a grid or of a random search, as `jaxpg sweep` does.

    settings: those of `run`, and random, halving and part; a range is text, as in "1e-4:1e-2:log8".

    >>> sweep("CartPole-v1", seeds=2)
    Traceback (most recent call last):
    ValueError: nothing is swept; give a hyperparameter several values, as in learning_rate='1e-4:...
    """
    from jaxpg.runs.sweep.sweep import execute, prepare

    with python_hints():
        named = {"network": agent, "algorithm": algorithm, "run": folder, "resume_or_start": resume}
        prepared = prepare(_words(env, named | settings))
        if not prepared.done:
            _cached(prepared.config)
            execute(prepared)
    return Sweep(prepared.folder)


def plot(
    runs: Any, *, x: str = "env_steps", metric: str = "episode_return", out: Any = None
) -> Figures:
    """Draws runs, as `jaxpg plot` does: curves, diagnostics and, of several, a comparison.

    runs: one or several, each a `Run` or a folder. x: env_steps, updates or seconds. out: the folder of the
    figures.

    >>> plot("runs/none")
    Traceback (most recent call last):
    ValueError: runs/none is not a folder; name the folder of a jaxpg train run
    """
    from jaxpg.runs.plot.command import execute, prepare

    several = runs if isinstance(runs, list | tuple) and not isinstance(runs, Run) else [runs]
    folders = [str(each.folder if isinstance(each, Run | Sweep) else each) for each in several]
    with python_hints():
        asked = prepare([*folders, *flags({"x": x, "metric": metric, "out": out})])
        saved = execute(asked)
    return Figures(tuple(asked.out / f"{name}.png" for name in saved))


def flags(settings: Mapping[str, Any]) -> list[str]:
    """The settings as flags of the command; None is left out.

    >>> flags({"learning_rate": [1e-3, 3e-3], "lambda_": 0.9, "quiet": True, "num_steps": None})
    ['--learning-rate=0.001,0.003', '--lambda=0.9', '--quiet']
    """
    words = []
    for name, value in settings.items():
        flag = name.strip("_").replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            words.append(f"--{flag}={_text(name, value)}")
    return words


def _words(env: Any, settings: dict[str, Any]) -> list[str]:
    """The arguments of train or sweep."""
    if settings["resume_or_start"] is False:
        del settings["resume_or_start"]
    return [*([] if env is None else [_text("env", env)]), *flags(settings)]


def _text(name: str, value: Any) -> str:
    """A value as it is written after its flag. Raises ValueError for what cannot be found again by a name."""
    if isinstance(value, str | PathLike):
        return str(value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_text(name, each)}" for key, each in value.items())
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    if isinstance(value, Sequence) and not hasattr(value, "_fields"):
        return ",".join(_text(name, each) for each in value)
    if isinstance(value, int | float):
        return str(value)
    inside = getattr(value, "__qualname__", "<")
    if not inside.isidentifier():
        raise ValueError(
            f"{name} is a {type(value).__name__}, and a run is opened again by names: give a name, or a "
            "function of a module that makes it"
        )
    return f"{value.__module__}:{inside}"


def _cached(config: Any) -> None:
    from jaxpg.runs.host.cache import use_compilation_cache

    if config.compilation_cache:
        use_compilation_cache()


def _pictures(files) -> str:
    return "".join(shown.picture(file.read_bytes()) for file in files)
