"""Forms: estimators that no data can compute, or that are wrong on purpose, as exact moments.

All weight the step at t by gamma^t, so that the right ones estimate grad J of the discounted return.
Each is one row of coefficients of the pair recursion.
"""

import numpy as np

from jaxpg.envs import Mdp
from jaxpg.lab.exact.recursions import Coefficients, paired
from jaxpg.lab.exact.tables import Moments, action_values, discounts, tabulate, visits


def advantage_moments(
    mdp: Mdp, logits, gamma, *, baseline=None, from_start=True, action_value=None
) -> Moments:
    """sum_t gamma^t u_t (Q_t(s_t,a_t) - b_t(s_t)) with the exact Q, unless given; b = V unless given.

    baseline: a number, [H, S, 1] or [H, S, A]. from_start=False drops gamma^t. action_value: [H, S, A].
    """
    world = tabulate(mdp, logits)
    value, own = action_values(world, gamma)
    action_value = own if action_value is None else action_value
    b = value[:-1, :, None] if baseline is None else baseline
    start = _start(gamma, world) if from_start else 1.0
    return paired(world, Coefficients(action_value, decay=0.0, step=start, shift=start * b))


def surrogate_moments(
    mdp: Mdp, logits, behaviour_logits, gamma, *, clip_eps=None, from_start=True
) -> Moments:
    """sum_t gamma^t rho_t u_t A_t with the exact advantages A = Q - V of the behaviour, on its data.

    With clip_eps, steps where clipping stops the gradient (A > 0 and rho > 1 + eps, or A < 0 and
    rho < 1 - eps) count 0 (Schulman et al., 2017).
    """
    world = tabulate(mdp, logits, behaviour_logits)
    value, action_value = action_values(tabulate(mdp, behaviour_logits), gamma)
    advantage, rho = action_value - value[:-1, :, None], world.ratio
    step = np.broadcast_to(rho, advantage.shape)
    if clip_eps is not None:
        above, below = rho > 1.0 + clip_eps, rho < 1.0 - clip_eps
        step = np.where(((advantage > 0) & above) | ((advantage < 0) & below), 0.0, step)
    start = _start(gamma, world) if from_start else 1.0
    return paired(world, Coefficients(advantage, decay=0.0, step=start * step))


def all_action_moments(mdp: Mdp, logits, gamma, action_value=None) -> Moments:
    """sum_t gamma^t sum_a grad pi(a|s_t) Q_t(s_t,a): every action, weighted by its probability.

    action_value: Q [H, S, A]; the exact one unless given.
    """
    world = tabulate(mdp, logits)
    action_value = action_values(world, gamma)[1] if action_value is None else action_value
    local = np.einsum("sa,sap,tsa->tsp", world.policy, world.score, action_value)
    drift = -_start(gamma, world) * local
    return paired(world, Coefficients(0.0, decay=0.0, step=0.0, drift=drift[:, :, None]))


def action_baseline_moments(mdp: Mdp, logits, gamma, baseline) -> Moments:
    """Reward-to-go minus b_t(s,a) [H, S, A]: biased by -sum_t gamma^t E[u_t b_t] unless b ignores a."""
    world = tabulate(mdp, logits)
    start = _start(gamma, world)
    return paired(world, _returns(world, gamma, step=start, shift=start * baseline))


def note_literal_moments(mdp: Mdp, logits, behaviour_logits, gamma) -> Moments:
    """Causal importance sampling that counts rho_t twice: prod_{k<=t} rho_k prod_{j=t}^{k} rho_j.

    The second product must start at t+1; importance.per_decision is the right form. For demonstration.
    """
    world = tabulate(mdp, logits, behaviour_logits)
    rho, start = world.ratio, _start(gamma, world)
    return paired(world, _returns(world, gamma, trace=rho, step=start * rho**2, carry=rho))


def marginal_moments(mdp: Mdp, logits, behaviour_logits, gamma) -> Moments:
    """sum_t gamma^t omega_t(s_t) rho_t u_t R_t with omega_t = d_t^pi / d_t^beta, the exact state ratio.

    The mean is that of importance.prefix, hence biased, with less variance.
    Raises ValueError when the behaviour never visits a state that the policy does.
    """
    world = tabulate(mdp, logits, behaviour_logits)
    own, others = visits(world), visits(tabulate(mdp, behaviour_logits))
    if ((own > 0) & (others == 0)).any():
        raise ValueError("the behaviour never visits a state that the policy visits: no support")
    omega = own / np.where(others > 0, others, 1.0)
    step = _start(gamma, world) * omega[:, :, None] * world.ratio
    return paired(world, _returns(world, gamma, step=step))


def _returns(world, gamma, **rest):
    return Coefficients(world.reward, float(gamma), world.variance, **rest)


def _start(gamma, world):
    return discounts(gamma, world.horizon)[:, None, None]
