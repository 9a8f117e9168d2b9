"""jaxpg: a policy-gradient trainer and gradient-variance laboratory in JAX.

Examples in docstrings assume that `jax`, `jnp`, `np`, `jaxpg` and their own module's names are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxpg import algorithms, devices, envs, estimators, lab, optimizers, policies
    from jaxpg.rollout import episodes, evaluate, unroll
    from jaxpg.runs.entries import Run, Sweep, plot, run, sweep
    from jaxpg.runs.play.policy import load_policy
    from jaxpg.training.algorithm import Algorithm
    from jaxpg.training.trainer import Trainer, TrainState, make_trainer, train
    from jaxpg.types import Hyperparams, TimeStep, Trajectory

__version__ = "0.2.0"

# Imported at first use, so that the command's help does not wait for jax (PEP 562).
_HOMES = {
    "Algorithm": "jaxpg.training.algorithm",
    "Hyperparams": "jaxpg.types",
    "Run": "jaxpg.runs.entries",
    "Sweep": "jaxpg.runs.entries",
    "TimeStep": "jaxpg.types",
    "TrainState": "jaxpg.training.trainer",
    "Trainer": "jaxpg.training.trainer",
    "Trajectory": "jaxpg.types",
    "episodes": "jaxpg.rollout",
    "evaluate": "jaxpg.rollout",
    "load_policy": "jaxpg.runs.play.policy",
    "make_trainer": "jaxpg.training.trainer",
    "plot": "jaxpg.runs.entries",
    "run": "jaxpg.runs.entries",
    "sweep": "jaxpg.runs.entries",
    "train": "jaxpg.training.trainer",
    "unroll": "jaxpg.rollout",
}
_MODULES = {
    "algorithms",
    "devices",
    "envs",
    "estimators",
    "lab",
    "natural",
    "optimizers",
    "policies",
}

__all__ = [
    "Algorithm",
    "Hyperparams",
    "Run",
    "Sweep",
    "TimeStep",
    "TrainState",
    "Trainer",
    "Trajectory",
    "algorithms",
    "devices",
    "envs",
    "episodes",
    "estimators",
    "evaluate",
    "lab",
    "load_policy",
    "make_trainer",
    "optimizers",
    "plot",
    "policies",
    "run",
    "sweep",
    "train",
    "unroll",
]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"jaxpg.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxpg' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
