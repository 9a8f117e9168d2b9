"""Layers of networks, each a pair of functions.

>>> action = jaxpg.envs.Discrete(2)
>>> body, output = body_of((8,), "relu", "highest", layer_norm=True), output_of(action, "highest", {})
>>> params = body.init(jnp.ones((1, 3)))
>>> features = body.apply(params, jnp.ones((5, 3)))
>>> output.apply(output.init(features), features).mode().shape, isinstance(body, Layers)
((5,), True)
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.envs import Space
from jaxpg.policies.heads import Settings, head
from jaxpg.types import Array, Params

# Numbers in an activation that is large: it is then kept once. On a TPU that doubled a minibatch's cycles.
LARGE = {"gpu": 2**22}

# Of matrix products: factors of float32 in one, three or six products of bfloat16 on a TPU; on a GPU rounded
# to 10 bits, or in full.
PRECISIONS = {x.name.lower(): x for x in jax.lax.Precision}

# Of a run that names none; elsewhere "highest". Three products bias a gradient by 2e-4 of the standard error
# of 4096 episodes at most, and PPO on 4096x128 CartPoles takes a v5e 24.3 Mcycles instead of 37.8. A GPU's 10
# bits bias it by up to 0.03 (`jaxpg lab precision`).
PRECISION = {"tpu": "high"}

# Precisions at which all gradients of a TPU's layers are products of matrices. Sums over samples and products
# with one column cost more: PPO on 4096x128 CartPoles takes a v5e 16.6 Mcycles instead of 19.9. At "high"
# that is 22.1 instead of 22.5, but 4.8 instead of 4.6 for 8 agents of 16x64.
BY_PRODUCTS = ("default",)

KERNEL = 3  # entries in each direction that a convolution combines

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu, "gelu": nn.gelu}


class Layers(NamedTuple):
    """A linen module as the pair of functions that the builders compose."""

    init: Callable[[Array], Params]  # takes an input; matrices are filled with their gains
    apply: Callable[[Params, Array], Any]


def precision_of(asked: str | None) -> str:
    """The precision that is asked for, or the one for what programs are built for."""
    return asked or PRECISION.get(backend(), "highest")


def dense(width: int, scale: float, precision: str) -> nn.Dense:
    """A layer whose matrix is filled with its gain, and its bias with 0."""
    product = _product if backend() == "cpu" else None
    gain = nn.initializers.constant(scale)
    by_products = backend() == "tpu" and precision in BY_PRODUCTS
    return (_ByProducts if by_products else nn.Dense)(
        width,
        kernel_init=gain,
        precision=precision,
        dot_general=product,
        param_dtype=jnp.result_type(float),
    )


def _product(x, kernel, dimensions, precision=None, preferred_element_type=None):
    """x @ kernel, as a product with the transposed kernel's rows: its gradient is one with x's rows too.

    XLA's fast products on CPUs need a first factor that is contracted over its last axis. Without the
    barrier XLA swaps the factors of the gradient, which then took 2.5 times as long.
    """
    del dimensions
    rows = jax.lax.optimization_barrier(kernel.T)
    return jax.lax.dot_general(
        x,
        rows,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


class _ByProducts(nn.Dense):
    """A layer whose gradients are products of matrices, also the bias's."""

    @nn.compact
    def __call__(self, inputs):
        shape, dtype = (inputs.shape[-1], self.features), self.param_dtype
        kernel = self.param("kernel", self.kernel_init, shape, dtype)
        bias = self.param("bias", self.bias_init, shape[1:], dtype)
        return _affine(self.precision, inputs, kernel, bias)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _affine(precision: Any, x: Array, kernel: Array, bias: Array) -> Array:
    out = jnp.dot(x, kernel, precision=precision)
    return out + jnp.broadcast_to(bias, out.shape)


@_affine.defjvp
def _affine_jvp(precision, primals, tangents):
    (x, kernel, bias), (d_x, d_kernel, d_bias) = primals, tangents
    # XLA makes sums of products with one column, or with ones that it sees.
    wide = jnp.pad(d_kernel, ((0, 0), (0, max(2 - len(bias), 0))))
    moved = jnp.dot(x, wide, precision=precision)[..., : len(bias)]
    moved += jnp.dot(d_x, kernel, precision=precision)
    ones = jax.lax.optimization_barrier(jnp.ones((*x.shape[:-1], 8), x.dtype))
    rows = jnp.pad(d_bias[None], ((0, 7), (0, 0)))
    return _affine(precision, *primals), moved + jnp.dot(ones, rows, precision="high")


def pure(module: nn.Module) -> Layers:
    """A module's functions."""
    return Layers(partial(gains_of, module), cast(Callable[[Params, Array], Any], module.apply))


def gains_of(module: nn.Module, *inputs: Any) -> Params:
    """The parameters of a module, before `orthogonal`."""
    # The initialisers are constants, so the key is not used.
    return module.init(jax.random.key(0), *inputs)


def body_of(
    hidden: Sequence[int],
    activation: str,
    precision: str,
    layer_norm: bool = False,
    channels: Sequence[int] = (),
    stride: int = 1,
) -> Layers:
    """3 x 3 convolutions of images [..., H, W, C], if there are channels, then dense layers.

    Each has an activation, and before it a normalisation over its outputs if layer_norm (Ba et al., 2016).
    Raises ValueError for an unknown activation or precision.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")

    def layer(width):
        # sqrt(2): the customary gain of hidden layers in policy-gradient code (Huang et al., 2022).
        made: list[Callable] = [dense(width, 2**0.5, precision)]
        if layer_norm:
            # The fast variance is a difference of large numbers.
            made.append(nn.LayerNorm(use_fast_variance=False, param_dtype=jnp.result_type(float)))
        return [*made, partial(_activated, ACTIVATIONS[activation])]

    layers: list[Callable] = []
    for width in channels:
        layers += [partial(_patches, stride), *layer(width)]
    if channels:
        layers.append(lambda x: x.reshape(*x.shape[:-3], -1))
    for width in hidden:
        layers += layer(width)
    if not layers:
        return Layers(lambda x: {}, lambda params, x: x)
    return pure(nn.Sequential(layers))


def _patches(stride, x):
    """The 3 x 3 neighbourhoods [..., H', W', 9 C] of images [..., H, W, C].

    A convolution is then a matrix product: mapped over agents, XLA would make it one of groups of channels,
    for which CPUs have no fast code.
    """
    height, width = ((size - KERNEL) // stride + 1 for size in x.shape[-3:-1])
    found = [
        x[..., i : i + stride * height : stride, j : j + stride * width : stride, :]
        for i in range(KERNEL)
        for j in range(KERNEL)
    ]
    return jnp.concatenate(found, -1)


def _activated(function, x):
    out = function(x)
    # XLA would put the function into the next product, and keep both its input and output for the gradient.
    large = x.size >= LARGE.get(backend(), math.inf)
    return jax.lax.optimization_barrier(out) if large else out


def output_of(action: Space | None, precision: str, policy: Settings) -> Layers:
    """The last layer: to the distribution over an action space, or to one value."""
    if action is None:
        scalar = pure(dense(1, 1.0, precision))
        return Layers(scalar.init, lambda params, x: jnp.squeeze(scalar.apply(params, x), -1))
    found = head(action, **policy)
    # A small last layer starts near the uniform policy (Andrychowicz et al., 2021).
    module = pure(dense(found.num_outputs, 0.01, precision))
    return Layers(
        lambda x: {"dense": module.init(x), **found.params},
        lambda params, x: found.distribution(module.apply(params["dense"], x), params),
    )
