"""The experiments: one table of names, each with its summary, its function and its sizes."""

from jaxpg.lab.studies.advantages import EXPERIMENTS as _ADVANTAGES
from jaxpg.lab.studies.batch_sizes import EXPERIMENTS as _BATCHES
from jaxpg.lab.studies.clipping import EXPERIMENTS as _CLIPPING
from jaxpg.lab.studies.coupling import EXPERIMENTS as _COUPLING
from jaxpg.lab.studies.decomposition import EXPERIMENTS as _DECOMPOSITION
from jaxpg.lab.studies.discounting import EXPERIMENTS as _DISCOUNTING
from jaxpg.lab.studies.horizons import EXPERIMENTS as _HORIZONS
from jaxpg.lab.studies.hurts import EXPERIMENTS as _HURTS
from jaxpg.lab.studies.importance import EXPERIMENTS as _IMPORTANCE
from jaxpg.lab.studies.ladder import EXPERIMENTS as _LADDER
from jaxpg.lab.studies.learning import EXPERIMENTS as _LEARNING
from jaxpg.lab.studies.noise import EXPERIMENTS as _NOISE
from jaxpg.lab.studies.observability import EXPERIMENTS as _OBSERVABILITY
from jaxpg.lab.studies.offsets import EXPERIMENTS as _OFFSETS
from jaxpg.lab.studies.staleness import EXPERIMENTS as _STALENESS
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, Table
from jaxpg.lab.studies.windows import EXPERIMENTS as _WINDOWS

_FOUND: dict[str, Experiment] = {
    **_ADVANTAGES,
    **_BATCHES,
    **_LADDER,
    **_OFFSETS,
    **_HURTS,
    **_HORIZONS,
    **_IMPORTANCE,
    **_CLIPPING,
    **_NOISE,
    **_DECOMPOSITION,
    **_COUPLING,
    **_WINDOWS,
    **_DISCOUNTING,
    **_STALENESS,
    **_OBSERVABILITY,
    **_LEARNING,
}

# In the order of a first course: batches, baselines, other policies' data, noise, and the consequences.
_ORDER = (
    "batch-size", "ladder", "gae", "offset", "never-hurts", "horizon-is", "importance", "clipping",
    "noise-scale", "stale", "cosine", "total-variance", "horizon", "coupled", "windows", "discount",
    "partial-observability", "large-batch", "optimizers", "seeds", "committal", "behaviour",
)  # fmt: skip

EXPERIMENTS: dict[str, Experiment] = {
    name: _FOUND[name] for name in (*_ORDER, *sorted(set(_FOUND) - set(_ORDER))) if name in _FOUND
}

__all__ = ["EXPERIMENTS", "Experiment", "Progress", "Result", "Settings", "Table"]
