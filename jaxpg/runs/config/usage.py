"""The help of training, generated from Config and Hyperparams."""

import os
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Annotated

import tyro

from jaxpg.runs.config.config import Config, Grid
from jaxpg.runs.config.flags import EITHER
from jaxpg.runs.console import heard
from jaxpg.types import HYPERPARAMS, Hyperparams


def show(
    argv: Sequence[str], prog: str, base: tuple[Config, Grid], where: str, fresh: bool
) -> None:
    """Prints help or a shell's completion, and exits.

    base, where: the defaults, and where they come from. fresh: the environment is required.
    """
    config, grid = base
    # Positional and without a default, so that the usage line shows it as required.
    required = {"environment": tyro.MISSING} if fresh else {}
    default = _Flags(
        _Start(None, None, False),
        _Config(**({f.name: getattr(config, f.name) for f in fields(Config)} | required)),
        _Hyperparams(**grid._asdict()),
    )
    if os.environ.get("NO_COLOR"):  # tyro's help ignores it
        vars(tyro).get("_experimental_options", {})["ansi_codes"] = False
    with heard():
        tyro.cli(
            _Flags,
            prog=prog,
            # Short lines, because tyro does not wrap them.
            description=f"Train policies on an environment.\n\nDefaults are those of {where}.\n\n"
            "A hyperparameter takes one value, or several as in 1e-3,3e-4 for a grid.",
            args=["--help"] if {"-h", "--help"} & {*argv} else list(argv),
            default=default,
            config=(tyro.conf.FlagCreatePairsOff,),
        )


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
    number = HYPERPARAMS[name]
    arg = tyro.conf.arg(
        name=name.strip("_"), help=": ".join(filter(None, (number.where, number.help)))
    )
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
            ("config", "start a new run with this run's settings; other flags override them"),
            ("resume", "resume this run; --updates N is then its new total"),
        )
    ]
    + [
        (
            EITHER.strip("-").replace("-", "_"),
            Annotated[bool, tyro.conf.arg(help="resume the run in the folder --run, or start it")],
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
