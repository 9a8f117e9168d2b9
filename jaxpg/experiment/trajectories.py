"""Files of whole episodes: written by `jaxpg record`, read as demonstrations.

An .npz file with, time first, T steps of B episodes:

    obs [T, B, ...], action [T, B, ...]   as the environment has them
    reward [T, B], discount [T, B]        discount 0 where terminated, else 1
    mask [T, B]                           the step counts: from the start of each episode to its end
    log_prob [T, B]                       of the action under whoever acted; may be absent
    environment                           its name; may be absent
"""

import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxpg.envs import Box, Discrete, Env, Space
from jaxpg.experiment.folder import write_atomically
from jaxpg.types import Trajectory

NEEDED = ("obs", "action", "reward", "discount", "mask")


def write_trajectories(path: str | Path, trajectory: Trajectory, environment: str) -> None:
    """Whole episodes into an .npz file, written whole or not at all."""
    fields = {name: np.asarray(getattr(trajectory, name)) for name in (*NEEDED, "log_prob")}
    arrays = cast(Any, fields | {"environment": np.array(environment)})
    write_atomically(Path(path), lambda file: np.savez_compressed(file, **arrays))


def read_trajectories(path: str | Path) -> tuple[Trajectory, str | None]:
    """The episodes of a file and the name of their environment; log_prob is NaN where the file has none.

    Raises ValueError for a file that cannot be read or whose fields are missing or do not fit together.
    """
    try:
        # Opened here, because numpy leaves a file open that turns out to be no archive.
        with open(path, "rb") as stream, np.load(stream) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; episodes need {', '.join(NEEDED)} (jaxpg record)"
        )
    mask = found["mask"].astype(bool)
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"{path}: mask has shape {mask.shape}; it must be [steps, episodes]")
    for name in (*NEEDED, "log_prob"):
        if name in found and found[name].shape[:2] != mask.shape:
            raise ValueError(
                f"{path}: {name} has shape {found[name].shape}, and mask has {mask.shape}"
            )
    if not mask[0].all() or (mask[1:] & ~mask[:-1]).any():
        raise ValueError(f"{path}: mask must be 1 from the first step of each episode to its end")
    zeros = np.zeros(mask.shape, np.float32)
    log_prob = found.get("log_prob", np.full(mask.shape, np.nan)).astype(np.float32)
    fields: dict[str, Any] = {
        "obs": found["obs"],
        "action": found["action"],
        "log_prob": np.where(mask, log_prob, np.float32(0)),
        "reward": np.where(mask, found["reward"], 0.0).astype(np.float32),
        "discount": np.where(mask, found["discount"], 0.0).astype(np.float32),
        "first": mask & (np.arange(len(mask))[:, None] == 0),
        "last": mask & ~np.vstack([mask[1:], np.zeros_like(mask[:1])]),
        "mask": mask,
        "value": zeros,
        "next_value": zeros,
    }
    name = str(found["environment"]) if "environment" in found else None
    return Trajectory(**fields), name


def read_demonstrations(path: str | Path, env: Env, environment: str) -> Trajectory:
    """The episodes of a file as demonstrations for an environment.

    Raises ValueError for those of another environment or shape, for impossible actions, and for actions
    that their own behaviour could not have taken.
    """
    trajectory, name = read_trajectories(path)
    if name not in (None, environment):
        raise ValueError(f"{path} holds episodes of {name}, not of {environment}")
    mask = np.asarray(trajectory.mask)
    if len(mask) > env.horizon:
        raise ValueError(
            f"{path} has episodes of {len(mask)} steps; {environment} ends after {env.horizon}"
        )
    obs = _fitting(path, "obs", np.asarray(trajectory.obs), env.observation, mask)
    action = _fitting(path, "action", np.asarray(trajectory.action), env.action, mask)
    _check_possible(path, action, env.action, mask)
    log_prob = np.asarray(trajectory.log_prob)
    if np.isneginf(log_prob[mask]).any():
        step, episode = np.argwhere(np.isneginf(log_prob) & mask)[0]
        raise ValueError(
            f"{path}: log_prob is -inf at step {step} of episode {episode}: its behaviour could not have "
            "acted so; leave log_prob out to have it fitted"
        )
    if np.isnan(log_prob[mask]).any() != np.isnan(log_prob[mask]).all():
        raise ValueError(
            f"{path}: log_prob is NaN in {np.isnan(log_prob[mask]).sum()} of {mask.sum()} steps; give it "
            "for all of them, or leave it out to have it fitted"
        )
    changed: Any = {"obs": obs, "action": action}
    return trajectory._replace(**changed)


def _fitting(path, what, values, space: Space, mask):
    if values.shape[2:] != space.shape:
        raise ValueError(
            f"{path}: {what} has shape {values.shape[2:]} per step; the environment's is {space.shape}"
        )
    if not isinstance(space, Box):
        if (values[mask] != np.round(values[mask])).any():
            raise ValueError(f"{path}: {what} must be whole numbers for a {type(space).__name__}")
        values = values.astype(np.int32)
    elif not np.isfinite(values[mask]).all():
        raise ValueError(f"{path}: {what} is not finite in a step that counts")
    else:
        values = values.astype(np.float32)
    return np.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)), values, 0)


def _check_possible(path, action, space: Space, mask):
    if isinstance(space, Box):
        return  # the environment clips what is outside
    sizes = np.asarray(space.n if isinstance(space, Discrete) else space.nvec)
    wrong = (action < 0) | (action >= sizes)
    wrong &= mask.reshape(mask.shape + (1,) * (wrong.ndim - 2))
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        raise ValueError(
            f"{path}: action {action[first]} at step {first[0]} of episode {first[1]} is impossible; "
            f"actions are 0 to {(sizes - 1).max()}"
        )
