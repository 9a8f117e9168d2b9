"""Emulation: networks whose matrix products round as an accelerator's do, on any device.

>>> third, half = jnp.full((2, 2), 1 / 3), jnp.full((2, 2), 1.5)
>>> for name, rounding in ROUNDINGS.items():
...     error = jnp.abs(rounded(rounding, third, half) - 1).max()
...     print(f"{name}: products {rounding.passes}, error {error:.0e}")
float32: products 1, error 0e+00
tf32: products 1, error 2e-04
bf16: products 1, error 2e-03
bf16x3: products 3, error 4e-06
bf16x6: products 6, error 0e+00
>>> seen = jaxpg.envs.Box(-np.ones(3), np.ones(3))
>>> critic = jaxpg.policies.mlp(seen, None, (8,))
>>> given = critic.init(jax.random.key(0)), (), jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool)
>>> value, other = (each.apply(*given)[1] for each in (critic, emulated(critic, ROUNDINGS["bf16"])))
>>> bool((1e-5 < jnp.abs(value - other)).all() & (jnp.abs(value - other) < 1e-2).all())
True
>>> emulated(jaxpg.policies.gru(seen, None), ROUNDINGS["bf16"])
Traceback (most recent call last):
ValueError: the products of a recurrent network cannot be rounded here; use mlp or linear
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpg.policies import Network
from jaxpg.types import Array


class Rounding(NamedTuple):
    """How a chip multiplies float32 matrices: as a sum of products of shorter parts, each of them exact."""

    mantissa_bits: int  # that a part keeps, rounded to nearest, ties to even
    parts: int = 1  # of each factor, the next one being what the last has left over
    from_last: bool = False  # sum from the last term on, as a program of another shape may

    @property
    def passes(self) -> int:
        """The number of products of parts i and j with i + j < parts: the others are too small to count."""
        return self.parts * (self.parts + 1) // 2


# On a GPU `default` and `high` are tf32, and `highest` is float32; on a TPU they are bf16, bf16x3 and bf16x6.
ROUNDINGS = {
    "float32": Rounding(23),
    "tf32": Rounding(10),
    "bf16": Rounding(7),
    "bf16x3": Rounding(7, 2),
    "bf16x6": Rounding(7, 3),
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded(rounding: Rounding, left: Array, right: Array) -> Array:
    """left [M, K] @ right [K, N], summed in the arrays' own type; its gradient's products round too."""
    return _product(rounding, left, right)


def _product(rounding, left, right):
    if rounding.from_last:
        left, right = left[:, ::-1], right[::-1]
    lefts, rights = _split(rounding, left), _split(rounding, right)
    # Smallest first, as compilers do. One product of all parts side by side compiles faster than a sum.
    pairs = [(i, order - i) for order in reversed(range(rounding.parts)) for i in range(order + 1)]
    joined = jnp.concatenate([lefts[i] for i, _ in pairs], axis=1)
    return jnp.matmul(joined, jnp.concatenate([rights[j] for _, j in pairs]), precision="highest")


def _split(rounding, x):
    parts = []
    for _ in range(rounding.parts):
        # Not a conversion to bfloat16 and back, which compilers may drop.
        parts.append(jax.lax.reduce_precision(x, 8, rounding.mantissa_bits))
        x = x - parts[-1]
    return parts


# Fisher products differentiate the gradient along a direction. `rounded` has no such derivative; `_product`
# has one, and it rounds the direction, because reduce_precision's does: as on the chip.
rounded.defvjp(
    lambda rounding, left, right: (_product(rounding, left, right), (left, right)),
    lambda rounding, factors, slope: (
        _product(rounding, slope, factors[1].T),
        _product(rounding, factors[0].T, slope),
    ),
)


def emulated(network: Network, rounding: Rounding) -> Network:
    """The network with the products of its dense layers (flax.linen) rounded, forwards and backwards.

    Raises ValueError for a recurrent network, whose recursion has products of its own.
    """
    if jax.tree.leaves(network.initial_carry(1)):
        raise ValueError(
            "the products of a recurrent network cannot be rounded here; use mlp or linear"
        )

    def call(following, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Dense):
            return following(*args, **kwargs)
        weights, (x,) = layer.variables["params"], args
        out = jnp.asarray(rounded(rounding, x.reshape(-1, x.shape[-1]), weights["kernel"]))
        out = out.reshape(*x.shape[:-1], -1)
        return out + jnp.broadcast_to(weights["bias"], out.shape) if layer.use_bias else out

    def apply(params, carry, obs, first):
        with nn.intercept_methods(call):
            return network.apply(params, carry, obs, first)

    return network._replace(apply=apply)
