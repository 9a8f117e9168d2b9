"""A batch is one batch: however it is cut, kept or rolled out again, the estimate is the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from worlds import random_mdp

from jaxpg import Hyperparams, batching, devices, episodes, make_trainer, train
from jaxpg.envs import from_mdp
from jaxpg.estimators import Estimator, baselines
from jaxpg.optimizers import sgd
from jaxpg.optimizers.natural import precondition_by_fisher
from jaxpg.policies import Agent, AgentParams, actor_critic, tabular
from jaxpg.rollout import episodic, stream
from jaxpg.training import accumulation
from jaxpg.training.algorithm import Algorithm, algorithm
from jaxpg.training.data import episodes as own_episodes

NUMBERS = Hyperparams(learning_rate=1.0, max_grad_norm=1e9, gamma=0.9)


@pytest.fixture
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(batching, "LANES", 4)
    monkeypatch.setitem(episodic.BLOCKS_AT_ONCE, "cpu", 1)


def one_step(row, num_envs=12, network="tabular", **settings):
    """The step of the policy, the metrics, and the state it started from."""
    env = from_mdp(random_mdp(0, horizon=4))
    agent = actor_critic(env, network, **({} if network == "tabular" else {"hidden": (4,)}))
    trainer = make_trainer(env, agent._replace(critic=None), row, num_envs=num_envs, **settings)
    state = trainer.init(jax.random.key(0))
    after, metrics = jax.jit(partial(train, trainer, num_updates=1))(state, NUMBERS)
    moved = jax.tree.map(jnp.subtract, after.params.policy, state.params.policy)
    return moved, metrics, state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_every_episode_is_compared_with_all_others(name, x64, blocks_of_four):
    row = algorithm(name)._replace(policy_optimizer=sgd)
    moved, metrics, state = one_step(row)
    env = from_mdp(random_mdp(0, horizon=4))
    agent = Agent(tabular(env.observation, env.action))
    params = AgentParams(state.params.policy, ())
    key, _ = jax.random.split(jax.random.fold_in(state.key, 0))
    # Each group draws from its own key, whatever the device.
    lanes = [episodes(env, agent, params, jax.random.fold_in(key, i), 4)[0] for i in range(3)]
    obs, action, reward, mask = (
        np.concatenate([np.asarray(getattr(x, field)) for x in lanes], axis=1)
        for field in ("obs", "action", "reward", "mask")
    )
    to_go, following = np.zeros_like(reward), 0.0
    for t in reversed(range(4)):
        following = to_go[t] = reward[t] + 0.9 * following
    psi = to_go if name == "reinforce_baseline" else np.broadcast_to(to_go[:1], to_go.shape)
    if name == "reinforce_baseline":
        psi = psi - (psi.sum(axis=1, keepdims=True) - psi) / 11
    total = np.zeros((3, 2))
    for t in range(4):
        for i in range(12):
            if mask[t, i]:
                score = np.full(2, -0.5)
                score[action[t, i]] += 1.0
                total[obs[t, i]] += score * psi[t, i] / 12
    assert np.allclose(moved["logits"], total, atol=1e-12)
    assert metrics["env_steps"][0] == mask.sum() and metrics["episodes"][0] == 12
    assert metrics["episode_return"][0] == pytest.approx(reward.sum(axis=0).mean())
    assert metrics["entropy"][0] == pytest.approx(np.log(2))
    assert metrics["grad_norm"][0] == pytest.approx(np.linalg.norm(total))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["tabular", "gru"])
@pytest.mark.parametrize("baseline", [baselines.time_mean, baselines.optimal_constant])
def test_how_it_is_computed_changes_no_estimate(baseline, network, monkeypatch):
    """Blocks run one after another, side by side, and are rolled out again, with and without memory."""
    row = Algorithm(Estimator(baseline=baseline), policy_optimizer=sgd)
    monkeypatch.setattr(batching, "LANES", 4)
    monkeypatch.setitem(episodic.BLOCKS_AT_ONCE, "cpu", 1)
    expected, metrics, _ = one_step(row, network=network)
    again = one_step(row, network=network, recompute=True)
    monkeypatch.setitem(episodic.BLOCKS_AT_ONCE, "cpu", 3)
    beside = one_step(row, network=network)
    for moved, others, _ in (again, beside):
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
            assert np.allclose(a, b, atol=3e-6)
        for name in metrics:
            assert np.allclose(others[name], metrics[name], 1e-4, 1e-6, True), name
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [8, 12])
def test_an_optimizer_of_the_users_own_takes_any_number_of_episodes(num_envs, blocks_of_four):
    """It reads the divergence, which must be given for a batch taken in groups too."""

    def natural(hyperparams):
        return optax.chain(precondition_by_fisher(0.1), optax.sgd(hyperparams.learning_rate))

    row = algorithm("reinforce_to_go")._replace(policy_optimizer=natural)
    moved, *_ = one_step(row, num_envs)
    plain, *_ = one_step(row._replace(policy_optimizer=sgd), num_envs)
    assert 0 < np.abs(moved["logits"]).max() < np.inf
    assert not np.allclose(moved["logits"], plain["logits"], rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_an_optimizer_of_the_users_own_is_told_of_the_whole_batch(recompute, blocks_of_four):
    """Its own gradient of the loss equals the one it is given, and every episode has a log-probability."""

    def own(hyperparams):
        def update(updates, state, params, *, loss, kl, fisher_kl, episode_log_probs, **extra):
            del updates, extra
            step = jax.tree.map(lambda x: -hyperparams.learning_rate * x, jax.grad(loss)(params))
            assert episode_log_probs(params).shape == (12,)
            same = kl(params) + fisher_kl(params)  # 0
            return jax.tree.map(lambda x: x + same, step), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    row = algorithm("reinforce_baseline")._replace(policy_optimizer=own)
    moved, *_ = one_step(row, recompute=recompute)
    plain, *_ = one_step(
        row._replace(policy_optimizer=lambda numbers: optax.sgd(numbers.learning_rate))
    )
    assert np.abs(plain["logits"]).max() > 1e-2
    np.testing.assert_allclose(moved["logits"], plain["logits"], atol=1e-6)


def test_a_device_decides_how_many_blocks_run_at_once():
    """It never decides how large a block is, and with it which lanes share a key."""
    for platform in ("cpu", "gpu", "tpu"):
        with devices.built_for(platform):
            assert batching.lane_block(10_000) == 50 and batching.lane_block(96, 8) == 48
    assert episodic.lanes_at_once(1024) == 1024 and episodic.lanes_at_once(65536) == 1024
    assert episodic.lanes_at_once(10_000) == 500
    assert episodic.lanes_at_once(7919) == 7919, "a prime has no blocks of a fair size"


def test_only_own_episodes_of_one_minibatch_are_rolled_out_again():
    env = from_mdp(random_mdp(0))
    for row in (algorithm("off_policy"), algorithm("ppo")):
        with pytest.raises(ValueError, match="recompute needs data=episodes"):
            make_trainer(env, actor_critic(env, "tabular"), row, num_envs=8, recompute=True)


@pytest.mark.slow
def test_chunks_of_updates_are_invisible_in_groups_too(blocks_of_four):
    env = from_mdp(random_mdp(1))
    trainer = make_trainer(env, actor_critic(env, "tabular"), algorithm("reinforce"), num_envs=8)
    numbers = jax.tree.map(jnp.float32, Hyperparams(learning_rate=0.1))
    states = jax.vmap(trainer.init)(jax.random.split(jax.random.key(0), 2))
    two = jax.jit(jax.vmap(partial(train, trainer, num_updates=2), (0, None)))
    four = jax.jit(jax.vmap(partial(train, trainer, num_updates=4), (0, None)))
    halfway, _ = two(states, numbers)
    end, _ = two(halfway, numbers)
    whole, _ = four(states, numbers)
    assert np.array_equal(end.params.policy["logits"], whole.params.policy["logits"])
    assert np.abs(end.params.policy["logits"]).max() > 0.05


def as_on(monkeypatch, device):
    """Set sizes as on a processor with few cores and a small cache, which cuts everything; or cut nothing."""
    small = device == "processor"
    monkeypatch.setattr(devices, "_told", ["cpu" if small else "gpu"])
    for module, name, size in (
        (accumulation, "BLOCK", 4),
        (episodic, "BLOCKS_AT_ONCE", 1),
        (stream, "AT_ONCE", 4),
        (stream, "STEPS_PER_START", 2),
    ):
        monkeypatch.setitem(getattr(module, name), "cpu", size)
    monkeypatch.setattr(batching, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1 if small else 10**6)


# One row for each kind of data and of step.
KINDS = ("reinforce_baseline", "enac", "off_policy", "guided", "impala", "ppo", "trpo")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_no_row_depends_on_the_device_that_it_runs_on(name, x64, blocks_of_four, monkeypatch):
    """Blocks, groups of episodes and replicas, and lanes rolled out again change no number of an update."""
    env, row = from_mdp(random_mdp(0, horizon=4)), algorithm(name)
    agent = actor_critic(env, "tabular")
    given = None
    if row.data.demonstrations:
        uniform = AgentParams(agent.policy.init(jax.random.key(0)), ())
        given, _ = episodes(env, Agent(agent.policy), uniform, jax.random.key(1), 8)
    numbers = Hyperparams(learning_rate=0.1, critic_learning_rate=0.1, gamma=0.9)
    keys = jax.random.split(jax.random.key(0), 3)

    def run(device, **settings):
        as_on(monkeypatch, device)
        num_steps = None if row.data.whole_episodes else 6
        trainer = make_trainer(env, agent, row, num_envs=8, num_steps=num_steps, **settings)

        def of(key):
            return train(trainer, trainer.init(key), numbers, given, num_updates=2)

        state, metrics = jax.jit(jax.vmap(of))(keys)
        return state.params, metrics

    expected = run("accelerator")
    found = run("processor", recompute=True if row.data is own_episodes else None)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-8, 1e-11, err_msg=jax.tree_util.keystr(path))
    logits = expected[0].policy["logits"]
    assert np.abs(logits).max(axis=(1, 2)).min() > 1e-2 and not np.allclose(logits[0], logits[1])
