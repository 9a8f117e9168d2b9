"""Recurrent cells, run over sequences [T, B, ...] whose carry restarts before an episode's first row.

>>> cell = minimal(4, "highest")
>>> encoded, first = jnp.ones((5, 2, 3)), jnp.zeros((5, 2), bool)
>>> carry, out = cell.apply(cell.init(encoded), cell.initial_carry(2), encoded, first)
>>> out.shape, carry.shape, isinstance(long_short_term(4, "highest"), Cell)
((5, 2, 4), (2, 4), True)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.devices import backend
from jaxpg.policies.layers import dense, gains_of, pure
from jaxpg.policies.recurrence import UNROLL, product, recur
from jaxpg.types import Array, Carry, Params


class Cell(NamedTuple):
    init: Callable[[Array], Params]  # takes inputs [T, B, N]; matrices are filled with their gains
    initial_carry: Callable[[int], Carry]  # of B lanes
    # Inputs [T, B, N] and first [T, B] to outputs [T, B, H].
    apply: Callable[[Params, Carry, Array, Array], tuple[Carry, Array]]


def gated(features: int, precision: str) -> Cell:
    """The gated recurrent unit (Cho et al., 2014) of `recurrence.recur`, with flax's parameters."""

    def initial_carry(num_lanes):
        return jnp.zeros((num_lanes, features))

    def apply(params, carry, encoded, first):
        rows, biases = _rows(params)
        shape = (*first.shape, features)
        inputs = [
            product(encoded, rows[gate], precision) + jnp.broadcast_to(biases[gate], shape)
            for gate in ("ir", "iz", "in")
        ]
        within = rows["hr"], rows["hz"], rows["hn"]
        out = recur(precision, carry, tuple(inputs), first, within, biases["hn"])
        return out[-1], out

    cell = nn.GRUCell(features, **_ONES, param_dtype=jnp.result_type(float))
    return Cell(lambda x: gains_of(cell, initial_carry(1), x[0]), initial_carry, apply)


def long_short_term(features: int, precision: str) -> Cell:
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), with flax's parameters.

    c = f c + i g,  h = o tanh(c);  i, f and o are sigmoids and g the tanh of W x + U h + b.
    """
    gates = "ifgo"

    def initial_carry(num_lanes):
        return jnp.zeros((num_lanes, features)), jnp.zeros((num_lanes, features))

    def apply(params, carry, encoded, first):
        rows, biases = _rows(params)
        joined, within = (jnp.concatenate([rows[x + gate] for gate in gates]) for x in "ih")
        bias = jnp.concatenate([biases[f"h{gate}"] for gate in gates])
        inputs = product(encoded, joined, precision)
        inputs += jnp.broadcast_to(bias, inputs.shape)

        def step(carry, now):
            inputs, first = now
            c, h = (jnp.where(first[:, None], 0.0, x) for x in carry)
            i, f, g, o = jnp.split(inputs + product(h, within, precision), 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        return jax.lax.scan(step, carry, (inputs, first), unroll=UNROLL.get(backend(), 1))

    cell = nn.LSTMCell(features, **_ONES, param_dtype=jnp.result_type(float))
    return Cell(lambda x: gains_of(cell, initial_carry(1), x[0]), initial_carry, apply)


def minimal(features: int, precision: str) -> Cell:
    """The minimal gated recurrent unit, linear in its state (Feng et al., 2024), for all steps at once.

    h_t = (1 - z_t) h_{t-1} + z_t n_t, where z is the sigmoid of W x + b, and n = U x + d. At first it
    remembers for 2 to 100 steps, by the biases b (Tallec and Ollivier, 2018).
    """
    layer = pure(dense(features, 1.0, precision))
    bias = -np.log(np.geomspace(2, 100, features) - 1)

    def initial_carry(num_lanes):
        return jnp.zeros((num_lanes, features))

    def init(encoded):
        z: Any = layer.init(encoded)
        z["params"]["bias"] += bias
        return {"z": z, "n": layer.init(encoded)}

    def apply(params, carry, encoded, first):
        z, n = (layer.apply(params[name], encoded) for name in "zn")
        z = jax.nn.sigmoid(z)
        keep, new = jnp.where(first[..., None], 0.0, 1 - z), z * n
        new = jnp.concatenate([new[:1] + keep[:1] * carry[None], new[1:]])
        out = jax.lax.associative_scan(_after, (keep, new))[1]
        return out[-1], out

    return Cell(init, initial_carry, apply)


# Steps that attention looks back, and its heads.
WINDOW, HEADS = 32, 4


class Cache(NamedTuple):
    """The keys and values of the last steps, oldest first, and how many of the episode's came before."""

    keys: Array  # [B, WINDOW, H]
    values: Array
    since: Array  # [B] steps since the episode's first, -1 before any


def attention(features: int, precision: str) -> Cell:
    """A block of a causal transformer (Vaswani et al., 2017) over the last steps of the episode.

    h = x + O softmax(q k / sqrt(d) + b[age]) v, then h + D relu(U h), with a bias b for each head and age
    (Raffel et al., 2020) instead of positions. The carry is its cache of keys and values. Raises ValueError
    unless the heads divide `features`.
    """
    if features % HEADS:
        raise ValueError(f"features={features} is not a multiple of the {HEADS} heads of attention")
    layer = pure(dense(features, 1.0, precision))

    def initial_carry(num_lanes):
        zeros = jnp.zeros((num_lanes, WINDOW, features))
        return Cache(zeros, zeros, jnp.full(num_lanes, -1, jnp.result_type(int)))

    def init(encoded):
        inner = jnp.zeros((1, 1, features))
        params = {name: layer.init(encoded) for name in ("x", "q", "k", "v")}
        params |= {name: layer.init(inner) for name in ("o", "up", "down")}
        return params | {"ages": jnp.zeros((HEADS, WINDOW + 1))}

    def apply(params, carry, encoded, first):
        x, q, k, v = (layer.apply(params[name], encoded) for name in ("x", "q", "k", "v"))
        steps, lanes = first.shape
        row = jnp.arange(steps)[:, None]
        start = jnp.where(first, row, -(carry.since + 1)[None])
        since = row - jax.lax.cummax(start, axis=0)  # [T, B]
        keys, values = (
            jnp.concatenate([old, jnp.moveaxis(new, 1, 0)], axis=1)
            for old, new in zip(carry[:2], (k, v), strict=True)
        )
        age = WINDOW + row - jnp.arange(WINDOW + steps)[None]  # [T, WINDOW + T]
        seen = (age >= 0) & (age <= WINDOW)
        seen = seen[:, None] & (age[:, None] <= since[..., None])  # [T, B, WINDOW + T]
        split = (HEADS, features // HEADS)
        scores = jnp.einsum(
            "tbhd,bshd->bhts",
            q.reshape(steps, lanes, *split),
            keys.reshape(lanes, -1, *split),
            precision=precision,
        )
        bias = params["ages"][:, jnp.clip(age, 0, WINDOW)][None]
        scores = scores / split[1] ** 0.5 + jnp.broadcast_to(bias, scores.shape)
        seen = jnp.broadcast_to(jnp.moveaxis(seen, 1, 0)[:, None], scores.shape)
        share = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        found = jnp.einsum(
            "bhts,bshd->tbhd", share, values.reshape(lanes, -1, *split), precision=precision
        )
        h = x + layer.apply(params["o"], found.reshape(steps, lanes, features))
        h = h + layer.apply(params["down"], jax.nn.relu(layer.apply(params["up"], h)))
        return Cache(keys[:, steps:], values[:, steps:], since[-1]), h

    return Cell(init, initial_carry, apply)


def _after(one, other):
    """The map h -> keep h + new of one, and then of the other."""
    return one[0] * other[0], one[1] * other[0] + other[1]


def _rows(params: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """The transposed matrices and the biases of a flax cell's gates."""
    cell = params["params"]
    # Without the barriers the gradients' products would be slow on a CPU, as in `layers`.
    rows = {gate: jax.lax.optimization_barrier(x["kernel"].T) for gate, x in cell.items()}
    return rows, {gate: x["bias"] for gate, x in cell.items() if "bias" in x}


_ONES: dict[str, Any] = {
    "kernel_init": nn.initializers.ones,
    "recurrent_kernel_init": nn.initializers.ones,
}
