"""Reference: the KL divergence to a fixed policy, estimated from the actions taken.

With x = log pi(a|s) - log ref(a|s), of which a trajectory records the second part, each of k1 = x,
k2 = x^2 / 2 and k3 = exp(-x) - 1 + x estimates KL(pi || ref); k1 and k3 without bias (Schulman, 2020).
Their gradients are something else, because differentiating an estimate leaves out that pi draws the actions.

>>> x = jnp.log(jnp.array([[2.0, 0.5]]))  # one step of two episodes
>>> for name, estimate in ESTIMATES.items():
...     print(name, estimate(x)[0].round(2))
k1 [ 0.69 -0.69]
k2 [0.24 0.24]
k3 [0.19 0.31]
>>> mask, zero, numbers = jnp.ones((1, 2), bool), jnp.zeros((1, 2)), jaxpg.Hyperparams(kl_coef=1.0)
>>> trajectory = Trajectory(zero, zero, x, zero, zero, mask, mask, mask, zero, zero, reference=zero)
>>> print(penalised(jaxpg.estimators.surrogates.score, "k2")(x, zero, trajectory, numbers)[0].round(2))
[-0.24 -0.24]
>>> print(charged(jaxpg.estimators.credit.total_return, "k1")(zero + 1, trajectory, numbers)[0].round(2))
[-0.69  0.69]
>>> print(divergence("k3", x, trajectory)[0].round(2))
[0.19 0.31]
"""

from functools import partial
from typing import Any

import jax.numpy as jnp

from jaxpg.estimators.credit import Credit
from jaxpg.estimators.estimator import Estimator
from jaxpg.estimators.slot import Slot, facts_of
from jaxpg.estimators.surrogates import Surrogate, standardised
from jaxpg.types import Array, Trajectory

# x [T, B] -> an estimate of KL(pi || ref) where pi drew the actions.
ESTIMATES = {
    "k1": lambda x: x,
    "k2": lambda x: 0.5 * x**2,
    "k3": lambda x: jnp.expm1(-x) + x,
}


def penalised(surrogate: Surrogate, estimate: str) -> Slot:
    """The surrogate - kl_coef * estimate, differentiated where it stands (Shao et al., 2024: k3).

    On data of pi, per state: k1 has the gradient 0 in expectation, k2 that of KL(pi || ref), k3 that of the
    other direction, KL(ref || pi). None sees that pi also chooses which states come next: `charged` does.
    """
    facts = facts_of(surrogate)
    if facts.rescale is not None:  # of advantages, to which the penalty does not belong
        inner: Any = surrogate
        return standardised(penalised(inner.arguments[0], estimate))
    facts = facts._replace(reads_reference=True)
    return Slot(_penalised, "penalised", (surrogate, estimate), facts)


def _penalised(surrogate, estimate, log_prob, advantage, trajectory, hyperparams):
    gain = surrogate(log_prob, advantage, trajectory, hyperparams)
    return gain - hyperparams.kl_coef * divergence(estimate, log_prob, trajectory)


def charged(credit: Credit, estimate: str) -> Slot:
    """The credit of rewards r_t - kl_coef * estimate_t, which are data (Ouyang et al., 2022: k1).

    On data of pi, k1 has exactly the gradient of -kl_coef sum_t gamma^t E KL(pi || ref)(s_t), through the
    states too: E grad k1 = 0, so nothing is lost. Of k2 and k3 a part is: k3 leaves the gradient of
    KL(pi || ref) - KL(ref || pi). A critic learns the values of these rewards.
    """
    facts = facts_of(credit)._replace(reads_reference=True, constant=False)
    return Slot(_charged, "charged", (credit, estimate), facts)


def _charged(credit, estimate, trace, trajectory, hyperparams):
    cost = divergence(estimate, trajectory.log_prob, trajectory)
    reward = trajectory.reward - hyperparams.kl_coef * cost
    return credit(trace, trajectory._replace(reward=reward), hyperparams)


def divergence(estimate: str, log_prob: Array, trajectory: Trajectory) -> Array:
    """The estimate [T, B] of the KL from a policy with these log-probabilities; 0 where masked."""
    x = jnp.where(trajectory.mask, log_prob - trajectory.reference, 0.0)
    return ESTIMATES[estimate](x)


def _with_penalty(estimate: str, estimator: Estimator) -> Estimator:
    return estimator._replace(surrogate=penalised(estimator.surrogate, estimate))


def _with_charge(estimator: Estimator) -> Estimator:
    return estimator._replace(credit=charged(estimator.credit, "k1"))


# Ways to hold a policy to its reference, by name: an estimator -> the estimator that does.
REGULARISERS = {name: partial(_with_penalty, name) for name in ESTIMATES} | {"reward": _with_charge}
