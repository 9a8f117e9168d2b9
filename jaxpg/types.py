"""The data that flows through jaxpg: time steps, trajectories, hyperparameters.

Arrays are time-major, `[T, B, ...]`: T steps of B environments.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jax import Array
else:
    Array = Any  # the command's help reads Hyperparams, and must not wait for jax

Key = Array
Params = Any
Carry = Any
Metrics = dict[str, Array]


class TimeStep(NamedTuple):
    """What one environment returns for one step, before any reset."""

    obs: Array  # the true successor observation
    reward: Array  # []
    terminated: Array  # [] bool: the MDP ended, nothing follows
    truncated: Array  # [] bool: the clock ended it, the value goes on


class Trajectory(NamedTuple):
    """T steps of B environments, [T, B, ...]; rows after an episode's end have mask False and zeros."""

    obs: Array
    action: Array  # as sampled; the environment clips it
    log_prob: Array  # under the behaviour policy, of the action as sampled
    reward: Array
    discount: Array  # 0 where terminated, else 1; gamma is applied later
    first: Array  # bool: obs opens an episode
    last: Array  # bool: the episode ended here, either way
    mask: Array  # bool: the step counts
    value: Array  # V(obs); 0 without a critic
    next_value: (
        Array  # V(true successor), also at truncation; where terminated, discount cancels it
    )


class Hyperparams(NamedTuple):
    """Numbers that training reads: traced and vmappable, never a shape and never a switch."""

    learning_rate: Any = 1e-3
    critic_learning_rate: Any = 1e-3
    gamma: Any = 0.99
    lambda_: Any = 0.95
    clip_eps: Any = 0.2
    entropy_coef: Any = 0.0
    kl_coef: Any = 1.0
    target_kl: Any = 0.01
    stop_kl: Any = 1e9
    max_kl: Any = 0.01
    damping: Any = 0.1
    value_clip_eps: Any = 1e9
    ess_floor: Any = 0.1
    normaliser_coef: Any = 0.0
    max_grad_norm: Any = 0.5
    weight_decay: Any = 0.0  # of adamw, lion and muon
    schedule_updates: Any = 1e9  # updates over which a learning-rate schedule runs


HYPERPARAM_HELP = {
    "learning_rate": "step size of the policy's optimizer",
    "critic_learning_rate": "step size of the critic's optimizer",
    "gamma": "discount per step, in [0, 1]",
    "lambda_": "lambda of the lambda-return (GAE is the lambda-return minus V), in [0, 1]",
    "clip_eps": "epsilon of the clipped surrogate: ratios outside 1 +- epsilon are clipped",
    "entropy_coef": "weight of the entropy bonus",
    "kl_coef": "weight of the KL penalty of the kl_penalised surrogate",
    "target_kl": "KL per update, in nats per step, that --adaptation steers to",
    "stop_kl": "a minibatch whose KL exceeds it ends the policy's steps of its update",
    "max_kl": "KL in nats per step of one step of npg, trpo and enac",
    "damping": "added to the diagonal of the Fisher matrix by npg, trpo and enac",
    "value_clip_eps": "the critic's loss lets a value move this far per update; a large one is no limit",
    "ess_floor": "old data is dropped where its effective share of the sample is below it, in [0, 1]",
    "normaliser_coef": "weight of the log normaliser of guided's self-normalised weights",
    "max_grad_norm": "gradients are scaled down to this global norm",
    "weight_decay": "of weight matrices, by adamw, lion and muon, in units of the learning rate",
    "schedule_updates": "updates over which the learning-rate schedule runs; for the command, 0 is all",
}
