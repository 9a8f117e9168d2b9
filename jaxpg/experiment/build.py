"""From a configuration to what is trained: environment, agent, algorithm, trainer."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpg.algorithms import Algorithm, algorithm
from jaxpg.envs import Env, from_gymnax
from jaxpg.estimators.control_variates import CONTROL_VARIATES
from jaxpg.experiment.config import Config
from jaxpg.optimizers import OPTIMIZERS, SCHEDULES
from jaxpg.policies import NETWORKS, Agent, actor_critic
from jaxpg.policies.networks import ACTIVATIONS
from jaxpg.trainer import Trainer, make_trainer


class Parts(NamedTuple):
    env: Env
    agent: Agent
    trainer: Trainer


def build(config: Config) -> Parts:
    """The parts of a run. Raises ValueError for names that are unknown and parts that do not fit."""
    row = build_algorithm(config)
    # Names are looked up before the environment is made, which takes seconds.
    known(NETWORKS, "network", config.network)
    known(ACTIVATIONS, "activation", config.activation)
    env = from_gymnax(config.environment)
    # Not every network has hidden layers or an activation.
    accepted = inspect.signature(NETWORKS[config.network]).parameters
    settings = {
        name: getattr(config, name)
        for name in ("hidden", "activation", "initial_std")
        if name in accepted
    }
    agent = actor_critic(env, config.network, **settings)
    if row.critic_optimizer is None:
        agent = agent._replace(critic=None)
    trainer = make_trainer(env, agent, row, num_envs=config.num_envs, num_steps=config.num_steps)
    return Parts(env, agent, trainer)


def build_algorithm(config: Config) -> Algorithm:
    """The row of the algorithm table with the configuration's settings. Raises ValueError."""
    row = algorithm(config.algorithm)
    if row.imitates:
        raise ValueError(
            f"{config.algorithm} imitates demonstrations, which the command line cannot give yet; "
            "train it from Python with jaxpg.train(trainer, state, hyperparams, demonstrations, ...)"
        )
    if row.critic_optimizer is None and config.critic_epochs:
        raise ValueError(
            f"critic_epochs={config.critic_epochs}, but {config.algorithm} has no critic; "
            "leave it out, or use vpg or ppo"
        )
    optimizer = known(OPTIMIZERS, "optimizer", config.optimizer)
    variate = config.control_variate
    return row._replace(
        policy_optimizer=optimizer,
        critic_optimizer=optimizer if row.critic_optimizer else None,
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
        critic_epochs=config.critic_epochs,
        schedule=known(SCHEDULES, "schedule", config.schedule),
        control_variate=variate and known(CONTROL_VARIATES, "control variate", variate),
        measure_noise=config.measure_noise,
    )


def known(table: Mapping[str, Any], what: str, name: str) -> Any:
    """An entry of a table. Raises ValueError, with near matches, for an unknown name."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or table
        raise ValueError(f"unknown {what} {name!r}; did you mean {', '.join(near)}?")
    return table[name]
