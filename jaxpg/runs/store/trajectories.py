"""Files of whole episodes: written by `jaxpg record`, read as demonstrations.

An .npz file with, time first, T steps of B episodes:

    obs [T, B, ...], action [T, B, ...]   as the agent saw them, after any wrappers of the run
    reward [T, B], discount [T, B]        discount 0 where terminated, else 1
    mask [T, B]                           the step counts: from the start of each episode to its end
    log_prob [T, B]                       of the action under the policy that acted; may be absent
    environment                           its name, and the flags of the wrappers; may be absent
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
from jax.numpy import result_type

from jaxpg.envs import Box, Discrete, Env, Space
from jaxpg.runs.store.folder import declared_arrays, read_arrays, write_atomically
from jaxpg.types import Trajectory

NEEDED = ("obs", "action", "reward", "discount", "mask")


def write_trajectories(path: str | Path, trajectory: Trajectory, environment: str) -> None:
    """Writes whole episodes into an .npz file, whole or not at all."""
    fields = {name: np.asarray(getattr(trajectory, name)) for name in (*NEEDED, "log_prob")}
    arrays = cast(Any, fields | {"environment": np.array(environment)})
    write_atomically(Path(path), lambda file: np.savez_compressed(file, **arrays))


def read_trajectories(path: str | Path) -> tuple[Trajectory, str | None]:
    """Reads the episodes of a file and the name of their environment; a missing log_prob becomes NaN.

    Raises ValueError for a file that cannot be read or whose fields are missing or do not fit together.
    """
    declared = declared_arrays(path)
    missing = [name for name in NEEDED if name not in declared]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; episodes need {', '.join(NEEDED)} (jaxpg record)"
        )
    for name, (shape, dtype) in declared.items():
        _check_declared(path, name, shape, dtype, declared["mask"].shape)
    found = read_arrays(path, (*NEEDED, "log_prob", "environment"))
    if not np.isin(found["mask"], (0, 1)).all():
        raise ValueError(f"{path}: mask must be 1 where a step counts and 0 elsewhere")
    mask = found["mask"].astype(bool)
    if not mask[0].all() or (mask[1:] & ~mask[:-1]).any():
        raise ValueError(f"{path}: mask must be 1 from the first step of each episode to its end")
    discount = found["discount"]
    ends = mask & ~np.vstack([mask[1:], np.zeros_like(mask[:1])])
    if not ((discount == 1) | ((discount == 0) & ends))[mask].all():
        raise ValueError(
            f"{path}: discount must be 1, or 0 in the last step of an episode that terminated"
        )
    zeros = np.zeros(mask.shape, result_type(float))
    log_prob = found.get("log_prob", np.full(mask.shape, np.nan))
    if (log_prob[mask] > _largest()).any():
        raise ValueError(f"{path}: log_prob must be the logarithm of a density")
    fields: dict[str, Any] = {
        "obs": found["obs"],
        "action": found["action"],
        "log_prob": _floats(np.where(mask, log_prob, 0.0)),
        "reward": _floats(np.where(mask, _finite(path, "reward", found["reward"], mask), 0.0)),
        "discount": _floats(np.where(mask, found["discount"], 0.0)),
        "first": mask & (np.arange(len(mask))[:, None] == 0),
        "last": ends,
        "mask": mask,
        "value": zeros,
        "next_value": zeros,
    }
    name = str(found["environment"]) if "environment" in found else None
    return Trajectory(**fields), name


def read_demonstrations(path: str | Path, env: Env, environment: str) -> Trajectory:
    """Reads the episodes of a file as demonstrations for an environment.

    Raises ValueError for episodes of another environment or shape, for impossible actions, and for actions
    that the behaviour policy could not have taken.
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
    log_prob = np.asarray(trajectory.log_prob)
    if np.isneginf(log_prob[mask]).any():
        step, episode = np.argwhere(np.isneginf(log_prob) & mask)[0]
        raise ValueError(
            f"{path}: log_prob is -inf at step {step} of episode {episode}, an action that its policy "
            "cannot have taken; leave log_prob out to have it fitted"
        )
    if np.isnan(log_prob[mask]).any() != np.isnan(log_prob[mask]).all():
        raise ValueError(
            f"{path}: log_prob is NaN in {np.isnan(log_prob[mask]).sum()} of {mask.sum()} steps; give it "
            "for all of them, or leave it out to have it fitted"
        )
    changed: Any = {"obs": obs, "action": action}
    return trajectory._replace(**changed)


def _check_declared(path, name, shape, dtype, of_mask) -> None:
    """Raises ValueError for an array whose type or shape does not fit its name."""
    if name == "environment":
        if shape or dtype.kind != "U":
            raise ValueError(f"{path}: environment must be a name")
    elif name in (*NEEDED, "log_prob"):
        if len(of_mask) != 2 or 0 in of_mask:
            raise ValueError(f"{path}: mask has shape {of_mask}; it must be [steps, episodes]")
        if dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} must be numbers, not {dtype}")
        if shape != of_mask if name not in ("obs", "action") else shape[:2] != of_mask:
            raise ValueError(f"{path}: {name} has shape {shape}, and mask has {of_mask}")


def _finite(path, name, values, mask):
    """Returns the values. Raises ValueError if an array cannot hold one in a step that counts."""
    if not (np.abs(values[mask].astype(float)) <= _largest()).all():
        raise ValueError(f"{path}: {name} is not finite in a step that counts")
    return values


def _floats(values):
    with np.errstate(over="ignore"):  # in a step that does not count, or at the logarithm of 0
        return values.astype(result_type(float))


def _largest():
    return np.finfo(result_type(float)).max


def _fitting(path, what, values, space: Space, mask):
    if values.shape[2:] != space.shape:
        raise ValueError(
            f"{path}: {what} has shape {values.shape[2:]} per step; the environment's is {space.shape}"
        )
    _finite(path, what, values, mask)
    values = np.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)), values, 0)
    if isinstance(space, Box):
        return _floats(values)  # the environment clips actions outside its bounds
    if (values != np.round(values)).any():
        raise ValueError(f"{path}: {what} must be whole numbers for a {type(space).__name__}")
    sizes = np.asarray(space.n if isinstance(space, Discrete) else space.nvec)
    wrong = (values < 0) | (values >= sizes)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        raise ValueError(
            f"{path}: {what} {values[first]:g} at step {first[0]} of episode {first[1]} is impossible; "
            f"{'actions' if what == 'action' else 'observations'} are 0 to {(sizes - 1).max()}"
        )
    return values.astype(np.int32)
