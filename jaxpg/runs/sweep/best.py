"""The best point of a sweep as a run of its own, whose policies every other command can load."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpg.runs.config.config import Config, Grid, load_config
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import declared_arrays, read_arrays_like
from jaxpg.runs.sweep import ranking
from jaxpg.runs.sweep.ranking import Outcomes
from jaxpg.runs.sweep.record import Search
from jaxpg.runs.train import replica_batches

BEST = "best"
HELD = "best.npz"  # of an unfinished sweep

Policies = dict[int, Any]  # row of [P x S] -> the parameters of its agent, on the host


def hold(
    policies: Policies, rows: np.ndarray, params: Any, outcomes: Outcomes, place: Path
) -> None:
    """Adds the evaluated agents of a batch, keeps those that may be of the best point, and saves them."""
    seeds = outcomes.returns.shape[1]
    for i, row in enumerate(rows.tolist()):
        policies[row] = jax.tree.map(lambda x, i=i: x[i], params)
    whole = np.all(outcomes.evaluated, axis=1)
    best = next((i for i in ranking.order(outcomes) if whole[i]), -1)
    for row in [row for row in policies if whole[row // seeds] and row // seeds != best]:
        del policies[row]
    kept = sorted(policies)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(policies[row] for row in kept))
    replica_batches.write(place / HELD, np.array(kept), {}, stacked)


def held(place: Path, like: Any) -> Policies:
    """The agents that a killed sweep held; like: shapes of one agent's parameters. Raises ValueError."""
    path = place / HELD
    if not path.is_file():
        return {}
    leaves, structure = jax.tree.flatten(like)
    count = declared_arrays(path)["rows"].shape
    wanted = {f"state_{i}": ((*count, *x.shape), x.dtype) for i, x in enumerate(leaves)}
    found = read_arrays_like(path, wanted | {"rows": (count, np.dtype(int))}, "this sweep")
    rows = found.pop("rows").tolist()
    return {
        row: structure.unflatten([found[name][i] for name in wanted]) for i, row in enumerate(rows)
    }


def write(
    folder: Path, config: Config, search: Search, outcomes: Outcomes, policies: Policies
) -> Path | None:
    """Writes the agents of the best point as the run best/; None if they are not among those held."""
    place, seeds = folder / BEST, config.seeds
    shutil.rmtree(place, ignore_errors=True)
    best = int(ranking.order(outcomes)[0])
    rows, returns = [best * seeds + seed for seed in range(seeds)], outcomes.returns[best]
    if not np.isfinite(returns).any() or not policies.keys() >= {*rows}:
        return None
    point, diverged = search.points[best], outcomes.diverged[best]
    labels = [{"seed": seed, **point._asdict()} for seed in range(seeds)]
    own, grid = replace(config, run=str(place)), Grid(*((value,) for value in point))
    place.mkdir()
    files.write_json(place / files.CONFIG, files.description(own, grid, labels), exact=True)
    params = jax.tree.map(lambda *x: np.stack(x), *(policies[row] for row in rows))
    about = {"updates": config.updates, "settings": files.settings(place)}
    files.write_params(place / files.PARAMS, params, about)
    record = {
        "update": config.updates,
        "mean_return": returns,
        "diverged": [int(update) or None for update in diverged],
        **{name: [label[name] for label in labels] for name in labels[0]},
    }
    files.write_json(place / files.EVALUATION, record)
    return place


def copy(folder: Path, parts: list[Path], search: Search, outcomes: Outcomes) -> Path | None:
    """Copies the run best/ of the part that has the best of all points, if it is there."""
    best = int(ranking.order(outcomes)[0])
    source = parts[best % len(parts)] / BEST
    wanted = Grid(*((value,) for value in search.points[best]))
    if not source.is_dir() or load_config(source)[1] != wanted:
        return None
    return Path(shutil.copytree(source, folder / BEST))
