"""Networks of the user's own: torsos of flax.linen, of flax.nnx, and pairs of pure functions."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import Box, Discrete, Squashed, from_gymnax
from jaxpg.policies import Network, actor_critic, network_builder
from jaxpg.training.algorithm import algorithm

NETS = """
import flax.linen as nn
import jax, jax.numpy as jnp
from flax import nnx
from jaxpg.policies import mlp

class Torso(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x)) if x.ndim == 4 else x
        return nn.tanh(nn.Dense(8)(x.reshape(len(x), -1)))

def linen(observation, action):
    return Torso()

def by_nnx(observation, action):
    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(observation.shape[0], 8, rngs=rngs)])
        def __call__(self, x):
            return jnp.tanh(self.layers[0](x))
    return Mine

def pair(observation, action):
    def init(key, obs):
        return {"w": 0.3 * jax.random.normal(key, (obs.shape[-1], 8))}
    def apply(params, obs):
        return jnp.tanh(obs @ params["w"])
    return init, apply

def whole(observation, action):
    return mlp(observation, action, (8,))

def noisy(observation, action):
    def make(rngs):
        return nnx.Sequential(nnx.Linear(observation.shape[0], 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    return make

def flat(observation, action):
    return (lambda key, obs: {}), (lambda params, obs: obs.sum(-1))

def nothing(observation, action):
    return 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Torso", "linen", "by_nnx", "pair", "whole"])
def test_every_kind_of_torso_trains(kind, nets):
    env = from_gymnax("CartPole-v1", max_steps_in_episode=30)
    agent = actor_critic(env, f"{nets}:{kind}")
    row = algorithm("ppo")._replace(num_epochs=1, num_minibatches=1)
    trainer = make_trainer(env, agent, row, num_envs=4, num_steps=16)
    learn = jax.jit(jax.vmap(partial(train, trainer, num_updates=3), (0, None)))
    states = jax.vmap(trainer.init)(jax.random.split(jax.random.key(0), 2))
    after, metrics = learn(states, Hyperparams(learning_rate=1e-2))
    assert (jnp.abs(metrics["kl"]) < 1e-6).all(), "updates start at the rollout's own policy"
    for old, new in zip(jax.tree.leaves(states.params), jax.tree.leaves(after.params), strict=True):
        assert (old != new).any(), "every array learns"
    seeds = [x for x in jax.tree.leaves(states.params.policy) if x.ndim == 3]
    assert all((x[0] != x[1]).any() for x in seeds), "every seed starts from weights of its own"


def test_a_torso_sees_images_in_their_shape_and_integers_one_hot(nets):
    image = Box(np.zeros((5, 5, 2), np.float32), np.ones((5, 5, 2), np.float32))
    policy = network_builder(f"{nets}:Torso")(image, Discrete(3))
    params = policy.init(jax.random.key(0))
    assert params["torso"]["params"]["Conv_0"]["kernel"].shape == (3, 3, 2, 4)
    obs, first = jax.random.uniform(jax.random.key(1), (4, 2, 5, 5, 2)), jnp.zeros((4, 2), bool)
    _, together = policy.apply(params, (), obs, first)
    _, alone = policy.apply(params, (), obs[2:3, 1:], first[2:3, 1:])
    np.testing.assert_allclose(together.logits[2, 1], alone.logits[0, 0], 1e-5)

    critic = network_builder(f"{nets}:pair")(Discrete(4), None)
    params = critic.init(jax.random.key(0))
    assert params["torso"]["w"].shape == (4, 8)
    _, value = critic.apply(params, (), jnp.array([[0, 3]]), first[:1])
    weights = params["head"]["head"]["params"]
    rows = np.tanh(params["torso"]["w"])[[0, 3]]
    by_hand = rows @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    np.testing.assert_allclose(value, by_hand.T, 1e-5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "gives a int; it must give a Network, a module of flax, or a pair"),
        ("flat", r"it maps observations \[1, 4\] to \[1\], not to \[1, F\]"),
        ("noisy", "it keeps Rng.* besides its parameters, which no update would keep"),
        ("nosuch", "has no 'nosuch'"),
    ],
)
def test_what_is_no_network_is_one_line(kind, message, nets):
    env = from_gymnax("CartPole-v1")
    with pytest.raises(ValueError, match=message) as error:
        actor_critic(env, f"{nets}:{kind}")
    assert "\n" not in str(error.value)


def test_a_whole_network_is_taken_as_it_is(nets):
    built = network_builder(f"{nets}:whole")(Box(-np.ones(3), np.ones(3)), Discrete(2))
    assert isinstance(built, Network)
    reals, bounded = Box(-np.ones(3), np.ones(3)), Box(-np.ones(2), np.ones(2))
    assert network_builder(f"{nets}:whole")(reals, bounded, distribution="gaussian")
    for action, settings, message in (
        (
            Squashed(*bounded),
            {"distribution": "beta"},
            "with a TanhGaussian distribution, not beta",
        ),
        (bounded, {"state_dependent_std": True}, "which state_dependent_std cannot change"),
    ):
        with pytest.raises(ValueError, match=message):
            network_builder(f"{nets}:whole")(reals, action, **settings)
