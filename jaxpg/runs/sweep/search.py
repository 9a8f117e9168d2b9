"""Searches: which points of hyperparameter space a sweep tries, and for how long. Imports nothing heavy."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxpg.runs.config.config import MOST, Grid, num_points, points, varying
from jaxpg.runs.console import shortened
from jaxpg.types import Hyperparams

EXAMPLE = "1e-4:1e-2:log8"
MOST_VALUES = 100_000  # in a range
HELP = """\
usage: jaxpg sweep ENV [--NUMBER VALUES] [--random POINTS] [--halving FACTOR]
       jaxpg sweep --join FOLDER... [--run FOLDER]

Trains every point of a grid, or points drawn at random, as one compiled
program in batches that fit memory, and ranks them by the final evaluation. Its
folder has the learning curve of every seed (curves.parquet), and the policies
of the best point as the run best/.

VALUES of any hyperparameter:
  .9,.99            these values
  1e-4:1e-2:log8    eight, evenly spaced in the logarithm
  0:0.1:lin5        five, evenly spaced
  1e-4:1e-2:log     any number between, drawn evenly in the logarithm
  0:0.1:lin         any number between, drawn evenly (both with --random)

options:
  --random POINTS   draw this many points instead of the whole grid
  --halving FACTOR  successive halving: train all points for a few updates, keep
                    the best 1/FACTOR of them, train these FACTOR times as long,
                    and so on
  --part I/N        train only the I-th of N parts of the points, in a folder of
                    its own, as one task of a job array
  --study STORAGE   tell an Optuna study the returns; with --random it chooses
                    the points, waiting trials first; STORAGE is a URL such as
                    sqlite:///study.db or, with a study's name, ...#NAME
  --join FOLDER...  rank the points of all N parts together, in a new folder
  --resume-or-start resume the interrupted sweep in the folder --run, or start
                    it there
  --distributed, or --coordinator HOST:PORT --processes N --process I
                    split the points over several processes (jaxpg train --help)
  --seeds, --updates, --run and all other flags are those of train (jaxpg train
  ENV --help)

example: jaxpg sweep CartPole-v1 --learning-rate 1e-4:1e-2:log8 --gamma .9,.99
"""


class Range(NamedTuple):
    """Numbers from low to high, spaced evenly, or evenly in the logarithm."""

    low: float
    high: float
    logarithmic: bool
    values: int | None  # how many; None: any number between, for a random search


class Part(NamedTuple):
    """One of several parts of a sweep, run alone: every `of`-th point, from this number on.

    The points are listed or drawn for the whole sweep, whatever the part, and a seed has the same key at
    every point. So a part gives its points the results of the whole sweep, to rounding.
    """

    number: int  # from 1
    of: int


class Options(NamedTuple):
    """The options that a sweep adds to those of a run."""

    ranges: dict[str, Range]  # those without a count
    random: int | None  # points to draw
    halving: float | None  # the factor by which points become fewer
    part: Part | None = None  # to run alone
    study: str | None = None  # the storage of the Optuna study that chooses the points


class Rung(NamedTuple):
    """One stage of a search: this many points train until each has made this many updates in all."""

    points: int
    updates: int


def take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The sweep's own flags, and the others with every range written out as a list.

    Raises ValueError for what cannot be read.
    """
    rest, words = [], list(argv)
    ranges: dict[str, Range] = {}
    random = halving = part = study = None
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag in ("--random", "--halving", "--part", "--study"):
            if not equals:
                value = words.pop(0) if words else ""
            if flag == "--random":
                random = _number(int, flag, value, "a number of points, such as 64")
            elif flag == "--part":
                part = read_part(value)
            elif flag == "--study":
                study = value
            else:
                halving = _number(float, flag, value, "a factor above 1, such as 3")
            continue
        field = name if name in Hyperparams._fields else f"{name}_"
        if flag.startswith("--") and field in Hyperparams._fields:
            value = value if equals else (words.pop(0) if words else "")
            if ":" in value:
                found = read_range(name, value)
                if found.values is None:
                    ranges[field] = found
                value = ",".join(map(repr, listed(found)))
            rest += [flag, value] if value else [flag]
            continue
        rest.append(word)
    if random is not None and random < 1:
        raise ValueError(f"--random {random} must be at least 1")
    if random is not None and random > MOST:
        raise ValueError(f"--random {str(random)[:20]} must be at most {MOST}")
    if halving is not None and not (math.isfinite(halving) and halving > 1):
        raise ValueError(f"--halving {halving:g} must be above 1: 3 keeps the best third")
    if part is not None and halving is not None:
        raise ValueError(
            "--part does not go with --halving, which compares all points with each other, and a part has "
            "only its own; leave one of them out"
        )
    if study is not None and "://" not in study:
        raise ValueError(
            f"--study {shortened(study)} takes a storage, such as sqlite:///study.db, with #NAME of a study"
        )
    if study is not None and part is not None:
        raise ValueError(
            "--study does not go with --part, which runs apart from the others; leave one out"
        )
    return Options(ranges, random, halving, part, study), rest


def read_part(text: str) -> Part:
    """Parses 2/8, the second of eight parts. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}/[1-9][0-9]{0,8}", text):
        said = f"--part {shortened(text)}".rstrip()
        raise ValueError(f"{said} takes I/N, such as 2/8 for the second of eight parts")
    part = Part(*map(int, text.split("/")))
    if not 1 <= part.number <= part.of:
        raise ValueError(
            f"--part {text} does not exist; the parts are 1/{part.of} to {part.of}/{part.of}"
        )
    return part


def places(part: Part | None, total: int) -> slice:
    """Where the points of the part lie among all. Raises ValueError if some part would have none."""
    if part is None:
        return slice(0, total)
    if part.of > total:
        raise ValueError(
            f"--part {part.number}/{part.of} divides {total:,} points into {part.of:,} parts; "
            f"at most {total:,} parts are possible"
        )
    return slice(part.number - 1, total, part.of)


def read_range(name: str, text: str) -> Range:
    """Parses LOW:HIGH:log8, LOW:HIGH:lin5, or either without the count. Raises ValueError."""
    said = f"{name}={text}"
    how = f"write LOW:HIGH:logN or LOW:HIGH:linN, such as {EXAMPLE}"
    parts = text.split(":")
    if len(parts) != 3 or parts[2][:3] not in ("log", "lin"):
        raise ValueError(f"{said} is not a range; {how}")
    try:
        low, high = float(parts[0]), float(parts[1])
        count = int(parts[2][3:]) if parts[2][3:] else None
    except ValueError:
        raise ValueError(f"{said} is not a range; {how}") from None
    logarithmic = parts[2][:3] == "log"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{said}: a range has finite ends")
    if count is not None and count < 2:
        raise ValueError(f"{said} has {count} values; a range has 2 or more, as in {EXAMPLE}")
    if count is not None and count > MOST_VALUES:
        raise ValueError(
            f"{said} has {count:,} values; at most {MOST_VALUES:,} are possible, and --random draws from "
            "a range without a count"
        )
    if low >= high:
        raise ValueError(f"{said}: {low:g} is not below {high:g}; give the lower end first")
    if logarithmic and low <= 0:
        raise ValueError(f"{said}: a logarithmic range starts above 0; use lin, or another LOW")
    return Range(low, high, logarithmic, count)


def listed(span: Range) -> list[float]:
    """The values of a range, or its ends if it has no count; to six digits, as they are printed."""
    space = np.geomspace if span.logarithmic else np.linspace
    return [float(f"{x:.6g}") for x in space(span.low, span.high, span.values or 2)]


def choose(grid: Grid, options: Options, seed: int) -> list[Hyperparams]:
    """The points to try: the whole grid, or the number asked for, drawn at random. Raises ValueError.

    They are the same whatever the part.
    """
    if not varying(grid):
        raise ValueError(
            f"nothing is swept; give a hyperparameter several values, as in --learning-rate {EXAMPLE} "
            "or --gamma .9,.99; what is no number, such as --hidden 32,64 (one network of two layers), has "
            "one value in a sweep"
        )
    if options.random is None:
        if options.ranges:
            name, span = next(iter(options.ranges.items()))
            kind = "log" if span.logarithmic else "lin"
            raise ValueError(
                f"{name.strip('_')}={span.low:g}:{span.high:g}:{kind} has no count; write one, as in "
                f"{kind}8, or draw with --random POINTS"
            )
        return points(grid)
    rng = np.random.default_rng(seed)
    columns = [
        _drawn(rng, options.ranges.get(name), values, options.random)
        for name, values in grid._asdict().items()
    ]
    return [Hyperparams(*row) for row in zip(*columns, strict=True)]


def count(grid: Grid, options: Options) -> int:
    """The number of points that `choose` returns."""
    return options.random or num_points(grid)


def rungs(num_points: int, updates: int, chunk: int, factor: float | None) -> list[Rung]:
    """Successive halving (Jamieson and Talwalkar, 2016): each rung keeps 1/factor of the points.

    Updates are multiples of chunk and grow by the same factor. Without a factor there is one rung. Raises
    ValueError if there is no room for two.
    """
    if factor is None:
        return [Rung(num_points, updates)]
    if factor * (num_points - 1) < num_points and num_points > 1:
        raise ValueError(
            f"--halving {factor:.9g} keeps all of {num_points:,} points; {num_points / (num_points - 1):.6g} "
            "or more keeps fewer"
        )

    def end(left):
        """The update at which a rung ends, with this many cuts left after it."""
        return max(chunk, round(updates / factor**left / chunk) * chunk)

    # Every rung must end after a different number of chunks.
    most = min(int(math.log(num_points) / math.log(factor) + 1e-9), updates // chunk)
    for cuts in range(most, 0, -1):
        if all(end(left) < end(left - 1) for left in range(cuts, 0, -1)):
            return [
                Rung(max(1, math.ceil(num_points / factor**k - 1e-9)), end(cuts - k))
                for k in range(cuts + 1)
            ]
    raise ValueError(
        f"--halving {factor:g} cannot thin {num_points} points over {updates} updates; it needs "
        f"{math.ceil(factor)} points or more, and some 20 updates"
    )


def _drawn(rng, span, values, count):
    if span is None:
        return [float(x) for x in rng.choice(np.asarray(values), count)]
    ends = (math.log(span.low), math.log(span.high)) if span.logarithmic else span[:2]
    drawn = rng.uniform(*ends, count)
    return [float(f"{x:.6g}") for x in (np.exp(drawn) if span.logarithmic else drawn)]


def _number(kind, flag, text, meant):
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{flag} {text}".rstrip() + f" takes {meant}") from None
