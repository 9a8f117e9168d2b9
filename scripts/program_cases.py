"""The programs that scripts/benchmark programs compiles: jaxpg's, and rejax's in the same settings."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Program(NamedTuple):
    function: Callable
    arguments: tuple  # shapes
    steps: int  # of environments in an update
    updates: int = 1


def _numbers() -> Any:
    import jax

    from jaxpg import Hyperparams

    return jax.eval_shape(lambda: jax.tree.map(jax.numpy.float32, Hyperparams()))


def _shapes(function: Callable, count: int, *arguments: Any) -> Any:
    import jax

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    return jax.eval_shape(jax.vmap(function), keys, *arguments)


def _training(
    name,
    environment,
    agents,
    envs,
    steps,
    precision,
    network="mlp",
    hidden=(64, 64),
    limit=None,
    **counts,
):
    """One update of a row. limit: the longest episode, by default the environment's."""
    import jax

    from jaxpg import episodes, make_trainer
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic, init_params
    from jaxpg.training.algorithm import algorithm

    env = from_gymnax(environment, **({} if limit is None else {"max_steps_in_episode": limit}))
    agent = actor_critic(env, network, hidden=hidden, **precision)
    row = algorithm(name)._replace(**counts)
    trainer = make_trainer(env, agent, row, num_envs=envs, num_steps=steps)
    update, common, key = trainer.update, (), jax.random.key(0)
    if row.data.demonstrations:
        alone = agent._replace(critic=None)
        shown = jax.eval_shape(lambda: episodes(env, alone, init_params(alone, key), key, envs))
        common = shown[:1]
    state = jax.eval_shape(trainer.init, key)
    if agents > 1:
        update = jax.vmap(update, (0, None, *(None for _ in common)))
        state = _shapes(trainer.init, agents)
    steps = agents * envs * (steps or env.horizon)
    return Program(update, (state, _numbers(), *common), steps)


def _ppo(agents, envs, steps, precision, environment="CartPole-v1", network="mlp"):
    counts = {"num_epochs": 4, "num_minibatches": 4}
    return _training("ppo", environment, agents, envs, steps, precision, network, **counts)


def _evaluation(episodes, precision):
    import jax

    from jaxpg import evaluate
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic, init_params

    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, hidden=(64, 64), **precision)
    params, key = jax.eval_shape(lambda key: (init_params(agent, key), key), jax.random.key(0))
    run = partial(evaluate, env, agent, num_episodes=episodes)
    return Program(run, (params, key), episodes * env.horizon)


def _statistics(trajectories, precision):
    import jax

    from jaxpg.envs import from_gymnax
    from jaxpg.estimators import Estimator
    from jaxpg.lab import Source
    from jaxpg.lab.measure import statistics
    from jaxpg.policies import mlp

    env = from_gymnax("CartPole-v1")
    policy = mlp(env.observation, env.action, **precision)

    def run(params, key, hyperparams):
        taken = Source(env, policy, Estimator(), params, key, hyperparams)
        # The part of gradient_statistics that is compiled.
        return statistics._measure(taken, *statistics.plan(taken, trajectories, None))

    params, key = jax.eval_shape(lambda key: (policy.init(key), key), jax.random.key(0))
    return Program(run, (params, key, _numbers()), trajectories * env.horizon)


def _command(seeds, precision):
    """A chunk of `jaxpg train CartPole-v1 --seeds N`; by default 8, in the quickstart notebook 256."""
    import jax

    from jaxpg import make_trainer, train
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic
    from jaxpg.runs.config.presets import preset
    from jaxpg.runs.train.build import build_algorithm
    from jaxpg.runs.train.loop import chunk_length

    config, _ = preset("CartPole-v1", "ppo")
    env = from_gymnax(config.environment)
    agent = actor_critic(env, hidden=config.hidden, **precision)
    row = build_algorithm(config)
    trainer = make_trainer(env, agent, row, num_envs=config.num_envs, num_steps=config.num_steps)
    updates = chunk_length(config.updates)
    run = jax.vmap(partial(train, trainer, num_updates=updates), (0, None))
    steps = seeds * config.num_envs * (config.num_steps or 128)
    return Program(run, (_shapes(trainer.init, seeds), _numbers()), steps, updates)


# Names say AGENTS x ENVIRONMENTS x STEPS. PPO takes 4 epochs of 4 minibatches; networks are 2x64 tanh.
CASES: dict[str, Callable[[dict[str, str]], Program]] = {
    "ppo-1x4096x128": partial(_ppo, 1, 4096, 128),
    "ppo-8x16x64": partial(_ppo, 8, 16, 64),
    "ppo-256x4x128": partial(_ppo, 256, 4, 128),
    "ppo-2048x4x128": partial(_ppo, 2048, 4, 128),
    "ppo-gru-8x16x64": partial(_ppo, 8, 16, 64, network="gru"),
    "ppo-pendulum-1x1024x128": partial(_ppo, 1, 1024, 128, environment="Pendulum-v1"),
    "ppo-breakout-1x1024x128": partial(_ppo, 1, 1024, 128, environment="Breakout-MinAtar"),
    "a2c-1x65536x1": partial(_training, "a2c", "CartPole-v1", 1, 65536, 1),
    "trpo-1x1024x128": partial(_training, "trpo", "CartPole-v1", 1, 1024, 128),
    "reinforce-65536": partial(_training, "reinforce_baseline", "CartPole-v1", 1, 65536, None),
    "evaluate-1024": partial(_evaluation, 1024),
    "statistics-100000": partial(_statistics, 10**5),
    "command-8": partial(_command, 8),
    "quickstart-256": partial(_command, 256),
}
PEER_CASES = ("ppo-1x4096x128", "ppo-8x16x64", "ppo-256x4x128", "ppo-2048x4x128")


def budgeted(row: str, environment: str) -> Program:
    """One update of an algorithm, small: what a loop's body costs hardly depends on it, compiling does."""
    limited = {"hidden": (8, 8), "limit": 8}
    return _training(row, environment, 1, 8, 8, {}, **limited)


def rejax(name: str) -> Program:
    """One iteration of rejax's PPO in the setting of a case."""
    import jax
    from rejax import get_algo

    agents, envs, steps = map(int, re.findall(r"\d+", name))
    algo = get_algo("ppo").create(
        env="CartPole-v1",
        agent_kwargs={"hidden_layer_sizes": (64, 64), "activation": "tanh"},
        num_envs=envs,
        num_steps=steps,
        num_epochs=4,
        num_minibatches=4,
        learning_rate=1e-3,
        total_timesteps=2**30,
        eval_freq=2**30,
    )
    update, state = algo.train_iteration, jax.eval_shape(algo.init_state, jax.random.key(0))
    if agents > 1:
        update, state = jax.vmap(update), _shapes(algo.init_state, agents)
    return Program(update, (state,), agents * envs * steps)
