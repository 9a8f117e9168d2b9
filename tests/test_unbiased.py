"""Every composition documented as unbiased has mean grad J, by enumeration in float64.

Every one documented as biased fails the same test, as it should.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "lab"))
from instances import random_instance

from jaxpg.estimators import Estimator, baselines, credit, facts_of, groups, importance, surrogates
from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration
from jaxpg.types import Hyperparams

pytestmark = pytest.mark.usefixtures("x64")
HP = Hyperparams(gamma=0.8, lambda_=0.7)
TABLE = np.random.default_rng(1).normal(size=(3, 3))
TOTAL, TO_GO, LAMBDA = credit.total_return, credit.reward_to_go, credit.lambda_return
START = importance.from_start
ON = START(importance.on_policy)
TABULATED = baselines.tabulated(TABLE)

UNBIASED = {
    "total return": Estimator(TOTAL),
    "total return, constant": Estimator(TOTAL, baselines.constant(1.7)),
    "total return, table": Estimator(TOTAL, TABULATED),
    "to go": Estimator(TO_GO, importance=ON),
    "to go, constant": Estimator(TO_GO, baselines.constant(1.7), ON),
    "to go, table": Estimator(TO_GO, TABULATED, ON),
    "to go, critic however wrong": Estimator(TO_GO, baselines.critic, ON),
    "to go, leave one out": Estimator(TO_GO, baselines.leave_one_out, ON),
    "to go, time mean": Estimator(TO_GO, baselines.time_mean, ON),
    "to go, optimal constant": Estimator(TO_GO, baselines.optimal_constant, ON),
    "to go, optimal per time": Estimator(TO_GO, baselines.optimal_per_time, ON),
    "to go, optimal per time, in a group": Estimator(
        TO_GO, groups.grouped(baselines.optimal_per_time, 2), ON
    ),
    "ratio on-policy": Estimator(TO_GO, TABULATED, ON, surrogates.ratio),
    "clipped on-policy": Estimator(TO_GO, TABULATED, ON, surrogates.clipped),
    "penalised on-policy": Estimator(TO_GO, TABULATED, ON, surrogates.kl_penalised),
}
UNBIASED_OFF = {
    "trajectory": Estimator(TOTAL, importance=importance.trajectory),
    "trajectory, to go, table": Estimator(TO_GO, TABULATED, START(importance.trajectory)),
    "per decision": Estimator(TO_GO, importance=START(importance.per_decision)),
    "per decision, critic": Estimator(TO_GO, baselines.critic, START(importance.per_decision)),
}
BIASED = {
    "to go without gamma^t": Estimator(TO_GO),
    "lambda-return, wrong critic": Estimator(LAMBDA, baselines.critic, ON),
    "to go, batch mean": Estimator(TO_GO, baselines.batch_mean, ON),
    "to go, optimal token": Estimator(TO_GO, baselines.optimal_token, ON),
    "per step": Estimator(TO_GO, importance=ON, reduce=surrogates.per_step),
    "standardised": Estimator(
        TO_GO, importance=ON, surrogate=surrogates.standardised(surrogates.score)
    ),
}
BIASED_OFF = {
    "no weights": Estimator(TO_GO, importance=ON),
    "one step": Estimator(TO_GO, importance=START(importance.one_step)),
    "prefix": Estimator(TO_GO, importance=START(importance.prefix)),
    "truncated": Estimator(TO_GO, importance=START(importance.truncated(1.1))),
    "self-normalised": Estimator(
        TOTAL, importance=importance.self_normalised(importance.trajectory)
    ),
    "ratio": Estimator(TO_GO, importance=ON, surrogate=surrogates.ratio),
    "clipped": Estimator(TO_GO, importance=ON, surrogate=surrogates.clipped),
}


def distance(estimator, off_policy, seed=3):
    """|E g - grad J| on a random world with a terminal state and a critic that is wrong.

    Batches have two episodes if a slot compares them.
    """
    mdp, logits, behaviour = random_instance(seed)
    critic = np.random.default_rng(seed).normal(size=(3, 3))
    size = max(facts_of(value).min_lanes for value in estimator)
    found = enumeration.moments(
        mdp,
        logits,
        estimator,
        HP,
        behaviour if off_policy else None,
        critic=critic,
        batch_size=size,
    )
    return np.linalg.norm(found.mean - exact.gradient(mdp, logits, HP.gamma))


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_on_policy(name):
    assert distance(UNBIASED[name], False) < 1e-10


@pytest.mark.parametrize("name", UNBIASED_OFF)
def test_unbiased_off_policy(name):
    assert distance(UNBIASED_OFF[name], True) < 1e-10


@pytest.mark.parametrize("name", BIASED)
def test_biased_on_policy(name):
    assert distance(BIASED[name], False) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASED_OFF)
def test_biased_off_policy(name):
    assert distance(BIASED_OFF[name], True) > 1e-3
