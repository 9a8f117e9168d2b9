"""Trained policies: what a run has learnt, loaded to act elsewhere."""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.envs import Actor, Env, spaces, unwrapped
from jaxpg.lab.worlds.world import TABULATED, Checkpoint, tabulated
from jaxpg.policies import AgentParams, Network
from jaxpg.runs.config.config import points
from jaxpg.runs.console import say
from jaxpg.runs.store import folder as files
from jaxpg.runs.store.folder import PARAMS
from jaxpg.runs.train.build import Parts, build_algorithm, settings_of
from jaxpg.runs.train.saved import Run, choose, read_run, recast
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
