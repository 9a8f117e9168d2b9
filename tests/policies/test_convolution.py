"""Convolutions as matrix products, against flax's; layer normalisation against its definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Box, Discrete, MultiDiscrete
from jaxpg.policies import cnn, gru, mlp


def image(*shape):
    return Box(np.zeros(shape, np.float32), np.ones(shape, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_flaxs_convolution(stride, x64):
    space = image(9, 11, 2)
    network = cnn(space, None, (5,), channels=(4, 3), stride=stride, activation="relu")
    params = network.init(jax.random.key(0))
    obs, first = jax.random.normal(jax.random.key(1), (2, 3, 9, 11, 2)), jnp.zeros((2, 3), bool)
    layers = params["body"]["params"]
    kinds = [layers[name] for name in sorted(layers, key=lambda name: int(name.split("_")[1]))]
    x = obs.reshape(6, 9, 11, 2)
    for width, layer in zip((4, 3), kinds[:2], strict=True):
        kernel = layer["kernel"].reshape(3, 3, x.shape[-1], width)
        convolution = nn.Conv(width, (3, 3), stride, padding="VALID")
        own = {"params": {"kernel": kernel, "bias": layer["bias"]}}
        x = jax.nn.relu(convolution.apply(own, x))
    x = x.reshape(6, -1)
    x = jax.nn.relu(x @ kinds[2]["kernel"] + kinds[2]["bias"][None])
    last = params["head"]["params"]
    expected = (x @ last["kernel"] + last["bias"][None]).reshape(2, 3)
    np.testing.assert_allclose(network.apply(params, (), obs, first)[1], expected, 1e-10, 1e-12)


def test_a_grid_has_one_channel():
    first = jnp.zeros((1, 2), bool)
    grid, same = (cnn(image(*shape), Discrete(3)) for shape in ((5, 6), (5, 6, 1)))
    params = grid.init(jax.random.key(0))
    obs = jax.random.normal(jax.random.key(1), (1, 2, 5, 6))
    one = grid.apply(params, (), obs, first)[1].logits
    other = same.apply(params, (), obs[..., None], first)[1].logits
    assert (one == other).all() and one.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("space", "said", "settings"),
    [
        (image(4), r"observations are Box of shape \[4\]; use mlp", {}),
        (Discrete(4), r"observations are Discrete of shape \[\]", {}),
        (MultiDiscrete((2, 3)), "observations are MultiDiscrete", {}),
        (image(2, 5, 1), "after 0 there are 2 x 5", {}),
        (image(10, 10, 1), "after 2 there are 1 x 1", {"channels": (4, 4, 4), "stride": 3}),
        (image(10, 10, 1), "give channels", {"channels": ()}),
    ],
)
def test_what_it_cannot_convolve_is_refused(space, said, settings):
    with pytest.raises(ValueError, match=said) as error:
        cnn(space, Discrete(2), **settings)
    assert "\n" not in str(error.value)


def test_layer_norm_comes_before_each_activation(x64):
    space = image(3)
    network = mlp(space, None, (4,), layer_norm=True)
    params = network.init(jax.random.key(0))
    layers = params["body"]["params"]
    dense, norm = layers["layers_0"], layers["layers_1"]
    norm["scale"], norm["bias"] = jnp.arange(1.0, 5.0), jnp.arange(4.0)
    obs = 1e3 + np.asarray(jax.random.normal(jax.random.key(1), (1, 6, 3)))
    x = obs @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = np.tanh(x * np.arange(1.0, 5.0) + np.arange(4.0))
    last = params["head"]["params"]
    expected = (x @ last["kernel"])[..., 0] + last["bias"][0]
    found = network.apply(params, (), jnp.asarray(obs), jnp.zeros((1, 6), bool))[1]
    np.testing.assert_allclose(found, expected, 1e-9, 1e-12)
    for build in (gru, cnn):
        seen = image(5, 5) if build is cnn else space
        names = str(
            jax.eval_shape(build(seen, None, (4,), layer_norm=True).init, jax.random.key(0))
        )
        assert "scale" in names
        assert "scale" not in str(jax.eval_shape(build(seen, None, (4,)).init, jax.random.key(0)))
