"""Trained policies: what a run has learnt, loaded to act elsewhere."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Actor, Env, spaces, unwrapped
from jaxpg.lab.worlds.world import TABULATED, Checkpoint, tabulated
from jaxpg.policies import Agent, AgentParams, Network, init_params
from jaxpg.runs.config.config import Config, Grid, load_config, num_points, points
from jaxpg.runs.console import say
from jaxpg.runs.host import health
from jaxpg.runs.store import checkpoint as checkpoints
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.evaluation import read_evaluation
from jaxpg.runs.store.folder import CHECKPOINTS, EVALUATION, PARAMS, declared_arrays, read_arrays
from jaxpg.runs.train.build import Parts, build, build_algorithm, settings_of
from jaxpg.types import Array, Carry, Key


class Policy(NamedTuple):
    """A policy with fixed parameters, which acts on observations of the environment without wrappers.

    It contains the run's wrappers: it keeps entries, fills histories, repeats actions, and gives one action
    of the plain environment per step. step is pure. act hides the carry of a recurrent network and of
    wrappers: it remembers each lane since its last observation with first=True (and starts anew when the
    number of lanes changes), so use it for one stream of observations, and not inside jit.
    """

    initial_carry: Callable[[int], Carry]  # of B lanes
    # (key, obs [B, ...], carry, first [B]) -> (action [B, ...], carry)
    step: Callable[[Key, Array, Carry, Array], tuple[Array, Carry]]
    act: Callable[..., Array]  # (key, obs, first=False): obs of one environment, or [B, ...]
    env: Env  # without the run's wrappers
    params: AgentParams
    replica: int
    seed: int


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


def load_policy(
    run: str | Path,
    replica: int | str | None = None,
    *,
    greedy: bool = False,
    update: int | str | None = None,
) -> Policy:
    """Loads the policy that a run has learnt.

    replica: its number in the order of config.json; "best" (and None) is the highest mean return in the
    final evaluation. greedy: the distribution's mode instead of a sample. update: the checkpoint to load, or
    "best" for the one with the highest training return; the end of the run by default. Actions are
    clipped to the action space. Raises ValueError if this is not a run, or it has no such replica or
    checkpoint; warns if jax here converts the parameters to another precision.

    >>> load_policy("runs/none")
    Traceback (most recent call last):
    ValueError: runs/none has ...
    """
    found = read_run(run, update)
    if said := recast(found):
        warnings.warn(said, stacklevel=2)
    return policy_of(found, replica, greedy)


def policy_of(run: Run, replica: int | str | None, greedy: bool = False) -> Policy:
    """`load_policy` for a run that has been read."""
    chosen = choose(run, replica)
    params = jax.tree.map(lambda x: jnp.asarray(x[chosen]), run.params)
    return _policy(run.parts, params, greedy, chosen, chosen % run.config.seeds)


def recast(run: Run) -> str:
    """A note that jax here converts the run's parameters to another precision; "" if it does not."""
    here = str(jnp.result_type(float))
    if run.stored in ("", here):
        return ""
    return (
        f"the parameters of {run.folder} are {run.stored}, and become {here}; "
        f"JAX_ENABLE_X64={int(run.stored == 'float64')} leaves them as they are"
    )


def load(run: str, replica: int = 0) -> Checkpoint:
    """Loads one of a run's replicas for the laboratory. Raises ValueError."""
    found = read_run(run)
    if said := recast(found):
        say(said)
    chosen = choose(found, replica)
    params = jax.tree.map(lambda x: jnp.asarray(x[chosen]), found.params)
    config, env = found.config, found.parts.env
    point, seed = points(found.grid)[chosen // config.seeds], chosen % config.seeds
    wrapped = config.repeat > 1 or config.history is not None or bool(config.keep)
    if (
        build_algorithm(config).data.whole_episodes
        and (config.num_steps or env.horizon) < env.horizon
    ):
        # Episodes end where training cut them.
        env, wrapped = env._replace(horizon=config.num_steps), True
    tables = None
    if config.environment in TABULATED and not wrapped:
        tables = partial(tabulated, config.environment, **settings_of(config))
    origin = {
        "run": str(found.folder),
        "update": _update_of(found),
        "replica": chosen,
        "seed": seed,
        "config": asdict(config),
        "hyperparameters": point._asdict(),
    }
    return Checkpoint(config.environment, env, found.parts.agent, params, point, tables, origin)


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


def greedily(network: Network) -> Network:
    """The policy that always takes its distribution's mode; log-probs stay the distribution's."""

    class Greedy(NamedTuple):
        distribution: Any

        def sample(self, key):
            del key
            return self.distribution.mode()

        def log_prob(self, action):
            return self.distribution.log_prob(action)

    def apply(params, carry, obs, first):
        carry, distribution = network.apply(params, carry, obs, first)
        return carry, Greedy(distribution)

    return network._replace(apply=apply)


def _policy(parts: Parts, params: AgentParams, greedy: bool, replica: int, seed: int) -> Policy:
    network = parts.agent.policy

    def step(key, obs, carry, first):
        carry, distribution = network.apply(params.policy, carry, obs[None], first[None])
        distribution = jax.tree.map(lambda x: x[0], distribution)
        action = distribution.mode() if greedy else distribution.sample(key)
        return jax.vmap(partial(spaces.clip, parts.env.action))(action), carry

    env, actor = unwrapped(parts.env, Actor(network.initial_carry, step))
    compiled = jax.jit(actor.step)
    memory: dict[str, Any] = {}

    def act(key, obs, first=False):
        obs = jnp.asarray(obs)
        rank = len(env.observation.shape)
        if (
            obs.ndim not in (rank, rank + 1)
            or obs.shape[obs.ndim - rank :] != env.observation.shape
        ):
            raise ValueError(
                f"an observation has shape {env.observation.shape}, several have one axis more; "
                f"got {obs.shape}"
            )
        lanes = obs if obs.ndim > rank else obs[None]
        carry = memory.get("carry")
        if carry is None or memory["lanes"] != len(lanes):
            carry = actor.initial_carry(len(lanes))
        first = jnp.broadcast_to(jnp.asarray(first, bool), len(lanes))
        action, carry = compiled(key, lanes, carry, first)
        if jax.tree.leaves(carry):
            memory.update(carry=carry, lanes=len(lanes))
        return action if obs.ndim > rank else action[0]

    return Policy(*actor, act, env, params, replica, seed)


def _update_of(run: Run) -> int | None:
    """The number of updates that made a run's parameters; None if an older file does not say."""
    if run.update is not None:
        return run.update
    about = files.about_params(run.folder / PARAMS)
    return about["updates"] if about else None


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
