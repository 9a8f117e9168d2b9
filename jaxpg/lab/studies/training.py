"""Training: the product's own loop on many replicas at a time, scored by exact J where it is known."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy import optimize

from jaxpg.envs import Env, check_mdp
from jaxpg.lab.measure.samples import gradient_samples
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.sampling import options_for, source_of
from jaxpg.lab.studies.study import Settings
from jaxpg.lab.worlds import regulators
from jaxpg.lab.worlds.world import Checkpoint, World, has_exact
from jaxpg.memory import available_bytes, check_fits, needed_bytes
from jaxpg.policies import NETWORKS, Agent, AgentParams
from jaxpg.training.algorithm import Algorithm
from jaxpg.training.trainer import make_trainer, train
from jaxpg.types import Array, Hyperparams, Key, Params

NO_CLIP = 1e9  # max_grad_norm


class Curves(NamedTuple):
    """The learning curves of R replicas, [R, num_updates]."""

    score: np.ndarray  # before each update
    env_steps: np.ndarray  # gathered before each update


# (keys [R], hyperparams of scalars or [R], reward_scale scalar or [R])
Learner = Callable[..., Curves]


def learner(
    world: World,
    algorithm: Algorithm,
    *,
    num_envs: int,
    num_updates: int,
    num_steps: int | None = None,
    per_repeat: int = 1,
) -> Learner:
    """A program that trains R replicas from the world's parameters, and gives the score before each update.

    The score is J of the policy, exact where the world has tables, else the mean return of the episodes
    that the update itself learned from. reward_scale multiplies rewards, not the score.
    per_repeat: the number of replicas trained for each of --repeats.
    """
    critic = None
    if algorithm.critic_optimizer is not None:
        kind = "tabular" if world.is_tabular else "mlp"
        critic = world.critic or NETWORKS[kind](world.env.observation, None)
    agent = Agent(world.policy, critic)
    score = objective_of(world) if has_exact(world) else None

    def one(key, hyperparams, reward_scale):
        env = scaled(world.env, reward_scale)
        trainer = make_trainer(env, agent, algorithm, num_envs=num_envs, num_steps=num_steps)
        state = trainer.init(key)
        trained = critic is not None and world.critic is not None
        values = world.critic_params if trained else state.params.critic
        state = state._replace(params=AgentParams(world.params, values))

        def step(state, _):
            before = state.params.policy
            state, metrics = train(trainer, state, hyperparams, num_updates=1)
            seen = metrics["episode_return"][0] / reward_scale
            return state, (seen if score is None else score(before), metrics["env_steps"][0])

        return jax.lax.scan(step, state, length=num_updates)[1]

    def run(keys, hyperparams: Hyperparams, reward_scale=1.0) -> Curves:
        spread = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.result_type(float)), keys.shape),
            (hyperparams, reward_scale),
        )
        work = keys.shape[0] * num_updates * num_envs * (num_steps or world.env.horizon)
        program = jax.jit(jax.vmap(one), compiler_options=options_for(work))
        program = program.lower(keys, *spread).compile()
        repeats = keys.shape[0] // per_repeat
        # Both curves are also held in 64 bits, twice.
        each = (needed_bytes(program) or 0) / repeats + 32 * per_repeat * num_updates
        check_fits(available_bytes(), each, repeats, "training", "repeat", "give fewer --repeats")
        scores, steps = (np.asarray(x, np.float64) for x in program(keys, *spread))
        return Curves(scores, np.cumsum(steps, axis=1) - steps)

    return run


def objective_of(world: World) -> Callable[[Params], Array]:
    """J of the world's policy as a function of its parameters, by V_t = sum_a pi (r + gamma P V_{t+1})."""
    if world.is_regulator:
        return partial(regulators.objective, world.regulator, world.policy, gamma=world.gamma)
    mdp, dtype = check_mdp(world.mdp), jnp.result_type(float)
    alive = ~mdp.terminal[:, None]
    reward = jnp.asarray(np.where(alive, mdp.reward, 0.0), dtype)
    transition = jnp.asarray(mdp.transition * alive[..., None], dtype)
    initial, observation = jnp.asarray(mdp.initial, dtype), jnp.asarray(mdp.observation)
    seen = jnp.arange(int(np.max(mdp.observation)) + 1)[None]

    def objective(params):
        first = jnp.zeros(seen.shape, bool)
        _, distribution = world.policy.apply(params, (), seen, first)
        policy = jax.nn.softmax(distribution.logits[0])[observation]

        def step(value, _):
            return (policy * (reward + world.gamma * transition @ value)).sum(axis=1), None

        value, _ = jax.lax.scan(step, jnp.zeros(len(mdp.initial), dtype), length=mdp.horizon)
        return initial @ value

    return objective


def best_objective(world: World) -> float:
    """The best J: of any policy of state and time by dynamic programming, or of a regulator's parameters."""
    if world.is_regulator:
        flat, unravel = ravel_pytree(world.params)
        slope = jax.jit(jax.value_and_grad(lambda x: -objective_of(world)(unravel(x))))
        found = optimize.minimize(lambda x: jax.tree.map(np.float64, slope(x)), flat, jac=True)
        return -float(found.fun)
    mdp, gamma = check_mdp(world.mdp), world.gamma
    alive = ~mdp.terminal[:, None]
    value = np.zeros(len(mdp.initial))
    for _ in range(mdp.horizon):
        value = (np.where(alive, mdp.reward + gamma * mdp.transition @ value, 0.0)).max(axis=1)
    return float(mdp.initial @ value)


def scaled(env: Env, factor) -> Env:
    """The environment with its rewards multiplied by a factor."""

    def step(key, state, action):
        state, result = env.step(key, state, action)
        return state, result._replace(reward=factor * result.reward)

    return env._replace(step=step)


def small_rate(world: World, key: Key) -> float:
    """A learning rate at which one trajectory moves the parameters by 1/32, whatever the scale of rewards."""
    rows = gradient_samples(source_of(world, form("rtg", world), key), 64)
    return 1 / 32 / float(np.sqrt((np.asarray(rows) ** 2).sum(axis=1).mean()))


def own_rate(settings: Settings, optimizer: str) -> float | None:
    """The learning rate of a checkpoint's run, if the run used this optimizer; else None."""
    checkpoint = settings.checkpoint
    if checkpoint is None or checkpoint.origin["config"]["optimizer"] != optimizer:
        return None
    return float(checkpoint.hyperparams.learning_rate)


def adam_rate(world: World) -> float:
    """A learning rate for Adam: logits of a table can move faster than a network's weights."""
    return 0.05 if has_exact(world) else 3e-3


def replaced(checkpoint: Checkpoint, num_envs: int | None, *, unlimited: bool) -> list[str]:
    """The settings of training here that differ from those of a checkpoint's run."""
    config, limit = checkpoint.origin["config"], checkpoint.hyperparams.max_grad_norm
    said = []
    if num_envs not in (None, config["num_envs"]):
        said.append(f"batches of {num_envs}, not the run's {config['num_envs']}")
    if config["schedule"] != "constant":
        said.append(f"a constant learning rate, not the run's {config['schedule']} schedule")
    if unlimited:
        said.append(f"no limit of the gradient's norm, not the run's {limit:g}")
    return said
