"""Tabular worlds, in which every expectation can be computed exactly.

>>> coin = Mdp(np.ones(1), np.ones((1, 2, 1)), np.array([[0.0, 1.0]]), np.zeros((1, 2)),
...     np.zeros(1, bool), np.zeros(1, int), horizon=1)
>>> from_mdp(coin).action
Discrete(n=2)
>>> check_mdp(coin).reward.dtype
dtype('float64')
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Discrete
from jaxpg.types import TimeStep


class Mdp(NamedTuple):
    """A finite-horizon tabular process; `observation` aliases states (partial observability)."""

    initial: np.ndarray | jax.Array  # [S] probabilities
    transition: np.ndarray | jax.Array  # [S, A, S] probabilities
    reward: np.ndarray | jax.Array  # [S, A] mean reward
    reward_variance: np.ndarray | jax.Array  # [S, A] variance of the added Gaussian noise
    terminal: np.ndarray | jax.Array  # [S] bool: absorbing, no reward, no score
    observation: np.ndarray | jax.Array  # [S] int: what the policy sees
    horizon: int


def check_mdp(mdp: Mdp) -> Mdp:
    """The same Mdp as float64 NumPy arrays.

    Raises ValueError, naming the field, when it is not well formed.
    """
    traced = [k for k, v in mdp._asdict().items() if isinstance(v, Tracer)]
    if traced:
        raise ValueError(
            f"Mdp.{traced[0]} is traced, but tables are checked when built: give numbers"
        )
    fields = [np.asarray(x) for x in mdp[:6]]
    initial, transition, reward, variance, terminal, observation = fields
    num_states, num_actions = reward.shape if reward.ndim == 2 else (0, 0)
    shapes = {
        "initial": (initial.shape, (num_states,)),
        "transition": (transition.shape, (num_states, num_actions, num_states)),
        "reward": (reward.shape, (num_states, num_actions)),
        "reward_variance": (variance.shape, (num_states, num_actions)),
        "terminal": (terminal.shape, (num_states,)),
        "observation": (observation.shape, (num_states,)),
    }
    for name, (shape, expected) in shapes.items():
        if shape != expected or num_states == 0:
            raise ValueError(f"Mdp.{name} has shape {shape}; S and A from reward need {expected}")
    if not all(np.isfinite(x).all() for x in fields):
        raise ValueError("an Mdp field holds a number that is not finite")
    for name, rows in (("initial", initial), ("transition", transition)):
        if (rows < 0).any() or not np.allclose(rows.sum(-1), 1, atol=1e-6):
            raise ValueError(f"Mdp.{name} has a row that is not a distribution; rows must sum to 1")
    if (variance < 0).any():
        raise ValueError("Mdp.reward_variance holds a negative number")
    if (observation < 0).any() or not np.issubdtype(observation.dtype, np.integer):
        raise ValueError("Mdp.observation must hold non-negative integers")
    if (initial[terminal.astype(bool)] > 0).any():
        raise ValueError("Mdp.initial starts in a terminal state; an episode has at least one step")
    if mdp.horizon < 1:
        raise ValueError(f"Mdp.horizon={mdp.horizon} must be at least 1")
    return Mdp(
        initial=initial.astype(np.float64),
        transition=transition.astype(np.float64),
        reward=reward.astype(np.float64),
        reward_variance=variance.astype(np.float64),
        terminal=terminal.astype(bool),
        observation=observation.astype(np.int32),
        horizon=int(mdp.horizon),
    )


def from_mdp(mdp: Mdp) -> Env:
    """The environment of an Mdp; the state is (s, t).

    The horizon belongs to the process (V_H = 0 in every exact number), so reaching it
    terminates the episode: nothing follows, nothing is bootstrapped.
    Raises ValueError when the Mdp is not well formed.
    """
    mdp = check_mdp(mdp)
    num_actions = mdp.reward.shape[1]
    dtype = jnp.result_type(float)
    # Cumulative sums are taken in float64 and scaled to end at exactly 1.
    initial_cdf = jnp.asarray(_cdf(mdp.initial), dtype)
    transition_cdf = jnp.asarray(_cdf(mdp.transition), dtype)
    reward = jnp.asarray(mdp.reward, dtype)
    noise_scale = jnp.asarray(np.sqrt(mdp.reward_variance), dtype)
    noisy = bool((mdp.reward_variance > 0).any())
    terminal = jnp.asarray(mdp.terminal)
    observation = jnp.asarray(mdp.observation)

    def reset(key):
        s = _draw(jax.random.uniform(key, dtype=dtype), initial_cdf)
        return (s, jnp.int32(0)), observation[s]

    def step(key, state, action):
        s, t = state
        k_state, k_noise = jax.random.split(key)
        mean = reward[s, action]
        noise = noise_scale[s, action] * jax.random.normal(k_noise, dtype=dtype) if noisy else 0.0
        successor = _draw(jax.random.uniform(k_state, dtype=dtype), transition_cdf[s, action])
        ended = terminal[successor] | (t + 1 >= mdp.horizon)
        time_step = TimeStep(observation[successor], mean + noise, ended, jnp.zeros_like(ended))
        return (successor, t + 1), time_step

    num_obs = int(mdp.observation.max()) + 1
    return Env(reset, step, Discrete(num_obs), Discrete(num_actions), mdp.horizon)


def _cdf(probabilities):
    cdf = np.cumsum(probabilities, axis=-1)
    return cdf / cdf[..., -1:]


def _draw(uniform, cdf):
    return jnp.sum(uniform >= cdf[:-1]).astype(jnp.int32)
