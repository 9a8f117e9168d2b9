"""Ratios: how many times noisier one estimator is than another, on the same trajectories."""

import numpy as np

from jaxpg.lab.measure.statistics import trace_of
from jaxpg.lab.studies.estimators import batch_moments, coupled, form
from jaxpg.lab.studies.ladder import BATCH
from jaxpg.lab.studies.measured import Measured, need_effective
from jaxpg.lab.studies.rows import where
from jaxpg.lab.studies.sampling import measure
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    stated_row,
    tidy,
    world_of,
)
from jaxpg.stats.figures import BARS, caption, interval, label, panels
from jaxpg.stats.figures import rows as row_names
from jaxpg.stats.intervals import Estimate, within
from jaxpg.stats.moments import SampleMoments, jackknife_ratio
from jaxpg.stats.words import words

RATIO, TRACE = "ratio of traces", "trace"


def ratio(settings: Settings, progress: Progress) -> Result:
    """tr Cov of the first estimator over tr Cov of the second, both from the same trajectories.

    What an episode does to both cancels, so the interval is narrower than from two separate samples. It is
    also how many times as many trajectories the first needs for the same error.
    """
    world = world_of(settings)
    names = settings.estimators
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(
            f"ratio compares two estimators, not {len({*names})}; name them, as in jaxpg lab ratio rtg total"
        )
    forms = [form(name, world) for name in names]
    for each in forms:
        if each.estimator is None:
            raise ValueError(f"{each.name} is computed, not sampled; name another estimator")
    size = BATCH if any(map(coupled, forms)) else 1
    found = measure(world, forms, key_of(settings), settings.trajectories, (size,), progress)
    rows, traces = [], []
    for each in forms:
        measured = found[each.name]
        need_effective(measured, each.name)
        known = batch_moments(each, world, size)
        traces.append(None if known is None else size * known.trace)
        value = Estimate(*(size * x for x in measured.trace(size)))
        warning = "; ".join(filter(None, (each.warning, measured.warning))) or None
        common = {"batch": size, "warning": warning, **measured.counts}
        rows.append(
            estimated(value, estimator=each.name, quantity=TRACE, exact=traces[-1], **common)
        )
    one, other = (found[name] for name in names)
    known = traces[0] / traces[1] if None not in traces and traces[1] else None
    rows.append(estimated(paired_ratio(one, other, size), quantity=RATIO, exact=known,
                          estimator=f"{names[0]} / {names[1]}", batch=size, **one.counts))  # fmt: skip
    summary = {"ratio": stated_row(rows[-1])}
    return Result(tidy(rows), summary, lambda figure: _draw(figure, rows, names, world.name))


def paired_ratio(one: Measured, other: Measured, size: int = 1) -> Estimate:
    """tr Cov of one over tr Cov of the other, with a jackknife over groups of trajectories common to both."""
    first, second = one.levels[size], other.levels[size]
    both = SampleMoments(
        first.count, *(np.concatenate(x, axis=-1) for x in zip(first[1:], second[1:], strict=True))
    )
    half = first.mean.shape[-1]

    def part(moments, span):
        return trace_of(moments._replace(squares=moments.squares[..., span]))

    return within(
        jackknife_ratio(lambda m: part(m, slice(half)), lambda m: part(m, slice(half, None)), both)
    )


def _draw(figure, rows, names, world):
    axes = panels(figure, 2, height=0.8)
    drawn = (
        (TRACE, f"Variance, {world}", "tr Cov, one trajectory"),
        (RATIO, "Ratio", "tr Cov / tr Cov"),
    )
    for axis, (quantity, title, unit) in zip(axes, drawn, strict=True):
        mine = where(rows, quantity=quantity)
        known = [(i, row["exact"]) for i, row in enumerate(mine) if row["exact"] is not None]
        if known:
            axis.barh(*zip(*known, strict=True), 0.6, **BARS)
        for i, row in enumerate(mine):
            interval(axis, Estimate(*(row[x] for x in ("measured", "low", "high"))), i, 0)
        label(axis, title, unit, "", legend=False)
    row_names(axes[0], [words(name) for name in names])
    row_names(axes[1], ["\nover ".join(map(words, names))])
    axes[1].axvline(1.0, color="0.3", linewidth=0.8)
    for axis in axes:
        axis.set_xlim(0)
    caption(figure, "bars: exact; markers: measured, with 95 % intervals")


EXPERIMENTS = {
    "ratio": Experiment(
        "how many times noisier one estimator is than another, from common trajectories",
        ratio,
        Settings(estimators=("total", "rtg"), trajectories=2**18),
        Settings(estimators=("total", "rtg"), trajectories=2**14, quick=True),
        ignores=("repeats",),
    ),
}
