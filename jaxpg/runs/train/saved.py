"""Runs read back: the parameters of all replicas of a finished or interrupted run, from its folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.policies import Agent, AgentParams, init_params
from jaxpg.runs.config.config import Config, Grid, load_config, num_points
from jaxpg.runs.host import health
from jaxpg.runs.store import checkpoint as checkpoints
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.evaluation import read_evaluation
from jaxpg.runs.store.folder import CHECKPOINTS, EVALUATION, PARAMS, declared_arrays, read_arrays
from jaxpg.runs.train.build import Parts, build
from jaxpg.training.data import referring


class Run(NamedTuple):
    """A finished or interrupted run, read back from its folder."""

    folder: Path
    config: Config
    grid: Grid
    parts: Parts
    params: AgentParams  # [N, ...] of every replica
    update: int | None  # of the checkpoint that held the parameters; None: the end of the run
    diverged: np.ndarray  # [N] bool: there is no policy
    stored: str  # the type of float that the parameters were stored as


def recast(run: Run) -> str:
    """A note that jax here converts the run's parameters to another precision; "" if it does not."""
    here = str(jnp.result_type(float))
    if run.stored in ("", here):
        return ""
    return (
        f"the parameters of {run.folder} are {run.stored}, and become {here}; "
        f"JAX_ENABLE_X64={int(run.stored == 'float64')} leaves them as they are"
    )


def read_run(run: str | Path, update: int | str | None = None) -> Run:
    """Reads a run with the parameters of all its replicas. Raises ValueError."""
    folder = Path(run)
    config, grid = load_config(folder)
    parts, count = build(config), num_points(grid) * config.seeds
    if update is None and (folder / PARAMS).is_file():
        params, stored = _read_params(folder, parts.agent, grid, config.seeds)
        good = health.finite(params)
        evaluation = read_evaluation(folder, len(good))
        returns = evaluation["mean_return"] if evaluation else [0.0] * len(good)
        gone = ~good | np.array([each is None for each in returns])
        return Run(folder, config, grid, parts, params, None, gone, stored)
    keys = jax.ShapeDtypeStruct((count,), jax.random.key(0, impl="threefry2x32").dtype)
    shapes = jax.eval_shape(jax.vmap(parts.trainer.init), keys)
    place, settings = folder / CHECKPOINTS, files.settings(folder)
    while True:
        chosen = _chosen(folder, update)
        try:
            state, host = checkpoints.restore_run(place, chosen, shapes, count, settings)
        except ValueError:
            # A process that trains may have removed it for a newer one: choose again.
            if checkpoints.removed(place / str(chosen)):
                continue
            raise
        gone = ~health.finite(state.params)
        gone[[int(replica) for replica in host["record"]["diverged"]]] = True
        leaves = host["leaves"].items()
        stored = _floats(leaf["dtype"] for name, leaf in leaves if name.startswith("params."))
        return Run(folder, config, grid, parts, state.params, chosen, gone, stored)


def _floats(types: Iterable[str]) -> str:
    """The first type of float among some types; "" if there is none."""
    return next((each for each in types if each.startswith("float")), "")


def _chosen(folder: Path, update: int | str | None) -> int:
    """The number of updates of the checkpoint that is asked for. Raises ValueError."""
    saved = checkpoints.steps(folder / CHECKPOINTS)
    if not saved:
        raise ValueError(
            f"{folder} has neither {PARAMS} nor a checkpoint: it has learnt nothing yet"
        )
    if update == "best":
        return checkpoints.best(folder / CHECKPOINTS)
    if update is None:
        return saved[-1]
    if update not in saved:
        raise ValueError(
            f"{folder} has no checkpoint of {update} updates; it has {', '.join(map(str, saved))}"
        )
    return int(update)


def choose(run: Run, replica: int | str | None) -> int:
    """A replica's number; "best" and None: that with the highest evaluated return. Raises ValueError."""
    count = len(jax.tree.leaves(run.params)[0])
    if isinstance(replica, int):
        if not 0 <= replica < count:
            raise ValueError(f"{run.folder} has replicas 0 to {count - 1}, not {replica}")
        if run.diverged[replica]:
            raise ValueError(
                f"replica {replica} of {run.folder} has diverged, so it has no policy; "
                + _others(np.flatnonzero(~run.diverged))
            )
        return replica
    if replica not in (None, "best"):
        raise ValueError(f"replica={replica!r} must be a number from 0 to {count - 1}, or 'best'")
    if count == 1:
        return choose(run, 0)
    evaluation = read_evaluation(run.folder, count)
    if evaluation is None:
        raise ValueError(
            f"{run.folder} has no evaluation to choose the best replica by; name one from 0 to "
            f"{count - 1}, or finish the run with jaxpg train --resume {run.folder}"
        )
    returns = np.where(run.diverged, np.nan, np.array(evaluation["mean_return"], float))
    if np.isnan(returns).all():
        raise ValueError(
            f"{run.folder / EVALUATION} has no return to choose by; name a replica from 0 to "
            f"{count - 1}"
        )
    return int(np.nanargmax(returns))


def _others(good: np.ndarray) -> str:
    if not len(good):
        return "nor has any other of this run"
    return f"name another, such as {good[0]}"


def _read_params(folder: Path, agent: Agent, grid: Grid, seeds: int) -> tuple[AgentParams, str]:
    """Reads the parameters of every replica, [N, ...], and the type of float that they were stored as.

    Raises ValueError, naming the array that does not fit the run.
    """
    path, count = folder / PARAMS, num_points(grid) * seeds
    about = files.about_params(path)
    checkpoints.check_settings(path, about and about["settings"], files.settings(folder))
    shapes = jax.eval_shape(lambda key: init_params(agent, key), jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    expected = {
        jax.tree_util.keystr(place, simple=True, separator="/"): leaf for place, leaf in leaves
    }
    declared = declared_arrays(path)
    for name, leaf in expected.items():
        shape, found = (count, *leaf.shape), declared.get(name)
        # Another precision is converted to the expected one.
        if found is None or (found.shape, found.dtype.kind) != (shape, leaf.dtype.kind):
            has = "lacks it" if found is None else f"has {found.dtype}{found.shape}"
            raise ValueError(
                f"{path} does not hold {name} as its config asks, {leaf.dtype}{shape}: it {has}"
            )
    arrays = read_arrays(path, expected)
    evaluation = read_evaluation(folder, count)
    # A run of one setting ends when it diverges; in a grid the others go on.
    diverged = np.full(count, num_points(grid) > 1)
    if evaluation is not None:
        diverged = np.array([each is None for each in evaluation["mean_return"]])
    for name, array in arrays.items():
        good = diverged | health.finite({name: array})
        if not good.all():
            raise ValueError(
                f"{path} is damaged: {name} is not finite in replica {good.argmin()}, which did not diverge"
            )
    params = jax.tree.unflatten(structure, [arrays[k].astype(x.dtype) for k, x in expected.items()])
    return params, _floats(str(array.dtype) for array in arrays.values())


# Settings that change what a network's parameters mean, but not their shapes.
MEANINGS = ("network", "activation", "stride", "distribution", "keep", "history")


def referred(parts: Parts, config: Config) -> Parts:
    """The parts of a run whose reference policy is that of the run that the configuration names.

    It is the best of its replicas, the same for all seeds. Raises ValueError for a policy of another shape.
    """
    if config.reference is None:
        return parts
    found = read_run(config.reference)
    chosen, trainer = choose(found, None), parts.trainer
    params = jax.tree.map(lambda x: jnp.asarray(x[chosen]), found.params.policy)
    own = jax.eval_shape(parts.agent.policy.init, jax.random.key(0))
    here, there = map(_shapes, (own, params))
    here |= {name: getattr(config, name) for name in MEANINGS}
    there |= {name: getattr(found.config, name) for name in MEANINGS}
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"reference={config.reference}: its policy has {name}={there.get(name)}, and this run's "
                f"{name}={here.get(name)}; give both the same network and environment"
            )

    def init(key):
        state = trainer.init(key)
        return state._replace(data=referring(state.data, params))

    return parts._replace(trainer=trainer._replace(init=init))


def _shapes(params) -> dict[str, tuple[int, ...] | None]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(place, simple=True, separator="/"): x.shape for place, x in leaves}
