"""Figures of runs: learning curves, diagnostics and comparisons, with intervals over seeds.

Each function fills a matplotlib Figure. Series also differ in line style and marker, for grey print.
"""

from itertools import combinations

import numpy as np

from jaxpg.runs.plot.records import Series
from jaxpg.stats.figures import (
    BOUND,
    COLOURS,
    LINES,
    MARKERS,
    bounds,
    caption,
    improvement,
    interval,
    label,
    legend,
    panels,
    rows,
)
from jaxpg.stats.figures import band as interval_band
from jaxpg.stats.intervals import Estimate, bootstrap
from jaxpg.stats.reliability import (
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from jaxpg.stats.seeds import band, robust, scaled
from jaxpg.stats.words import words

RETURN = "episode_return"
AXES = {
    "env_steps": "environment steps per agent",
    "updates": "updates",
    "seconds": "seconds of training, all agents together",
}
MOST_SERIES = 8  # as many as there are markers
MOST_PAIRED = 4  # up to this many series, every pair is compared; beyond it, each with the best
MOST_NAMED = 3  # diverged series that a caption names
BAND = "interquartile mean with 95 % bootstrap band"
PROFILE_POINTS = 101
RESAMPLES = 500  # for a profile: enough for the eye
LINE = 0.15  # inches per line of a row's name, with the space between rows
LEAST_RANGE = 0.05  # of a comparison's axis, as a share of the returns
NOT_DIAGNOSTICS = (RETURN, "episodes")


def curves(figure, series: list[Series], x: str = "env_steps", metric: str = RETURN) -> None:
    """A metric against environment steps, updates or seconds: one panel for each environment."""
    worlds = list(dict.fromkeys(s.environment for s in series))
    axes = panels(figure, len(worlds))
    places = _places(series)
    for axis, world in zip(axes, worlds, strict=True):
        for s in (s for s in series if s.environment == world):
            _curve(axis, s, x, metric, places[s.label])
        label(axis, world, AXES[x], words(metric), legend=False)
    if len(places) > 1:
        legend(figure)
    caption(figure, f"{BAND}; {_seeds(series)}")


def diagnostics(figure, series: list[Series], x: str = "env_steps") -> None:
    """A small panel for each of the other logged metrics that changes."""
    names = sorted({n for s in series for n in (*s.metrics, *s.ratios)} - {*NOT_DIAGNOSTICS})
    found = {name: [s for s in series if name in s.metrics or name in s.ratios] for name in names}
    names = [name for name in names if _varies(found[name], name)]
    if not names:
        raise ValueError("nothing was logged that changes, but returns")
    axes = panels(figure, len(names), height=1.3)
    places = _places(series)
    for axis, name in zip(axes, names, strict=True):
        for s in found[name]:
            _curve(axis, s, x, name, places[s.label])
        if _spans_decades(np.concatenate([_values(s, name).ravel() for s in found[name]])):
            axis.set_yscale("log")
        _heed_lines(axis)
        label(axis, words(name), "", "", legend=False)
    right = max(axis.get_xlim()[1] for axis in axes)
    columns = axes[0].get_subplotspec().get_gridspec().ncols
    for axis in axes:
        axis.set_xlim(-0.03 * right, right)
    for axis in axes[-columns:]:
        axis.set_xlabel(AXES[x])
    arrows = any(each.get_label() == BOUND for axis in axes for each in axis.get_lines())
    caption(figure, f"{BAND}; {_seeds(series)}" + arrows * f"; arrows: {BOUND}")
    if len(places) > 1:
        legend(figure)


def comparison(figure, series: list[Series]) -> None:
    """Final evaluations: interquartile means, performance profiles, probabilities of improvement.

    Raises ValueError where `final_scores` does.
    """
    scores, unit = final_scores(series)
    pairs = _pairs(scores)
    lines = [[_folded(name) for name in scores], [f"{a}\n{b}" for a, b in map(_over, pairs)]]
    tall = max(len(each) * (1 + max(x.count("\n") for x in each)) for each in lines if each)
    axes = panels(figure, 3 if pairs else 2, height=max(1.5, LINE * tall))
    _draw_means(axes[0], scores, unit)
    _draw_profiles(axes[1], scores, unit)
    if pairs:
        improvement(axes[2], [
            (*_over(pair), bootstrap(probability_of_improvement, *(scores[name] for name in pair)))
            for pair in pairs
        ])  # fmt: skip
    caption(figure, f"95 % stratified bootstrap intervals; {_seeds(series)}")


def final_scores(series: list[Series]) -> tuple[dict[str, np.ndarray], str]:
    """Final returns [R, K] by label, over K environments, and the label of their axis.

    Several environments are each rescaled: 0 is the worst run and 1 the best. Raises ValueError for a
    single series, runs without an evaluation, and series that were not all run on the same environments.
    """
    if len({s.label for s in series}) < 2:
        raise ValueError("there is one series; name several runs, or a run with a grid")
    left = {s.label for s in series if s.final is None or np.isfinite(s.final).any()}
    if len(left) < 2:
        raise ValueError(f"of {len({s.label for s in series})} series, the agents of all "
                         f"but {len(left)} have diverged")  # fmt: skip
    series = [s for s in series if s.label in left]
    by_label: dict[str, dict[str, np.ndarray]] = {}
    for s in series:
        if s.final is None:
            raise ValueError(f"{s.folder} has no final evaluation: it did not run to its end")
        by_label.setdefault(s.label, {})[s.environment] = s.final
    worlds = list(dict.fromkeys(s.environment for s in series))
    for name, each in by_label.items():
        if len(each) < len(worlds):
            missing = ", ".join(world for world in worlds if world not in each)
            raise ValueError(
                f"nothing to compare: {name} was run on {', '.join(each)} and not on {missing}"
            )
    scores = {}
    for name, each in by_label.items():
        few = min(map(len, each.values()))  # strata of one size
        scores[name] = np.stack([each[world][:few] for world in worlds], axis=1)
    lowest = np.nan_to_num(_lowest(scores))
    # A policy whose return is not a number gets the lowest.
    scores = {name: np.where(np.isnan(x), lowest[None], x) for name, x in scores.items()}
    if len(worlds) == 1:
        return scores, "final return"
    return scaled(scores), "final return, 0 worst and 1 best run"


def _lowest(scores):
    return np.fmin.reduce(np.concatenate(list(scores.values())), axis=0)


def _curve(axis, s: Series, x, metric, place):
    # Episodes differ in length, so seeds may have taken different numbers of steps by the same update.
    at = {"env_steps": s.env_steps.mean(axis=0), "updates": s.update, "seconds": s.seconds}[x]
    shown = s.ratios[metric] if metric in s.ratios else band(s.metrics[metric])
    bounds(axis, at, Estimate(*shown), place)
    # A line without a point has no length to space markers along.
    every = (0.05 + 0.02 * place, 0.14) if np.isfinite(shown.value).any() else None
    axis.plot(
        at, shown.value, color=COLOURS[place], linestyle=LINES[place], label=s.label,
        marker=MARKERS[place], markerfacecolor="white", markevery=every,
    )  # fmt: skip
    low, high = np.where(np.isfinite(shown.value), [shown.low, shown.high], np.nan)
    interval_band(axis, at, low, high, place)
    if x != "seconds":
        axis.xaxis.set_major_formatter(_thousands())


def _heed_lines(axis):
    """Limits the y axis to its lines and a margin, because a band may be very wide."""
    logarithmic = axis.get_yscale() == "log"
    values = np.concatenate([np.asarray(each.get_ydata(), float) for each in axis.get_lines()])
    values = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
    if not values.size:
        return
    before = np.array(axis.get_ylim())
    ends = np.array([values.min(), values.max()])
    if logarithmic:
        before, ends = np.log10(before), np.log10(ends)
    reach = 0.5 * (ends[1] - ends[0]) + 1e-9 + 0.02 * abs(ends[1])
    low, high = max(before[0], ends[0] - reach), min(before[1], ends[1] + reach)
    axis.set_ylim(*(10.0 ** np.array([low, high]) if logarithmic else (low, high)))


def _thousands():
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")  # 200k, 1M


def _draw_means(axis, scores, unit):
    found = [robust(each) for each in scores.values()]
    for i, each in enumerate(found):
        interval(axis, each, i, i)
    rows(axis, [_folded(name) for name in scores])
    everything = np.concatenate([x.ravel() for x in scores.values()])
    ends = np.array([x for each in found for x in each])
    ends = ends[np.isfinite(ends)]
    # Means that are nearly equal look so: no narrower than a part of the range of all runs and of 0.
    least = LEAST_RANGE * max(np.ptp(everything), np.abs(everything).max(), 1e-9)
    lacking = max(least - np.ptp(ends), 0.0) / 2
    axis.set_xlim(
        ends.min() - lacking - 0.08 * np.ptp(ends), ends.max() + lacking + 0.08 * np.ptp(ends)
    )
    label(axis, "Interquartile mean", unit, "", legend=False)


def _draw_profiles(axis, scores, unit):
    everything = np.concatenate([x.ravel() for x in scores.values()])
    low, high = everything.min(), everything.max()
    lacking = max(LEAST_RANGE * np.abs(everything).max() - (high - low), 0.0) / 2
    margin = 0.02 * (high - low) + lacking or 1.0
    limits = np.linspace(low - margin, high + margin, PROFILE_POINTS)
    for i, each in enumerate(scores.values()):
        above = performance_profile(each, limits)
        axis.step(
            limits, above, where="post", color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i],
            markerfacecolor="white", markevery=(0.04 + 0.03 * i, 0.25),
        )  # fmt: skip
        if len(each) > 1:
            shown = bootstrap(
                lambda x: performance_profile(x, limits), each, num_resamples=RESAMPLES
            )
            interval_band(axis, limits, shown.low, shown.high, i, "post")
    axis.set_ylim(-0.03, 1.03)
    # The markers are named in the panel to the left.
    label(axis, "Performance profile", f"{unit}, τ", "share of runs above τ", legend=False)


def _pairs(scores) -> list[tuple[str, str]]:
    """The pairs of series to compare, the better one first."""
    if any(len(each) < 2 for each in scores.values()):
        return []
    order = sorted(scores, key=lambda name: -float(interquartile_mean(scores[name])))
    if len(order) <= MOST_PAIRED:
        return list(combinations(order, 2))
    return [(order[0], other) for other in order[1:]]


def _folded(name):
    return name.replace(", ", ",\n")


def _over(pair):
    return tuple(map(_folded, pair))


def _places(series) -> dict[str, int]:
    """The line style of each label, the same in all panels."""
    return {name: i for i, name in enumerate(dict.fromkeys(s.label for s in series))}


def _values(s: Series, name) -> np.ndarray:
    """The values to draw, bounds included."""
    if name not in s.ratios:
        return s.metrics[name]
    value, low, _ = s.ratios[name]
    return np.where(np.isnan(value), low, value)


def _varies(series, name) -> bool:
    """Whether any series of the metric has two values that differ by more than rounding."""
    values = np.concatenate([_values(s, name).ravel() for s in series])
    values = values[np.isfinite(values)]
    return values.size > 0 and np.ptp(values) > 1e-6 * np.abs(values).max()


def _spans_decades(values) -> bool:
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() > 100 * values.min()


def _seeds(series) -> str:
    least, most = (f(len(s.env_steps) for s in series) for f in (min, max))
    each = " each" if len(series) > 1 else ""
    said = f"{most} seeds{each}" if least == most else f"{least} to {most} seeds{each}"
    if most == 1:
        said = f"one seed{each}"
    lost = [f"{len(s.diverged)} of {len(s.env_steps)} of {s.label}" for s in series if s.diverged]
    if not lost:
        return said
    more = f" and of {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
    return f"{said}\ndiverged: {', '.join(lost[:MOST_NAMED])}{more}"
