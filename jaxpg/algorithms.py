"""The table: every algorithm is an estimator, an optimizer and how often the data is gone through."""

import difflib
from typing import NamedTuple

from jaxpg.estimators import Estimator, baselines, credit, describe, importance, surrogates, uses
from jaxpg.estimators.control_variates import ControlVariate
from jaxpg.optimizers import Optimizer, Schedule, adam, constant


class Algorithm(NamedTuple):
    estimator: Estimator
    policy_optimizer: Optimizer = adam
    critic_optimizer: Optimizer | None = None  # None: no critic
    num_epochs: int = 1  # passes over the batch that move the policy (and the critic)
    num_minibatches: int = 1  # parts of the batch, one step each
    critic_epochs: int = 0  # further passes that move only the critic
    episodic: bool = True  # data: whole episodes, or a stream that carries on
    imitates: bool = False  # data: demonstrations
    schedule: Schedule = constant
    control_variate: ControlVariate | None = None  # a baseline per parameter, on whole episodes
    measure_noise: bool = False  # log the gradient's signal and noise, for one more backward pass


_TO_GO = Estimator(credit.reward_to_go)
_ACTOR_CRITIC = Estimator(credit.lambda_return, baselines.critic, reduce=surrogates.per_step)

ALGORITHMS = {
    # Williams, 1992.
    "reinforce": Algorithm(Estimator(credit.total_return)),
    "reinforce_to_go": Algorithm(_TO_GO),
    "reinforce_baseline": Algorithm(_TO_GO._replace(baseline=baselines.leave_one_out)),
    # Sutton et al., 2000, with the credit of Schulman et al., 2016.
    "vpg": Algorithm(
        _ACTOR_CRITIC._replace(surrogate=surrogates.standardised(surrogates.score)),
        critic_optimizer=adam,
        critic_epochs=9,
        episodic=False,
    ),
    # Schulman et al., 2017.
    "ppo": Algorithm(
        _ACTOR_CRITIC._replace(surrogate=surrogates.standardised(surrogates.clipped)),
        critic_optimizer=adam,
        num_epochs=4,
        num_minibatches=4,
        episodic=False,
    ),
    # Maximum likelihood is REINFORCE with weight 1, on somebody else's data.
    "behaviour_cloning": Algorithm(Estimator(credit.unit), imitates=True),
}


def algorithm(name: str) -> Algorithm:
    """A row of the table. Raises ValueError, with near matches, for an unknown name."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=3, cutoff=0.4) or ALGORITHMS
        raise ValueError(f"unknown algorithm {name!r}; did you mean {', '.join(near)}?")
    return ALGORITHMS[name]


def check_algorithm(algorithm: Algorithm, has_critic: bool) -> None:
    """Raises ValueError for a row whose parts contradict each other."""
    estimator = algorithm.estimator
    stream = not algorithm.episodic and not algorithm.imitates
    if stream:
        for value, slot in (
            (credit.total_return, estimator.credit),
            (importance.from_start, estimator.importance),
            (importance.trajectory, estimator.importance),
            (importance.per_decision, estimator.importance),
            (importance.prefix, estimator.importance),
            (surrogates.per_episode, estimator.reduce),
        ):
            if uses(slot, value):
                raise ValueError(
                    f"{describe(slot)} needs whole episodes, but the algorithm runs on a stream; "
                    "set episodic=True"
                )
    needs_critic = uses(estimator.baseline, baselines.critic) or uses(
        estimator.credit, credit.lambda_return
    )
    if needs_critic and not (has_critic and algorithm.critic_optimizer):
        raise ValueError(
            f"credit {describe(estimator.credit)} with baseline {describe(estimator.baseline)} reads a "
            "critic; give the agent one and the algorithm a critic_optimizer"
        )
    reuses = algorithm.num_epochs * algorithm.num_minibatches > 1 and not algorithm.imitates
    if reuses and uses(estimator.surrogate, surrogates.score):
        raise ValueError(
            f"{algorithm.num_epochs} epochs x {algorithm.num_minibatches} minibatches move the policy "
            "away from its data, which the score surrogate cannot correct; use ratio, clipped or "
            "kl_penalised, or one step per batch"
        )
    if algorithm.control_variate and (
        stream or reuses or not uses(estimator.reduce, surrogates.per_episode)
    ):
        raise ValueError(
            "a control variate acts on the gradients of whole episodes; use episodic=True, reduce "
            "per_episode, and one step per batch"
        )
    for name in ("num_epochs", "num_minibatches"):
        if getattr(algorithm, name) < 1:
            raise ValueError(f"{name}={getattr(algorithm, name)} must be at least 1")
    if algorithm.critic_epochs < 0:
        raise ValueError(f"critic_epochs={algorithm.critic_epochs} must not be negative")
