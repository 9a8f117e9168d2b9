"""Evaluation: the mean return of whole episodes, each counted once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.envs import Env
from jaxpg.policies import Agent, AgentParams, initial_carry
from jaxpg.rollout.episodic import until_ended
from jaxpg.rollout.stepping import (
    act,
    check_sizes,
    inputs_of,
    kept,
    reset_lanes,
    step_lanes,
)
from jaxpg.types import Array, Key

# Steps between checks whether an episode still runs, if not as for `episodes`: on a CPU a check is free, and
# with one in 32 steps episodes of up to 60 steps took 1.15 times as long.
BLOCK = {"cpu": 1}


class Evaluation(NamedTuple):
    """Returns of whole episodes, one per environment, so long episodes are not under-represented."""

    mean: Array
    standard_error: Array  # infinite for one episode, which says nothing about the spread
    episodes: Array  # how many
    smallest: Array  # return of an episode; returns can attain the range from here to the largest
    largest: Array


def evaluate(
    env: Env,
    agent: Agent,
    params: AgentParams,
    key: Key,
    num_episodes: int,
    greedy: bool = False,
) -> Evaluation:
    """The mean undiscounted return of fresh episodes, one per environment, and its standard error.

    One whole episode per environment gives every episode the same weight; pooling all that end in a window
    over-counts short ones (Glynn and Heidelberger, 1990). An episode still running at the environment's
    horizon ends there, as in training, and counts. greedy: take the distribution's mode. Raises ValueError
    for fewer than one episode or step.
    """
    check_sizes(num_episodes, env.horizon)
    k_reset, k_steps = jax.random.split(key)
    env_state, obs = reset_lanes(env, jax.random.split(k_reset, num_episodes))

    def step(state, inputs):
        t, keys, noise = inputs
        alive, returns, env_state, obs, carry = state
        action, _, carry = act(agent, params.policy, carry, obs, t == 0, noise, greedy)
        env_state, result = step_lanes(env, keys, env_state, action)
        returns = returns + kept(alive, result.reward)
        alive = alive & ~(result.terminated | result.truncated) & (t < env.horizon - 1)
        return (alive, returns, env_state, result.obs, carry), ()

    carry = initial_carry(agent, num_episodes).policy
    alive, returns = jnp.ones(num_episodes, bool), jnp.zeros(num_episodes, jnp.result_type(float))
    start = alive, returns, env_state, obs, carry
    inputs = inputs_of(agent, params.policy, k_steps[None], obs)
    (_, returns, *_), _ = until_ended(step, start, inputs, env.horizon, BLOCK.get(backend()))
    error = jnp.full((), jnp.inf, returns.dtype)
    if num_episodes > 1:
        error = returns.std(ddof=1) / num_episodes**0.5
    count = jnp.int32(num_episodes)
    return Evaluation(returns.mean(), error, count, returns.min(), returns.max())
