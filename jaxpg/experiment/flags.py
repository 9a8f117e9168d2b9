"""Command-line flags, generated from Config and Hyperparams."""

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any

import tyro

from jaxpg.experiment.config import Config, Grid
from jaxpg.experiment.presets import preset
from jaxpg.types import HYPERPARAM_HELP, Hyperparams


def parse(argv: Sequence[str], prog: str) -> tuple[Config, Grid]:
    """The run that the arguments ask for; what they leave out comes from the presets.

    Exits as tyro does: with status 0 after help, and 2 after arguments that cannot be read.
    """
    environment, algorithm = _peek(argv)
    config, grid = preset(environment, algorithm)
    where = f"{algorithm} on {environment}" if environment else algorithm
    # Positional, hence without a default: the usage line must call it required.
    required = {"environment": tyro.MISSING}
    default = _Flags(
        _Config(**({f.name: getattr(config, f.name) for f in fields(Config)} | required)),
        _Hyperparams(**grid._asdict()),
    )
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


def _peek(argv) -> tuple[str, str]:
    """The environment and the algorithm, which decide the defaults of everything else."""
    switches = {"-h", "--help", *(f"--{f.name}" for f in fields(Config) if f.type is bool)}
    environment, algorithm, rest = "", Config("").algorithm, list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            environment = environment or word
        elif word not in switches:
            value = value if equals else (rest.pop(0) if rest else "")
            algorithm = value if flag == "--algorithm" else algorithm
    return environment, algorithm


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
_Flags = make_dataclass(
    "Flags",
    [
        ("config", tyro.conf.OmitArgPrefixes[_Config]),
        ("hyperparameter", tyro.conf.OmitArgPrefixes[_Hyperparams]),
    ],
    frozen=True,
)
