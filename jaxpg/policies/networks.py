"""Networks: pure (init, initial_carry, apply) triples, feed-forward and recurrent alike.

Every builder takes the observation space and the kind of output: an action space gives a policy, whose
`apply` returns a distribution; None gives a critic, whose `apply` returns values [T, B].

>>> seen, taken = Box(-np.ones(3), np.ones(3)), Discrete(2)
>>> params = jax.eval_shape(mlp(seen, taken, (8,)).init, jax.random.key(0))
>>> sum(x.size for x in jax.tree.leaves(params))
50
>>> [x.initial_carry(2).shape for x in (gru(seen, None, (), features=4), mingru(seen, None))]
[(2, 4), (2, 64)]
>>> len(lstm(seen, None).initial_carry(2))
2
>>> image = Box(np.zeros((10, 10, 4)), np.ones((10, 10, 4)))
>>> params = jax.eval_shape(cnn(image, taken, (64,)).init, jax.random.key(0))
>>> {x.shape for x in jax.tree.leaves(params) if x.ndim == 2} == {(36, 16), (1024, 64), (64, 2)}
True
>>> tabular(Discrete(3), taken).init(None)["logits"].shape, isinstance(linear(seen, taken), Network)
((3, 2), True)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from jaxpg.envs import Box, Discrete, Space, spaces
from jaxpg.policies import cells
from jaxpg.policies.cells import Cell
from jaxpg.policies.heads import Settings, head
from jaxpg.policies.initializers import orthogonal
from jaxpg.policies.layers import KERNEL, Layers, body_of, output_of
from jaxpg.types import Array, Carry, Key, Params


class Network(NamedTuple):
    """A network over sequences; a feed-forward one carries `()`."""

    init: Callable[[Key], Params]
    initial_carry: Callable[[int], Carry]  # of B lanes
    apply: Callable[
        [Params, Carry, Array, Array], tuple[Carry, Any]
    ]  # obs [T, B, ...], first [T, B]
    # The params after an update with obs [T, B, ...] and mask [T, B]; those the optimizer trains stay.
    observe: Callable[[Params, Array, Array], Params] | None = None
    # Like apply, but the torso's features [T, B, F], before the last layer; None: there is no torso.
    features: Callable[[Params, Carry, Array, Array], tuple[Carry, Array]] | None = None


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
    layer_norm: bool = False,
    precision: str = "highest",
    **policy: Unpack[Settings],
) -> Network:
    """Dense layers with orthogonal weights; the last layer of a policy starts 100 times smaller.

    policy: the settings of its distribution, as of `heads.head`. layer_norm: before each activation.
    precision: of matrix products; below "highest", GPUs and TPUs round to 10 or 7 mantissa bits.
    """
    _check(observation, action)
    body = body_of(hidden, activation, precision, layer_norm)
    output = output_of(action, precision, policy)
    found = _feed_forward(body, output, partial(spaces.encode, observation), observation)
    return found if hidden else found._replace(features=None)


def cnn(
    observation: Space,
    action: Space | None,
    hidden: Sequence[int] = (64,),
    *,
    channels: Sequence[int] = (16,),
    stride: int = 1,
    activation: str = "tanh",
    layer_norm: bool = False,
    precision: str = "highest",
    **policy: Unpack[Settings],
) -> Network:
    """3 x 3 convolutions without padding on images [H, W, C] or grids [H, W], then dense layers.

    channels: filters of each convolution; stride: of each. Raises ValueError for other observations, and for
    images that the convolutions leave nothing of.
    """
    _check(observation, action)
    shape = observation.shape
    if not isinstance(observation, Box) or len(shape) not in (2, 3):
        raise ValueError(
            f"a cnn needs images [H, W, C] or grids [H, W], but observations are {_kind(observation)} of "
            f"shape {list(shape)}; use mlp"
        )
    if not channels:
        raise ValueError("a cnn without channels convolves nothing; give channels, such as 16")
    sizes = list(shape[:2])
    for done, _ in enumerate(channels):
        if min(sizes) < KERNEL:
            raise ValueError(
                f"{len(channels)} convolutions with stride {stride} do not fit observations of "
                f"{shape[0]} x {shape[1]}: after {done} there are {sizes[0]} x {sizes[1]}, and each takes "
                f"{KERNEL} x {KERNEL}; give fewer channels or a smaller stride"
            )
        sizes = [(size - KERNEL) // stride + 1 for size in sizes]
    body = body_of(hidden, activation, precision, layer_norm, channels, stride)
    image = (*shape, 1)[:3]

    def encode(obs):
        return jnp.asarray(obs, jnp.result_type(float)).reshape(*obs.shape[:2], *image)

    return _feed_forward(body, output_of(action, precision, policy), encode, observation)


def _feed_forward(body: Layers, output: Layers, encode, observation) -> Network:
    def init(key):
        example = encode(example_observation(observation))
        gains = body.init(example)
        output_gains = output.init(body.apply(gains, example))
        return orthogonal(key, {"body": gains, "head": output_gains})

    def features(params, carry, obs, first):
        del first
        return carry, body.apply(params["body"], encode(obs))

    return _on_torso(init, lambda num_lanes: (), features, output)


def _on_torso(init, initial_carry, features, output: Layers) -> Network:
    def apply(params, carry, obs, first):
        carry, found = features(params, carry, obs, first)
        return carry, output.apply(params["head"], found)

    return Network(init, initial_carry, apply, features=features)


def value_layer(policy: Network, observation: Space, precision: str = "highest") -> Network:
    """A critic that is one more layer on a policy's torso.

    Its `init` gives that layer's parameters; its `apply` takes those of the policy and of the layer, as
    fields `policy` and `critic`. Raises ValueError for a policy without a torso.

    >>> policy = mlp(Box(-np.ones(3), np.ones(3)), Discrete(2), (8,))
    >>> layer = value_layer(policy, Box(-np.ones(3), np.ones(3)))
    >>> [x.shape for x in jax.tree.leaves(jax.eval_shape(layer.init, jax.random.key(0)))]
    [(1,), (8, 1)]
    """
    features = policy.features
    if features is None:
        raise ValueError(
            "there is no torso to share: the network has no hidden layers, or does not give its features; "
            "leave out shared_torso"
        )
    output = output_of(None, precision, {})

    def width(key):
        carry, obs = policy.initial_carry(1), example_observation(observation)
        return features(policy.init(key), carry, obs, jnp.zeros((1, 1), bool))[1]

    def init(key):
        found = jax.eval_shape(width, key)
        return orthogonal(key, output.init(jnp.zeros(found.shape, found.dtype)))

    def apply(params, carry, obs, first):
        carry, found = features(params.policy, carry, obs, first)
        return carry, output.apply(params.critic, found)

    return Network(init, policy.initial_carry, apply)


def _recurrent(
    cell: Callable[[int, str], Cell],
    observation: Space,
    action: Space | None,
    hidden: Sequence[int] = (64,),
    *,
    features: int = 64,
    activation: str = "tanh",
    layer_norm: bool = False,
    precision: str = "highest",
    **policy: Unpack[Settings],
) -> Network:
    """Dense layers, then this cell, whose carry restarts before an episode's first row."""
    _check(observation, action)
    body = body_of(hidden, activation, precision, layer_norm)
    output, within = output_of(action, precision, policy), cell(features, precision)
    encode = partial(spaces.encode, observation)

    def init(key):
        example = encode(example_observation(observation))
        body_gains = body.init(example)
        cell_gains = within.init(body.apply(body_gains, example))
        output_gains = output.init(jnp.zeros((1, 1, features)))
        return orthogonal(key, {"body": body_gains, "cell": cell_gains, "head": output_gains})

    def remembered(params, carry, obs, first):
        encoded = body.apply(params["body"], encode(obs))
        return within.apply(params["cell"], carry, encoded, first)

    return _on_torso(init, within.initial_carry, remembered, output)


# A gated recurrent unit, long short-term memory, a unit that is linear in its state, and causal attention,
# as in `cells`.
gru = partial(_recurrent, cells.gated)
lstm = partial(_recurrent, cells.long_short_term)
mingru = partial(_recurrent, cells.minimal)
transformer = partial(_recurrent, cells.attention)


def _check(observation: Space, action: Space | None) -> None:
    spaces.check_space("the observation space", observation)
    if action is not None:
        spaces.check_space("the action space", action)


def example_observation(space: Space) -> Array:
    integer = not isinstance(space, Box)
    return jnp.zeros((1, 1, *space.shape), jnp.int32 if integer else jnp.float32)


def _kind(space: Space | None) -> str:
    return type(space).__name__
