"""The experiments: one table of names, each with its summary, its function and its sizes."""

from jaxpg.lab.studies import (
    advantages,
    batch_sizes,
    clipping,
    coupling,
    decomposition,
    discounting,
    groups,
    horizons,
    hurts,
    importance,
    ladder,
    learning,
    noise,
    observability,
    offsets,
    precision,
    ratios,
    reference,
    samplers,
    staleness,
    windows,
)
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, Table

_MODULES = (
    *(advantages, batch_sizes, ladder, offsets, hurts, horizons, importance, clipping, noise),
    *(decomposition, coupling, windows, discounting, staleness, observability, learning),
    precision,
    ratios,
    groups,
    reference,
    samplers,
)
_FOUND = {name: each for module in _MODULES for name, each in module.EXPERIMENTS.items()}

# In the order of a first course: batches, baselines, other policies' data, noise, and the consequences.
_ORDER = (
    "batch-size", "ladder", "ratio", "gae", "offset", "never-hurts", "horizon-is", "importance", "clipping",
    "noise-scale", "stale", "stale-sampler", "cosine", "total-variance", "horizon", "coupled", "windows",
    "discount", "partial-observability", "large-batch", "optimizers", "seeds", "committal", "behaviour",
    "precision", "groups", "reference",
)  # fmt: skip

EXPERIMENTS: dict[str, Experiment] = {
    name: _FOUND[name] for name in (*_ORDER, *sorted(set(_FOUND) - set(_ORDER))) if name in _FOUND
}

__all__ = ["EXPERIMENTS", "Experiment", "Progress", "Result", "Settings", "Table"]
