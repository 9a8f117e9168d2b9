import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import clock

from jaxpg.devices import built_for
from jaxpg.envs import Box, Discrete, Env, MultiDiscrete, Squashed, from_gymnax
from jaxpg.policies import (
    Agent,
    Bernoulli,
    Categorical,
    Gaussian,
    MultiCategorical,
    actor_critic,
    check_agent,
    gru,
    linear,
    lstm,
    mingru,
    mlp,
    orthogonal,
    tabular,
    transformer,
)

BOX = Box(-np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
TORQUE = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))


# These programs run longer than they take to compile, so they are compiled as for users.
WELL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
SHAPES = [(8, 8), (4, 16), (16, 4), (5, 1), (8, 8)]


def test_orthogonal_rows_or_columns():
    gains = [jnp.full(shape, float(gain)) for gain, shape in enumerate(SHAPES, 1)]
    found = orthogonal(jax.random.key(0), {"kernels": gains, "bias": jnp.full(3, 7.0)})
    for gain, matrix in enumerate(map(np.asarray, found["kernels"]), 1):
        rows, columns = matrix.shape
        product = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
        np.testing.assert_allclose(product, gain**2 * np.eye(min(rows, columns)), atol=2e-5)
    np.testing.assert_array_equal(found["bias"], np.full(3, 7.0))
    assert orthogonal(jax.random.key(0), {"bias": jnp.ones(3)}).keys() == {"bias"}


def test_orthogonal_matrices_are_uniform_and_independent():
    """Entries of a matrix of n rows have mean 0, variance 1 / n, and no correlation with another matrix."""
    keys = jax.random.split(jax.random.key(1), 4000)
    gains = [jnp.ones((4, 4)), jnp.ones((4, 2)), jnp.ones((4, 4))]
    one, tall, other = map(np.asarray, jax.jit(jax.vmap(lambda k: orthogonal(k, gains)))(keys))
    # The standard error of a mean is 0.008, of a variance and of the product of two entries 0.005.
    for matrices in (one, tall, other):
        assert np.abs(matrices.mean(axis=0)).max() < 0.035
        assert np.abs((matrices**2).mean(axis=0) - 1 / 4).max() < 0.025
    for a, b in ((one, other), (one[:, :, :2], tall)):
        assert np.abs((a * b).mean(axis=0)).max() < 0.02
    assert np.abs((one * one).mean(axis=0)).min() > 0.2  # correlated entries exceed the bound


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_orthogonal_does_not_hang_under_vmap():
    """QR under vmap hangs for ever on two cores with jaxlib 0.10: 16 seeds, 400 times."""
    gains = jnp.ones((64, 64))
    init = jax.jit(jax.vmap(lambda key: orthogonal(key, gains)), compiler_options=WELL)
    for i in range(400):
        matrices = init(jax.random.split(jax.random.key(i), 16))
    product = np.einsum("nij,nik->njk", matrices, matrices)
    assert np.abs(product - np.eye(64)).max() < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_recurrent_initialisation_does_not_hang_under_vmap():
    network = gru(BOX, Discrete(2), (64,), features=64)
    init = jax.jit(jax.vmap(network.init), compiler_options=WELL)
    for i in range(50):
        params = init(jax.random.split(jax.random.key(i), 16))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("build", [linear, mlp, gru, lstm, mingru, transformer])
@pytest.mark.parametrize("observation", [Discrete(5), BOX, MultiDiscrete((3, 4))])
def test_shapes_and_near_uniform_start(build, observation):
    integer = not isinstance(observation, Box)
    obs = jnp.ones((4, 3, *observation.shape), jnp.int32 if integer else jnp.float32)
    first = jnp.zeros((4, 3), bool)
    for action, kind in (
        (Discrete(3), Categorical),
        (TORQUE, Gaussian),
        (MultiDiscrete((2, 3)), MultiCategorical),
        (None, None),
    ):
        network = build(observation, action)

        @jax.jit
        def start(key, network=network):
            return network.apply(network.init(key), network.initial_carry(3), obs, first)

        carry, out = start(jax.random.key(0))
        assert jax.tree.structure(carry) == jax.tree.structure(network.initial_carry(3))
        if kind is None:
            assert out.shape == (4, 3)
        else:
            assert isinstance(out, kind) and out.entropy().shape == (4, 3)
        if kind is Categorical:
            assert np.abs(jax.nn.softmax(out.logits) - 1 / 3).max() < 0.02
        if kind is Gaussian:
            # In units of half the range: centre (0, .5), standard deviation half of (2, .5).
            assert np.abs(out.mean - np.array([0.0, 0.5], np.float32).reshape(1, 1, 2)).max() < 0.05
            assert np.allclose(jnp.exp(out.log_std), np.broadcast_to([1.0, 0.25], (4, 3, 2)))


def test_one_hot_of_multi_discrete_tells_values_apart():
    network = linear(MultiDiscrete((2, 2)), None)
    params = network.init(jax.random.key(0))
    obs = jnp.array([[[0, 1], [1, 0], [0, 0], [1, 1]]])
    value = network.apply(params, (), obs, jnp.zeros((1, 4), bool))[1][0]
    assert len(np.unique(np.round(value, 5))) == 4


def test_tabular_is_a_table():
    network = tabular(Discrete(3), Discrete(2))
    params = network.init(jax.random.key(0))
    params = {"logits": params["logits"].at[1].set(jnp.array([2.0, 0.0]))}
    obs = jnp.array([[0, 1]])
    _, out = network.apply(params, (), obs, jnp.zeros((1, 2), bool))
    assert np.allclose(out.logits, [[[0.0, 0.0], [2.0, 0.0]]])
    with pytest.raises(ValueError, match="tabular needs discrete"):
        tabular(BOX, Discrete(2))
    with pytest.raises(ValueError, match="tabular needs discrete"):
        tabular(Discrete(2), TORQUE)


def test_recurrent_concatenation_equals_unrolling_each_episode():
    """The carry restarts before an episode's first observation is read."""
    network = gru(Box(-np.ones(3, np.float32), np.ones(3, np.float32)), Discrete(2))
    params = network.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.3, params)
    obs = jax.random.normal(jax.random.key(1), (9, 1, 3))
    first = jnp.zeros((9, 1), bool).at[jnp.array([0, 4])].set(True)
    dirty = network.initial_carry(1) + 5.0
    _, whole = network.apply(params, dirty, obs, first)
    parts = [
        network.apply(params, network.initial_carry(1), obs[a:b], first[a:b])[1].logits
        for a, b in ((0, 4), (4, 9))
    ]
    assert np.allclose(whole.logits, np.concatenate(parts), atol=1e-6)
    _, leaking = network.apply(params, network.initial_carry(1), obs, jnp.zeros_like(first))
    assert not np.allclose(whole.logits[4:], leaking.logits[4:], atol=1e-3), (
        "control: without restart"
    )


def test_policy_and_critic_share_nothing():
    agent = actor_critic(from_gymnax("CartPole-v1"))
    k = jax.random.key(0)
    assert jax.tree.structure(agent.policy.init(k)) is not None
    with pytest.raises(ValueError, match="unknown network 'cnm'"):
        actor_critic(from_gymnax("CartPole-v1"), "cnm")
    with pytest.raises(ValueError, match="unknown activation 'tahn'"):
        actor_critic(from_gymnax("CartPole-v1"), activation="tahn")


def test_a_policy_of_the_wrong_kind_is_refused():
    discrete, continuous = clock(3), clock(3, continuous=True)
    for env, other in ((discrete, continuous), (continuous, discrete)):
        policy = mlp(env.observation, other.action)
        with pytest.raises(ValueError, match="action space"):
            check_agent(env, Agent(policy))
        check_agent(env, Agent(mlp(env.observation, env.action)))
    wider = Env(*discrete[:3], Discrete(3), 3)
    with pytest.raises(ValueError, match="do not fit"):
        check_agent(wider, Agent(mlp(discrete.observation, discrete.action)))


def test_a_deviation_may_depend_on_the_state():
    """It starts at the initial one, and moves with the observation once the last layer is not small."""
    seen = Box(-np.ones(3, np.float32), np.ones(3, np.float32))
    obs, first = jax.random.normal(jax.random.key(0), (4, 2, 3)), jnp.zeros((4, 2), bool)
    for action, start in ((TORQUE, [1.0, 0.25]), (Squashed(*TORQUE), [0.5, 0.5])):
        network = mlp(seen, action, (8,), state_dependent_std=True)
        params = network.init(jax.random.key(1))
        std = jnp.exp(network.apply(params, (), obs, first)[1].log_std)
        np.testing.assert_allclose(std, np.broadcast_to(start, std.shape), 0.05)
        larger = jax.tree.map(lambda x: 50 * x, params)
        assert np.std(network.apply(larger, (), obs, first)[1].log_std, axis=(0, 1)).min() > 0.1
        fixed = mlp(seen, action, (8,))
        found = fixed.apply(
            jax.tree.map(lambda x: 50 * x, fixed.init(jax.random.key(1))), (), obs, first
        )
        assert np.std(found[1].log_std, axis=(0, 1)).max() < 1e-6


def test_switches_are_a_bernoulli_vector():
    network = mlp(BOX, MultiDiscrete((2, 2, 2)), (4,), distribution="bernoulli")
    obs, first = jnp.ones((1, 5, 2, 3)), jnp.zeros((1, 5), bool)
    found = network.apply(network.init(jax.random.key(0)), (), obs, first)[1]
    assert isinstance(found, Bernoulli) and found.mode().shape == (1, 5, 3)
    with pytest.raises(ValueError, match=r"between 2, but the actions are .*\(2, 3\)"):
        mlp(BOX, MultiDiscrete((2, 3)), distribution="bernoulli")


@pytest.mark.slow
@pytest.mark.parametrize("action", [Discrete(3), None])
def test_a_tpus_layers_have_the_derivatives_of_others(action, x64):
    space = Box(-np.ones(4, np.float32), np.ones(4, np.float32))
    network = mlp(space, action, (5, 6), precision="default")
    keys = jax.random.split(jax.random.key(0), 3)
    params, moved = network.init(keys[0]), network.init(keys[1])
    obs, first = jax.random.normal(keys[2], (7, 2, 4)), jnp.zeros((7, 2), bool)

    def found(network):
        def outputs(params):
            return jax.tree.leaves(network.apply(params, (), obs, first)[1])[0]

        pull = jax.vjp(outputs, params)[1]
        out, along = jax.jvp(outputs, (params,), (moved,))
        return out, along, jax.vmap(pull)(jnp.stack([out, along]))

    with built_for("tpu"):
        own = found(mlp(space, action, (5, 6), precision="default"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), own, found(network))
