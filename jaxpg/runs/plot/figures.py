"""Figures of runs: learning curves, diagnostics and comparisons, with intervals over seeds.

Each function fills a matplotlib Figure. Series also differ in line style and marker, for grey print.
"""

from itertools import combinations

import numpy as np

from jaxpg.runs.plot.records import Series
from jaxpg.stats.figures import BOUND, COLOURS, LINES, MARKERS, bounds, caption, label, panels
from jaxpg.stats.intervals import Estimate, bootstrap
from jaxpg.stats.reliability import (
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from jaxpg.stats.seeds import band, robust, scaled

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
HANDLE = 3.5  # length of a legend's handle: enough to show its dash pattern and marker
NOT_DIAGNOSTICS = (RETURN, "episodes")


def curves(figure, series: list[Series], x: str = "env_steps", metric: str = RETURN) -> None:
    """A metric against environment steps, updates or seconds: one panel for each environment."""
    worlds = list(dict.fromkeys(s.environment for s in series))
    axes = panels(figure, columns=len(worlds), width=5.6)
    places = _places(series)
    for axis, world in zip(axes, worlds, strict=True):
        mine = [s for s in series if s.environment == world]
        for s in mine:
            _curve(axis, s, x, metric, places[s.label])
        label(axis, world, AXES[x], words(metric), legend=False)
        if len(mine) > 1:
            # A long legend would hide the curves.
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(mine) > 4 else {}
            axis.legend(fontsize=8, frameon=False, handlelength=HANDLE, **beside)
    caption(figure, f"{BAND}; {_seeds(series)}")


def diagnostics(figure, series: list[Series], x: str = "env_steps") -> None:
    """A small panel for each of the other logged metrics."""
    names = sorted({n for s in series for n in (*s.metrics, *s.ratios)} - {*NOT_DIAGNOSTICS})
    if not names:
        raise ValueError("nothing was logged but returns")
    columns = min(3, len(names))
    axes = panels(figure, columns, -(-len(names) // columns), width=3.6, height=2.3)
    places = _places(series)
    for axis, name in zip(axes, names, strict=False):
        having = [s for s in series if name in s.metrics or name in s.ratios]
        for s in having:
            _curve(axis, s, x, name, places[s.label])
        if _spans_decades(np.concatenate([_values(s, name).ravel() for s in having])):
            axis.set_yscale("log")
        _heed_lines(axis)
        label(axis, words(name), "", "", legend=False)
        axis.tick_params(labelsize=8)
    right = max(axis.get_xlim()[1] for axis in axes[: len(names)])
    for axis in axes[: len(names)]:
        axis.set_xlim(-0.03 * right, right)
    for axis in axes[max(len(names) - columns, 0) : len(names)]:
        axis.set_xlabel(AXES[x], fontsize=8)
    for axis in axes[len(names) :]:
        axis.remove()
    arrows = any(each.get_label() == BOUND for axis in axes for each in axis.get_lines())
    caption(figure, f"{BAND}; {_seeds(series)}" + arrows * f"; arrows: {BOUND}")
    if len(places) > 1:
        handles = {h.get_label(): h for axis in axes for h in axis.get_lines()}
        chosen = [handles[name] for name in places if name in handles]
        figure.legend(
            handles=chosen, loc="outside upper center", fontsize=8, frameon=False, handlelength=HANDLE,
            ncols=max(1, min(3, int(figure.get_figwidth() / (0.8 + 0.07 * max(map(len, places)))))),
        )  # fmt: skip


def comparison(figure, series: list[Series]) -> None:
    """Final evaluations: interquartile means, performance profiles, probabilities of improvement.

    Raises ValueError where `final_scores` does.
    """
    scores, unit = final_scores(series)
    pairs = _pairs(scores)
    named = [[_folded(name) for name in scores], list(map(_over, pairs))]
    tall = max(len(each) * (1 + max(x.count("\n") for x in each)) for each in named if each)
    height = 1.6 + max(0.55 * max(*map(len, named), 3), LINE * tall)
    axes = panels(figure, columns=3 if pairs else 2, width=4.2, height=height)
    _draw_means(axes[0], scores, unit)
    _draw_profiles(axes[1], scores, unit)
    if pairs:
        _draw_improvement(axes[2], scores, pairs)
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


def words(metric: str) -> str:
    """The name of a metric in words."""
    known = {"kl": "KL divergence", "ess": "effective sample size (share)",
             "grad_norm": "gradient norm", "noise_scale": "noise scale (episodes or lanes)",
             "episode_return": "episode return", "episode_length": "episode length (steps)",
             "entropy": "entropy (nats)"}  # fmt: skip
    return known.get(metric, metric.replace("_", " "))


def _lowest(scores):
    return np.fmin.reduce(np.concatenate(list(scores.values())), axis=0)


def _curve(axis, s: Series, x, metric, place):
    # Episodes differ in length, so seeds may have taken different numbers of steps by the same update.
    at = {"env_steps": s.env_steps.mean(axis=0), "updates": s.update, "seconds": s.seconds}[x]
    shown = s.ratios[metric] if metric in s.ratios else band(s.metrics[metric])
    colour = COLOURS[place]
    bounds(axis, at, Estimate(*shown), place)
    # A line without a point has no length to space markers along.
    every = (0.05 + 0.02 * place, 0.14) if np.isfinite(shown.value).any() else None
    axis.plot(
        at, shown.value, color=colour, linestyle=LINES[place], linewidth=1.4, label=s.label,
        marker=MARKERS[place], markerfacecolor="white", markersize=4, markevery=every,
    )  # fmt: skip
    resolved = np.where(np.isfinite(shown.value), [shown.low, shown.high], np.nan)
    axis.fill_between(at, *resolved, color=colour, alpha=0.18, linewidth=0)
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
    for i, each in enumerate(scores.values()):
        _interval(axis, robust(each), i, i)
    _rows(axis, [_folded(name) for name in scores])
    label(axis, "Interquartile mean", unit, "", legend=False)


def _draw_profiles(axis, scores, unit):
    everything = np.concatenate([x.ravel() for x in scores.values()])
    low, high = everything.min(), everything.max()
    margin = 0.02 * (high - low) or 1.0
    limits = np.linspace(low - margin, high + margin, PROFILE_POINTS)
    for i, each in enumerate(scores.values()):
        above = performance_profile(each, limits)
        axis.step(
            limits, above, where="post", color=COLOURS[i], linestyle=LINES[i], linewidth=1.4,
            marker=MARKERS[i], markerfacecolor="white", markersize=5,
            markevery=(0.04 + 0.03 * i, 0.25),
        )  # fmt: skip
        if len(each) > 1:
            shown = bootstrap(
                lambda x: performance_profile(x, limits), each, num_resamples=RESAMPLES
            )
            shade = {"color": COLOURS[i], "alpha": 0.18, "linewidth": 0}
            axis.fill_between(limits, shown.low, shown.high, step="post", **shade)
    axis.set_ylim(-0.03, 1.03)
    # The markers are named in the panel to the left.
    label(
        axis, "Performance profile", rf"{unit} $\tau$", r"share of runs above $\tau$", legend=False
    )


def _pairs(scores) -> list[tuple[str, str]]:
    """The pairs of series to compare, the better one first."""
    if any(len(each) < 2 for each in scores.values()):
        return []
    order = sorted(scores, key=lambda name: -float(interquartile_mean(scores[name])))
    if len(order) <= MOST_PAIRED:
        return list(combinations(order, 2))
    return [(order[0], other) for other in order[1:]]


def _draw_improvement(axis, scores, pairs):
    for i, (one, other) in enumerate(pairs):
        _interval(axis, bootstrap(probability_of_improvement, scores[one], scores[other]), i, 0)
    _rows(axis, list(map(_over, pairs)))
    axis.set_xlim(-0.02, 1.02)
    axis.axvline(0.5, color="0.3", linewidth=0.8)
    label(axis, "Probability of improvement", "P(a run of the first is better)", "", legend=False)


def _interval(axis, estimate, row, place):
    value, low, high = estimate
    reach = np.nan_to_num(np.maximum([[value - low], [high - value]], 0.0))
    axis.errorbar([value], [row], xerr=reach, fmt=MARKERS[place], color=COLOURS[place],
                  markerfacecolor="white", markersize=6, capsize=3)  # fmt: skip


def _folded(name):
    return name.replace(", ", ",\n")


def _over(pair):
    one, other = map(_folded, pair)
    return f"{one}\nover {other}"


def _rows(axis, names):
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axis.grid(False, axis="y")


def _places(series) -> dict[str, int]:
    """The line style of each label, the same in all panels."""
    return {name: i for i, name in enumerate(dict.fromkeys(s.label for s in series))}


def _values(s: Series, name) -> np.ndarray:
    """The values to draw, bounds included."""
    if name not in s.ratios:
        return s.metrics[name]
    value, low, _ = s.ratios[name]
    return np.where(np.isnan(value), low, value)


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
