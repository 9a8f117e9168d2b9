"""The gated recurrent unit against flax's cell, one step after the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.devices import built_for
from jaxpg.envs import Box, Discrete
from jaxpg.policies import gru

STEPS, LANES = 11, 3  # not a whole number of passes


@pytest.fixture
def unit(x64):
    bound = np.ones(2, np.float32)
    policy = gru(Box(-bound, bound), Discrete(3), (5,), features=4)
    keys = jax.random.split(jax.random.key(0), 4)
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(keys[0], x.shape), policy.init(keys[1])
    )
    obs = jax.random.normal(keys[2], (STEPS, LANES, 2))
    first = jax.random.uniform(keys[3], (STEPS, LANES)) < 0.2
    assert 2 < first.sum() < 12 and not first[0].all()
    return policy, params, obs, first


def by_steps(params, carry, obs, first):
    """Logits and last carry, from flax's cell and written-out layers."""
    (layer,) = jax.tree.leaves(params["body"], is_leaf=lambda x: "kernel" in x)
    dense = params["head"]["dense"]["params"]
    cell = nn.GRUCell(4, param_dtype=jnp.float64)
    logits = []
    for t in range(STEPS):
        carry = jnp.where(first[t][:, None], 0.0, carry)
        hidden = jnp.tanh(obs[t] @ layer["kernel"] + layer["bias"][None])
        carry, out = cell.apply(params["cell"], carry, hidden)
        logits.append(out @ dense["kernel"] + dense["bias"][None])
    return carry, jnp.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_it_is_flaxs_cell_up_to_the_second_derivative(platform, unit):
    policy, params, obs, first = unit
    start = jax.random.normal(jax.random.key(5), (LANES, 4))

    def ours(params, carry):
        carry, found = policy.apply(params, carry, obs, first)
        return carry, found.logits

    def flaxs(params, carry):
        return by_steps(params, carry, obs, first)

    def everything(run):
        def loss(params, carry):
            carry, logits = run(params, carry)
            return (jnp.sin(logits) * jnp.arange(3.0)[None, None]).sum() + (carry**2).sum()

        def gradient(arguments):
            return jax.grad(loss, (0, 1))(*arguments)

        arguments = params, start
        along = jax.tree.map(lambda x: jnp.cos(7.0 * x), arguments)
        forward = jax.jvp(run, arguments, along)
        product = jax.jvp(gradient, (arguments,), (along,))  # as of a Fisher matrix
        return forward, product

    with built_for(platform):
        found = jax.jit(lambda: everything(ours))()
        sides = jax.jit(jax.vmap(lambda c: ours(params, c)))(jnp.stack([start, -start]))
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.jit(lambda: everything(flaxs))()), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-9, 1e-12)
    for i, sign in enumerate((1, -1)):
        alone = flaxs(params, sign * start)
        for a, b in zip(sides, alone, strict=True):
            np.testing.assert_allclose(a[i], b, 1e-9, 1e-12)
