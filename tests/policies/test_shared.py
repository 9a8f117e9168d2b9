"""A torso that policy and critic share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxpg import Hyperparams, make_trainer, train, unroll
from jaxpg.cli import main
from jaxpg.envs import Discrete, from_gymnax, from_mdp, with_mask
from jaxpg.estimators import assess
from jaxpg.lab.exact.bandits import bandit
from jaxpg.optimizers import sgd
from jaxpg.policies import Network, actor_critic, critic_of, init_params
from jaxpg.rollout import init_stream
from jaxpg.training.algorithm import algorithm

SETTINGS = {
    "mlp": {"hidden": (8,)},
    "gru": {"hidden": (8,), "features": 4},
    "mlp normalised": {"hidden": (8,), "normalise": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_step_is_along_the_policys_gradient_minus_the_critics(name, x64):
    """One step of SGD on one batch, against the derivative of J - c/2 mean (V - target)^2 as written here."""
    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, name.split()[0], shared_torso=True, **SETTINGS[name])
    row = algorithm("a2c")._replace(policy_optimizer=sgd, critic_optimizer=sgd)
    rate, coef, entropy = 0.03, 0.7, 0.2
    numbers = Hyperparams(
        learning_rate=rate, critic_learning_rate=99.0, value_coef=coef, entropy_coef=entropy,
        max_grad_norm=1e9,
    )  # fmt: skip
    trainer = make_trainer(env, agent, row, num_envs=4, num_steps=24)
    state = jax.jit(lambda: trainer.init(jax.random.key(0)))()
    k_rollout, _ = jax.random.split(jax.random.fold_in(state.key, 0))
    _, (trajectory, _) = jax.jit(
        lambda: unroll(env, agent, state.params, state.data, k_rollout, 24)
    )()
    batch = assess(row.estimator, trajectory, trajectory.log_prob, numbers)
    carry, critic = state.data.carry, agent.critic
    assert critic is not None

    def objective(params):
        inputs = trajectory.obs, trajectory.first
        _, found = agent.policy.apply(params.policy, carry.policy, *inputs)
        _, value = critic.apply(params, carry.critic, *inputs)
        gain = found.log_prob(trajectory.action) * batch.advantage + entropy * found.entropy()
        return (gain - coef / 2 * (value - batch.target) ** 2).mean()

    gradient = ravel_pytree(jax.grad(objective)(state.params))[0]
    after, _ = jax.jit(trainer.update)(state, numbers)
    statistics = lambda params: params.policy.get("statistics", ())  # noqa: E731
    moved = ravel_pytree(after.params)[0] - ravel_pytree(state.params)[0]
    if name == "mlp normalised":
        assert statistics(after.params).seen == 4 * 24
        untouched = after.params.policy | {"statistics": statistics(state.params)}
        after_params = after.params._replace(policy=untouched)
        moved = ravel_pytree(after_params)[0] - ravel_pytree(state.params)[0]
    assert np.allclose(moved, rate * gradient, rtol=1e-9, atol=1e-12)
    assert np.abs(gradient).max() > 1e-2


def test_values_are_one_layer_on_the_policys_torso():
    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, hidden=(8,), shared_torso=True)
    params = init_params(agent, jax.random.key(0))
    state = init_stream(env, agent, jax.random.key(1), 3)
    _, (trajectory, _) = jax.jit(lambda: unroll(env, agent, params, state, jax.random.key(2), 5))()
    layer = params.policy["body"]["params"]["layers_0"]
    features = np.tanh(trajectory.obs @ layer["kernel"] + np.broadcast_to(layer["bias"], (5, 3, 8)))
    last = params.critic["params"]
    assert np.allclose(
        trajectory.value, (features @ last["kernel"])[..., 0] + last["bias"][0], atol=1e-6
    )
    assert sum(x.size for x in jax.tree.leaves(params.critic)) == 8 + 1


def test_the_critic_alone_is_a_network_with_the_parameters_of_all():
    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, hidden=(8,), shared_torso=True)
    params = init_params(agent, jax.random.key(0))
    critic, own = critic_of(agent, params)
    assert critic is not None
    assert jax.tree.structure(critic.init(jax.random.key(1))) == jax.tree.structure(own)


@pytest.mark.slow
def test_a_mask_is_taken_off_before_the_torso():
    env = with_mask(from_mdp(bandit([0.0, 1.0, 2.0])), lambda state: jnp.array([True, True, False]))
    agent = actor_critic(env, hidden=(4,), shared_torso=True)
    row = algorithm("ppo")._replace(num_minibatches=1)
    trainer = make_trainer(env, agent, row, num_envs=16, num_steps=4)
    numbers = Hyperparams(learning_rate=3e-2)
    start = trainer.init(jax.random.key(0))
    _, metrics = jax.jit(lambda: train(trainer, start, numbers, num_updates=40))()
    assert metrics["episode_return"][-1] > 0.9, "1 is the best of the actions that are allowed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a2c", "impala", "ppo", "ppo_kl"])
def test_rows_with_one_step_for_both_learn_a_bandit(name):
    env = from_mdp(bandit([0.0, 1.0]))
    agent = actor_critic(env, hidden=(4,), shared_torso=True)
    trainer = make_trainer(env, agent, algorithm(name), num_envs=16, num_steps=4)
    numbers = Hyperparams(learning_rate=3e-2)
    start = trainer.init(jax.random.key(0))
    state, metrics = jax.jit(lambda: train(trainer, start, numbers, num_updates=60))()
    assert metrics["episode_return"][-10:].mean() > 0.9
    half, _ = jax.jit(lambda: train(trainer, start, numbers, num_updates=30))()
    again, _ = jax.jit(lambda state: train(trainer, state, numbers, num_updates=30))(half)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--algorithm trpo", "natural gradients step by the policy's KL alone"),
        ("--algorithm vpg", "critic_epochs=9 would move it for the critic alone"),
        ("--algorithm reinforce", "there is no critic to share it with"),
        ("--network linear", "there is no torso to share"),
    ],
)
def test_what_cannot_share_is_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        main(["train", "CartPole-v1", "--shared-torso", *flags.split()])
    assert said in capsys.readouterr().err


def test_a_table_has_no_torso():
    env = from_mdp(bandit([0.0, 1.0]))
    with pytest.raises(ValueError, match="no torso to share"):
        actor_critic(env, "tabular", shared_torso=True)
    assert isinstance(env.observation, Discrete)
    assert Network._field_defaults["features"] is None
