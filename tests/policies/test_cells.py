"""Long short-term memory against flax's cell, the minimal unit against a loop, step by step with resets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Box, Discrete
from jaxpg.policies import lstm, mingru, transformer
from jaxpg.policies.cells import HEADS, WINDOW

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


@pytest.mark.slow
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


@pytest.mark.slow
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


def attended(params, obs, first):
    """Logits of the block of attention [T, B, A], one query after the other."""
    within, output = layers_of(params)
    cell, x = params["cell"], np.stack([within(row) for row in obs])

    def layer(name, x):
        own = cell[name]["params"]
        return x @ np.asarray(own["kernel"]) + np.asarray(own["bias"])

    skip, queries, keys, values = (layer(name, x) for name in ("x", "q", "k", "v"))
    mixed = np.zeros_like(skip)
    size = skip.shape[-1] // HEADS
    for b in range(x.shape[1]):
        start = 0
        for t in range(len(x)):
            start = t if first[t, b] else start
            places = range(max(start, t - WINDOW), t + 1)
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                scores = np.array([
                    queries[t, b, part] @ keys[s, b, part] / size**0.5 + cell["ages"][head, t - s]
                    for s in places
                ])  # fmt: skip
                share = np.exp(scores - scores.max())
                found = sum(w * values[s, b, part] for w, s in zip(share, places, strict=True))
                mixed[t, b, part] = found / share.sum()
    h = skip + layer("o", mixed)
    h = h + layer("down", np.maximum(layer("up", h), 0))
    return np.stack([output(row) for row in h])


@pytest.mark.slow
def test_attention_looks_back_within_the_episode_and_its_window(x64):
    network = transformer(Box(-BOUND, BOUND), Discrete(3), (5,), features=8)
    keys, steps = jax.random.split(jax.random.key(0), 4), WINDOW + 13
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(keys[0], x.shape), network.init(keys[1])
    )
    obs = jax.random.normal(keys[2], (steps, 2, 2))
    first = jax.random.uniform(keys[3], (steps, 2)) < jnp.array([[0.0, 0.1]])
    first = first.at[0].set(True)
    assert first[:, 0].sum() == 1 and first[:, 1].sum() > 3

    def run(carry, obs, first):
        carry, found = network.apply(params, carry, obs, first)
        return carry, found.logits

    start = network.initial_carry(2)
    end, whole = jax.jit(run)(start, obs, first)
    np.testing.assert_allclose(whole, attended(params, obs, np.asarray(first)), 1e-9, 1e-11)
    # A rollout's steps, and an update's pieces, give the same log-probs and the same cache.
    step, carry, rows = jax.jit(run), start, []
    for t in range(steps):
        carry, row = step(carry, obs[t : t + 1], first[t : t + 1])
        rows.append(row[0])
    np.testing.assert_allclose(whole, np.stack(rows), 1e-9, 1e-11)
    for a, b in zip(carry, end, strict=True):
        np.testing.assert_allclose(a, b, 1e-9, 1e-11)
    with pytest.raises(ValueError, match="features=6 is not a multiple of the 4 heads"):
        transformer(Box(-BOUND, BOUND), None, (5,), features=6)
