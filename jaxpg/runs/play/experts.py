"""Scripted experts: policies to record demonstrations from before any has been trained."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Box, Discrete, Env, mdp_from_gymnax
from jaxpg.policies import Categorical, Gaussian, Network

# An expert sometimes takes any action, so that its density has support everywhere.
SLIP = 0.05
DISCOUNT = 0.999


def expert(environment: str, env: Env, **settings) -> Network:
    """The scripted policy of an environment, without parameters. Raises ValueError where there is none."""
    if environment not in EXPERTS:
        raise ValueError(
            f"there is no scripted expert for {environment}; there is one for {', '.join(EXPERTS)}; "
            "or record a trained run"
        )
    distribution = EXPERTS[environment](environment, env, settings)

    def apply(params, carry, obs, first):
        del params, first
        return carry, distribution(obs)

    return Network(lambda key: (), lambda num_lanes: (), apply)


def optimal(environment: str, env: Env, settings: dict) -> Callable[[Any], Categorical]:
    """The best action of every square, by value iteration on the environment's table."""
    mdp = mdp_from_gymnax(environment, **settings)
    transition, reward = np.asarray(mdp.transition), np.asarray(mdp.reward)
    alive = ~np.asarray(mdp.terminal)
    quality = np.zeros_like(reward)
    for _ in range(20 * mdp.horizon):
        quality = alive[:, None] * (reward + DISCOUNT * transition @ quality.max(axis=1))
    # Sum over states that look alike: they differ only in a coin, drawn one step ahead.
    by_square = np.zeros((int(mdp.observation.max()) + 1, reward.shape[1]))
    np.add.at(by_square, np.asarray(mdp.observation), quality)
    logits = _mostly(by_square.argmax(axis=1), reward.shape[1])

    def distribution(obs):
        if isinstance(env.observation, Box):  # an image of the agent's position
            obs = jnp.argmax(
                obs.reshape(*obs.shape[: obs.ndim - len(env.observation.shape)], -1), -1
            )
        return Categorical(jnp.asarray(logits)[jnp.minimum(obs, len(logits) - 1)])

    return distribution


def pump(environment: str, env: Env, settings: dict) -> Callable[[Any], Categorical | Gaussian]:
    """Push the way the car already moves."""
    del environment, settings
    if isinstance(env.action, Discrete):
        logits = jnp.asarray(_mostly(np.array([0, 2]), 3))
        return lambda obs: Categorical(logits[(obs[..., 1] >= 0).astype(jnp.int32)])

    def distribution(obs):
        mean = jnp.where(obs[..., 1:2] >= 0, 1.0, -1.0)
        return Gaussian(mean, jnp.full_like(mean, np.log(0.1)))

    return distribution


EXPERTS = {
    "FrozenLake-misc": optimal,
    "DeepSea-bsuite": optimal,
    "MountainCar-v0": pump,
    "MountainCarContinuous-v0": pump,
}


def _mostly(action: np.ndarray, num_actions: int) -> np.ndarray:
    """Logits that choose the action with probability 1 - SLIP, and otherwise any action uniformly."""
    chance = np.full((len(action), num_actions), SLIP / num_actions)
    chance[np.arange(len(action)), action] += 1 - SLIP
    return np.log(chance).astype(np.float32)
