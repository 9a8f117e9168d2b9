"""Checkpoints: the final parameters of a run, read back from its folder."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.experiment.build import build
from jaxpg.experiment.config import Config
from jaxpg.experiment.folder import CONFIG, PARAMS
from jaxpg.lab.worlds import Checkpoint
from jaxpg.policies import init_params


def load(run: str, replica: int = 0) -> Checkpoint:
    """Policy and critic of one replica (seed and setting, in the order of config.json) of a run.

    Raises ValueError for a folder that is no finished run, and for a replica that it has not.
    """
    folder = Path(run)
    for name in (CONFIG, PARAMS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; name the folder of a finished jaxpg train run"
            )
    try:
        config = _config(json.loads((folder / CONFIG).read_text())["config"])
        with np.load(folder / PARAMS) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the run in {folder}: {error}") from error
    count = len(next(iter(arrays.values())))
    if not 0 <= replica < count:
        raise ValueError(f"{folder} has replicas 0 to {count - 1}, not {replica}")
    parts = build(config)
    shapes = jax.eval_shape(lambda key: init_params(parts.agent, key), jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    found = []
    for place, shape in leaves:
        name = jax.tree_util.keystr(place, simple=True, separator="/")
        if name not in arrays or arrays[name].shape[1:] != shape.shape:
            raise ValueError(
                f"{folder / PARAMS} does not hold {name} {shape.shape} of its own config"
            )
        found.append(jnp.asarray(arrays[name][replica]))
    params = jax.tree_util.tree_unflatten(structure, found)
    return Checkpoint(config.environment, parts.env, parts.agent, params)


def _config(saved: dict[str, Any]) -> Config:
    known = {f.name for f in fields(Config)}
    settings: dict[str, Any] = {name: value for name, value in saved.items() if name in known}
    settings["hidden"] = tuple(settings["hidden"])  # JSON has lists only
    return Config(**settings)
