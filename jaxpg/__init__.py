"""jaxpg: a policy-gradient trainer and gradient-variance laboratory in JAX."""

from jaxpg import algorithms, envs, estimators, optimizers, policies
from jaxpg.algorithms import Algorithm
from jaxpg.rollout import episodes, evaluate, unroll
from jaxpg.trainer import Trainer, TrainState, make_trainer, train
from jaxpg.types import Hyperparams, TimeStep, Trajectory

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Hyperparams",
    "TimeStep",
    "TrainState",
    "Trainer",
    "Trajectory",
    "algorithms",
    "envs",
    "episodes",
    "estimators",
    "evaluate",
    "make_trainer",
    "optimizers",
    "policies",
    "train",
    "unroll",
]
