"""Large batches of whole episodes, piece after piece: memory does not grow with their number.

A piece is gathered, assessed and differentiated before the next one begins; gradients are averaged. An
estimator that compares episodes compares those of one piece, and stays as unbiased as it was.
"""

import jax
import jax.numpy as jnp
import optax

from jaxpg import adaptation
from jaxpg.algorithms import Algorithm
from jaxpg.envs import Env
from jaxpg.estimators import assess, baselines, surrogates, uses
from jaxpg.gradients import divisor, gradient_of
from jaxpg.improvement import optimizers
from jaxpg.natural import NATURAL_OPTIMIZERS
from jaxpg.policies import Agent, AgentParams, initial_carry
from jaxpg.rollout import EpisodeSums, episodes
from jaxpg.types import Hyperparams, Key, Metrics

# Episodes in a piece. More keep no more of a CPU busy, and leave its cache; elsewhere they bound the memory.
PIECE = {"cpu": 1024}
OTHER_PIECE = 2**16

# Whose estimate of one episode's gradient is unbiased whichever others it is compared with.
_SEPARABLE = (
    baselines.none,
    baselines.constant,
    baselines.tabulated,
    baselines.leave_one_out,
    baselines.time_mean,
)


def num_pieces(agent: Agent, algorithm: Algorithm, num_envs: int, piece: int | None = None) -> int:
    """Into how many pieces a batch of episodes is cut: 1 for what needs its batch at once."""
    estimator = algorithm.estimator
    plain = (
        algorithm.episodic
        and not (algorithm.imitates or algorithm.guided)
        and algorithm.num_batches == algorithm.num_epochs == algorithm.num_minibatches == 1
        and not (algorithm.control_variate or algorithm.measure_noise or algorithm.measure_kl)
        and algorithm.critic_optimizer is None
        and algorithm.adaptation is adaptation.fixed
        and algorithm.policy_optimizer not in NATURAL_OPTIMIZERS
        and agent.policy.observe is None
        and estimator.reduce is surrogates.per_episode
        and not surrogates.is_standardised(estimator.surrogate)
        and any(uses(estimator.baseline, value) for value in _SEPARABLE)
    )
    if not plain:
        return 1
    piece = piece or PIECE.get(jax.default_backend(), OTHER_PIECE)
    return num_envs // divisor(num_envs, piece)


def improve_in_pieces(
    env: Env,
    agent: Agent,
    algorithm: Algorithm,
    params: AgentParams,
    opt_state,
    hyperparams: Hyperparams,
    key: Key,
    num_envs: int,
    num_steps: int,
    pieces: int,
) -> tuple[AgentParams, tuple, Metrics, EpisodeSums]:
    """One step along the mean gradient of all pieces. Metrics over steps are means over all steps."""
    estimator, size = algorithm.estimator, num_envs // pieces
    carry = initial_carry(agent, size)

    def one(index):
        # A piece's key depends on its number alone.
        trajectory, ended = episodes(
            env, agent, params, jax.random.fold_in(key, index), size, num_steps
        )
        batch = assess(
            estimator, trajectory, trajectory.log_prob, hyperparams, agent.policy, params.policy
        )
        gradient, metrics = gradient_of(
            estimator, agent.policy, params.policy, carry.policy, batch, hyperparams
        )
        steps = trajectory.mask.sum()
        value = metrics.pop("objective")
        return gradient, value, jax.tree.map(lambda x: steps * x, metrics), ended, steps

    def step(total, index):
        return jax.tree.map(jnp.add, total, one(index)), None

    shapes = jax.eval_shape(one, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(step, zeros, jnp.arange(pieces))
    gradient, value, metrics, ended, steps = total
    gradient = jax.tree.map(lambda x: -x / pieces, gradient)  # optimizers descend
    policy_optimizer, _ = optimizers(algorithm, hyperparams)
    updates, policy_state = policy_optimizer.update(gradient, opt_state[0], params.policy)
    params = params._replace(policy=optax.apply_updates(params.policy, updates))
    metrics = jax.tree.map(lambda x: x / steps, metrics)
    metrics |= {
        "objective": value / pieces,
        "grad_norm": optax.tree.norm(gradient),
        "env_steps": steps,
    }
    return params, (policy_state, opt_state[1]), metrics, ended
