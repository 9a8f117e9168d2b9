"""Command-line flags, parsed by the types of Config and Hyperparams. Imports nothing heavy."""

import os.path
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from jaxpg.runs.config.config import CONFIG, COUNTS, FREE, Config, Grid, load_config
from jaxpg.runs.config.presets import preset
from jaxpg.runs.console import nearest, shortened
from jaxpg.types import Hyperparams

EITHER = "--resume-or-start"
# Flags of other trainers, where the nearest name here is another thing.
OTHERS = {
    "--lr": "--learning-rate",
    "--clip-coef": "--clip-eps",
    "--vf-coef": "--value-coef",
    "--update-epochs": "--num-epochs",
    "--batch-size": "--num-envs, --num-steps and --num-minibatches",
    "--out": "--run",
    "--track": "--wandb or --tensorboard",
    **dict.fromkeys(("--cuda", "--gpu", "--device"), "--devices, or JAX_PLATFORMS"),
    **dict.fromkeys(
        ("--env", "--env-id"), "the environment without a flag, as in jaxpg train CartPole-v1"
    ),
    **dict.fromkeys(
        ("--total-timesteps", "--timesteps"), "--updates, each of num-envs times num-steps steps"
    ),
}
_STRUCTURE = {f.name: f.type for f in fields(Config)}
# flag -> (the setting, its kind)
_KINDS: dict[str, tuple[str, Any]] = {
    **{f"--{name.replace('_', '-')}": (name, kind) for name, kind in _STRUCTURE.items()},
    **{
        f"--no-{name.replace('_', '-')}": (name, kind)
        for name, kind in _STRUCTURE.items()
        if kind is bool
    },
    **{
        f"--{name.strip('_').replace('_', '-')}": (name, tuple[float, ...])
        for name in Hyperparams._fields
    },
    **{flag: (flag, str) for flag in ("--config", "--resume")},
    EITHER: (EITHER, bool),
}
del _KINDS["--environment"]  # positional, so not a flag


class TrainRequest(NamedTuple):
    """A run to start, or to resume from the folder config.run."""

    config: Config
    grid: Grid
    resume: bool | None  # None: resume if there is something to resume, otherwise start


def request(argv: Sequence[str], prog: str) -> TrainRequest:
    """The run that the arguments of train ask for.

    Raises ValueError for unreadable arguments and forbidden changes. Exits with status 0 after help.
    """
    given = _given(argv, prog)
    config, resume = given.get("--config"), given.get("--resume")
    if config is not None and resume is not None:
        raise ValueError("--config starts a new run and --resume continues one; use one of them")
    if resume is not None and EITHER in given:
        raise ValueError("--resume-or-start does not go with --resume; name the folder with --run")
    if resume is None:
        config, grid = parse(argv, prog)
        return _either(config, grid) if EITHER in given else TrainRequest(config, grid, False)
    saved = load_config(resume)
    if not Path(resume).is_dir():
        raise ValueError(f"--resume takes the folder of a run, and {resume} is a file")
    saved = replace(saved[0], run=resume, quiet=False, profile=None), saved[1]
    asked = _changed(saved, given)
    _check_unchanged(saved, *asked, resume)
    return TrainRequest(*asked, True)


def parse(argv: Sequence[str], prog: str) -> tuple[Config, Grid]:
    """The new run that the arguments ask for; other settings come from --config or the presets.

    Raises ValueError for arguments that cannot be read. Exits with status 0 after help.
    """
    given = _given(argv, prog)
    if given.get("--config") is not None:
        config, grid = load_config(given["--config"])
        return _changed((replace(config, run=None, quiet=False, profile=None), grid), given)
    if "environment" not in given:
        raise ValueError(f"name an environment, such as CartPole-v1{_see(prog)}")
    return _changed(_preset(given), given)


def _preset(given) -> tuple[Config, Grid]:
    names = ("environment", ""), ("algorithm", Config("").algorithm)
    return preset(*(given.get(name, usual) for name, usual in names))


def _changed(base: tuple[Config, Grid], given: dict[str, Any]) -> tuple[Config, Grid]:
    config, grid = base
    structure = {name: given[name] for name in _STRUCTURE if name in given}
    return (
        replace(config, **structure),
        grid._replace(**{name: given[name] for name in Grid._fields if name in given}),
    )


def _given(argv: Sequence[str], prog: str) -> dict[str, Any]:
    """The settings that the arguments name, and --config and --resume. Raises ValueError."""
    if {"-h", "--help"} & {*argv}:
        _help(argv, prog)
    return dict(_read(argv, prog))


def _read(argv, prog) -> Iterator[tuple[str, Any]]:
    words, positional, before = list(argv), 0, ""
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            positional += 1
            if positional > 1:
                hint = (
                    before
                    and f"; several values are joined by commas, as in {before},{shortened(word)}"
                )
                raise ValueError(f"{shortened(word)!r} is a second environment{hint}{_see(prog)}")
            yield "environment", word
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        name, kind = _known_flag(flag, prog)
        if kind is bool:
            if equals:
                raise ValueError(f"{flag} takes no value{_see(prog)}")
            yield name, not flag.startswith("--no-")
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        # What a list's next value would follow.
        before = f"{flag} {value}" if get_origin(kind) is tuple else ""
        if not value:
            raise ValueError(f"{flag} lacks its value{_see(prog)}")
        yield name, _value(flag, kind, value, prog)


def _known_flag(flag, prog) -> tuple[str, Any]:
    """The setting that a flag changes, and its kind."""
    if flag in _KINDS:
        return _KINDS[flag]
    raise ValueError(f"unknown flag {shortened(flag)}{nearest(flag, _KINDS, OTHERS)}{_see(prog)}")


def _value(flag, kind, text, prog) -> Any:
    """Parses a value of the kind."""
    if type(None) in get_args(kind):
        if text == "None":
            return None
        kind = get_args(kind)[0]
    try:
        if get_origin(kind) is tuple:
            return tuple(get_args(kind)[0](part) for part in text.split(","))
        return kind(text)
    except ValueError:
        whole = int in (kind, *get_args(kind))
        what = "whole numbers" if whole else "numbers"
        if get_origin(kind) is not tuple:
            what = f"a {what[:-1]}"
        ranges = "; jaxpg sweep takes ranges" if ":" in text and prog == "jaxpg train" else ""
        said = f"{flag} takes {what}, not {shortened(text)!r}{ranges}{_see(prog)}"
        raise ValueError(said) from None


def _see(prog) -> str:
    return f" (see {prog} --help)"


def _help(argv, prog) -> None:
    """Shows the flags, with the defaults of the run asked for as far as it can be read, and exits."""
    found: dict[str, Any] = {}
    with suppress(ValueError):
        rest = (word for word in argv if word not in ("-h", "--help"))
        for name, value in _read(rest, prog):
            found[name] = value
    base, where = _preset(found), found.get("algorithm", Config("").algorithm)
    if "environment" in found:
        where = f"{where} on {found['environment']}"
    named = found.get("--config", found.get("--resume"))
    if named is not None:
        base, where = load_config(named), "the run that was named"
    # Imported here, because only help needs it.
    from jaxpg.runs.config.usage import show

    show(prog, base, where)
    raise SystemExit(0)


def _either(config, grid) -> TrainRequest:
    """The run in the folder --run, which must have these settings, or a new one there."""
    if config.run is None:
        raise ValueError("--resume-or-start needs the same folder each time; name it with --run")
    if os.path.isfile(Path(config.run) / CONFIG):
        began = load_config(config.run)
        ends = began[1].schedule_updates  # what 0 stood for
        if len(grid.schedule_updates) == len(ends):
            given = (new or end for new, end in zip(grid.schedule_updates, ends, strict=True))
            grid = grid._replace(schedule_updates=tuple(given))
        began = replace(began[0], run=config.run), began[1]
        left = [name for name in COUNTS if getattr(config, name) is None]
        config = replace(config, **{name: getattr(began[0], name) for name in left})
        _check_unchanged(began, config, grid, config.run)
    return TrainRequest(config, grid, None)


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
