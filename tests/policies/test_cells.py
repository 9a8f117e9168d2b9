"""Long short-term memory against flax's cell, the minimal unit against a loop, step by step with resets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Box, Discrete
from jaxpg.policies import lstm, mingru

STEPS, LANES = 11, 3
BOUND = np.ones(2, np.float32)


def sequence(build, layer_norm=False):
    network = build(Box(-BOUND, BOUND), Discrete(3), (5,), features=4, layer_norm=layer_norm)
    keys = jax.random.split(jax.random.key(0), 4)
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(keys[0], x.shape), network.init(keys[1])
    )
    obs = jax.random.normal(keys[2], (STEPS, LANES, 2))
    first = jax.random.uniform(keys[3], (STEPS, LANES)) < 0.2
    assert 2 < first.sum() < 12 and not first[0].all()
    start = jax.tree.map(lambda x: x + 0.7, network.initial_carry(LANES))
    return network, params, start, obs, first


def layers_of(params):
    (layer,) = jax.tree.leaves(params["body"], is_leaf=lambda x: "kernel" in x)
    dense = params["head"]["dense"]["params"]

    def within(obs):
        return jnp.tanh(obs @ layer["kernel"] + layer["bias"][None])

    return within, lambda h: h @ dense["kernel"] + dense["bias"][None]


def flaxs(params, carry, obs, first):
    within, output = layers_of(params)
    cell, logits = nn.LSTMCell(4, param_dtype=jnp.float64), []
    for t in range(STEPS):
        carry = jax.tree.map(lambda x, t=t: jnp.where(first[t][:, None], 0.0, x), carry)
        carry, out = cell.apply(params["cell"], carry, within(obs[t]))
        logits.append(output(out))
    return carry, jnp.stack(logits)


def loop(params, carry, obs, first):
    within, output = layers_of(params)
    z, n = (params["cell"][name]["params"] for name in "zn")
    logits = []
    for t in range(STEPS):
        x, carry = within(obs[t]), jnp.where(first[t][:, None], 0.0, carry)
        gate = 1 / (1 + jnp.exp(-(x @ z["kernel"] + z["bias"][None])))
        carry = (1 - gate) * carry + gate * (x @ n["kernel"] + n["bias"][None])
        logits.append(output(carry))
    return carry, jnp.stack(logits)


@pytest.mark.parametrize(("build", "reference"), [(lstm, flaxs), (mingru, loop)])
def test_it_is_its_cell_and_so_is_the_gradient(build, reference, x64):
    network, params, start, obs, first = sequence(build)

    def ours(params, carry):
        carry, found = network.apply(params, carry, obs, first)
        return carry, found.logits

    def everything(run):
        def loss(params, carry):
            carry, logits = run(params, carry)
            ends = sum((x**2).sum() for x in jax.tree.leaves(carry))
            return (jnp.sin(logits) * jnp.arange(3.0)[None, None]).sum() + ends

        return run(params, start), jax.grad(loss, (0, 1))(params, start)

    found = jax.jit(lambda: everything(ours))()
    expected = jax.jit(lambda: everything(lambda *x: reference(*x, obs, first)))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-9, 1e-12)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("build", [lstm, mingru])
def test_log_probs_at_the_update_are_those_of_the_rollout(build, layer_norm, x64):
    """A rollout calls the network once per step, an update once for all steps."""
    network, params, start, obs, first = sequence(build, layer_norm)
    critic = build(Box(-BOUND, BOUND), None, (5,), features=4, layer_norm=layer_norm)
    critic_params = critic.init(jax.random.key(3))
    for each, own in ((network, params), (critic, critic_params)):

        def output(carry, obs, first, each=each, own=own):
            carry, found = each.apply(own, carry, obs, first)
            return carry, getattr(found, "logits", found)

        _, whole = jax.jit(output)(start, obs, first)
        step, carry, rows = jax.jit(output), start, []
        for t in range(STEPS):
            carry, row = step(carry, obs[t : t + 1], first[t : t + 1])
            rows.append(row[0])
        np.testing.assert_allclose(whole, np.stack(rows), 1e-10, 1e-12)
        leaking = output(start, obs, jnp.zeros_like(first))[1]
        assert np.abs(leaking - whole).max() > 1e-3, "control: without resets"


def test_the_minimal_unit_starts_with_memories_of_2_to_100_steps():
    network = mingru(Box(-BOUND, BOUND), None, ())
    bias = network.init(jax.random.key(0))["cell"]["z"]["params"]["bias"]
    steps = 1 + np.exp(-np.asarray(bias, float))  # 1 / sigmoid
    np.testing.assert_allclose([steps.min(), steps.max()], [2, 100], 1e-4)
