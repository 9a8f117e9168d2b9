"""The slots against few-line NumPy loops, in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import estimators
from jaxpg.envs import Discrete
from jaxpg.estimators import (
    Estimator,
    Slot,
    assess,
    baselines,
    coefficients,
    credit,
    describe,
    facts_of,
    groups,
    importance,
    reference,
    surrogates,
)
from jaxpg.policies import Gaussian, Network, tabular
from jaxpg.types import Array, Hyperparams, Trajectory

HP = Hyperparams(gamma=0.9, lambda_=0.7)
T, B = 11, 6
pytestmark = pytest.mark.usefixtures("x64")


def trajectory(seed: int, ends: bool = True) -> Trajectory:
    """Random numbers, with terminations and truncations in the middle; a stream, so all steps count."""
    rng = np.random.default_rng(seed)
    last = rng.random((T, B)) < (0.3 if ends else 0.0)
    dead = last & (rng.random((T, B)) < 0.5)
    first = np.concatenate([np.ones((1, B), bool), last[:-1]])
    x = rng.normal(size=(4, T, B))
    return Trajectory(
        obs=jnp.asarray(rng.normal(size=(T, B, 3))),
        action=jnp.asarray(rng.integers(0, 2, (T, B))),
        log_prob=jnp.asarray(x[0]),
        reward=jnp.asarray(x[1]),
        discount=jnp.asarray(1.0 - dead),
        first=jnp.asarray(first),
        last=jnp.asarray(last),
        mask=jnp.ones((T, B), bool),
        value=jnp.asarray(x[2]),
        next_value=jnp.asarray(x[3]),
    )


def consistent(traj: Trajectory) -> Trajectory:
    """next_value is the next row's value, except where an episode ended or the rollout did."""
    later = jnp.concatenate([traj.value[1:], traj.next_value[-1:]])
    return traj._replace(next_value=jnp.where(traj.last, traj.next_value, later))


def masked(traj: Trajectory) -> Trajectory:
    """Whole episodes from row 0, of lengths 1 .. T; later rows hold rubbish."""
    length = np.array([1, 3, T, 5, T, 2])
    row = np.arange(T)[:, None]
    last, mask = row == length - 1, row < length
    return traj._replace(
        last=jnp.asarray(last),
        mask=jnp.asarray(mask),
        reward=jnp.where(mask, traj.reward, jnp.nan),
        value=jnp.where(mask, traj.value, 0.0),
        discount=jnp.asarray(np.where(last & (length % 2 == 1), 0.0, 1.0)),
    )


def loop(traj, gamma, lambda_, trace=None):
    """The definition, O(T^2): sum over k of the products of decay and trace times delta_k."""
    r, d, last, v, nv = (
        np.asarray(x) for x in (traj.reward, traj.discount, traj.last, traj.value, traj.next_value)
    )
    c = np.ones((T, B)) if trace is None else np.asarray(trace)
    psi = np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            weight, total = 1.0, v[t, b]
            for k in range(t, T):
                total += weight * (r[k, b] + gamma * d[k, b] * nv[k, b] - v[k, b])
                if last[k, b] or k == T - 1:
                    break
                weight *= gamma * lambda_ * c[k + 1, b]
            psi[t, b] = total
    return psi


@pytest.mark.parametrize("seed", range(3))
def test_lambda_return_is_its_definition(seed):
    traj = trajectory(seed)
    psi = credit.lambda_return(jnp.ones((T, B)), traj, HP)
    assert np.allclose(psi, loop(traj, 0.9, 0.7), atol=1e-12)
    trace = jnp.asarray(np.random.default_rng(9).random((T, B)) * 2)
    assert np.allclose(
        credit.lambda_return(trace, traj, HP), loop(traj, 0.9, 0.7, trace), atol=1e-12
    )


def test_nothing_follows_a_terminated_step_not_even_a_nan():
    traj = trajectory(0)
    ended = jnp.asarray(traj.discount) == 0
    assert ended.any()
    unknown = traj._replace(next_value=jnp.where(ended, jnp.nan, traj.next_value))
    for psi in (credit.lambda_return, credit.reward_to_go):
        found, expected = (psi(jnp.ones((T, B)), each, HP) for each in (unknown, traj))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_reward_to_go_sums_rewards_and_bootstraps_only_where_cut(seed):
    traj = consistent(trajectory(seed))
    r, d, last, nv = (
        np.asarray(x) for x in (traj.reward, traj.discount, traj.last, traj.next_value)
    )
    expected = np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            for k in range(t, T):
                expected[t, b] += 0.9 ** (k - t) * r[k, b]
                if last[k, b] or k == T - 1:
                    expected[t, b] += 0.9 ** (k - t + 1) * d[k, b] * nv[k, b]
                    break
    assert np.allclose(credit.reward_to_go(jnp.ones((T, B)), traj, HP), expected, atol=1e-12)


def test_whole_episodes_are_masked_before_anything_multiplies():
    traj = masked(trajectory(4))
    traj = traj._replace(value=jnp.zeros((T, B)), next_value=jnp.zeros((T, B)))
    psi = credit.reward_to_go(jnp.ones((T, B)), traj, HP)
    total = credit.total_return(jnp.ones((T, B)), traj, HP)
    r, length = np.asarray(traj.reward), np.asarray(traj.mask).sum(0)
    for b in range(B):
        by_hand = [
            sum(0.9 ** (k - t) * r[k, b] for k in range(t, length[b])) for t in range(length[b])
        ]
        assert np.allclose(psi[: length[b], b], by_hand, atol=1e-12)
        assert (psi[length[b] :, b] == 0).all()
        assert np.allclose(total[:, b], by_hand[0], atol=1e-12), (
            "discounted from the start, for every t"
        )


def test_truncation_is_not_death():
    """One state that pays 1 for ever, cut after each step: V = 1/(1-gamma). Death would give 1."""
    gamma = 0.9
    value = 1 / (1 - gamma)
    ones = jnp.ones((1, 1))
    true = jnp.ones((1, 1), bool)
    cut = Trajectory(
        obs=ones, action=ones, log_prob=ones, reward=ones, discount=ones, first=true, last=true,
        mask=true, value=value * ones, next_value=value * ones,
    )  # fmt: skip
    for slot in (credit.reward_to_go, credit.lambda_return, credit.total_return):
        psi = slot(ones, cut, Hyperparams(gamma=gamma))
        assert np.allclose(psi, value), "V is the fixed point when the time limit is not death"
        death = slot(ones, cut._replace(discount=0 * ones), Hyperparams(gamma=gamma))
        assert np.allclose(death, 1.0)


def never_called(*given):
    raise AssertionError


UNREAD = baselines.Scores(jnp.ones((T, B)), never_called, never_called)


def test_baselines_against_loops():
    traj = masked(trajectory(5))
    psi, mask = np.random.default_rng(6).normal(size=(T, B)), np.asarray(traj.mask)
    arguments = (jnp.asarray(psi), UNREAD, traj, HP)
    assert (baselines.none(*arguments) == 0).all()
    assert (baselines.constant(2.5)(*arguments) == 2.5).all()
    assert np.allclose(baselines.critic(*arguments), traj.value)
    own = baselines.batch_mean(*arguments)
    others = baselines.leave_one_out(*arguments)
    running = baselines.time_mean(*arguments)
    for t in range(T):
        for i in range(B):
            rest = [j for j in range(B) if j != i]
            assert np.isclose(own[t, i], psi[t].mean())
            assert np.isclose(others[t, i], psi[t, rest].mean())
            alive = [j for j in rest if mask[t, j]]
            assert np.isclose(running[t, i], psi[t, alive].mean() if alive else 0.0)
    # Sample by sample: the own-mean estimate is (N-1)/N times the leave-one-out one.
    assert np.allclose(psi - own, (B - 1) / B * (psi - others), atol=1e-12)


@pytest.mark.slow
def test_the_optimal_token_baseline_weighs_by_the_norms_so_far():
    """With a table, scores have the square 1 - 2 pi(a) + sum pi^2; a Gaussian's are by mean and log std."""
    traj = masked(trajectory(24))
    obs, action = np.random.default_rng(25).integers(0, 2, (2, T, B))
    traj = estimators.masked(traj._replace(obs=jnp.asarray(obs), action=jnp.asarray(action)))
    psi, mask = np.random.default_rng(26).normal(size=(T, B)), np.asarray(traj.mask)
    policy, logits = tabular(Discrete(2), Discrete(2)), np.array([[0.3, -0.4], [1.0, 0.5]])
    fixed = Slot(lambda trace, traj, numbers: jnp.asarray(psi), "fixed")
    row = Estimator(fixed, baselines.optimal_token, importance.from_start(importance.on_policy))
    found = assess(row, traj, traj.log_prob, HP, policy, {"logits": jnp.asarray(logits)}).advantage
    pi = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    energy = np.zeros(B)
    for t in range(T):
        for i in np.flatnonzero(mask[t]):
            own = pi[obs[t, i]]
            energy[i] += 0.9 ** (2 * t) * (1 - 2 * own[action[t, i]] + (own**2).sum())
        alive = np.flatnonzero(mask[t])
        expected = (energy[alive] * psi[t, alive]).sum() / energy[alive].sum()
        assert np.allclose(found[t, alive], 0.9**t * (psi[t, alive] - expected), atol=1e-12)

    gaussian = gaussian_policy(1)
    real = jnp.asarray(np.random.default_rng(27).normal(size=(T, B, 1)))
    given = assess(
        row._replace(importance=importance.on_policy), traj._replace(action=real), traj.log_prob, HP,
        gaussian, jnp.array([0.2, -0.3]),
    )  # fmt: skip
    z = (np.asarray(real)[..., 0] - 0.2) * np.exp(0.3)
    energy = np.where(mask, np.cumsum((z * np.exp(0.3)) ** 2 + (z**2 - 1) ** 2, axis=0), 0.0)
    expected = (energy * psi).sum(axis=1, keepdims=True) / energy.sum(axis=1, keepdims=True)
    assert np.allclose(given.advantage, np.where(mask, psi - expected, 0.0), atol=1e-12)


def gaussian_policy(size):
    """A Gaussian of one mean and one log std, whatever is seen: params are both."""

    def apply(params, carry, obs, first):
        shape = (*first.shape, size)
        return carry, Gaussian(*(jnp.broadcast_to(x, shape) for x in params))

    return Network(lambda key: jnp.zeros(2), lambda num_envs: (), apply)


@pytest.mark.parametrize("baseline", [baselines.leave_one_out, baselines.time_mean])
def test_others_do_not_exist_in_a_batch_of_one(baseline):
    one = jax.tree.map(lambda x: x[:, :1], trajectory(0))
    with pytest.raises(ValueError, match="num_envs=1 must be at least 2"):
        baseline(one.reward, UNREAD, one, HP)


def test_importance_weights():
    traj, log_ratio = trajectory(7), np.random.default_rng(8).normal(size=(T, B))
    ratio = jnp.asarray(log_ratio)
    on = importance.on_policy(ratio, traj, HP)
    assert (on.step == 1).all() and (on.trace == 1).all()
    one = importance.one_step(ratio, traj, HP)
    assert np.allclose(one.step, np.exp(log_ratio)) and (one.trace == 1).all()
    start = importance.from_start(importance.one_step)(ratio, traj, HP)
    assert np.allclose(start.step, 0.9 ** np.arange(T)[:, None] * np.exp(log_ratio))
    assert (start.trace == 1).all()


def test_self_normalised_with_its_baseline_is_the_gradient_of_the_normalised_objective():
    """d/dx of sum_i W_i R_i / sum_i W_i, with log W_i = sum_t log_ratio: automatic differentiation."""
    traj = masked(trajectory(20))._replace(value=jnp.zeros((T, B)), next_value=jnp.zeros((T, B)))
    estimator = Estimator(
        credit.total_return,
        baselines.weighted_mean,
        importance.self_normalised(importance.trajectory),
    )
    log_prob = traj.log_prob + jnp.asarray(np.random.default_rng(21).normal(size=(T, B)) * 0.3)
    advantage = assess(estimator, traj, log_prob, HP).advantage
    psi = credit.total_return(jnp.ones((T, B)), traj, HP)[0]

    def normalised(log_prob):
        weight = jnp.exp(jnp.where(traj.mask, log_prob - traj.log_prob, 0.0).sum(axis=0))
        return (weight * psi).sum() / weight.sum()

    assert np.allclose(jax.grad(normalised)(log_prob), advantage / B, atol=1e-12)


def test_mixture_is_the_density_of_all_behaviours():
    mask = np.asarray(masked(trajectory(22)).mask)
    each = np.random.default_rng(23).normal(size=(3, T, B))
    each[2, 0, 0] = -np.inf  # an action that one behaviour never takes does no harm
    found = importance.mixture(jnp.asarray(each), jnp.asarray(mask))
    for b in range(B):
        length = mask[:, b].sum()
        density = np.exp(each[:, :length, b].sum(axis=1)).mean()
        assert np.isclose(np.asarray(found)[:length, b].sum(), np.log(density), atol=1e-10)
    assert np.isfinite(found).all()


def test_surrogate_values_and_gradients():
    traj = trajectory(9)
    rng = np.random.default_rng(10)
    log_prob = traj.log_prob + jnp.asarray(rng.normal(size=(T, B)) * 0.4)
    advantage = jnp.asarray(rng.normal(size=(T, B)))
    rho = np.exp(np.asarray(log_prob - traj.log_prob))
    a = np.asarray(advantage)

    def gradient(surrogate):
        return np.asarray(jax.grad(lambda x: surrogate(x, advantage, traj, HP).sum())(log_prob))

    assert np.allclose(gradient(surrogates.score), a)
    assert np.allclose(gradient(surrogates.ratio), rho * a)
    # The clip's gradient mask is exact.
    zero = ((a > 0) & (rho > 1.2)) | ((a < 0) & (rho < 0.8))
    assert 5 < zero.sum() < T * B - 5
    assert np.allclose(gradient(surrogates.clipped), np.where(zero, 0.0, rho * a))
    penalised = gradient(surrogates.kl_penalised)
    assert np.allclose(penalised, rho * a - HP.kl_coef * (rho - 1))
    # On the behaviour's own data every surrogate has the score's gradient.
    for surrogate in (surrogates.ratio, surrogates.clipped, surrogates.kl_penalised):
        same = jax.grad(lambda x, f=surrogate: f(x, advantage, traj, HP).sum())(traj.log_prob)
        assert np.allclose(same, a)


def test_standardised_uses_only_the_steps_that_count():
    traj = masked(trajectory(11))
    advantage = jnp.asarray(np.random.default_rng(12).normal(size=(T, B)))
    mask = np.asarray(traj.mask)
    gain = surrogates.standardised(surrogates.score)(jnp.ones((T, B)), advantage, traj, HP)
    kept = np.asarray(advantage)[mask]
    expected = (np.asarray(advantage) - kept.mean()) / (kept.std() + 1e-8)
    assert np.allclose(np.asarray(gain)[mask], expected[mask])


def test_reductions():
    mask = np.asarray(masked(trajectory(13)).mask)
    gain = np.where(mask, np.random.default_rng(14).normal(size=(T, B)), np.nan)
    assert np.isclose(
        surrogates.per_episode(jnp.asarray(gain), jnp.asarray(mask)), np.nansum(gain) / B
    )
    assert np.isclose(surrogates.per_step(jnp.asarray(gain), jnp.asarray(mask)), np.nanmean(gain))


def test_assess_fixes_the_order_and_stops_gradients():
    traj = trajectory(15)
    estimator = Estimator(
        credit.lambda_return, baselines.critic, importance.from_start(importance.one_step)
    )
    log_prob = traj.log_prob + 0.3
    batch = assess(estimator, traj, log_prob, HP)
    psi = loop(traj, 0.9, 0.7)
    weight = 0.9 ** np.arange(T)[:, None] * np.exp(0.3)
    assert np.allclose(batch.advantage, weight * (psi - np.asarray(traj.value)), atol=1e-12)
    assert np.allclose(batch.target, psi, atol=1e-12)
    gradient = jax.grad(lambda x: assess(estimator, traj, x, HP).advantage.sum())(log_prob)
    assert (gradient == 0).all()


def test_slots_have_names():
    wrapped = importance.from_start(importance.one_step)
    assert describe(wrapped) == "from_start(one_step)"
    assert describe(baselines.constant(2.0)) == "constant(2.0)"
    assert describe(surrogates.standardised(surrogates.clipped)) == "standardised(clipped)"


def test_wrappers_keep_the_facts_of_what_they_wrap():
    assert facts_of(importance.from_start(importance.one_step)).corrects
    assert not facts_of(importance.from_start(importance.on_policy)).corrects
    assert facts_of(importance.from_start(importance.on_policy)).whole_episodes
    assert facts_of(importance.self_normalised(importance.prefix)).whole_episodes
    assert facts_of(baselines.regularised(baselines.critic)).reads_critic
    assert not facts_of(surrogates.standardised(surrogates.score)).corrects
    assert facts_of(lambda gain, mask: gain.sum()).couples, "a plain function may compare lanes"


MODULES = {
    "credit": credit, "baseline": baselines, "importance": importance, "surrogate": surrogates,
    "reduce": surrogates,
}  # fmt: skip
REDUCTIONS = ("per_episode", "per_step", "per_length", "per_row")
INNER = importance.self_normalised(importance.prefix)
# Values that a call returns, around one that couples and one that does not.
WRAPPED = {
    "credit": [reference.charged(credit.reward_to_go, "k1")],
    "baseline": [
        baselines.constant(1.0),
        baselines.tabulated(np.arange(2.0 * T).reshape(T, 2)),
        baselines.regularised(baselines.critic),
        baselines.regularised(baselines.leave_one_out),
        groups.grouped(baselines.leave_one_out, 2),
        groups.grouped(baselines.optimal_token, 2),
    ],
    "importance": [
        *importance.IMPORTANCES.values(),
        importance.from_start(importance.one_step),
        importance.from_start(INNER),
        importance.capped(importance.one_step, 1.2),
        importance.dropped_above(importance.trajectory, 1.2),
    ],
    "surrogate": [
        surrogates.standardised(surrogates.clipped),
        groups.group_scaled(surrogates.score, 2),
        groups.episode_scaled(surrogates.score),
        groups.dropping(groups.group_scaled(surrogates.score, 2), 2),
        reference.penalised(surrogates.score, "k2"),
        reference.penalised(surrogates.standardised(surrogates.clipped), "k3"),
    ],
}


def values_of(place):
    """Every value of a slot, the modules' own first."""
    own = [
        value
        for name, value in vars(MODULES[place]).items()
        if isinstance(value, Slot) and (name in REDUCTIONS) == (place == "reduce")
    ]
    return own + WRAPPED.get(place, [])


def test_no_value_is_forgotten():
    """Every function that builds a slot value has one among those measured below."""
    seen = {value.name for place in MODULES for value in values_of(place)}
    for module in (groups, reference):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert name in seen or inspect.signature(function).return_annotation is Array
    for place, module in MODULES.items():
        names = {describe(value).partition("(")[0] for value in values_of(place)}
        if place == "reduce":
            assert names == set(REDUCTIONS)
            continue
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and inspect.signature(function).return_annotation is not Array:
                assert name in names, name


@pytest.mark.slow
@pytest.mark.parametrize("place", MODULES)
def test_what_a_value_says_of_coupling_is_what_it_does(place):
    """One lane's rewards, values, ratios and length move others' coefficients only where its facts say so.

    Coefficients are the result of all five slots: the weights of the scores in the gradient.
    """
    one = masked(trajectory(20))
    obs = jnp.asarray(np.random.default_rng(21).integers(0, 2, (T, B)))
    one = estimators.masked(one._replace(obs=obs))
    # Lane 1 now lives for 4 steps instead of 3.
    one = one._replace(reference=one.log_prob + 0.3)
    other = trajectory(22)._replace(obs=1 - obs, reference=one.log_prob - 0.2)
    longer = one.mask.at[3, 1].set(True)
    lane = jnp.arange(B)[None] == 1
    changed = jax.tree.map(
        lambda a, b: jnp.where(lane.reshape(1, B, *(1,) * (a.ndim - 2)), b, a), one, other
    )
    last = one.last.at[2, 1].set(False).at[3, 1].set(True)
    first = jnp.broadcast_to(jnp.arange(T)[:, None] == 0, (T, B))
    one = one._replace(first=first)
    changed = estimators.masked(changed._replace(mask=longer, last=last, first=first))
    log_prob = one.log_prob.at[:, 0].add(-0.2)
    policy = tabular(Discrete(2), Discrete(2))
    params = {"logits": jnp.array([[0.3, -0.1], [0.2, 0.5]])}

    def coefficients_of(estimator, trajectory):
        under = jnp.where(lane, trajectory.log_prob + 0.1, log_prob)
        batch = assess(estimator, trajectory, under, HP, policy, params)
        return coefficients(estimator, under, batch, HP)[:, ~lane[0]]

    assert not any(facts_of(value).couples for value in Estimator())
    for value in values_of(place):
        estimator = Estimator()._replace(**{place: value})
        before, after = (coefficients_of(estimator, given) for given in (one, changed))
        moves = not np.allclose(before, after, rtol=1e-9, atol=1e-12)
        assert facts_of(value).couples == moves, describe(value)
