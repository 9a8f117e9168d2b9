"""Networks of your own, named by the module and the function that makes them."""

import inspect
from collections.abc import Callable
from typing import Any, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Box, Space
from jaxpg.envs.factory import imported, refused
from jaxpg.envs.spaces import encode
from jaxpg.policies.heads import Settings, head
from jaxpg.policies.networks import Network, example_observation, linear
from jaxpg.types import Array, Key, Params

Torso = tuple[Callable[[Key, Array], Params], Callable[[Params, Array], Array]]


def own_network(name: str) -> Callable[..., Network]:
    """The builder of a network that MODULE:FUNCTION makes, looked for in the working directory too.

    A function is called with the observation space and the action space, or None for a critic; a class
    without arguments. Either gives a Network, or a torso, which maps observations [N, ...] to features [N, F]
    and to which the last layer is added: a module of flax.linen, a function (or class) that makes a module of
    flax.nnx from `rngs`, or a pair of pure functions init(key, obs) and apply(params, obs). Real observations
    keep their shape, others are one-hot vectors. Raises ValueError if it cannot be imported, fails, or gives
    something else.

    >>> own_network("flax.linen:Dens")
    Traceback (most recent call last):
    ValueError: flax.linen has no 'Dens'; did you mean Dense...
    """
    function = imported(name)

    def build(
        observation: Space,
        action: Space | None,
        *,
        precision: str = "highest",
        **policy: Unpack[Settings],
    ) -> Network:
        with refused(name, {}):
            if not isinstance(function, type):
                made: Any = function(observation, action)
            else:
                made = function if _takes_rngs(function) else function()
        if isinstance(made, Network):
            if action is not None:
                _check_head(name, made, observation, action, policy)
            return made
        torso = _torso(made)
        if torso is None:
            raise ValueError(
                f"{name} gives a {type(made).__name__}; it must give a Network, a module of flax, or a "
                "pair of functions init(key, obs) and apply(params, obs)"
            )
        with refused(name, {}):
            return _with_head(torso, observation, action, precision, policy)

    return build


def _check_head(name: str, network: Network, observation, action, policy: Settings) -> None:
    """Raises ValueError for a distribution that was asked for, where a whole network has another."""
    if policy.get("state_dependent_std"):
        raise ValueError(
            f"{name} gives a whole Network, which state_dependent_std cannot change; leave it out, or give a "
            "torso"
        )
    if (asked := policy.get("distribution")) is None:
        return
    wanted = head(action, **policy)

    def outputs():
        params, first = network.init(jax.random.key(0)), jnp.zeros((1, 1), bool)
        obs = example_observation(observation)
        found = network.apply(params, network.initial_carry(1), obs, first)[1]
        return found, wanted.distribution(jnp.zeros(wanted.num_outputs), wanted.params)

    kinds = [type(each) for each in jax.eval_shape(outputs)]
    if kinds[0] is not kinds[1]:
        raise ValueError(
            f"{name} gives a whole Network, with a {kinds[0].__name__} distribution, not "
            f"{asked}; change one of them, or give a torso"
        )


def _torso(made: Any) -> Torso | None:
    if isinstance(made, nn.Module):
        return made.init, made.apply  # type: ignore[return-value]
    if isinstance(made, tuple) and len(made) == 2 and all(map(callable, made)):
        return made
    make: Any = made
    return _of_nnx(make) if _takes_rngs(make) else None


def _takes_rngs(made) -> bool:
    # The signature of a class of flax.nnx is hidden by its metaclass.
    start = made.__init__ if isinstance(made, type) else made
    return callable(made) and "rngs" in inspect.signature(start).parameters


def _of_nnx(make: Callable[..., Any]) -> Torso:
    """The parameters of a module of flax.nnx are the list of its arrays."""
    from flax import nnx  # takes a seventh of a second

    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param, ...)
    if jax.tree.leaves(rest):
        kinds = {type(x).__name__ for _, x in nnx.to_flat_state(rest)}
        raise ValueError(
            f"it keeps {', '.join(sorted(kinds))} besides its parameters, which no update would keep"
        )
    structure = jax.tree.structure(params)

    def init(key, obs):
        del obs
        return jax.tree.leaves(nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param))

    def apply(params, obs):
        return nnx.merge(graph, jax.tree.unflatten(structure, params), rest)(obs)

    return init, apply


def _with_head(torso: Torso, observation, action, precision, policy) -> Network:
    start, run = torso

    def shown(obs):
        obs = obs if isinstance(observation, Box) else encode(observation, obs)
        inner = observation.shape if isinstance(observation, Box) else obs.shape[-1:]
        return jnp.asarray(obs, jnp.result_type(float)).reshape(-1, *inner)

    example = shown(example_observation(observation))
    features = jax.eval_shape(lambda key: run(start(key, example), example), jax.random.key(0))
    if getattr(features, "ndim", 0) != 2 or len(features) != 1:
        said = list(getattr(features, "shape", ())) or type(features).__name__
        raise ValueError(f"it maps observations {list(example.shape)} to {said}, not to [1, F]")
    anywhere = np.full(features.shape[1:], np.inf, np.float32)
    head = linear(Box(-anywhere, anywhere), action, precision=precision, **policy)

    def init(key):
        k_torso, k_head = jax.random.split(key)
        return {"torso": start(k_torso, example), "head": head.init(k_head)}

    def shaped(params, carry, obs, first):
        found = run(params["torso"], shown(obs))
        return carry, found.reshape(*first.shape, found.shape[-1])

    def apply(params, carry, obs, first):
        _, found = shaped(params, carry, obs, first)
        return carry, head.apply(params["head"], (), found, first)[1]

    return Network(init, lambda num_lanes: (), apply, features=shaped)
