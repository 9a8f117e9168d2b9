"""The table: every algorithm is an estimator, a source of data, and a way to step."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from jaxpg.estimators import (
    Estimator,
    baselines,
    credit,
    describe,
    facts_of,
    group_size_of,
    groups,
    importance,
    surrogates,
)
from jaxpg.estimators.control_variates import ControlVariate
from jaxpg.optimizers import Optimizer, Schedule, adam, adaptation, constant, natural
from jaxpg.optimizers.adaptation import Adaptation
from jaxpg.training import data
from jaxpg.training.data import Data


class Algorithm(NamedTuple):
    """A row of the table.

    >>> Algorithm(Estimator(baseline=baselines.time_mean), num_epochs=2).num_minibatches
    1
    """

    estimator: Estimator
    data: Data = data.episodes
    policy_optimizer: Optimizer = adam
    critic_optimizer: Optimizer | None = None  # None: no critic
    num_epochs: int = 1  # passes over the batch that move the policy (and the critic)
    num_minibatches: int = 1  # parts of the batch, one step each
    critic_epochs: int = 0  # further passes that move only the critic
    critic_minibatches: int = 1  # parts of the batch in those passes
    schedule: Schedule = constant
    adaptation: Adaptation = adaptation.fixed  # of hyperparameters to the KL of each update
    fisher_samples: int | None = None  # steps (or lanes) in the Fisher matrix; None: all
    measure_kl: bool = False  # log the KL of each whole update, for two more forward passes
    control_variate: ControlVariate | None = None  # a baseline per parameter, on whole episodes
    group_size: int = 1  # episodes from one start, side by side
    measure_noise: bool = False  # log the gradient's signal and noise, for one more backward pass


_TO_GO = Estimator(credit.reward_to_go)
_ACTOR_CRITIC = Estimator(credit.lambda_return, baselines.critic, reduce=surrogates.per_step)
_PPO = Algorithm(
    _ACTOR_CRITIC._replace(surrogate=surrogates.standardised(surrogates.clipped)),
    data.stream,
    critic_optimizer=adam,
    num_epochs=4,
    num_minibatches=4,
)
_TRUST_REGION = Algorithm(
    _ACTOR_CRITIC._replace(surrogate=surrogates.standardised(surrogates.ratio)),
    data.stream,
    policy_optimizer=natural.trpo,
    critic_optimizer=adam,
    critic_epochs=9,
    measure_kl=True,
)


def _grouped(size: int, baseline=baselines.batch_mean, **slots) -> Algorithm:
    """Total returns compared within groups of episodes from one start."""
    estimator = Estimator(credit.total_return, groups.grouped(baseline, size), **slots)
    return Algorithm(estimator, group_size=size)


def _reused(row: Algorithm) -> Algorithm:
    return row._replace(num_minibatches=4)


# Rows that compare episodes from one start, by the size of the groups.
GROUP_ROWS: dict[str, Callable[[int], Algorithm]] = {
    # Ahmadian et al., 2024.
    "rloo": lambda size: _grouped(size, baselines.leave_one_out),
    # Shao et al., 2024.
    "grpo": lambda size: _reused(
        _grouped(
            size,
            surrogate=groups.group_scaled(surrogates.clipped, size),
            reduce=surrogates.per_length,
        )
    ),
    # Liu et al., 2025: without either scale, of returns or of lengths.
    "dr_grpo": lambda size: _reused(
        _grouped(size, surrogate=surrogates.clipped, reduce=surrogates.per_row)
    ),
    # Yu et al., 2025.
    "dapo": lambda size: _reused(
        _grouped(
            size,
            surrogate=groups.dropping(
                groups.group_scaled(surrogates.clipped_apart, size), size, per_step=True
            ),
            reduce=surrogates.per_step,
        )
    ),
    # Zheng et al., 2025.
    "gspo": lambda size: _reused(
        _grouped(
            size,
            surrogate=groups.group_scaled(surrogates.sequence_clipped, size),
            reduce=surrogates.per_length,
        )
    ),
    # MiniMax, 2025.
    "cispo": lambda size: _reused(
        _grouped(
            size,
            surrogate=groups.group_scaled(surrogates.weighted_score, size),
            reduce=surrogates.per_step,
        )
    ),
}
GROUP_SIZE = 8
OFF_POLICY = ("dqn", "sac", "td3", "ddpg", "c51", "rainbow", "qr-dqn", "redq", "crossq")

ALGORITHMS = {
    # Williams, 1992.
    "reinforce": Algorithm(Estimator(credit.total_return)),
    "reinforce_to_go": Algorithm(_TO_GO),
    "reinforce_baseline": Algorithm(_TO_GO._replace(baseline=baselines.leave_one_out)),
    # Sutton et al., 2000, with the credit of Schulman et al., 2016.
    "vpg": Algorithm(
        _ACTOR_CRITIC._replace(surrogate=surrogates.standardised(surrogates.score)),
        data.stream,
        critic_optimizer=adam,
        critic_epochs=9,
    ),
    # Mnih et al., 2016, without the asynchrony: short rollouts, one joint step each.
    "a2c": Algorithm(_ACTOR_CRITIC, data.stream, critic_optimizer=adam),
    # Espeholt et al., 2018: stale streams under V-trace weights.
    "impala": Algorithm(
        _ACTOR_CRITIC._replace(importance=importance.truncated(1.0)),
        data.replay(data.stream, 4),
        critic_optimizer=adam,
    ),
    # Schulman et al., 2017.
    "ppo": _PPO,
    "ppo_kl": _PPO._replace(
        estimator=_ACTOR_CRITIC._replace(
            surrogate=surrogates.standardised(surrogates.kl_penalised)
        ),
        adaptation=adaptation.kl_penalty,
        measure_kl=True,
    ),
    # Kakade, 2001.
    "npg": _TRUST_REGION._replace(policy_optimizer=natural.npg),
    # Schulman et al., 2015.
    "trpo": _TRUST_REGION,
    # Peters and Schaal, 2008: batch_mean is what the intercept of the regression subtracts.
    "enac": Algorithm(
        Estimator(credit.total_return, baselines.batch_mean),
        policy_optimizer=natural.enac,
        measure_kl=True,
    ),
    # Baxter and Bartlett, 2001: the discounted sum from the start of the episode ...
    "gpomdp": Algorithm(_TO_GO._replace(importance=importance.from_start(importance.on_policy))),
    # ... and the eligibility trace z <- gamma z + u over num_steps of a task that never ends, where gamma
    # is their beta: (1/T) sum_t r_t z_t = (1/T) sum_t u_t sum_{k>=t} gamma^(k-t) r_k.
    "gpomdp_continuing": Algorithm(_TO_GO._replace(reduce=surrogates.per_step), data.stream),
    # Precup et al., 2000: whole episodes of the last policies, each reward weighted by the ratios up to it.
    "off_policy": Algorithm(
        _TO_GO._replace(baseline=baselines.time_mean, importance=importance.per_decision),
        data.replay(data.episodes, 4),
    ),
    # Levine and Koltun, 2013: the gradient of the self-normalised estimate of J, including its normaliser,
    # from the mixture of the policy's own episodes and demonstrations.
    "guided": Algorithm(
        Estimator(
            credit.total_return,
            baselines.regularised(baselines.weighted_mean),
            importance.self_normalised(importance.trajectory),
        ),
        data.mixture,
    ),
    # Maximum likelihood is REINFORCE with weight 1 on another policy's data.
    "behaviour_cloning": Algorithm(Estimator(credit.unit), data.demonstrations),
} | {name: row(GROUP_SIZE) for name, row in GROUP_ROWS.items()}


def algorithm(name: str, group_size: int | None = None) -> Algorithm:
    """A row of the table, with groups of another size if one is given.

    Raises ValueError for an unknown name, with near matches, and for groups too small to compare.

    >>> describe(algorithm("ppo").estimator.surrogate), algorithm("gpomdp") is ALGORITHMS["gpomdp"]
    ('standardised(clipped)', True)
    """
    if name.lower() in OFF_POLICY:
        raise ValueError(
            f"{name} learns values from a replay buffer, which jaxpg does not; use ppo, or a library "
            "such as Stoix, rejax or SBX"
        )
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=3, cutoff=0.4) or ALGORITHMS
        raise ValueError(f"unknown algorithm {name!r}; did you mean {', '.join(near)}?")
    if group_size is None:
        return ALGORITHMS[name]
    if name in GROUP_ROWS:
        return GROUP_ROWS[name](group_size)
    return ALGORITHMS[name]._replace(group_size=group_size)


def unmeasured(algorithm: Algorithm) -> list[str]:
    """Metrics that say nothing if a policy takes one step from its own data: kl 0, ess 1, nothing clipped."""
    if algorithm.num_epochs * algorithm.num_minibatches > 1 or algorithm.data.reweighs:
        return []
    return ["clip_fraction", "ess"] + ([] if algorithm.measure_kl else ["kl"])


def check_shared(algorithm: Algorithm) -> None:
    """Raises ValueError for a row that cannot train a policy and a critic in the same steps."""
    why = None
    if algorithm.critic_optimizer is None:
        why = "there is no critic to share it with"
    elif algorithm.policy_optimizer in natural.NATURAL_OPTIMIZERS:
        why = "natural gradients step by the policy's KL alone"
    elif algorithm.critic_epochs:
        why = f"critic_epochs={algorithm.critic_epochs} would move it for the critic alone"
    if why:
        raise ValueError(
            f"shared_torso: {why}; leave it out, or use ppo, ppo_kl, a2c, impala, or vpg with critic_epochs=0"
        )


def check_algorithm(algorithm: Algorithm, has_critic: bool) -> None:
    """Raises ValueError for a row whose parts contradict each other."""
    estimator, source = algorithm.estimator, algorithm.data
    whole = [value for value in estimator if facts_of(value).whole_episodes]
    if whole and not source.whole_episodes:
        raise ValueError(
            f"{describe(whole[0])} needs whole episodes, but the algorithm runs on a stream; "
            "set data=episodes"
        )
    size, compared = algorithm.group_size, group_size_of(estimator)
    if size < 1 or compared not in (1, size):
        raise ValueError(
            f"group_size={size}, but the estimator compares groups of {compared} episodes from one start"
        )
    if size > 1 and (not source.whole_episodes or source.demonstrations):
        raise ValueError(
            f"group_size={size} needs whole episodes of the policy's own, not {source.name}; leave it "
            "out, or use a row such as reinforce_baseline, rloo or grpo"
        )
    needs_critic = any(facts_of(value).reads_critic for value in estimator)
    if needs_critic and not (has_critic and algorithm.critic_optimizer):
        raise ValueError(
            f"credit {describe(estimator.credit)} with baseline {describe(estimator.baseline)} reads a "
            "critic; give the agent one and the algorithm a critic_optimizer"
        )
    reads = [value for value in estimator if facts_of(value).reads_reference]
    if reads and not source.records_reference:
        raise ValueError(
            f"{describe(reads[0])} reads a reference policy, which {source.name} does not record; use "
            f"with_reference({source.name})"
        )
    if facts_of(estimator.credit).reads_reference and source.reweighs:
        raise ValueError(
            f"{describe(estimator.credit)} charges the policy for its own actions, but {source.name} holds "
            "those of others; use a penalty instead (penalised, --kl-estimate k2), or one batch"
        )
    weighs = facts_of(estimator.importance).corrects
    if facts_of(estimator.surrogate).rescale and facts_of(estimator.credit).constant and not weighs:
        raise ValueError(
            f"{describe(estimator.surrogate)} makes the constant credit {describe(estimator.credit)} an "
            "advantage of 0, so the policy would never move; leave out standardised"
        )
    corrects = facts_of(estimator.surrogate).corrects
    reuses = algorithm.num_epochs * algorithm.num_minibatches > 1 and source.gathers
    if reuses and not corrects:
        raise ValueError(
            f"{algorithm.num_epochs} epochs x {algorithm.num_minibatches} minibatches move the policy "
            "away from its data, which the score surrogate cannot correct; use ratio, clipped or "
            "kl_penalised, or one step per batch"
        )
    if source.reweighs and not weighs:
        raise ValueError(
            f"{source.name} holds data of other policies, which {describe(estimator.importance)} treats as "
            "the current one's; use per_decision, trajectory, prefix, one_step, truncated or a "
            "self_normalised form"
        )
    by_step = facts_of(estimator.reduce).ignores_lanes
    if algorithm.control_variate and (not source.whole_episodes or reuses or by_step):
        raise ValueError(
            "a control variate acts on the gradients of whole episodes; use data=episodes, reduce "
            "per_episode, and one step per batch"
        )
    if source.name == "mixture" and (algorithm.critic_optimizer or algorithm.control_variate):
        raise ValueError(
            "a mixture with demonstrations takes neither a critic nor a control variate"
        )
    if algorithm.adaptation is not adaptation.fixed and not algorithm.measure_kl:
        raise ValueError("adaptation reads the KL of each update; set measure_kl=True")
    for name in ("num_epochs", "num_minibatches", "critic_minibatches"):
        if getattr(algorithm, name) < 1:
            raise ValueError(f"{name}={getattr(algorithm, name)} must be at least 1")
    if algorithm.critic_epochs < 0:
        raise ValueError(f"critic_epochs={algorithm.critic_epochs} must not be negative")
