"""Sources: where the data of an update comes from, and under which density it was drawn.

Own episodes or a stream (rollout.py); the last K batches, kept with the log-probabilities of the policies
that gathered them; own episodes joined by demonstrations, weighed by the density of the mixture.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.estimators import importance
from jaxpg.estimators.estimator import Batch
from jaxpg.estimators.importance import Importance
from jaxpg.policies import Agent, AgentCarry, Network, initial_carry
from jaxpg.types import Array, Carry, Hyperparams, Metrics, Params, Trajectory


class Data(NamedTuple):
    """What an update learns from."""

    trajectory: Trajectory  # [T, B, ...]; log_prob is the density that it was drawn from
    log_prob: Array  # [T, B] under the policy to improve
    carry: AgentCarry  # at the first row
    share: Array | float = 1.0  # of the lanes that count: the others are masked throughout


class Memory(NamedTuple):
    """The last K batches of B lanes, side by side, the n-th at slot n mod K."""

    trajectory: Trajectory  # [T, K x B, ...]; masked where no batch has been yet
    carry: AgentCarry


def on_policy(trajectory: Trajectory, carry: AgentCarry) -> Data:
    """The policy's own data: no forward pass is needed to know that every ratio is 1."""
    return Data(trajectory, trajectory.log_prob, carry)


def imitated(agent: Agent, params: Params, demonstrations: Trajectory) -> Data:
    """Demonstrations taken for the policy's own: maximum likelihood asks nobody else's density."""
    carry = initial_carry(agent, demonstrations.mask.shape[1])
    log_prob = log_prob_of(agent.policy, params, carry.policy, demonstrations)
    return on_policy(demonstrations._replace(log_prob=log_prob), carry)


def empty_memory(batch: tuple[Trajectory, AgentCarry], num_batches: int) -> Memory:
    """For batches of these shapes."""

    def blank(x, axis):
        shape = list(x.shape)
        shape[axis] *= num_batches
        return jnp.zeros(shape, x.dtype)

    trajectory, carry = batch
    return Memory(
        jax.tree.map(lambda x: blank(x, 1), trajectory), jax.tree.map(lambda x: blank(x, 0), carry)
    )


def remember(
    memory: Memory, trajectory: Trajectory, carry: AgentCarry, num_updates: Array
) -> Memory:
    """The newest batch in place of the oldest."""
    num_lanes = trajectory.mask.shape[1]
    start = (num_updates % (memory.trajectory.mask.shape[1] // num_lanes)) * num_lanes

    def put(axis):
        return lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)

    return Memory(
        jax.tree.map(put(1), memory.trajectory, trajectory),
        jax.tree.map(put(0), memory.carry, carry),
    )


def recalled(
    memory: Memory,
    num_batches: int,
    slot: Importance,
    policy: Network,
    params: Params,
    hyperparams: Hyperparams,
    num_updates: Array,
) -> tuple[Data, Metrics]:
    """All batches that are still worth something, and how much each of the old ones is.

    A batch is dropped when (sum w)^2 / (n sum w^2) over its n steps, w the weights of the importance slot
    relative to on-policy ones, is below ess_floor; the newest never is. Metrics: this ess and the mean KL
    of the policy from the one that gathered the batch, by lag in updates.
    """
    trajectory = memory.trajectory
    log_prob = log_prob_of(policy, params, memory.carry.policy, trajectory)
    log_ratio = jnp.where(trajectory.mask, log_prob - trajectory.log_prob, 0.0)
    # Relative, so that gamma^t counts neither for nor against.
    weight = slot(log_ratio, trajectory, hyperparams).step
    weight = weight / slot(jnp.zeros_like(log_ratio), trajectory, hyperparams).step

    def by_batch(x):
        x = jnp.where(trajectory.mask, x, 0.0)
        return x.reshape(x.shape[0], num_batches, -1).sum(axis=(0, 2))

    count = by_batch(1.0)
    ess = by_batch(weight) ** 2 / (count * by_batch(weight**2))
    kl = by_batch(jnp.expm1(log_ratio) - log_ratio) / count
    newest = num_updates % num_batches
    kept = (ess >= hyperparams.ess_floor) | (jnp.arange(num_batches) == newest)
    lanes = jnp.repeat(kept, trajectory.mask.shape[1] // num_batches)
    metrics: Metrics = {"batches": kept.sum()}
    for lag in range(1, num_batches):
        at = (num_updates - lag) % num_batches
        metrics |= {f"ess_lag{lag}": ess[at], f"kl_lag{lag}": kl[at]}
    trajectory = trajectory._replace(mask=trajectory.mask & lanes[None])
    return Data(trajectory, log_prob, memory.carry, kept.mean()), metrics


def joined(
    agent: Agent,
    params: Params,
    behaviour: Params,
    own: Trajectory,
    demonstrations: Trajectory,
) -> Data:
    """Own episodes and demonstrations as draws from the mixture of both densities, by their shares.

    q(tau) = share_own pi(tau) + share_demo beta(tau): a demonstration that pi would never give has a small
    weight pi/q, and an episode that beta would never give has at most 1/share_own (Levine and Koltun,
    2013). behaviour: parameters of the policy network that stand for beta on the policy's own episodes;
    on the demonstrations beta is their log_prob, or the same network where that is NaN.
    """
    num_steps = own.mask.shape[0]
    if demonstrations.mask.shape[0] > num_steps:
        raise ValueError(
            f"demonstrations of {demonstrations.mask.shape[0]} steps are longer than episodes of "
            f"num_steps={num_steps}; raise num_steps"
        )
    demonstrations = jax.tree.map(lambda x: _padded(x, num_steps), demonstrations)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), own, demonstrations)
    counts = [own.mask.shape[1], demonstrations.mask.shape[1]]
    carry = [initial_carry(agent, n) for n in counts]
    under_pi = jnp.concatenate(
        [own.log_prob, log_prob_of(agent.policy, params, carry[1].policy, demonstrations)], 1
    )
    fitted = log_prob_of(agent.policy, behaviour, carry[1].policy, demonstrations)
    known = jnp.where(jnp.isnan(demonstrations.log_prob), fitted, demonstrations.log_prob)
    under_beta = jnp.concatenate(
        [log_prob_of(agent.policy, behaviour, carry[0].policy, own), known], 1
    )
    density = importance.mixture(jnp.stack([under_pi, under_beta]), both.mask, counts)
    return Data(both._replace(log_prob=density), under_pi, initial_carry(agent, sum(counts)))


def corrected(batch: Batch, data: Data, whole: bool) -> Batch:
    """The batch, its data now weighed: ratios from here on are to the policy at the start of the update.

    whole: the mean is over episodes, of which only a share counts.
    """
    trajectory = batch.trajectory._replace(log_prob=jax.lax.stop_gradient(data.log_prob))
    advantage = batch.advantage / data.share if whole else batch.advantage
    return batch._replace(trajectory=trajectory, advantage=advantage)


def share_of_demonstrations(data: Data, num_own: int) -> Metrics:
    """How much of the self-normalised weight the demonstrations have, and the effective sample size."""
    log_ratio = jnp.where(data.trajectory.mask, data.log_prob - data.trajectory.log_prob, 0.0)
    weight = jax.nn.softmax(log_ratio.sum(axis=0))
    return {
        "demo_share": weight[num_own:].sum(),
        "ess_mixture": 1.0 / (weight**2).sum() / weight.size,
    }


def log_prob_of(policy: Network, params: Params, carry: Carry, trajectory: Trajectory) -> Array:
    """log pi(a_t|s_t) [T, B] of a policy; the trajectory's own where masked."""
    _, distribution = policy.apply(params, carry, trajectory.obs, trajectory.first)
    log_prob = distribution.log_prob(trajectory.action)
    return jnp.where(trajectory.mask, log_prob, trajectory.log_prob)


def _padded(x: Array, num_steps: int) -> Array:
    return jnp.pad(x, [(0, num_steps - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
