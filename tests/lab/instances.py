"""The worked instances: A (3 states, 2 actions, 5 steps), T (with a terminal state), C (a counterexample)."""

from typing import NamedTuple

import numpy as np
from worlds import random_mdp

from jaxpg.envs import Mdp


class Instance(NamedTuple):
    mdp: Mdp
    logits: np.ndarray
    behaviour_logits: np.ndarray | None = None


def instance_a(horizon=5, observation=(0, 1, 2)) -> Instance:
    transition = np.array(
        [
            [(0.7, 0.2, 0.1), (0.1, 0.6, 0.3)],
            [(0.4, 0.5, 0.1), (0.2, 0.2, 0.6)],
            [(0.3, 0.3, 0.4), (0.05, 0.15, 0.8)],
        ]
    )
    reward = np.array([(1.0, -0.5), (0.0, 2.0), (0.5, -1.0)])
    logits = np.array([(0.2, -0.1), (-0.4, 0.3), (0.5, 0.1)])
    behaviour = np.array([(-0.1, 0.2), (-0.6, 0.5), (0.9, -0.3)])
    num_obs = max(observation) + 1
    mdp = world((0.5, 0.3, 0.2), transition, reward, (0, 0, 0), horizon)
    mdp = mdp._replace(observation=np.array(observation))
    return Instance(mdp, logits[:num_obs], behaviour[:num_obs])


def instance_t(unmasked=False) -> Instance:
    """With `unmasked`, episodes go on in the absorbing state, and its scores count."""
    transition = np.array(
        [
            [(0.6, 0.3, 0.1), (0.2, 0.4, 0.4)],
            [(0.5, 0.4, 0.1), (0.1, 0.3, 0.6)],
            [(0.0, 0.0, 1.0), (0.0, 0.0, 1.0)],
        ]
    )
    reward = np.array([(1.0, 2.5), (0.5, 3.0), (0.0, 0.0)])
    mdp = world((0.8, 0.2, 0.0), transition, reward, (0, 0, not unmasked), 6)
    return Instance(mdp, np.array([(0.3, -0.2), (-0.1, 0.4), (0.0, 0.0)]))


def instance_c() -> Instance:
    """r_0 = +-1 by a_0 and r_1 = -r_0 whatever a_1: every return is 0."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1:, :, 0] = 1.0
    reward = np.array([(1.0, -1.0), (-1.0, -1.0), (1.0, 1.0)])
    mdp = world((1.0, 0.0, 0.0), transition, reward, (0, 0, 0), 2)
    return Instance(mdp, np.array([(0.4, 0.0), (0.2, -0.2), (0.0, 0.5)]))


def random_instance(seed, horizon=3, terminal=True, observation=(0, 1, 2)) -> Instance:
    rng = np.random.default_rng(seed + 1000)
    mdp = random_mdp(seed, horizon=horizon, terminal=terminal)
    mdp = mdp._replace(observation=np.array(observation))
    logits, behaviour = rng.normal(size=(2, max(observation) + 1, 2))
    return Instance(mdp, logits, behaviour)


def world(initial, transition, reward, terminal, horizon) -> Mdp:
    return Mdp(
        np.array(initial),
        transition,
        reward,
        np.zeros_like(reward),
        np.array(terminal, bool),
        np.arange(len(initial)),
        horizon,
    )
