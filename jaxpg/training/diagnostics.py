"""Diagnostics: metrics of an update beside its losses, from what the update has at hand.

>>> numbers, algorithm = Hyperparams(max_grad_norm=0.5), jaxpg.algorithms.algorithm
>>> row = algorithm("trpo")
>>> gradient = jnp.array([3.0, 4.0])
>>> for optimizer in (row.critic_optimizer, row.policy_optimizer):  # Adam clips, natural gradients do not
...     print({name: float(x) for name, x in norms(gradient, optimizer, numbers).items()})
{'grad_norm': 5.0, 'grad_norm_clipped': 0.5}
{'grad_norm': 5.0}
>>> list(rates(row, False, numbers)), list(rates(algorithm("a2c"), True, numbers))
(['scheduled_critic_learning_rate'], ['scheduled_learning_rate'])
>>> mask, value, target = jnp.ones((1, 3), bool), jnp.array([[1.0, 3.0, 4.0]]), jnp.array([[2.0, 4.0, 6.0]])
>>> trajectory = jaxpg.types.Trajectory(*[mask] * 10)._replace(value=value)
>>> print(explained_variance(Batch(trajectory, value, value, target)).round(4))
0.9167
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpg.devices import totals
from jaxpg.estimators.estimator import Batch
from jaxpg.optimizers import OPTIMIZERS
from jaxpg.optimizers.natural import NATURAL_OPTIMIZERS
from jaxpg.training.algorithm import Algorithm
from jaxpg.types import Array, Hyperparams, Metrics


def norms(gradient: Array, optimizer: Any, hyperparams: Hyperparams) -> Metrics:
    """The norm of a gradient [P] and, for the optimizers of this package, which clip it, the norm after."""
    norm = optax.tree.norm(gradient)
    if optimizer not in OPTIMIZERS.values():
        return {"grad_norm": norm}
    return {"grad_norm": norm, "grad_norm_clipped": jnp.minimum(norm, hyperparams.max_grad_norm)}


def rates(algorithm: Algorithm, shared: bool, hyperparams: Hyperparams) -> Metrics:
    """The learning rates of an update, after its schedule and adaptation, of the optimizers that have one.

    shared: one optimizer moves policy and critic.
    """
    found = {}
    if algorithm.policy_optimizer not in NATURAL_OPTIMIZERS:
        found["scheduled_learning_rate"] = hyperparams.learning_rate
    if algorithm.critic_optimizer and not shared:
        found["scheduled_critic_learning_rate"] = hyperparams.critic_learning_rate
    return {name: jnp.asarray(x) for name, x in found.items()}


def explained_variance(batch: Batch) -> Array:
    """1 - Var[target - value] / Var[target] over the steps that count; NaN where targets do not vary.

    value: the critic's, from before the update, as trajectories hold it.
    """
    mask = batch.trajectory.mask
    target, error = batch.target, batch.target - batch.trajectory.value
    count, *sums = totals(mask, jnp.ones_like(target), target, error)
    # Around their means, because squares of large values would cancel.
    target, error = (
        x - y / jnp.maximum(count, 1) for x, y in zip((target, error), sums, strict=True)
    )
    varies, left = totals(mask, target**2, error**2)
    watched = jax.config.jax_debug_nans  # type: ignore[attr-defined]
    unknown = 0.0 if watched else jnp.nan
    return jnp.where(varies > 0.0, 1.0 - left / jnp.where(varies > 0.0, varies, 1.0), unknown)
