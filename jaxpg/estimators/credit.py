"""Credit: which rewards does the action at t answer for?

A slot takes (trace, trajectory, hyperparams) and returns psi [T, B]. trace [T, B] holds the
coefficients c of the importance slot, all 1 on-policy.

>>> one, end = jnp.ones((3, 1)), jnp.array([[0.0], [0.0], [1.0]])
>>> zero, numbers = jnp.zeros((3, 1)), Hyperparams(gamma=0.5, lambda_=0.0)
>>> episode = Trajectory(one, one, zero, one, 1 - end, 1 - one, end, one > 0, zero, zero)
>>> [x(one, episode, numbers).ravel().tolist() for x in (reward_to_go, total_return)]
[[1.75, 1.5, 1.0], [1.75, 1.75, 1.75]]
>>> [x(one, episode, numbers).ravel().tolist() for x in (lambda_return, unit)]
[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.estimators.slot import slot
from jaxpg.types import Array, Hyperparams, Trajectory

Credit = Callable[[Array, Trajectory, Hyperparams], Array]

# Steps of the recursion in one pass of its loop: an accelerator runs them as one operation.
UNROLL = {"gpu": 32, "tpu": 32}


@slot()
def reward_to_go(trace: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Array:
    """psi_t = sum_{k>=t} gamma^(k-t) r_k: the lambda-return with lambda = 1.

    Discounted from t. Where a time limit cut the episode, or the rollout ended, the critic's value of
    the true successor stands in for the unseen rewards (0 without a critic).
    """
    return _return(trace, trajectory, hyperparams.gamma, 1.0)


@slot(reads_critic=True)
def lambda_return(trace: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Array:
    """psi_t = V(s_t) + A_t with A_t = delta_t + gamma lambda (1-last_t) c_{t+1} A_{t+1}.

    delta_t = r_t + gamma discount_t V(s_{t+1}) - V(s_t). Minus the critic baseline this is the
    generalised advantage estimate (Schulman et al., 2016); with c = min(rho, c_bar), V-trace
    (Espeholt et al., 2018).
    """
    return _return(trace, trajectory, hyperparams.gamma, hyperparams.lambda_)


@slot(whole_episodes=True)
def total_return(trace: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Array:
    """psi_t = sum_k gamma^k r_k over the whole episode, for every t (REINFORCE; Williams, 1992).

    Discounted from the start of the episode; needs whole episodes.
    """
    whole = _return(trace, trajectory, hyperparams.gamma, 1.0)[:1]
    return jnp.broadcast_to(whole, trajectory.reward.shape)


@slot(constant=True)
def unit(trace: Array, trajectory: Trajectory, hyperparams: Hyperparams) -> Array:
    """psi_t = 1: with the score surrogate, the maximum-likelihood gradient."""
    del trace, hyperparams
    return jnp.ones_like(trajectory.reward)


def _return(trace: Array, trajectory: Trajectory, gamma, lambda_) -> Array:
    # Nothing follows a terminated step: the critic's value of its successor may be NaN.
    following = jnp.where(trajectory.discount > 0.0, trajectory.next_value, 0.0)
    delta = trajectory.reward + gamma * trajectory.discount * following
    delta = jnp.where(trajectory.mask, delta - trajectory.value, 0.0)
    decay = gamma * lambda_ * (1.0 - trajectory.last)

    def step(later, inputs):
        delta, decay, trace = inputs
        advantage = delta + decay * later
        return trace * advantage, advantage

    start = jnp.zeros_like(delta[0])
    inputs, unroll = (delta, decay, trace), UNROLL.get(backend(), 1)
    _, advantage = jax.lax.scan(step, start, inputs, reverse=True, unroll=unroll)
    return advantage + trajectory.value
