"""Estimators that compare episodes from one start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import bandit, random_mdp

from jaxpg import Hyperparams, episodes, make_trainer, train
from jaxpg.envs import Discrete, from_gymnax, from_mdp
from jaxpg.estimators import (
    Estimator,
    assess,
    baselines,
    coefficients,
    credit,
    describe,
    groups,
    importance,
    surrogates,
)
from jaxpg.lab import Source, gradient_statistics, gradient_trace
from jaxpg.lab.exact import enumeration, grouped
from jaxpg.lab.exact import episodes as episodes_of
from jaxpg.policies import actor_critic, init_params, tabular
from jaxpg.rollout import episodes_again
from jaxpg.training.algorithm import GROUP_ROWS, algorithm
from jaxpg.types import Trajectory

T, B, G = 5, 6, 3
NUMBERS = Hyperparams(gamma=1.0, clip_eps=0.2, clip_eps_high=0.3)


def whole_episodes(seed=0, returns=None) -> Trajectory:
    """Six episodes of several lengths; with `returns`, paid at the end."""
    rng = np.random.default_rng(seed)
    length = np.array([1, 3, T, 2, T, 4])
    row = np.arange(T)[:, None]
    mask, last = row < length, row == length - 1
    reward = np.where(mask, rng.normal(size=(T, B)), 0.0)
    if returns is not None:
        reward = np.where(last, np.asarray(returns), 0.0)
    zeros = np.zeros((T, B))
    log_prob = np.where(mask, rng.normal(size=(T, B)), 0.0)
    action = np.where(mask, np.arange(B) % 2, 0)
    parts = zeros.astype(int), action, log_prob, reward, mask & ~last, mask & (row == 0), last
    return Trajectory(*(jnp.asarray(x) for x in (*parts, mask, zeros, zeros)))


def advantages(estimator, trajectory):
    policy, params = tabular(Discrete(1), Discrete(2)), {"logits": jnp.array([[0.3, -0.5]])}
    found = assess(estimator, trajectory, trajectory.log_prob, NUMBERS, policy, params)
    return np.asarray(found.advantage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "baseline",
    [
        baselines.leave_one_out,
        baselines.batch_mean,
        baselines.time_mean,
        baselines.optimal_constant,
        baselines.optimal_per_time,
        baselines.optimal_token,
    ],
    ids=describe,
)
def test_a_grouped_baseline_is_its_loop_over_groups(baseline, x64):
    trajectory = whole_episodes()
    estimator = Estimator(credit.reward_to_go, groups.grouped(baseline, G))
    found = advantages(estimator, trajectory)
    for g in range(B // G):
        lanes = slice(g * G, (g + 1) * G)
        part = jax.tree.map(lambda x, lanes=lanes: x[:, lanes], trajectory)
        alone = advantages(estimator._replace(baseline=baseline), part)
        np.testing.assert_allclose(found[:, lanes], alone, atol=1e-12)


def test_scales_are_those_of_the_returns_and_equal_returns_have_no_advantage(x64):
    returns = [0.1 + 0.2, 0.3, 0.3, 1.0, 2.0, 4.0]  # the first group differs by rounding only
    trajectory, mean = whole_episodes(returns=returns), groups.grouped(baselines.batch_mean, G)
    mask = np.asarray(trajectory.mask)
    within = np.array(returns[G:]) - np.mean(returns[G:])
    row = Estimator(credit.total_return, mean, surrogate=groups.group_scaled(surrogates.score, G))
    found = advantages(row, trajectory)
    assert (found[:, :G] == 0).all()
    np.testing.assert_allclose(found[:, G:], mask[:, G:] * within / np.std(returns[G:]), atol=1e-12)
    row = row._replace(surrogate=groups.episode_scaled(surrogates.score))
    spread = np.std(np.concatenate([np.zeros(G), within]))
    np.testing.assert_allclose(
        advantages(row, trajectory)[:, G:], mask[:, G:] * within / spread, 1e-9
    )
    batch = assess(row, trajectory, trajectory.log_prob, NUMBERS)
    assert groups.silent_share(G, batch.advantage, batch.resolution) == 0.5


@pytest.mark.parametrize("reduce", [surrogates.per_episode, surrogates.per_step])
def test_dropping_is_the_estimate_of_the_other_groups(reduce, x64):
    trajectory = whole_episodes(returns=[1.0, 1.0, 1.0, 0.0, 1.0, 5.0])
    by_step = reduce is surrogates.per_step
    row = Estimator(credit.total_return, groups.grouped(baselines.batch_mean, G), reduce=reduce)
    dropping = row._replace(surrogate=groups.dropping(surrogates.score, G, by_step))

    def weight(estimator, part):
        batch = assess(estimator, part, part.log_prob, NUMBERS)
        return coefficients(estimator, part.log_prob, batch, NUMBERS) / part.mask.shape[1]

    rest = jax.tree.map(lambda x: x[:, G:], trajectory)
    np.testing.assert_allclose(weight(dropping, trajectory)[:, G:], weight(row, rest), 1e-12)
    assert (weight(dropping, trajectory)[:, :G] == 0).all()
    silent = whole_episodes(returns=[1.0] * B)
    assert (weight(dropping, silent) == 0).all(), "nothing is left, and nothing is NaN"


def test_surrogates_and_reductions_are_their_formulas(x64):
    trajectory, rng = whole_episodes(), np.random.default_rng(3)
    mask = np.asarray(trajectory.mask)
    advantage = np.where(mask, rng.normal(size=(1, B)), 0.0)
    log_prob = trajectory.log_prob + jnp.asarray(np.where(mask, rng.normal(size=(T, B)) / 3, 0.0))
    rho = np.exp(np.asarray(log_prob - trajectory.log_prob))
    length = mask.sum(axis=0)
    root = np.prod(np.where(mask, rho, 1.0), axis=0) ** (1 / length)

    def clip(x):
        return np.minimum(x * advantage, np.clip(x, 0.8, 1.3) * advantage)

    expected = {
        surrogates.clipped_apart: clip(rho),
        surrogates.sequence_clipped: clip(np.broadcast_to(root, rho.shape)),
        surrogates.weighted_score: np.minimum(rho, 1.3) * advantage * np.asarray(log_prob),
    }
    for surrogate, by_hand in expected.items():
        found = surrogate(log_prob, jnp.asarray(advantage), trajectory, NUMBERS)
        np.testing.assert_allclose(np.where(mask, found, 0), np.where(mask, by_hand, 0), atol=1e-12)

    def total(log_prob):
        given = log_prob, jnp.asarray(advantage), trajectory, NUMBERS
        return jnp.where(mask, surrogates.weighted_score(*given), 0.0).sum()

    # The weight is a constant: the gradient is min(rho, 1.3) A.
    np.testing.assert_allclose(
        jax.grad(total)(log_prob), np.minimum(rho, 1.3) * advantage, atol=1e-12
    )
    gain = np.where(mask, rng.normal(size=(T, B)), 0.0)
    by_length = np.mean([gain[:n, i].mean() for i, n in enumerate(length)])
    np.testing.assert_allclose(surrogates.per_length(gain, mask), by_length)
    np.testing.assert_allclose(surrogates.per_row(gain, mask), gain.sum() / (T * B))


def test_weights_of_a_stale_sampler_are_bounded_by_token_or_by_sequence(x64):
    trajectory = whole_episodes()
    log_ratio = jnp.where(trajectory.mask, trajectory.log_prob, 0.0)
    rho, whole = np.exp(np.asarray(log_ratio)), np.exp(np.asarray(log_ratio).sum(axis=0))
    for inner, ratio in ((importance.one_step, rho), (importance.trajectory, whole + 0 * rho)):
        for wrap, by_hand in (
            (importance.capped, np.minimum(ratio, 1.5)),
            (importance.dropped_above, ratio * (ratio <= 1.5)),
        ):
            found = wrap(inner, 1.5)(log_ratio, trajectory, NUMBERS)
            np.testing.assert_allclose(found.step, by_hand, 1e-12)
            assert (found.trace == 1).all()
            with pytest.raises(ValueError, match=r"ceiling=0 must be positive"):
                wrap(inner, 0)


@pytest.mark.slow
def test_a_group_shares_its_start_and_nothing_else():
    env = from_gymnax("CartPole-v1", max_steps_in_episode=12)
    agent = actor_critic(env, hidden=(4,))
    params = init_params(agent, jax.random.key(0))
    roll = partial(episodes, env, agent, params, jax.random.key(1))
    found, _ = jax.jit(lambda: roll(12, group_size=4))()
    opening = np.asarray(found.obs[0]).reshape(3, 4, 4)
    assert (opening == opening[:, :1]).all() and len(np.unique(opening[:, 0], axis=0)) == 3
    later = np.asarray(found.action).T.reshape(3, 4, -1)
    assert all(len(np.unique(group, axis=0)) > 1 for group in later)
    one, same = jax.jit(lambda: roll(12))()[0], jax.jit(lambda: roll(12, group_size=1))()[0]
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, one, same)))

    # Batches of more than one key: groups stay whole, and parts are rolled out again alike.
    big, _ = jax.jit(lambda: roll(2048, num_steps=2, group_size=8))()
    opening = np.asarray(big.obs[0]).reshape(-1, 8, 4)
    assert (opening == opening[:, :1]).all() and len(np.unique(opening[:, 0], axis=0)) == 256
    again = jax.jit(
        lambda: episodes_again(env, agent, params, jax.random.key(1), 2048, 2, jnp.int32(1), 8)
    )()
    np.testing.assert_array_equal(again.obs, big.obs[:, 1024:])
    with pytest.raises(
        ValueError, match=r"num_episodes=10 is not a multiple of group_size=4; use 8"
    ):
        roll(10, group_size=4)


def several_starts(seed=0, horizon=2):
    mdp = random_mdp(seed, horizon=horizon)
    rng = np.random.default_rng(seed)
    observations = int(np.max(mdp.observation)) + 1
    return mdp, rng.normal(size=(observations, np.shape(mdp.reward)[1]))


ESTIMATORS = {name: GROUP_ROWS[name](3).estimator for name in GROUP_ROWS} | {
    "no baseline": Estimator(credit.total_return),
    "constant": Estimator(credit.total_return, baselines.constant(0.7)),
    "batch scale": Estimator(
        credit.total_return,
        groups.grouped(baselines.batch_mean, 3),
        surrogate=groups.episode_scaled(surrogates.score),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_exact_moments_are_those_of_all_groups(name, x64):
    mdp, logits = several_starts()
    numbers = NUMBERS._replace(gamma=0.9)
    listed = enumeration.group_moments(mdp, logits, ESTIMATORS[name], numbers, 3)
    found = grouped.moments(mdp, logits, ESTIMATORS[name], numbers, 3)
    np.testing.assert_allclose(found.mean, listed.mean, atol=1e-9)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-9)


# Rows whose groups share a divisor, on two groups of two from starts of their own.
PAIRED = {name: GROUP_ROWS[name](2).estimator for name in ("rloo", "grpo", "dapo", "cispo")} | {
    "dropping": Estimator(
        credit.total_return,
        groups.grouped(baselines.batch_mean, 2),
        surrogate=groups.dropping(surrogates.score, 2),
    ),
}


def two_outcomes():
    """Several starts, and returns that are often equal: some groups are dropped."""
    mdp, logits = several_starts(3)
    return mdp._replace(reward=(np.asarray(mdp.reward) > 0.2) * 1.0), logits


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRED)
def test_exact_moments_of_several_groups_are_those_of_all_batches(name, x64):
    mdp, logits = two_outcomes()
    listed = enumeration.group_moments(mdp, logits, PAIRED[name], NUMBERS, 2, 2)
    found = grouped.moments(mdp, logits, PAIRED[name], NUMBERS, 2, 2)
    np.testing.assert_allclose(found.mean, listed.mean, atol=1e-9)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-9)
    one = grouped.moments(mdp, logits, PAIRED[name], NUMBERS, 2)
    alike = np.allclose(found.mean, one.mean) and np.allclose(2 * found.covariance, one.covariance)
    assert alike == (name in ("rloo", "grpo")), "the others share a divisor"


ROWS_OFF = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS_OFF)
def test_on_a_stale_policy_s_data_too(name, x64):
    mdp, logits = two_outcomes()
    behaviour = logits + np.random.default_rng(5).normal(size=logits.shape)
    row, numbers = GROUP_ROWS[name](2).estimator, NUMBERS._replace(gamma=0.9)
    given = mdp, logits, row, numbers, 2, 2, behaviour
    listed, found = enumeration.group_moments(*given), grouped.moments(*given)
    np.testing.assert_allclose(found.mean, listed.mean, atol=1e-9)
    np.testing.assert_allclose(found.covariance, listed.covariance, atol=1e-9)
    assert not np.allclose(found.mean, grouped.moments(*given[:-1]).mean, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("name", ["rloo", *ROWS_OFF])
def test_the_causes_of_a_bias_add_up_to_it(name, stale, x64):
    mdp, logits = two_outcomes()
    behaviour = logits + np.random.default_rng(5).normal(size=logits.shape) if stale else None
    row = GROUP_ROWS[name](2).estimator
    found = grouped.causes(mdp, logits, row, NUMBERS, 2, 2, behaviour)
    listed = enumeration.group_moments(mdp, logits, row, NUMBERS, 2, 2, behaviour)
    truth = enumeration.moments(mdp, logits, Estimator(credit.total_return), NUMBERS).mean
    np.testing.assert_allclose(sum(found.values()), listed.mean - truth, atol=1e-9)
    acts = {
        "stale_data": stale,
        "own_sample": name not in ("rloo",),
        "std": name in ("grpo", "dapo", "gspo", "cispo"),
        "length": name != "rloo",
        "dropping": name == "dapo",
        "clip": stale,
    }
    seen = {cause: bool(np.abs(change).max() > 1e-6) for cause, change in found.items()}
    # rloo's surrogate is the score: on stale data it leaves out the ratios.
    assert seen == acts
    if not stale:
        half = -truth / 2 if name != "rloo" else 0 * truth
        np.testing.assert_allclose(found["own_sample"], half, atol=1e-9)


@pytest.mark.slow
def test_which_rows_follow_the_gradient_of_j(x64):
    mdp, logits = several_starts(horizon=3)
    truth = enumeration.moments(mdp, logits, Estimator(credit.total_return), NUMBERS).mean
    lengths = {
        c.length
        for s in np.flatnonzero(mdp.initial)
        for c in episodes_of.classes(mdp, logits, s, 1.0)
    }
    assert len(lengths) > 1, "or a mean over steps would have no bias"

    def mean(name):
        return grouped.moments(mdp, logits, GROUP_ROWS[name](3).estimator, NUMBERS, 3).mean

    np.testing.assert_allclose(mean("rloo"), truth, atol=1e-12)
    # The own return is in the mean: 2/3 of it; and a constant divides it.
    np.testing.assert_allclose(3 * mean("dr_grpo"), 2 / 3 * truth, atol=1e-12)
    for name in ("grpo", "dapo", "gspo", "cispo"):
        direction = mean(name)
        cosine = direction @ truth / np.linalg.norm(direction) / np.linalg.norm(truth)
        assert cosine < 1 - 1e-4, f"{name} is the gradient of something else"


@pytest.mark.parametrize("size", [2, 5])
def test_with_rewards_0_and_1_grpo_follows_an_arcsine(size, x64):
    logits, row = np.array([[0.4, -0.9]]), GROUP_ROWS["grpo"](size)
    found = grouped.moments(bandit((0.0, 1.0)), logits, row.estimator, NUMBERS, size).mean
    p = np.exp(logits[0, 1]) / np.exp(logits[0]).sum()
    slope = p * (1 - p) * np.array([-1.0, 1.0])
    np.testing.assert_allclose(found, grouped.arcsine_slope(p, size) * slope, atol=1e-12)
    limit = 1 / np.sqrt(p * (1 - p))  # of 2 arcsin(sqrt p)
    assert abs(grouped.arcsine_slope(p, 2000) / limit - 1) < 2e-3
    assert abs(grouped.arcsine_slope(p, size) / limit - 1) > 0.05


@pytest.mark.slow
def test_measured_groups_are_the_exact_ones():
    mdp, logits = several_starts()
    env, row = from_mdp(mdp), GROUP_ROWS["grpo"](4)
    policy = tabular(env.observation, env.action)
    params = {"logits": jnp.asarray(logits, jnp.float32)}
    source = Source(env, policy, row.estimator, params, jax.random.key(0), NUMBERS, group_size=4)
    found = gradient_statistics(source, 2**16, batch_size=4)
    exact = grouped.moments(mdp, logits, row.estimator, NUMBERS, 4)
    trace = np.trace(exact.covariance)
    assert found.trace.low < trace < found.trace.high
    error = np.sqrt(np.diag(exact.covariance) / 2**14)
    assert (np.abs(found.mean - exact.mean) < 4.5 * error + 1e-6).all()
    # Without a baseline too, episodes from one start are no independent samples.
    alone = Estimator(credit.total_return)
    found = gradient_statistics(source._replace(estimator=alone), 2**16, batch_size=4)
    known = np.trace(grouped.moments(mdp, logits, alone, NUMBERS, 4).covariance)
    assert found.trace.low < known < found.trace.high and found.batch_size == 4
    with pytest.raises(ValueError, match="or they share a start"):
        gradient_trace(source._replace(estimator=alone), 2**12)
    # Episodes from starts of their own have another law.
    apart = enumeration.moments(mdp, logits, row.estimator, NUMBERS, batch_size=4)
    assert abs(np.trace(apart.covariance) / trace - 1) > 0.05
    with pytest.raises(ValueError, match=r"compares groups of 4 episodes .* pass group_size=4"):
        gradient_statistics(source._replace(group_size=1), 2**12)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUP_ROWS)
def test_group_rows_learn_a_bandit(name):
    env = from_mdp(bandit((0.0, 1.0, 0.2)))
    row = GROUP_ROWS[name](4)
    trainer = make_trainer(env, actor_critic(env, "tabular"), row, num_envs=64)
    learn = jax.jit(partial(train, trainer, num_updates=80))
    state, metrics = learn(trainer.init(jax.random.key(0)), Hyperparams(learning_rate=0.05))
    assert jax.nn.softmax(state.params.policy["logits"])[0, 1] > 0.9
    assert metrics["silent_groups"][-1] > metrics["silent_groups"][0]
    assert (metrics["silent_groups"][0] > 0) or name == "rloo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: make(num_envs=10), r"num_envs=10 is not a multiple of group_size=4; use 8"),
        (
            lambda: make(GROUP_ROWS["grpo"](4)._replace(num_minibatches=3)),
            r"num_envs=8 is not a multiple of num_minibatches=3; use 12$",
        ),
        (lambda: GROUP_ROWS["rloo"](1), r"group_size=1 must be at least 2"),
        (lambda: GROUP_ROWS["grpo"](1), r"group_size=1 must be at least 2"),
        (lambda: make(algorithm("ppo", 4)), r"group_size=4 needs whole episodes .* not stream"),
        (
            lambda: make(algorithm("rloo")._replace(group_size=4)),
            r"group_size=4, but the estimator compares groups of 8",
        ),
    ],
)
def test_a_group_that_cannot_be_is_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def make(row=None, num_envs=8):
    env = from_mdp(bandit((0.0, 1.0)))
    row = row or GROUP_ROWS["rloo"](4)
    return make_trainer(env, actor_critic(env, hidden=(4,)), row, num_envs=num_envs)
