"""Where data comes from: memories of batches, mixtures with demonstrations, and adaptation."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import bandit, random_mdp

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import from_mdp
from jaxpg.estimators import Estimator, assess, baselines, credit, importance, objective, surrogates
from jaxpg.estimators.importance import IMPORTANCES
from jaxpg.lab.exact import stationary
from jaxpg.optimizers import adaptation, sgd
from jaxpg.policies import Agent, actor_critic, init_params, initial_carry, tabular
from jaxpg.rollout import episodes
from jaxpg.training import data as sources
from jaxpg.training.algorithm import Algorithm, algorithm
from jaxpg.training.imitation import informed
from jaxpg.training.improvement import improve

B, K = 6, 3
NUMBERS = Hyperparams(gamma=0.9, ess_floor=0.0)


def world():
    return world_in(jax.config.jax_enable_x64)


@cache
def world_in(x64):
    """Its tables are numbers of the precision in which it was made."""
    del x64
    env = from_mdp(random_mdp(0, horizon=4))
    return env, Agent(tabular(env.observation, env.action))


@jax.jit
def rollout(params, key):
    return episodes(*world(), params, key, B)[0]


def recalled(memory, slot, params, numbers, count):
    def recall(*arguments):
        memory, *rest = arguments
        return sources.recalled(memory, K, slot, world()[1].policy, *rest)

    return jax.jit(recall)(memory, params, numbers, jnp.int32(count))


def batch_of(env, agent, logits, seed):
    params = init_params(agent, jax.random.key(0))
    params = params._replace(policy={"logits": jnp.asarray(logits)})
    return rollout(params, jax.random.key(seed))


def remembered(env, agent, tables):
    """A memory of batches from these policies, from the oldest to the newest."""
    carry = initial_carry(agent, B)
    memory = sources.empty_memory((batch_of(env, agent, tables[0], 0), carry), K)
    for i, table in enumerate(tables):
        memory = sources.remember(memory, batch_of(env, agent, table, i), carry, jnp.int32(i))
    return memory


def own_data(trajectory, carry):
    return sources.Gathered(trajectory, trajectory.log_prob, carry, trajectory, {})


def gradient(env, agent, estimator, data, logits, hyperparams=NUMBERS):
    @jax.jit
    def found(params, data):
        batch = assess(estimator, data.trajectory, data.log_prob, hyperparams)
        batch = sources.corrected(batch, data, whole=True)

        def value(params):
            return objective(estimator, agent.policy, params, (), batch, hyperparams)[0]

        return jax.grad(value)(params)

    return np.asarray(found({"logits": jnp.asarray(logits)}, data)["logits"])


@pytest.mark.slow
def test_a_memory_holds_the_last_batches(x64):
    env, agent = world()
    tables = np.random.default_rng(0).normal(size=(5, 3, 2))
    memory = remembered(env, agent, tables)
    for i in (2, 3, 4):  # the first two have been overwritten
        expected = batch_of(env, agent, tables[i], i)
        at = (i % K) * B
        for kept, new in zip(*map(jax.tree.leaves, (memory.trajectory, expected)), strict=True):
            assert np.array_equal(kept[:, at : at + B], new)
    early = remembered(env, agent, tables[:1])
    assert early.trajectory.mask[:, :B].any() and not early.trajectory.mask[:, B:].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTANCES)
def test_at_lag_zero_every_form_is_the_on_policy_gradient(name, x64):
    env, agent = world()
    logits = np.random.default_rng(1).normal(size=(3, 2))
    memory = remembered(env, agent, [logits] * 4)
    slot, params = IMPORTANCES[name], {"logits": jnp.asarray(logits)}
    data = recalled(memory, slot, params, NUMBERS, 3)
    metrics = data.metrics
    assert metrics["batches"] == K
    for lag in (1, 2):
        assert (
            metrics[f"ess_lag{lag}"] == pytest.approx(1.0) and abs(metrics[f"kl_lag{lag}"]) < 1e-12
        )
    estimator = Estimator(credit.reward_to_go, baselines.time_mean, slot)
    plain = estimator._replace(importance=importance.on_policy)
    own = own_data(memory.trajectory, memory.carry)
    found = gradient(env, agent, estimator, data, logits)
    assert np.allclose(found, gradient(env, agent, plain, own, logits), atol=1e-6)
    # Control: with the weights of another policy it is not.
    other = recalled(memory, slot, {"logits": params["logits"] * 3.0}, NUMBERS, 3)
    assert not np.allclose(gradient(env, agent, estimator, other, logits), found, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["per_decision", "normalised_trajectory"])
def test_what_is_far_or_not_there_yet_does_not_count(name, x64):
    """Dropped batches and empty slots leave the gradient of the rest, not a share of it."""
    env, agent = world()
    logits = np.zeros((3, 2))
    far = np.array([(9.0, -9.0)] * 3)
    slot, params = IMPORTANCES[name], {"logits": jnp.asarray(logits)}
    estimator = Estimator(credit.reward_to_go, baselines.time_mean, slot)
    numbers = NUMBERS._replace(ess_floor=0.9)

    def recall(tables):
        memory = remembered(env, agent, tables)
        count = jnp.int32(len(tables) - 1)
        return recalled(memory, slot, params, numbers, count)

    newest = batch_of(env, agent, logits, 2)
    alone = own_data(newest, initial_carry(agent, B))
    expected = gradient(env, agent, estimator, alone, logits)
    # Weighted by a policy far from both old ones, only the newest batch is left.
    data = recall([far, -far, logits])
    metrics = data.metrics
    assert metrics["batches"] == 1 and data.share == pytest.approx(1 / K)
    assert np.allclose(gradient(env, agent, estimator, data, logits), expected, atol=1e-12)
    data = recall([logits])
    metrics = data.metrics
    assert metrics["batches"] == 1 and np.isnan(metrics["ess_lag1"])
    alone = own_data(batch_of(env, agent, logits, 0), initial_carry(agent, B))
    expected = gradient(env, agent, estimator, alone, logits)
    assert np.allclose(gradient(env, agent, estimator, data, logits), expected, atol=1e-12)


@pytest.mark.slow
def test_the_newest_batch_is_never_dropped():
    env, agent = world()
    memory = remembered(env, agent, np.random.default_rng(3).normal(size=(3, 3, 2)) * 3)
    params = {"logits": jnp.zeros((3, 2))}
    numbers = NUMBERS._replace(ess_floor=1.0)
    data = recalled(memory, importance.trajectory, params, numbers, 2)
    assert data.trajectory.mask[:, 2 * B :].any() and not data.trajectory.mask[:, : 2 * B].any()


@pytest.mark.slow
def test_demonstrations_are_weighed_by_the_density_of_the_mixture(x64):
    env, agent = world()
    rng = np.random.default_rng(4)
    now, behaviour = rng.normal(size=(2, 3, 2))
    own, demos = batch_of(env, agent, now, 0), batch_of(env, agent, behaviour, 1)
    demos = jax.tree.map(lambda x: x[:, :4], demos)
    policy, fitted = {"logits": jnp.asarray(now)}, {"logits": jnp.asarray(behaviour)}

    def log_density(table, trajectory, i):
        log_p = np.log(np.exp(table) / np.exp(table).sum(axis=1, keepdims=True))
        length = int(trajectory.mask[:, i].sum())
        return sum(log_p[trajectory.obs[t, i], trajectory.action[t, i]] for t in range(length))

    for given in (True, False):
        if not given:
            demos = demos._replace(log_prob=jnp.full_like(demos.log_prob, jnp.nan))
        data = sources.joined(agent, policy, fitted, own, demos)
        log_ratio = jnp.where(data.trajectory.mask, data.log_prob - data.trajectory.log_prob, 0.0)
        weight = np.exp(np.asarray(log_ratio).sum(axis=0))
        lanes = [(own, i) for i in range(B)] + [(demos, i) for i in range(4)]
        for found, (trajectory, i) in zip(weight, lanes, strict=True):
            pi, beta = (np.exp(log_density(table, trajectory, i)) for table in (now, behaviour))
            assert found == pytest.approx(pi / (0.6 * pi + 0.4 * beta))
        share = sources.share_of_demonstrations(data, B)
        assert share["demo_share"] == pytest.approx(weight[B:].sum() / weight.sum())


def test_the_regulariser_is_the_gradient_of_the_log_normaliser(x64):
    """Compare with sum_i W_i R_i / sum W + coef log sum W, differentiated as written."""
    env, agent = world()
    rng = np.random.default_rng(5)
    now, behaviour = rng.normal(size=(2, 3, 2))
    trajectory = batch_of(env, agent, behaviour, 0)
    numbers = NUMBERS._replace(normaliser_coef=0.7)
    row = algorithm("guided").estimator
    params = {"logits": jnp.asarray(now)}
    log_prob = sources.log_prob_of(agent.policy, params, (), trajectory)
    data = sources.Gathered(trajectory, log_prob, initial_carry(agent, B), trajectory, {})
    found = gradient(env, agent, row, data, now, numbers)
    discounts = 0.9 ** np.arange(4)[:, None]
    returns = (np.asarray(trajectory.reward) * discounts * np.asarray(trajectory.mask)).sum(axis=0)

    def written(table):
        log_p = sources.log_prob_of(agent.policy, {"logits": table}, (), trajectory)
        log_weight = jnp.where(trajectory.mask, log_p - trajectory.log_prob, 0.0).sum(axis=0)
        weight = jnp.exp(log_weight)
        return (weight * returns).sum() / weight.sum() + 0.7 * jnp.log(weight.sum())

    assert np.allclose(found, jax.grad(written)(jnp.asarray(now)), atol=1e-10)
    without = gradient(env, agent, row, data, now, NUMBERS)
    assert not np.allclose(without, found, atol=1e-3)


@pytest.mark.slow
def test_imitation_finds_the_demonstrators():
    env, agent = world()
    behaviour = np.array([(1.0, -1.0), (-0.5, 0.5), (0.0, 0.0)], np.float32)
    params = init_params(agent, jax.random.key(0))._replace(
        policy={"logits": jnp.asarray(behaviour)}
    )
    demos, _ = episodes(env, agent, params, jax.random.key(1), 4000)
    row = algorithm("guided")
    trainer = make_trainer(env, agent, row, num_envs=4)
    start = jax.jit(informed(trainer, env, agent.policy, row, demos, 800, True))(jax.random.key(2))
    for fitted in (start.data, start.params.policy):
        found = np.asarray(jax.nn.softmax(fitted["logits"]))[:2, 0]
        exact = np.asarray(jax.nn.softmax(behaviour))[:2, 0]
        assert np.abs(found - exact).max() < 5 * 0.5 / 1000**0.5
    cold = jax.jit(informed(trainer, env, agent.policy, row, demos, 2, False))(jax.random.key(2))
    assert np.array_equal(cold.params.policy["logits"], np.zeros((3, 2)))


def test_demonstrations_longer_than_episodes_are_refused():
    env, agent = world()
    long = batch_of(env, agent, np.zeros((3, 2), np.float32), 0)
    trainer = make_trainer(env, agent, algorithm("guided"), num_envs=4, num_steps=3)
    with pytest.raises(ValueError, match="of 4 steps are longer than episodes of num_steps=3"):
        train(trainer, trainer.init(jax.random.key(0)), NUMBERS, long, num_updates=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            algorithm("reinforce_to_go")._replace(data=sources.replay(sources.episodes, 2)),
            r"replay\(episodes, 2\) holds data of other policies",
        ),
        (algorithm("reinforce")._replace(data=sources.mixture), "mixture holds data of other"),
        (
            algorithm("ppo")._replace(adaptation=adaptation.learning_rate),
            "adaptation reads the KL",
        ),
    ],
)
def test_contradictions_about_data_are_refused(row, message):
    env = from_mdp(bandit())
    with pytest.raises(ValueError, match=message):
        make_trainer(env, actor_critic(env, "tabular"), row, num_envs=4, num_steps=4)


def test_only_own_data_is_replayed():
    for given in (sources.mixture, sources.demonstrations):
        with pytest.raises(ValueError, match=f"the policy's own data, not {given.name}"):
            sources.replay(given, 2)
    with pytest.raises(ValueError, match="num_batches=0 must be at least 1"):
        sources.replay(sources.episodes, 0)
    twice = sources.replay(sources.replay(sources.stream, 4), 2)
    assert twice.name == "replay(stream, 2)" and sources.replay(twice, 1) is sources.stream


def test_numbers_adapt_to_the_divergence():
    start, numbers = adaptation.initial_scales(), Hyperparams(target_kl=0.01)
    for kl, rate, coef in ((0.04, 1 / 1.5, 2.0), (0.001, 1.5, 0.5), (0.01, 1.0, 1.0)):
        assert adaptation.learning_rate(start, jnp.float32(kl), numbers).learning_rate == (
            pytest.approx(rate)
        )
        assert adaptation.kl_penalty(start, jnp.float32(kl), numbers).kl_coef == coef
        assert adaptation.fixed(start, jnp.float32(kl), numbers) is start
    far = start._replace(kl_coef=jnp.float32(adaptation.HIGHEST))
    assert adaptation.kl_penalty(far, jnp.float32(1.0), numbers).kl_coef == adaptation.HIGHEST
    scaled = adaptation.scaled(Hyperparams(learning_rate=2.0), adaptation.Scales(0.5, 3.0))
    assert scaled.learning_rate == 1.0 and scaled.kl_coef == 3.0


def test_a_penalty_that_adapts_holds_the_divergence_near_its_target():
    env = from_mdp(bandit((0.0, 1.0, 2.0)))
    agent = actor_critic(env, "tabular")
    trainer = make_trainer(env, agent, algorithm("ppo_kl"), num_envs=64, num_steps=4)
    numbers = Hyperparams(learning_rate=0.05, target_kl=0.003, kl_coef=1e-3)
    state, metrics = jax.jit(partial(train, trainer, num_updates=12))(
        trainer.init(jax.random.key(0)), numbers
    )
    # The coefficient starts far too small and doubles per update; the metric is the scale after the update.
    scale = np.asarray(metrics["kl_coef_scale"])
    kl = np.asarray(metrics["kl"])
    before = np.concatenate([[1.0], scale[:-1]])
    expected = np.where(kl > 0.0045, 2 * before, np.where(kl < 0.002, before / 2, before))
    assert np.allclose(scale, expected) and scale.max() >= 16
    assert state.scales.kl_coef == scale[-1]


def settings_of(row, **numbers):
    env, agent = world()
    agent = actor_critic(env, "tabular")
    params = init_params(agent, jax.random.key(0))
    trajectory, _ = episodes(env, agent, params, jax.random.key(1), 8)
    batch = assess(row.estimator, trajectory, trajectory.log_prob, Hyperparams())
    policy, critic = (
        row.policy_optimizer(Hyperparams()).init(params.policy),
        row.critic_optimizer(Hyperparams()).init(params.critic),
    )
    run = jax.jit(partial(improve, agent, row, "steps"))
    hyperparams = jax.tree.map(jnp.float32, Hyperparams(**numbers))
    key = jax.random.key(2)
    return params, run(params, (policy, critic), batch, initial_carry(agent, 8), hyperparams, key)


@pytest.mark.slow
def test_stopping_on_the_divergence_keeps_the_first_step():
    """Every step after the first exceeds stop_kl, so the policy is that of one epoch."""
    row = algorithm("ppo")._replace(num_epochs=1, num_minibatches=1)
    start, (one, _, _) = settings_of(row, learning_rate=0.1)
    _, (stopped, _, _) = settings_of(row._replace(num_epochs=5), learning_rate=0.1, stop_kl=1e-6)
    _, (free, _, _) = settings_of(row._replace(num_epochs=5), learning_rate=0.1)
    assert np.array_equal(one.policy["logits"], stopped.policy["logits"])
    assert np.abs(free.policy["logits"] - stopped.policy["logits"]).max() > 0.05
    assert not np.array_equal(one.policy["logits"], start.policy["logits"])
    # The critic keeps training.
    assert np.array_equal(free.critic["value"], stopped.critic["value"])


def test_value_clipping_holds_values_near_the_old_ones():
    row = algorithm("ppo")._replace(num_epochs=200, num_minibatches=1, critic_optimizer=sgd)
    numbers = {"critic_learning_rate": 0.1, "max_grad_norm": 1e9}
    start, (free, _, _) = settings_of(row, **numbers)
    _, (held, _, _) = settings_of(row, value_clip_eps=0.05, **numbers)
    moved = np.abs(held.critic["value"] - start.critic["value"])
    # Past the edge the gradient is 0, so at most one step goes beyond it.
    assert moved.max() < 0.1 < np.abs(free.critic["value"] - start.critic["value"]).max()


@pytest.mark.slow
def test_the_continuing_form_estimates_the_discounted_approximation():
    """The mean over windows is the limit of an infinite trace, up to the O(1/T) of a window's edge."""
    mdp = random_mdp(7, horizon=100_000, terminal=False)
    env, beta, num_steps = from_mdp(mdp), 0.8, 400
    agent = Agent(tabular(env.observation, env.action))
    row = algorithm("gpomdp_continuing")._replace(policy_optimizer=sgd)
    trainer = make_trainer(env, agent, row, num_envs=64, num_steps=num_steps)
    state = trainer.init(jax.random.key(0))
    rate, updates = 1e-6, 60
    numbers = jax.tree.map(
        jnp.float32, Hyperparams(gamma=beta, learning_rate=rate, max_grad_norm=1e9)
    )

    def step(state, _):
        after, _ = trainer.update(state, numbers, None)
        moved = (after.params.policy["logits"] - state.params.policy["logits"]) / rate
        # Keep the parameters: only the stream goes on.
        return after._replace(params=state.params, opt_state=state.opt_state), moved

    _, rows = jax.jit(lambda s: jax.lax.scan(step, s, length=updates))(state)
    rows = np.asarray(rows, float).reshape(updates, -1)
    exact = stationary.gpomdp_gradient(mdp, np.zeros((3, 2)), beta).ravel()
    error = rows.std(axis=0, ddof=1) / updates**0.5
    edge = np.abs(exact).max() / (num_steps * (1 - beta)) * 4
    assert (np.abs(rows.mean(axis=0) - exact) < 5 * error + edge).all()
    other = stationary.gpomdp_gradient(mdp, np.zeros((3, 2)), 0.0).ravel()
    assert (np.abs(rows.mean(axis=0) - other) > 5 * error + edge).any(), "control: another beta"


@pytest.mark.slow
def test_a_row_of_the_users_own_uses_old_data():
    """Streams are replayed too: V-trace learns a bandit."""
    env = from_mdp(bandit((0.0, 1.0)))
    row = Algorithm(
        Estimator(credit.lambda_return, baselines.critic, importance.truncated(1.0),
                  surrogates.clipped, surrogates.per_step),
        sources.replay(sources.stream, 3),
        critic_optimizer=algorithm("ppo").critic_optimizer, num_epochs=2, num_minibatches=2,
    )  # fmt: skip
    trainer = make_trainer(env, actor_critic(env, "tabular"), row, num_envs=16, num_steps=4)
    learn = jax.jit(partial(train, trainer, num_updates=60))
    numbers = Hyperparams(learning_rate=0.1, critic_learning_rate=0.1)
    state, _ = learn(trainer.init(jax.random.key(0)), numbers)
    assert jax.nn.softmax(state.params.policy["logits"][0])[1] > 0.9
