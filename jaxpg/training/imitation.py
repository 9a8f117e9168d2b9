"""Imitation: fits the demonstrators' policy by maximum likelihood."""

from collections.abc import Callable

import jax

from jaxpg.devices import undivided
from jaxpg.envs import Env
from jaxpg.estimators import check_lanes
from jaxpg.policies import Agent, Network
from jaxpg.training.algorithm import Algorithm, algorithm
from jaxpg.training.data import mixture
from jaxpg.training.trainer import Trainer, TrainState, make_trainer, train
from jaxpg.types import Hyperparams, Key, Params, Trajectory

# For cloning alone: the run's learning rates belong to its own algorithm.
NUMBERS = Hyperparams(learning_rate=5e-3)


def imitate(
    env: Env, policy: Network, demonstrations: Trajectory, key: Key, num_updates: int
) -> Params:
    """Parameters of a fresh policy after num_updates Adam steps up the demonstrations' likelihood."""
    check_lanes(demonstrations)
    row = algorithm("behaviour_cloning")
    trainer = make_trainer(env, Agent(policy), row, num_envs=1)
    state, _ = train(trainer, trainer.init(key), NUMBERS, demonstrations, num_updates=num_updates)
    return state.params.policy


def informed(
    trainer: Trainer,
    env: Env,
    policy: Network,
    row: Algorithm,
    demonstrations: Trajectory,
    num_updates: int,
    warm_start: bool,
) -> Callable[[Key], TrainState]:
    """The trainer's init, followed by fitting a policy to the demonstrations.

    A mixture uses the fit as the demonstrators' density on its own episodes; with warm_start the policy
    starts from it.
    """

    def init(key):
        state = trainer.init(key)
        with undivided():  # every device fits the same policy
            own = jax.random.fold_in(key, 1)
            fitted = imitate(env, policy, demonstrations, own, num_updates)
        if row.data is mixture:
            state = state._replace(data=fitted)
        if warm_start:
            state = state._replace(params=state.params._replace(policy=fitted))
        return state

    return init
