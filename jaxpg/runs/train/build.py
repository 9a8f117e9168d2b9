"""Builds what a configuration trains: environment, agent, algorithm and trainer."""

import difflib
import inspect
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxpg.envs import Env, history, make_env, mask_observation, repeat_action, squashed
from jaxpg.estimators import describe
from jaxpg.estimators.control_variates import CONTROL_VARIATES
from jaxpg.estimators.importance import IMPORTANCES
from jaxpg.estimators.reference import REGULARISERS
from jaxpg.optimizers import BATCH_SCALINGS, OPTIMIZERS, SCHEDULES, batch_scaled
from jaxpg.optimizers.adaptation import ADAPTATIONS, fixed, kl_penalty
from jaxpg.optimizers.natural import NATURAL_OPTIMIZERS
from jaxpg.policies import DISTRIBUTIONS, Agent, actor_critic, network_builder
from jaxpg.policies.heads import SQUASHING, Settings
from jaxpg.policies.layers import ACTIVATIONS, PRECISIONS, precision_of
from jaxpg.runs.config.config import Config
from jaxpg.runs.config.rows import counts_of
from jaxpg.runs.console import shortened
from jaxpg.runs.store.trajectories import read_demonstrations
from jaxpg.training.algorithm import Algorithm, algorithm
from jaxpg.training.data import mixture, replay, with_reference
from jaxpg.training.imitation import informed
from jaxpg.training.scaling import scaled
from jaxpg.training.trainer import Trainer, make_trainer
from jaxpg.types import Trajectory


class Parts(NamedTuple):
    env: Env
    agent: Agent
    trainer: Trainer
    demonstrations: Trajectory | None = None


def build(config: Config) -> Parts:
    """Builds the parts of a run. Raises ValueError for unknown names and parts that do not fit."""
    row = build_algorithm(config)
    # Names come first, because making the environment takes seconds.
    builder = network_builder(config.network)
    known(ACTIVATIONS, "activation", config.activation)
    precision = precision_of(config.precision)
    known(PRECISIONS, "precision", precision)
    if config.distribution is not None:
        known(DISTRIBUTIONS, "distribution", config.distribution)
    # In older versions, gymnax's 32-bit values become 64-bit in a mapped scan.
    if jax.config.read("jax_enable_x64") and not hasattr(jax, "enable_x64"):
        raise ValueError(
            f"64 bits need jax 0.8 or newer, and this is {jax.__version__}; update it, or leave out "
            "JAX_ENABLE_X64"
        )
    env = wrapped(make_env(config.environment, **settings_of(config)), config)
    # Not every network has hidden layers or an activation.
    accepted = inspect.signature(builder).parameters
    given = {**vars(config), "precision": precision}
    settings = {
        name: given[name]
        for name in ("hidden", "channels", "stride", "activation", "layer_norm", "precision")
        if name in accepted
    } | {name: getattr(config, name) for name in Settings.__annotations__}
    agent = actor_critic(
        env,
        config.network,
        normalise=config.normalise,
        shared_torso=config.shared_torso,
        **settings,
    )
    if row.critic_optimizer is None:
        agent = agent._replace(critic=None)
    trainer = make_trainer(env, agent, row, num_envs=config.num_envs, num_steps=config.num_steps)
    return Parts(env, agent, trainer)


def settings_of(config: Config) -> dict[str, Any]:
    """The environment's settings: numbers, true or false, or words. Raises ValueError for another form."""
    settings = {}
    for part in config.settings.split(",") if config.settings else ():
        name, _, value = (word.strip() for word in part.partition("="))
        if not (name.isidentifier() and value):
            raise ValueError(
                f"settings={config.settings}: {shortened(part)!r} is not name=value, as in size=16"
            )
        try:
            settings[name] = json.loads(value.lower())
        except ValueError:  # not JSON, or a number with too many digits
            settings[name] = value
    return settings


def instructed(parts: Parts, config: Config) -> Parts:
    """Adds the demonstrations that the configuration names to the parts of a run. Raises ValueError.

    Separate from build, because a finished run's policy can be loaded without them.
    """
    if not config.demonstrations:
        return parts
    env, agent, trainer, _ = parts
    demonstrations = read_demonstrations(config.demonstrations, env, named(config))
    row = build_algorithm(config)
    if config.imitate:
        init = informed(
            trainer, env, agent.policy, row, demonstrations, config.imitate, config.warm_start
        )
        trainer = trainer._replace(init=init)
    return Parts(env, agent, trainer, demonstrations if row.data.demonstrations else None)


def wrapped(env: Env, config: Config) -> Env:
    """The environment as the agent sees it: entries kept, actions repeated, a history, actions squashed."""
    if config.keep:
        env = mask_observation(env, config.keep)
    if config.repeat > 1:
        env = repeat_action(env, config.repeat)
    if config.history is not None:
        env = history(env, config.history)
    return squashed(env) if config.distribution in SQUASHING else env


def named(config: Config) -> str:
    """The name of a wrapped environment: its own, and the flags of its wrappers."""
    parts = [config.environment]
    if config.keep:
        parts.append(f"--keep {','.join(map(str, config.keep))}")
    if config.repeat > 1:
        parts.append(f"--repeat {config.repeat}")
    if config.history is not None:
        parts.append(f"--history {config.history}")
    if config.distribution in SQUASHING:
        parts.append(f"--distribution {config.distribution}")
    return " ".join(parts)


def build_algorithm(config: Config) -> Algorithm:
    """The row of the algorithm table with the configuration's settings. Raises ValueError."""
    row, counts = algorithm(config.algorithm, config.group_size), counts_of(config)
    if (row.data.demonstrations or config.imitate) and not config.demonstrations:
        raise ValueError(
            f"{config.algorithm} learns from demonstrations; give --demonstrations FILE, as written "
            "by jaxpg record"
            if not config.imitate
            else f"imitate={config.imitate} needs demonstrations; give --demonstrations FILE"
        )
    if config.demonstrations and not (row.data.demonstrations or config.imitate):
        raise ValueError(
            f"{config.algorithm} does not read demonstrations; use guided or behaviour_cloning, or "
            "--imitate UPDATES --warm-start"
        )
    if config.imitate and not (row.data is mixture or config.warm_start):
        raise ValueError("imitate fits a policy that nothing uses; add --warm-start")
    if row.data is mixture and not config.imitate:
        raise ValueError(
            "guided weighs its own episodes by the demonstrators' density, which behaviour cloning "
            "fits; give --imitate UPDATES, such as 200"
        )
    if row.critic_optimizer is None and counts["critic_epochs"]:
        raise ValueError(
            f"critic_epochs={counts['critic_epochs']}, but {config.algorithm} has no critic; "
            "leave it out, or use vpg, a2c, ppo or trpo"
        )
    optimizer = known(OPTIMIZERS, "optimizer", config.optimizer)
    # A natural-gradient row fixes its policy's optimizer, so the flag sets only the critic's.
    natural_row = row.policy_optimizer in NATURAL_OPTIMIZERS
    estimator, adaptation = row.estimator, row.adaptation
    if config.importance:
        slot = known(IMPORTANCES, "importance", config.importance)
        estimator = estimator._replace(importance=slot)
    if config.adaptation:
        adaptation = known(ADAPTATIONS, "adaptation", config.adaptation)
    variate = config.control_variate
    data = row.data if config.num_batches is None else replay(row.data, config.num_batches)
    if config.kl_estimate is not None:
        if adaptation is kl_penalty or "kl_penalised" in describe(estimator.surrogate):
            raise ValueError(
                f"kl_estimate={config.kl_estimate}: kl_coef weighs the KL of each update already; use an "
                "algorithm other than ppo_kl, without --adaptation kl_penalty"
            )
        estimator = known(REGULARISERS, "KL estimate", config.kl_estimate)(estimator)
        data = with_reference(data)
    elif config.reference is not None:
        raise ValueError(
            f"reference={config.reference} is there for an estimate of the KL; give --kl-estimate reward, or "
            "k1, k2 or k3"
        )
    return row._replace(
        estimator=estimator,
        data=scaled(data) if config.normalise_rewards else data,
        policy_optimizer=row.policy_optimizer if natural_row else optimizer,
        critic_optimizer=optimizer if row.critic_optimizer else None,
        **counts,
        adaptation=adaptation,
        fisher_samples=config.fisher_samples,
        measure_kl=row.measure_kl or adaptation is not fixed,
        schedule=_schedule(config, row.data.whole_episodes),
        control_variate=variate and known(CONTROL_VARIATES, "control variate", variate),
        measure_noise=config.measure_noise,
    )


def _schedule(config, whole_episodes):
    schedule = known(SCHEDULES, "schedule", config.schedule)
    if not known(BATCH_SCALINGS, "batch scaling", config.batch_scaling):
        return schedule
    if config.reference_batch is None:
        raise ValueError(
            f"batch_scaling={config.batch_scaling} needs the batch size that the learning rates are "
            "tuned for; give reference_batch"
        )
    batch = config.num_envs * (1 if whole_episodes else config.num_steps or 128)
    return batch_scaled(schedule, config.batch_scaling, batch, config.reference_batch)


def known(table: Mapping[str, Any], what: str, name: str) -> Any:
    """An entry of a table. Raises ValueError, with near matches, for an unknown name."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or table
        raise ValueError(f"unknown {what} {name!r}; did you mean {', '.join(near)}?")
    return table[name]
