"""The exact mean and covariance of every estimator on instances A and T, at two discounts."""

import numpy as np
import pytest
from instances import instance_a, instance_c, instance_t, random_instance
from listing import (
    ahead,
    along,
    given_action,
    given_state,
    in_state,
    least,
    least_by_parameter,
    listing,
    moments,
    weighted,
)

from jaxpg.estimators import Estimator, baselines, credit, importance, surrogates
from jaxpg.lab import exact
from jaxpg.types import Hyperparams

CASES = [(name, gamma) for name in "AT" for gamma in (1.0, 0.9)]
TOTAL, TO_GO = credit.total_return, credit.reward_to_go
ON = importance.from_start(importance.on_policy)


def rows(instance, gamma):
    """The exact moments of every estimator of the table, by name."""
    mdp, logits, behaviour = instance
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
        poor = 0.5 * value + 0.3
        found[f"GAE({lambda_}) Vhat=0.5V+0.3"] = slots(*gae, lambda_=lambda_, critic=poor)
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


def written_out(instance, gamma):
    """The trajectories and, by name, the same estimates [N, P] of each, written out from their formulas."""
    mdp, logits, behaviour = instance
    each = listing(mdp, logits, gamma)
    returns, c, size = each.to_go[0], each.start, (each.u**2).sum(axis=-1)
    everyone = np.ones_like(each.to_go)
    value, action_value = given_state(each, each.to_go), given_action(each, each.to_go)
    q, v = along(each, action_value), along(each, value)
    total, to_go = weighted(each, everyone * returns), weighted(each, c * each.to_go)
    score, scores = weighted(each, everyone)[None], each.u * c[..., None]
    mean = (each.p * each.to_go).sum(axis=1, keepdims=True)
    local = given_state(each, size * each.to_go) / given_state(each, size).clip(1e-300)
    before = each.u.cumsum(axis=0)  # Z_t
    paid = c * each.reward
    peters = np.stack(
        [
            least_by_parameter(each, z * r[:, None], z[None])[0]
            for z, r in zip(before, paid, strict=True)
        ]
    )
    every_action = np.einsum("sa,sap,tsa->tsp", each.pi, each.scores, action_value)

    def minimal(g, functions):
        return g - np.tensordot(least(each, g, functions), functions, axes=1)

    def minimal_by_parameter(g, functions):
        return g - (least_by_parameter(each, g, functions)[:, None] * functions).sum(axis=0)

    found = {
        "total b=0": total,
        "total b=J": weighted(each, everyone * (returns - each.p @ returns)),
        "total b=b* scalar": minimal(total, score),
        "total b=b* per-parameter": minimal_by_parameter(total, score),
        "rtg b=0": to_go,
        "rtg b=J (constant)": weighted(each, c * (each.to_go - each.p @ returns)),
        "rtg b=b* scalar": minimal(to_go, scores.sum(axis=0)[None]),
        "rtg b_t=E[R_t]": weighted(each, c * (each.to_go - mean)),
        "rtg b_t=b*_t": minimal(to_go, scores),
        "rtg Peters-Schaal b_t^h": (before * (paid[..., None] - np.stack(peters)[:, None])).sum(
            axis=0
        ),
        "rtg b*_t per-parameter": minimal_by_parameter(to_go, scores),
        "rtg b_t(s)=V_t(s)": weighted(each, c * (each.to_go - v)),
        "rtg b_t(s) local |u|^2-wtd": weighted(each, c * (each.to_go - along(each, local))),
        "rtg b_t(s)=b*_t(s)": minimal(to_go, in_state(each, scores)),
        "rtg V, no gamma^t weight": weighted(each, each.to_go - v),
        "rtg b=0.7Q(s,a) (invalid)": weighted(each, c * (each.to_go - 0.7 * q)),
        "exact Q - V": weighted(each, c * (q - v)),
        "all-action": sum(
            c[t] * every_action[t, each.s[t]] * each.alive[t][:, None] for t in range(mdp.horizon)
        ),
    }
    for name, critic in (("exact V", v), ("Vhat=0.5V+0.3", along(each, 0.5 * value + 0.3))):
        following = np.concatenate([critic[1:], 0 * critic[:1]])
        error = np.where(each.alive, each.reward + gamma * following - critic, 0.0)
        for lambda_ in (0.0, 0.5, 0.9, 0.95, 1.0):
            found[f"GAE({lambda_}) {name}"] = weighted(each, c * ahead(error, gamma * lambda_))
    if behaviour is None:
        return [(each, found)]
    other = listing(mdp, logits, gamma, behaviour)
    acted = listing(mdp, behaviour, gamma)
    rho, prefix = other.rho, other.rho.cumprod(axis=0)
    value, action_value = given_state(acted, acted.to_go), given_action(acted, acted.to_go)
    v, advantage = along(other, value), along(other, action_value) - along(other, value)
    occupied, visited = (
        np.stack([((x.s == s) * x.p).sum(axis=1) for s in range(len(mdp.initial))], axis=1)
        for x in (each, other)
    )
    cut = ((advantage > 0) & (rho > 1.2)) | ((advantage < 0) & (rho < 0.8))
    causal = ahead(other.reward, gamma * rho)  # weighted by the ratios after t
    return [(each, found), (other, {
        "IS total": weighted(other, everyone * prefix[-1] * other.to_go[0]),
        "IS pdis": weighted(other, c * prefix * causal),
        "IS first_order": weighted(other, c * prefix * other.to_go),
        "IS step_ratio": weighted(other, c * rho * other.to_go),
        "IS step_ratio b=V^beta": weighted(other, c * rho * (other.to_go - v)),
        "IS note_literal": weighted(other, c * prefix * rho * causal),
        "IS marginal": weighted(other, c * along(other, occupied / visited) * rho * other.to_go),
        "surrogate exact A unclipped": weighted(other, c * rho * advantage),
        "PPO-clip 0.2 exact A": weighted(other, c * np.where(cut, 0.0, rho) * advantage),
    })]  # fmt: skip


@pytest.mark.parametrize(("name", "gamma"), CASES)
def test_every_row_of_the_table(name, gamma):
    """The recursions give the mean and the covariance over all trajectories."""
    instance = {"A": instance_a, "T": instance_t}[name]()
    found, seen = rows(instance, gamma), set()
    for each, estimates in written_out(instance, gamma):
        for row, estimate in estimates.items():
            mean, covariance = moments(each, estimate)
            np.testing.assert_allclose(found[row].mean, mean, atol=1e-11, err_msg=row)
            np.testing.assert_allclose(found[row].covariance, covariance, atol=1e-9, err_msg=row)
        seen |= set(estimates)
    assert seen == set(found)


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
    # To add kappa to the return, add kappa / H to every reward.
    found = [
        exact.moments(mdp._replace(reward=mdp.reward + k / 5), logits, estimator, hyperparams).trace
        for k in offsets
    ]
    known = found[0] + 2 * offsets * 4.95057615 + offsets**2 * 2.36076056
    np.testing.assert_allclose(found, known, rtol=1e-8)


def test_reward_noise_is_as_two_equally_likely_rewards():
    """A coin in the state, hidden from the policy, adds +-sigma, with the two moments of Gaussian noise."""
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
    """The step ratio's error to the true gradient is linear in the distance between the policies."""
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
