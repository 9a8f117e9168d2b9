"""Networks: pure (init, initial_carry, apply) triples, feed-forward and recurrent alike.

Every builder takes the observation space and the kind of output: an action space gives a policy, whose
`apply` returns a distribution; None gives a critic, whose `apply` returns values [T, B].

>>> seen, taken = Box(-np.ones(3), np.ones(3)), Discrete(2)
>>> params = jax.eval_shape(mlp(seen, taken, (8,)).init, jax.random.key(0))
>>> sum(x.size for x in jax.tree.leaves(params))
50
>>> gru(seen, None, (), features=4).initial_carry(2).shape
(2, 4)
>>> tabular(Discrete(3), taken).init(None)["logits"].shape, isinstance(linear(seen, taken), Network)
((3, 2), True)
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.envs import Box, Discrete, Space, spaces
from jaxpg.policies.heads import Settings, head
from jaxpg.policies.initializers import orthogonal
from jaxpg.policies.recurrence import product, recur
from jaxpg.types import Array, Carry, Key, Params

# Numbers in an activation that is large: it is then kept once. On a TPU that doubled a minibatch's cycles.
LARGE = {"gpu": 2**22}

# Of matrix products: factors of float32 in one, three or six products of bfloat16 on a TPU; on a GPU rounded
# to 10 bits, or in full.
PRECISIONS = {x.name.lower(): x for x in jax.lax.Precision}

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu, "gelu": nn.gelu}


class Network(NamedTuple):
    """A network over sequences; a feed-forward one carries `()`."""

    init: Callable[[Key], Params]
    initial_carry: Callable[[int], Carry]  # of B lanes
    apply: Callable[
        [Params, Carry, Array, Array], tuple[Carry, Any]
    ]  # obs [T, B, ...], first [T, B]
    # The params after an update with obs [T, B, ...] and mask [T, B]; those the optimizer trains stay.
    observe: Callable[[Params, Array, Array], Params] | None = None


def tabular(observation: Space, action: Space | None, **policy: Unpack[Settings]) -> Network:
    """One row of logits (or one value) per observation, initially zero.

    Params: {"logits": [S, A]} or {"value": [S]}; flattened, they are state-major.
    Raises ValueError unless both spaces are Discrete.
    """
    if not isinstance(observation, Discrete) or not isinstance(action, Discrete | None):
        raise ValueError(
            f"tabular needs discrete observations and actions, got {_kind(observation)} and "
            f"{_kind(action)}; use linear or mlp"
        )
    _check(observation, action)
    num_obs = observation.n
    distribution = None if action is None else head(action, **policy).distribution

    def init(key):
        del key
        if action is None:
            return {"value": jnp.zeros(num_obs)}
        return {"logits": jnp.zeros((num_obs, action.n))}

    def apply(params, carry, obs, first):
        del first
        table = jnp.asarray(params["value" if action is None else "logits"])[obs]
        return carry, table if distribution is None else distribution(table, params)

    return Network(init, lambda num_lanes: (), apply)


def linear(
    observation: Space,
    action: Space | None,
    *,
    precision: str = "highest",
    **policy: Unpack[Settings],
) -> Network:
    """One affine layer on the flattened (or one-hot) observation."""
    return mlp(observation, action, (), precision=precision, **policy)


def mlp(
    observation: Space,
    action: Space | None,
    hidden: Sequence[int] = (64, 64),
    *,
    activation: str = "tanh",
    precision: str = "highest",
    **policy: Unpack[Settings],
) -> Network:
    """Dense layers with orthogonal weights; the last layer of a policy starts 100 times smaller.

    policy: the settings of its distribution, as of `heads.head`.
    precision: of matrix products; below "highest", GPUs and TPUs round to 10 or 7 mantissa bits.
    """
    _check(observation, action)
    body, output = _body(hidden, activation, precision), _output(action, precision, policy)
    encode = partial(spaces.encode, observation)

    def init(key):
        example = encode(example_observation(observation))
        gains = body.init(example)
        output_gains = output.init(body.apply(gains, example))
        return orthogonal(key, {"body": gains, "head": output_gains})

    def apply(params, carry, obs, first):
        del first
        return carry, output.apply(params["head"], body.apply(params["body"], encode(obs)))

    return Network(init, lambda num_lanes: (), apply)


def gru(
    observation: Space,
    action: Space | None,
    hidden: Sequence[int] = (64,),
    *,
    features: int = 64,
    activation: str = "tanh",
    precision: str = "highest",
    **policy: Unpack[Settings],
) -> Network:
    """Dense layers, then a gated recurrent unit whose carry restarts before an episode's first row."""
    _check(observation, action)
    body, output = _body(hidden, activation, precision), _output(action, precision, policy)
    encode = partial(spaces.encode, observation)
    cell = nn.GRUCell(
        features,
        kernel_init=nn.initializers.ones,
        recurrent_kernel_init=nn.initializers.ones,
        param_dtype=jnp.result_type(float),
    )

    def initial_carry(num_lanes):
        return jnp.zeros((num_lanes, features))

    def init(key):
        example = encode(example_observation(observation))
        body_gains = body.init(example)
        encoded = body.apply(body_gains, example)
        cell_gains = _gains(cell, initial_carry(1), encoded[0])
        # The cell's output is its carry.
        output_gains = output.init(initial_carry(1)[None])
        return orthogonal(key, {"body": body_gains, "cell": cell_gains, "head": output_gains})

    def apply(params, carry, obs, first):
        encoded, cell = body.apply(params["body"], encode(obs)), params["cell"]["params"]
        # Without the barriers the gradients' products would be slow on a CPU, as in `_product`.
        rows = {gate: jax.lax.optimization_barrier(x["kernel"].T) for gate, x in cell.items()}
        shape = (*first.shape, features)
        inputs = [
            product(encoded, rows[gate], precision) + jnp.broadcast_to(cell[gate]["bias"], shape)
            for gate in ("ir", "iz", "in")
        ]
        within = rows["hr"], rows["hz"], rows["hn"]
        out = recur(precision, carry, tuple(inputs), first, within, cell["hn"]["bias"])
        return out[-1], output.apply(params["head"], out)

    return Network(init, initial_carry, apply)


class _Apply(NamedTuple):
    """A linen module as the pair of functions that the builders compose."""

    init: Callable[[Array], Params]  # takes an input; matrices are filled with their gains
    apply: Callable[[Params, Array], Any]


def _dense(width: int, scale: float, precision: str) -> nn.Dense:
    product = _product if backend() == "cpu" else None
    gain = nn.initializers.constant(scale)
    return nn.Dense(
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


def _pure(module: nn.Module) -> _Apply:
    return _Apply(partial(_gains, module), cast(Callable[[Params, Array], Any], module.apply))


def _gains(module: nn.Module, *inputs: Array) -> Params:
    # The initialisers are constants, so the key is not used.
    return module.init(jax.random.key(0), *inputs)


def _body(hidden, activation, precision) -> _Apply:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    layers = []
    for width in hidden:
        # sqrt(2): the customary gain of hidden layers in policy-gradient code (Huang et al., 2022).
        layers.append(_dense(width, 2**0.5, precision))
        layers.append(partial(_activated, ACTIVATIONS[activation]))
    if not layers:
        return _Apply(lambda x: {}, lambda params, x: x)
    return _pure(nn.Sequential(layers))


def _activated(function, x):
    out = function(x)
    # XLA would put the function into the next product, and keep both its input and output for the gradient.
    large = x.size >= LARGE.get(backend(), math.inf)
    return jax.lax.optimization_barrier(out) if large else out


def _output(action: Space | None, precision, policy: Settings) -> _Apply:
    if action is None:
        scalar = _pure(_dense(1, 1.0, precision))
        return _Apply(scalar.init, lambda params, x: jnp.squeeze(scalar.apply(params, x), -1))
    found = head(action, **policy)
    # A small last layer starts near the uniform policy (Andrychowicz et al., 2021).
    module = _pure(_dense(found.num_outputs, 0.01, precision))
    return _Apply(
        lambda x: {"dense": module.init(x), **found.params},
        lambda params, x: found.distribution(module.apply(params["dense"], x), params),
    )


def _check(observation: Space, action: Space | None) -> None:
    spaces.check_space("the observation space", observation)
    if action is not None:
        spaces.check_space("the action space", action)


def example_observation(space: Space) -> Array:
    integer = not isinstance(space, Box)
    return jnp.zeros((1, 1, *space.shape), jnp.int32 if integer else jnp.float32)


def _kind(space: Space | None) -> str:
    return type(space).__name__
