"""Reference: the KL divergence to a fixed policy, and what its estimates have as their gradients.

With x = log pi(a|s) - log ref(a|s) and u = grad log pi(a|s), where pi draws the actions:

- differentiated where it stands, an estimate has the gradient c u, with c = 1 for k1, x for k2 and
  1 - exp(-x) for k3. E[u] = 0; E[x u] = grad KL(pi || ref) and E[-exp(-x) u] = -E_ref[u] =
  grad KL(ref || pi), both for the state as it is;
- in the reward it is data, and its returns times the scores have the gradient of E sum_t gamma^t estimate_t
  less sum_t gamma^t E[c u], which differentiating the estimate would have added. For k1 that is nothing.

>>> mdp = jaxpg.lab.exact.bandits.bandit([0.0, 1.0])
>>> logits, reference = np.array([[0.0, 1.0]]), np.zeros((1, 2))
>>> round(kl(mdp, logits, reference, 1.0), 4), float(kl_gradient(mdp, logits, reference, 1.0)[1].round(4))
(0.1109, 0.1966)
>>> for place in (penalty_moments, reward_moments):
...     print([float(place(mdp, logits, reference, 1.0, k).mean[1].round(4)) for k in SLOPES])
[0.0, 0.1966, 0.2311]
[0.1966, -0.0236, -0.0344]
"""

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.estimators import Estimator, credit, importance
from jaxpg.lab.exact.compose import moments
from jaxpg.lab.exact.forms import advantage_moments
from jaxpg.lab.exact.tables import Moments, gradient, objective, tabulate
from jaxpg.types import Hyperparams

# c of each estimate, and the estimate itself, by x.
SLOPES = {"k1": np.ones_like, "k2": lambda x: x, "k3": lambda x: -np.expm1(-x)}
VALUES = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: np.expm1(-x) + x}


def log_ratio(mdp: Mdp, logits, reference_logits) -> np.ndarray:
    """x = log pi(a|s) - log ref(a|s) [S, A]; raises ValueError where ref never does what pi does."""
    return np.log(tabulate(mdp, logits, reference_logits).ratio)


def kl(mdp: Mdp, logits, reference_logits, gamma) -> float:
    """sum_t gamma^t E KL(pi || ref)(s_t): for gamma = 1, that of whole trajectories."""
    return objective(_charging(mdp, logits, reference_logits, "k1"), logits, gamma)


def kl_gradient(mdp: Mdp, logits, reference_logits, gamma) -> np.ndarray:
    """The gradient of `kl` [P], through the states that pi visits too."""
    return gradient(_charging(mdp, logits, reference_logits, "k1"), logits, gamma)


def penalty_moments(mdp: Mdp, logits, reference_logits, gamma, estimate: str) -> Moments:
    """The moments of grad sum_t gamma^t estimate_t of one episode: of an estimate that is differentiated."""
    slope = SLOPES[estimate](log_ratio(mdp, logits, reference_logits))
    slope = np.broadcast_to(slope, (mdp.horizon, *slope.shape))
    return advantage_moments(mdp, logits, gamma, baseline=0.0, action_value=slope)


def reward_moments(mdp: Mdp, logits, reference_logits, gamma, estimate: str) -> Moments:
    """The moments of one episode's gradient, to go, of rewards that are the estimate."""
    estimator = Estimator(
        credit.reward_to_go, importance=importance.from_start(importance.on_policy)
    )
    world = _charging(mdp, logits, reference_logits, estimate)
    return moments(world, logits, estimator, Hyperparams(gamma=gamma))


def _charging(mdp, logits, reference_logits, estimate) -> Mdp:
    reward = VALUES[estimate](log_ratio(mdp, logits, reference_logits))
    return mdp._replace(reward=reward, reward_variance=np.zeros_like(reward))
