"""The exact mean and covariance of every row of the table of instances A and T, at two discounts."""

import numpy as np
import pytest
from exact_traces import BIASES, TRACES
from instances import instance_a, instance_c, instance_t, random_instance

from jaxpg.estimators import Estimator, baselines, credit, importance, surrogates
from jaxpg.lab import exact
from jaxpg.types import Hyperparams

CASES = [(name, gamma) for name in "AT" for gamma in (1.0, 0.9)]
TOTAL, TO_GO = credit.total_return, credit.reward_to_go
ON = importance.from_start(importance.on_policy)


def rows(instance, gamma):
    """Every estimator of the table, by name: its exact moments."""
    mdp, logits, behaviour = instance
    lived_through, saturated = without_ends(mdp, logits)
    value, action_value = exact.values(mdp, logits, gamma)
    value = value[:-1]
    average = exact.objective(mdp, logits, gamma)
    total = exact.optimal_baselines(mdp, logits, TOTAL, gamma)
    to_go = exact.optimal_baselines(mdp, logits, TO_GO, gamma)
    mean = (exact.occupancy(mdp, logits) * value).sum(axis=1)

    def slots(*estimator, lambda_=1.0, **settings):
        hyperparams = Hyperparams(gamma=gamma, lambda_=lambda_)
        return exact.moments(mdp, logits, Estimator(*estimator), hyperparams, **settings)

    def table(b):
        b = np.broadcast_to(b, value.shape)
        return slots(TO_GO, baselines.tabulated(b), ON)

    def control(credit, b):
        return exact.control_variate_moments(mdp, logits, credit, gamma, b)

    found = {
        "total b=0": slots(TOTAL),
        "total b=J": slots(TOTAL, baselines.constant(average)),
        "total b=b* scalar": slots(TOTAL, baselines.constant(total.scalar)),
        "total b=b* per-parameter": control(TOTAL, total.per_parameter),
        "rtg b=0": slots(TO_GO, baselines.none, ON),
        "rtg b=J (constant)": slots(TO_GO, baselines.constant(average), ON),
        "rtg b=b* scalar": control(TO_GO, to_go.scalar),
        "rtg b_t=E[R_t]": table(mean[:, None]),
        "rtg b_t=b*_t": table(to_go.per_time[:, None]),
        "rtg Peters-Schaal b_t^h": control(TO_GO, to_go.peters_schaal),
        "rtg b*_t per-parameter": control(TO_GO, to_go.per_time_per_parameter),
        "rtg b_t(s)=V_t(s)": slots(TO_GO, baselines.critic, ON),
        "rtg b_t(s) local |u|^2-wtd": table(to_go.local),
        "rtg b_t(s)=b*_t(s)": table(to_go.per_state_time),
        "rtg V, no gamma^t weight": slots(TO_GO, baselines.critic),
        "rtg b=0.7Q(s,a) (invalid)": exact.action_baseline_moments(
            mdp, logits, gamma, 0.7 * action_value
        ),
        "exact Q - V": exact.advantage_moments(mdp, logits, gamma),
        "all-action": exact.all_action_moments(mdp, logits, gamma),
    }
    for lambda_ in (0.0, 0.5, 0.9, 0.95, 1.0):
        gae = credit.lambda_return, baselines.critic, ON
        found[f"GAE({lambda_}) exact V"] = slots(*gae, lambda_=lambda_)
        poor = exact.moments(
            lived_through,
            saturated,
            Estimator(*gae),
            Hyperparams(gamma=gamma, lambda_=lambda_),
            critic=0.5 * value + 0.3,
        )
        found[f"GAE({lambda_}) Vhat=0.5V+0.3"] = poor
    if behaviour is not None:
        beta = {"behaviour_logits": behaviour}
        critic = exact.values(mdp, behaviour, gamma)[0][:-1]
        start = importance.from_start
        found |= {
            "IS total": slots(TOTAL, baselines.none, importance.trajectory, **beta),
            "IS pdis": slots(TO_GO, baselines.none, start(importance.per_decision), **beta),
            "IS first_order": slots(TO_GO, baselines.none, start(importance.prefix), **beta),
            "IS step_ratio": slots(TO_GO, baselines.none, start(importance.one_step), **beta),
            "IS step_ratio b=V^beta": slots(
                TO_GO, baselines.critic, ON, surrogates.ratio, critic=critic, **beta
            ),
            "IS note_literal": exact.note_literal_moments(mdp, logits, behaviour, gamma),
            "IS marginal": exact.marginal_moments(mdp, logits, behaviour, gamma),
            "surrogate exact A unclipped": exact.surrogate_moments(mdp, logits, behaviour, gamma),
            "PPO-clip 0.2 exact A": exact.surrogate_moments(
                mdp, logits, behaviour, gamma, clip_eps=0.2
            ),
        }
    return found


def without_ends(mdp, logits):
    """The world with its terminal states lived through: no reward, and a policy too sure to have a score.

    The poor critic of the table says 0.3 of them too, while the value after a termination is 0 here
    (its discount is), so a state that is absorbing without being terminal is what the numbers are of.
    """
    sure = np.where(np.arange(logits.shape[1]) == 0, 60.0, -60.0)
    ends = np.unique(mdp.observation[mdp.terminal])
    logits = np.where(np.isin(np.arange(len(logits)), ends)[:, None], sure, logits)
    return mdp._replace(terminal=np.zeros_like(mdp.terminal)), logits


@pytest.mark.parametrize(("name", "gamma"), CASES)
def test_every_row_of_the_table(name, gamma):
    instance = {"A": instance_a, "T": instance_t}[name]()
    found = rows(instance, gamma)
    # Capping the weight of a whole trajectory is no recursion: tests/lab/test_enumeration.py.
    known = {k: v for k, v in TRACES[name, gamma].items() if "capped" not in k}
    biases = BIASES[name, gamma]
    true = exact.gradient(instance.mdp, instance.logits, gamma)
    for row, trace in known.items():
        np.testing.assert_allclose(found[row].trace, trace, rtol=1e-11, err_msg=row)
        bias = np.linalg.norm(found[row].mean - true)
        np.testing.assert_allclose(bias, biases.get(row, 0.0), rtol=1e-8, atol=1e-12, err_msg=row)
        np.testing.assert_allclose(found[row].covariance, found[row].covariance.T, atol=1e-12)
    assert set(found) == set(known)


def test_the_marginal_form_has_the_mean_of_the_first_order_form():
    found = rows(instance_a(), 0.9)
    first, marginal = found["IS first_order"], found["IS marginal"]
    np.testing.assert_allclose(first.mean, marginal.mean, atol=1e-12)
    assert marginal.trace < first.trace


def test_reward_to_go_can_only_hurt_where_rewards_cancel():
    mdp, logits, _ = instance_c()
    hyperparams = Hyperparams(gamma=1.0)
    found = {
        name: exact.moments(mdp, logits, estimator, hyperparams).trace
        for name, estimator in {
            "total": Estimator(TOTAL),
            "to_go": Estimator(),
            "V": Estimator(TO_GO, baselines.critic),
        }.items()
    }
    np.testing.assert_allclose(exact.gradient(mdp, logits, 1.0), 0.0, atol=1e-15)
    np.testing.assert_allclose(
        list(found.values()), [0.0, 0.4763020666, 0.0], rtol=1e-9, atol=1e-12
    )


def test_partial_observability_biases_bootstraps_but_not_returns():
    mdp, logits, _ = instance_a(observation=(0, 1, 0))
    true = exact.gradient(mdp, logits, 1.0)
    expected = (1.3682438082, -1.3682438082, -0.4989263193, 0.4989263193)
    np.testing.assert_allclose(true, expected, atol=1e-10)
    critic, _ = exact.observation_values(mdp, logits, 1.0)
    to_go = exact.moments(mdp, logits, Estimator(), Hyperparams(gamma=1.0))
    np.testing.assert_allclose(to_go.mean, true, atol=1e-12)
    np.testing.assert_allclose(to_go.trace, 9.91994022, rtol=1e-9)
    estimator = Estimator(credit.lambda_return, baselines.critic)
    known = {0.0: (0.1465, 1.844), 0.5: (0.0823, 2.613), 0.95: (0.0092, 5.819), 1.0: (0.0, 6.6)}
    for lambda_, (bias, trace) in known.items():
        hyperparams = Hyperparams(gamma=1.0, lambda_=lambda_)
        found = exact.moments(mdp, logits, estimator, hyperparams, critic=critic)
        relative = np.linalg.norm(found.mean - true) / np.linalg.norm(true)
        np.testing.assert_allclose((relative, found.trace), (bias, trace), atol=5e-4)


@pytest.mark.parametrize(
    ("estimator", "exponents"),
    [
        (Estimator(TOTAL), (24.0, 979.0, 13513.0, 2.87)),
        (Estimator(), (10.8, 348.0, 4602.0, 2.82)),
        (Estimator(TO_GO, baselines.critic), (6.17, 97.1, 599.5, 1.99)),
        (None, (1.65, 7.60, 19.5, 1.03)),
    ],
)
def test_variance_grows_with_the_horizon(estimator, exponents):
    *known, slope = exponents
    found = []
    for horizon in (5, 20, 50):
        mdp, logits, _ = instance_a(horizon)
        if estimator is None:
            found.append(exact.advantage_moments(mdp, logits, 1.0).trace)
        else:
            found.append(exact.moments(mdp, logits, estimator, Hyperparams(gamma=1.0)).trace)
    np.testing.assert_allclose(found, known, rtol=5e-3)
    assert abs(np.log(found[2] / found[1]) / np.log(2.5) - slope) < 0.006


@pytest.mark.parametrize(
    ("slot", "known"),
    [
        (importance.trajectory, (53, 493, 7762, 65489)),
        (importance.per_decision, (18.7, 132, 1553, 10345)),
        (importance.one_step, (12.4, 74, 528, 1728)),
    ],
)
def test_variance_of_importance_sampling_grows_with_the_horizon(slot, known):
    credit_ = TOTAL if slot is importance.trajectory else TO_GO
    found = []
    for horizon in (5, 10, 20, 30):
        mdp, logits, behaviour = instance_a(horizon)
        estimator = Estimator(credit_, importance=slot)
        found.append(exact.moments(mdp, logits, estimator, Hyperparams(gamma=1.0), behaviour).trace)
    np.testing.assert_allclose(found, known, rtol=6e-3)


def test_a_reward_offset_is_exactly_quadratic():
    mdp, logits, _ = instance_a()
    offsets = np.array([0.0, 0.5, -2.0, 7.0])
    estimator, hyperparams = Estimator(TOTAL), Hyperparams(gamma=1.0)
    # An offset of kappa on the return is one of kappa / H on every reward.
    found = [
        exact.moments(mdp._replace(reward=mdp.reward + k / 5), logits, estimator, hyperparams).trace
        for k in offsets
    ]
    known = found[0] + 2 * offsets * 4.95057615 + offsets**2 * 2.36076056
    np.testing.assert_allclose(found, known, rtol=1e-8)


def test_reward_noise_is_as_two_equally_likely_rewards():
    """A coin in the state, hidden from the policy, adds +-sigma: the first two moments of Gaussian noise."""
    mdp, logits, behaviour = random_instance(3)
    std = np.array([[0.5, 1.0], [2.0, 0.3], [0.0, 0.0]])
    noisy = mdp._replace(reward_variance=std**2)
    coin = np.array([0.5, 0.5])
    hidden = mdp._replace(
        initial=np.kron(mdp.initial, coin),
        transition=np.repeat(np.kron(mdp.transition, coin[None, None, :]), 2, axis=0),
        reward=np.repeat(mdp.reward, 2, axis=0) + np.kron(std, np.array([[1.0], [-1.0]])),
        reward_variance=np.zeros((6, 2)),
        terminal=np.repeat(mdp.terminal, 2),
        observation=np.repeat(mdp.observation, 2),
    )
    table = baselines.tabulated(np.arange(9.0).reshape(3, 3))
    for estimator in (
        Estimator(TOTAL, table, importance.trajectory),
        Estimator(TO_GO, table, importance.per_decision),
        Estimator(credit.lambda_return, table, importance.truncated(1.1)),
    ):
        pair = []
        for world in (noisy, hidden):
            repeats = len(world.initial) // 3
            critic = np.repeat([0.3, -0.4, 0.0], repeats)
            hyperparams = Hyperparams(gamma=0.8, lambda_=0.6)
            pair.append(
                exact.moments(world, logits, estimator, hyperparams, behaviour, critic=critic)
            )
        np.testing.assert_allclose(pair[0].mean, pair[1].mean, atol=1e-12)
        np.testing.assert_allclose(pair[0].covariance, pair[1].covariance, atol=1e-11)


def test_dropping_the_discount_of_states_is_seen():
    mdp, logits, _ = instance_a()
    true = exact.gradient(mdp, logits, 0.9)

    def bias(slot):
        estimator = Estimator(TO_GO, importance=slot)
        mean = exact.moments(mdp, logits, estimator, Hyperparams(gamma=0.9)).mean
        return np.linalg.norm(mean - true) / np.linalg.norm(true)

    assert bias(ON) < 1e-12
    assert abs(bias(importance.on_policy) - 0.228) < 5e-4


def test_without_the_discount_of_states_no_function_has_this_gradient():
    """The Jacobian of the expected update is symmetric for a gradient (Nota and Thomas, 2020)."""
    mdp, logits, _ = instance_a()

    def asymmetry(slot):
        def mean(x):
            estimator = Estimator(TO_GO, importance=slot)
            return exact.moments(mdp, x.reshape(3, 2), estimator, Hyperparams(gamma=0.9)).mean

        flat, h = logits.reshape(-1), 1e-5
        columns = [(mean(flat + h * e) - mean(flat - h * e)) / (2 * h) for e in np.eye(6)]
        jacobian = np.stack(columns, axis=1)
        return np.linalg.norm(jacobian - jacobian.T) / np.linalg.norm(jacobian)

    assert asymmetry(ON) < 1e-8
    assert abs(asymmetry(importance.on_policy) - 0.0478) < 5e-4


def test_an_unmasked_terminal_score_shows_in_the_variance_only():
    hyperparams = Hyperparams(gamma=1.0)
    found = []
    for unmasked in (False, True):
        mdp, logits, _ = instance_t(unmasked)
        found.append(exact.moments(mdp, logits, Estimator(TOTAL), hyperparams))
    np.testing.assert_allclose(found[0].mean, found[1].mean, atol=1e-12)
    traces = [x.trace for x in found]
    np.testing.assert_allclose(traces, [73.76380316, 102.04677065], rtol=1e-9)


def test_stale_data_costs_first_order_in_the_gradient():
    """Against the true gradient, the step ratio's error is linear in the distance of the policies."""
    mdp, logits, behaviour = instance_a()
    direction = (behaviour - logits) / np.linalg.norm(behaviour - logits)
    distances, errors = np.array([1e-1, 1e-2, 1e-3]), []
    for distance in distances:
        target = logits + distance * direction
        estimator = Estimator(importance=importance.one_step)
        mean = exact.moments(mdp, target, estimator, Hyperparams(gamma=1.0), logits).mean
        errors.append(np.linalg.norm(mean - exact.gradient(mdp, target, 1.0)))
    slope = np.polyfit(np.log(distances), np.log(errors), 1)[0]
    assert abs(slope - 1.0) < 0.03


@pytest.mark.parametrize(
    ("estimator", "named"),
    [
        (Estimator(baseline=baselines.leave_one_out), "baseline leave_one_out"),
        (Estimator(baseline=baselines.optimal_per_time), "baseline optimal_per_time"),
        (
            Estimator(importance=importance.self_normalised(importance.prefix)),
            r"importance self_normalised\(prefix\)",
        ),
        (
            Estimator(surrogate=surrogates.standardised(surrogates.score)),
            r"surrogate standardised\(score\)",
        ),
        (Estimator(surrogate=surrogates.clipped), r"clipped with clip_eps=0\.2 cuts"),
        (
            Estimator(importance=importance.prefix, surrogate=surrogates.kl_penalised),
            "kl_penalised adds a penalty",
        ),
        (Estimator(credit=lambda *x: x), "credit <lambda>"),
    ],
)
def test_what_no_recursion_covers_is_refused_by_name(estimator, named):
    mdp, logits, behaviour = instance_a()
    with pytest.raises(ValueError, match=named):
        exact.moments(mdp, logits, estimator, Hyperparams(), behaviour)


def test_bad_input_is_refused():
    mdp, logits, behaviour = instance_a()
    with pytest.raises(ValueError, match=r"logits has shape \(2, 2\)"):
        exact.gradient(mdp, logits[:2], 1.0)
    certain = behaviour.copy()
    certain[1, 0] = -np.inf
    with pytest.raises(ValueError, match="never take action 0 in state 1"):
        exact.moments(mdp, logits, Estimator(), Hyperparams(), certain)
    with pytest.raises(ValueError, match=r"entropy_coef=0\.1 is not covered"):
        exact.moments(mdp, logits, Estimator(), Hyperparams(entropy_coef=0.1))
    with pytest.raises(ValueError, match=r"critic has shape \(2,\)"):
        exact.moments(mdp, logits, Estimator(), Hyperparams(), critic=np.zeros(2))
    mdp, logits, _ = instance_t()
    with pytest.raises(ValueError, match="reduction per_step"):
        exact.moments(mdp, logits, Estimator(reduce=surrogates.per_step), Hyperparams())
