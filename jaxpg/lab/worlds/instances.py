"""Instances: the worked tabular worlds, small enough that every number is known to many digits."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpg.envs import Mdp


def instance_a(horizon: int = 5, observation=(0, 1, 2)) -> tuple[Mdp, np.ndarray, np.ndarray]:
    """A: three states, two actions, five steps, and a behaviour policy; `observation` may alias states."""
    transition = [
        [(0.7, 0.2, 0.1), (0.1, 0.6, 0.3)],
        [(0.4, 0.5, 0.1), (0.2, 0.2, 0.6)],
        [(0.3, 0.3, 0.4), (0.05, 0.15, 0.8)],
    ]
    reward = [(1.0, -0.5), (0.0, 2.0), (0.5, -1.0)]
    logits = np.array([(0.2, -0.1), (-0.4, 0.3), (0.5, 0.1)])
    behaviour = np.array([(-0.1, 0.2), (-0.6, 0.5), (0.9, -0.3)])
    rows = max(observation) + 1
    mdp = _mdp((0.5, 0.3, 0.2), transition, reward, horizon, observation=observation)
    return mdp, logits[:rows], behaviour[:rows]


def instance_t() -> tuple[Mdp, np.ndarray]:
    """T: two states and a terminal one that episodes reach at different times, six steps."""
    transition = [
        [(0.6, 0.3, 0.1), (0.2, 0.4, 0.4)],
        [(0.5, 0.4, 0.1), (0.1, 0.3, 0.6)],
        [(0.0, 0.0, 1.0), (0.0, 0.0, 1.0)],
    ]
    reward = [(1.0, 2.5), (0.5, 3.0), (0.0, 0.0)]
    mdp = _mdp((0.8, 0.2, 0.0), transition, reward, 6, terminal=(0, 0, 1))
    return mdp, np.array([(0.3, -0.2), (-0.1, 0.4), (0.0, 0.0)])


def instance_c() -> tuple[Mdp, np.ndarray]:
    """C: the second reward undoes the first, so every return is 0 and reward-to-go only adds noise."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1:, :, 0] = 1.0
    reward = [(1.0, -1.0), (-1.0, -1.0), (1.0, 1.0)]
    mdp = _mdp((1.0, 0.0, 0.0), transition, reward, 2)
    return mdp, np.array([(0.4, 0.0), (0.2, -0.2), (0.0, 0.5)])


def _mdp(initial, transition, reward, horizon, terminal=(0, 0, 0), observation=(0, 1, 2)) -> Mdp:
    reward = np.array(reward)
    return Mdp(
        np.array(initial),
        np.array(transition),
        reward,
        np.zeros_like(reward),
        np.array(terminal, bool),
        np.array(observation),
        horizon,
    )


INSTANCES: dict[str, Callable[..., Any]] = {"A": instance_a, "T": instance_t, "C": instance_c}
