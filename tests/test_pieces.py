"""A large batch in pieces is the mean of its pieces, and only where that is the same method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import random_mdp

from jaxpg import Hyperparams, episodes, make_trainer, pieces, train
from jaxpg.algorithms import ALGORITHMS, algorithm
from jaxpg.envs import from_mdp
from jaxpg.estimators import control_variates, surrogates
from jaxpg.optimizers import sgd
from jaxpg.policies import Agent, AgentParams, actor_critic, tabular


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_the_step_is_the_mean_of_the_pieces(name, x64, monkeypatch):
    monkeypatch.setitem(pieces.PIECE, "cpu", 4)
    env = from_mdp(random_mdp(0, horizon=4))
    policy = tabular(env.observation, env.action)
    row = algorithm(name)._replace(policy_optimizer=sgd)
    assert pieces.num_pieces(Agent(policy), row, 12) == 3
    trainer = make_trainer(env, Agent(policy), row, num_envs=12)
    state = trainer.init(jax.random.key(0))
    numbers = Hyperparams(learning_rate=1.0, max_grad_norm=1e9, gamma=0.9)
    after, metrics = jax.jit(partial(train, trainer, num_updates=1))(state, numbers)
    moved = np.asarray(after.params.policy["logits"] - state.params.policy["logits"])

    key, total, steps, returns = jax.random.fold_in(state.key, 0), 0.0, 0, []
    for index in range(3):
        trajectory, _ = episodes(
            env,
            Agent(policy),
            AgentParams(state.params.policy, ()),
            jax.random.fold_in(key, index),
            4,
        )
        obs, action, reward, mask = (
            np.asarray(x)
            for x in (trajectory.obs, trajectory.action, trajectory.reward, trajectory.mask)
        )
        to_go, following = np.zeros_like(reward), 0.0
        for t in reversed(range(4)):
            following = to_go[t] = reward[t] + 0.9 * following
        psi = to_go if name == "reinforce_baseline" else np.broadcast_to(to_go[:1], to_go.shape)
        if name == "reinforce_baseline":
            psi = psi - (psi.sum(axis=1, keepdims=True) - psi) / 3
        for t in range(4):
            for i in range(4):
                if mask[t, i]:
                    score = np.full(2, -0.5)
                    score[action[t, i]] += 1.0
                    gradient = np.zeros((3, 2))
                    gradient[obs[t, i]] = score * psi[t, i]
                    total = total + gradient / 12
        steps += mask.sum()
        returns += reward.sum(axis=0).tolist()
    assert np.allclose(moved, total, atol=1e-12)
    assert metrics["env_steps"][0] == steps and metrics["episodes"][0] == 12
    assert metrics["episode_return"][0] == pytest.approx(np.mean(returns))
    assert metrics["entropy"][0] == pytest.approx(np.log(2))
    assert metrics["grad_norm"][0] == pytest.approx(np.linalg.norm(total))


def test_only_separable_methods_are_cut(monkeypatch):
    monkeypatch.setitem(pieces.PIECE, "cpu", 4)
    env = from_mdp(random_mdp(0))
    agent = actor_critic(env, "tabular")
    cut = {name for name, row in ALGORITHMS.items() if pieces.num_pieces(agent, row, 12) > 1}
    assert cut == {"reinforce", "reinforce_to_go", "reinforce_baseline", "gpomdp"}
    row = algorithm("reinforce")
    for other in (
        row._replace(control_variate=control_variates.peters_schaal),
        row._replace(measure_noise=True),
        row._replace(num_epochs=2),
        row._replace(
            estimator=row.estimator._replace(surrogate=surrogates.standardised(surrogates.score))
        ),
    ):
        assert pieces.num_pieces(agent, other, 12) == 1
    assert pieces.num_pieces(agent, row, 7919, 1024) == 1, "a prime has no pieces of a fair size"


def test_chunks_of_updates_are_invisible_in_pieces_too(monkeypatch):
    monkeypatch.setitem(pieces.PIECE, "cpu", 4)
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
