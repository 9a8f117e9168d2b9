"""Emulated products against NumPy's, and the numbers of the study of precision against float64 loops."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from listing import listing, moments

from jaxpg.envs import Box, Discrete
from jaxpg.lab.measure.emulation import ROUNDINGS, emulated, rounded
from jaxpg.lab.studies import precision
from jaxpg.lab.worlds.world import world
from jaxpg.policies import gru, mlp

RNG = np.random.default_rng(0)
LEFT, RIGHT, SLOPE = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((5, 64), (64, 3), (5, 3))
)
T = world("T")


def shorter(x, name):
    """x rounded to bfloat16 by ml_dtypes, or to ten bits of mantissa: both to nearest."""
    if name == "tf32":
        fraction, exponent = np.frexp(np.asarray(x, np.float64))
        return np.ldexp(np.round(fraction * 2**11) / 2**11, exponent)
    return np.float64(np.float32(x).astype(ml_dtypes.bfloat16))


def product(name, left, right):
    """The product of the rounded factors in float64, without the terms that the chip leaves out."""
    count = {"bf16x3": 2, "bf16x6": 3}.get(name, 1)
    if name == "float32":
        return np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    parts = []
    for rest in (np.asarray(left, np.float64), np.asarray(right, np.float64)):
        found = []
        for _ in range(count):
            found.append(shorter(rest, name))
            rest = rest - found[-1]
        parts.append(found)
    pairs = [(i, j) for i in range(count) for j in range(count - i)]
    return sum(parts[0][i] @ parts[1][j] for i, j in pairs)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_products_round_their_factors_forwards_and_backwards(name):
    close = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-5)
    found, back = jax.vjp(partial(rounded, ROUNDINGS[name]), LEFT, RIGHT)
    close(found, product(name, LEFT, RIGHT))
    left, right = back(jnp.asarray(SLOPE))
    close(left, product(name, SLOPE, RIGHT.T))
    close(right, product(name, LEFT.T, SLOPE))
    # Along a direction every product rounds too; by the product rule it has two terms.
    turn = RNG.normal(size=LEFT.shape).astype(np.float32)

    def gradient(left):
        return jax.vjp(partial(rounded, ROUNDINGS[name]), left, RIGHT)[1](jnp.asarray(SLOPE))[1]

    close(jax.jvp(gradient, (LEFT,), (turn,))[1], product(name, turn.T, SLOPE))
    if name in ("tf32", "bf16"):
        # The control: derivatives that do not round are further away than this test allows.
        for plain, mine in ((SLOPE @ RIGHT.T, left), (LEFT.T @ SLOPE, right)):
            assert np.abs(plain - mine).max() > 1e-3


def test_float32_is_no_rounding():
    plain = jnp.matmul(LEFT, RIGHT, precision="highest")
    np.testing.assert_array_equal(rounded(ROUNDINGS["float32"], LEFT, RIGHT), plain)


def test_recurrent_networks_are_refused():
    ends = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="recurrent network cannot be rounded here; use mlp"):
        emulated(gru(Box(-ends, ends), None), ROUNDINGS["bf16"])


def by_hand(name, params, state, action, weight):
    """The gradient of weight log pi(action|state) of an mlp over one-hot states, layer by layer."""
    layers = [params["body"]["params"][k] for k in sorted(params["body"]["params"])]
    layers.append(params["head"]["dense"]["params"])
    x, inputs = np.eye(3)[[state]], []
    for i, layer in enumerate(layers):
        inputs.append(x)
        x = product(name, x, layer["kernel"]) + np.float64(layer["bias"])
        x = np.float32(np.tanh(x)) if i + 1 < len(layers) else x  # kept as the network keeps it
    policy = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    slope, found = weight * (np.eye(2)[[action]] - policy), []
    for x, layer in reversed(list(zip(inputs, layers, strict=True))):
        kernel = product(name, x.T, slope)
        found.append({"bias": slope[0], "kernel": kernel})
        slope = product(name, slope, np.transpose(layer["kernel"])) * (1 - x**2)
    found = found[::-1]
    names = sorted(params["body"]["params"])
    body = dict(zip(names, found[:-1], strict=True))
    tree = {"body": {"params": body}, "head": {"dense": {"params": found[-1]}}}
    return np.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)]), policy[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "tf32", "bf16"])
def test_the_mean_and_trace_of_rounded_gradients(name):
    """Every trajectory's gradient, written out in NumPy; the policy that acts rounds as well.

    Two roundings are left out: their last parts are as small as the error of a tanh in float32.
    """
    network = mlp(T.env.observation, Discrete(2), (4, 4))
    seen = precision._observations(T)
    params = precision.sharpened(network, network.init(jax.random.key(1)), seen, 3.0)
    mine = emulated(network, ROUNDINGS[name])
    logits = np.asarray(precision._logits(mine, params, seen), np.float64)
    laws = {"own": precision._law(T.mdp, logits)}
    mean, trace = precision.gradient_moments(T, mine, params, laws)["own"]

    each = listing(T.mdp, logits, 1.0)
    known = {}  # of each distinct step
    rows = 0.0
    for t in range(len(each.s)):
        steps = zip(each.s[t], each.a[t], each.to_go[t] * each.alive[t], strict=True)
        found = []
        for step in steps:
            if step not in known:
                known[step], policy = by_hand(name, params, *step)
                np.testing.assert_allclose(policy, each.pi[step[0]], atol=3e-6)
            found.append(known[step])
        rows = rows + np.stack(found)
    true, covariance = moments(each, rows)
    size = np.abs(true).max()
    np.testing.assert_allclose(mean, true, atol=1e-5 * size)
    assert abs(trace / np.trace(covariance) - 1) < 1e-5
    # The control: without the rounding, the mean is further away.
    plain = precision.gradient_moments(T, network, params, laws)["own"][0]
    if name != "float32":
        assert np.abs(plain - true).max() > 1e-4 * size


def test_float64_has_no_bias():
    """The estimator that training uses, through a network, has the exact gradient as its mean."""
    network = mlp(T.env.observation, Discrete(2), (4,))
    seen = precision._observations(T)
    params = precision.sharpened(network, network.init(jax.random.key(1)), seen, 3.0)
    with precision.wide():
        known = precision.widened(params)
        true = precision._gradient(T, network, known)
        laws = {"own": precision._law(T.mdp, precision._logits(network, known, seen))}
        mean, _ = precision.gradient_moments(T, network, known, laws)["own"]
    np.testing.assert_allclose(mean, true, atol=1e-12)


def test_ratios_at_equal_parameters():
    """Few states, so that the rarest step is the largest deviation; its share beyond clip_eps by a sum."""
    ends = np.full(2, np.inf, np.float32)
    network = mlp(Box(-ends, ends), Discrete(2), (8,))
    states = jnp.asarray(RNG.normal(size=(1, 50, 2)), jnp.float32)
    params = precision.sharpened(network, network.init(jax.random.key(0)), states, 40.0)
    rows = precision.ratio_rows(precision.roundings_of(network), params, states, 0.01)
    found = {(r["rounding"], r["quantity"]): r["exact"] for r in rows}
    table = [
        np.float64(jax.nn.log_softmax(precision._logits(each, params, states)))
        for each in (emulated(network, ROUNDINGS[name]) for name in ("bf16", "float32"))
    ]
    far, weight = np.abs(np.exp(table[1] - table[0]) - 1), np.exp(table[0]) / 50
    share = weight[far > 0.01].sum()
    assert 0 < share < 1
    assert abs(found["bf16", "share clipped, float32 updates"] - share) < 1e-6
    most = found["bf16", precision.RATIO]
    assert weight[far > most * (1 + 1e-5)].sum() <= precision.RARE
    assert weight[far >= most * (1 - 1e-5)].sum() > precision.RARE
    assert found["float32", precision.RATIO] == 0.0


@pytest.mark.slow
def test_the_natural_gradient_and_the_kl_of_its_steps():
    """The dense Fisher matrix sum_s sum_a pi u u^T in NumPy, of a policy without a hidden layer."""
    ends, damping = np.full(2, np.inf, np.float32), 0.1
    network = mlp(Box(-ends, ends), Discrete(2), ())
    states = jnp.asarray(RNG.normal(size=(1, 40, 2)), jnp.float32)
    params = precision.sharpened(network, network.init(jax.random.key(0)), states, 2.0)
    with precision.wide():
        known, seen = precision.widened(params), precision.widened(states)
        found = np.asarray(precision._natural(network, known, seen, damping))
        policy = np.asarray(jax.nn.softmax(precision._logits(network, known, seen)))
    x = np.asarray(states, np.float64)[0]
    # In the order of the leaves: biases [2], kernel [2, 2].
    features = np.concatenate([np.ones((40, 1)), x], axis=1)
    scores = np.einsum("nf,nab->nafb", features, np.eye(2) - policy[:, None]).reshape(40, 2, 6)
    fisher = np.einsum("na,nap,naq->pq", policy, scores, scores) / 40
    gradient = np.einsum("na,na,nap->p", policy, x, scores) / 40
    np.testing.assert_allclose(
        found, np.linalg.solve(fisher + damping * np.eye(6), gradient), rtol=1e-6, atol=1e-9
    )
    rounded = precision.roundings_of(network)
    rows = precision.natural_rows(network, rounded, params, states, damping)
    error = {(r["rounding"], r["quantity"], r.get("kl")): r["exact"] for r in rows}
    assert error["float32", precision.KL, 1e-2] < 1e-4 < error["bf16", precision.KL, 1e-4]
    assert error["float32", precision.TURN, None] < 1e-6
