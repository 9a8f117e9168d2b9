"""Command-line flags, generated from Config and Hyperparams."""

import os
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from jaxpg.experiment.config import CONFIG, FREE, Config, Grid, load_config
from jaxpg.experiment.presets import preset
from jaxpg.types import HYPERPARAM_HELP, Hyperparams

EITHER = "--resume-or-start"


class Request(NamedTuple):
    """A run to start, or to go on with: then config.run is its folder."""

    config: Config
    grid: Grid
    resume: bool | None  # None: where there is something to go on with, and else a start


def request(argv: Sequence[str], prog: str) -> Request:
    """What the arguments of train ask for. Raises ValueError for a run that cannot be read or changed so.

    Exits as tyro does: with status 0 after help, and 2 after arguments that cannot be read.
    """
    given = _peek(argv)
    if given.config and given.resume:
        raise ValueError("--config starts a new run and --resume goes on with one; use one of them")
    if given.resume and given.either:
        raise ValueError("--resume goes on and never starts; name the folder with --run")
    if given.resume:
        saved = load_config(given.resume)
        if not Path(given.resume).is_dir():
            raise ValueError(f"--resume takes the folder of a run, and {given.resume} is a file")
        saved = replace(saved[0], run=given.resume, quiet=False), saved[1]
        config, grid = parse(argv, prog, saved)
        _check_unchanged(saved, config, grid, given.resume)
        return Request(config, grid, True)
    base = None
    if given.config:
        config, grid = load_config(given.config)
        base = replace(config, run=None, quiet=False), grid
    config, grid = parse(argv, prog, base)
    return _either(config, grid) if given.either else Request(config, grid, False)


def parse(
    argv: Sequence[str], prog: str, base: tuple[Config, Grid] | None = None
) -> tuple[Config, Grid]:
    """The run that the arguments ask for; what they leave out comes from base, or else the presets.

    Exits as tyro does: with status 0 after help, and 2 after arguments that cannot be read.
    """
    environment, algorithm, *_ = _peek(argv)
    config, grid = base or preset(environment, algorithm)
    where = f"{algorithm} on {environment}" if environment else algorithm
    where = where if base is None else "the run that was named"
    # Positional, hence without a default: the usage line must call it required.
    required = {"environment": tyro.MISSING} if base is None else {}
    default = _Flags(
        _Start(None, None, False),
        _Config(**({f.name: getattr(config, f.name) for f in fields(Config)} | required)),
        _Hyperparams(**grid._asdict()),
    )
    if os.environ.get("NO_COLOR"):  # which tyro's help does not look at
        vars(tyro).get("_experimental_options", {})["ansi_codes"] = False
    flags: Any = tyro.cli(
        _Flags,
        prog=prog,
        # A short line each, because tyro does not wrap them.
        description=f"Train policies on an environment.\n\nDefaults are those of {where}.\n\n"
        "A hyperparameter takes one value, or several as in 1e-3,3e-4 for a grid.",
        args=list(argv),
        default=default,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    structure = {f.name: getattr(flags.config, f.name) for f in fields(Config)}
    return Config(**structure), Grid(**vars(flags.hyperparameter))


def _either(config, grid) -> Request:
    """The run of the folder --run, which has to have these settings, or a new one there."""
    if config.run is None:
        raise ValueError("--resume-or-start needs the same folder each time; name it with --run")
    if (Path(config.run) / CONFIG).is_file():
        began = load_config(config.run)
        ends = began[1].schedule_updates  # what 0 stood for
        if len(grid.schedule_updates) == len(ends):
            given = (new or end for new, end in zip(grid.schedule_updates, ends, strict=True))
            grid = grid._replace(schedule_updates=tuple(given))
        began = replace(began[0], run=config.run), began[1]
        _check_unchanged(began, config, grid, config.run)
    return Request(config, grid, None)


def _check_unchanged(saved, config, grid, run) -> None:
    before, after = ({f.name: getattr(c, f.name) for f in fields(c)} for c in (saved[0], config))
    before |= saved[1]._asdict()
    after |= grid._asdict()
    changed = [name for name in after if name not in FREE and after[name] != before[name]]
    if changed:
        raise ValueError(
            f"a resumed run keeps its {changed[0].strip('_')}; --config {run} starts a new one "
            "with other settings"
        )


class _Given(NamedTuple):
    environment: str
    algorithm: str
    config: str
    resume: str
    either: bool


def _peek(argv) -> _Given:
    """The arguments that decide the defaults of everything else."""
    bools = [f.name.replace("_", "-") for f in fields(Config) if f.type is bool]
    switches = {"-h", "--help", *(f"--{n}" for n in bools), *(f"--no-{n}" for n in bools)}
    found, rest = _Given("", Config("").algorithm, "", "", False), list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            found = found._replace(environment=found.environment or word)
        elif word == EITHER:
            found = found._replace(either=True)
        elif word not in switches:
            value = value if equals else (rest.pop(0) if rest else "")
            name = flag.removeprefix("--")
            if name in ("algorithm", "config", "resume"):
                found = found._replace(**{name: value})
    return found


def _commas(kind, metavar):
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{metavar}[,...]",
        instance_from_str=lambda words: tuple(kind(part) for part in words[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(f"{value:g}" for value in values)],
    )


_INTS, _FLOATS = _commas(int, "INT"), _commas(float, "FLOAT")


def _structure_flag(f):
    arg = tyro.conf.arg(help=f.metadata["help"])
    if f.name == "environment":
        kind = Annotated[
            tyro.conf.Positional[str], tyro.conf.arg(metavar="ENV", help=f.metadata["help"])
        ]
    elif f.type == tuple[int, ...]:
        kind = Annotated[f.type, _INTS, arg]
    else:
        kind = Annotated[f.type, arg]
    return f.name, kind, field()


def _number_flag(name):
    arg = tyro.conf.arg(name=name.strip("_"), help=HYPERPARAM_HELP[name])
    return name, Annotated[tuple[float, ...], _FLOATS, arg], field()


_Config = make_dataclass("Config", [_structure_flag(f) for f in fields(Config)], frozen=True)
_Hyperparams = make_dataclass(
    "Hyperparams", [_number_flag(name) for name in Hyperparams._fields], frozen=True
)
_Start = make_dataclass(
    "Start",
    [
        (name, Annotated[str | None, tyro.conf.arg(metavar="RUN", help=text)], field())
        for name, text in (
            ("config", "start anew with the settings of this run; flags after it override them"),
            ("resume", "go on with this run; --updates N is then N in all"),
        )
    ]
    + [
        (
            EITHER.strip("-").replace("-", "_"),
            Annotated[
                bool, tyro.conf.arg(help="go on with the run of the folder --run, or start it")
            ],
            field(),
        )
    ],
    frozen=True,
)
_Flags = make_dataclass(
    "Flags",
    [
        ("start", tyro.conf.OmitArgPrefixes[_Start]),
        ("config", tyro.conf.OmitArgPrefixes[_Config]),
        ("hyperparameter", tyro.conf.OmitArgPrefixes[_Hyperparams]),
    ],
    frozen=True,
)
