"""Stepping: keys, noise, one action and one step of many environments at once."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpg.devices import backend
from jaxpg.envs import Env, check_action, check_env
from jaxpg.policies import Agent, initial_carry
from jaxpg.types import Array, Key, Params

# Fields of up to this many numbers per lane are packed; larger ones are written as fast alone.
SMALL_FIELD = 16

# Where fields are packed: on an H100 a step then writes one row, not seven. On a v5e a step of 8x16 CartPoles
# would take 36,000 cycles instead of 30,000; on a CPU short episodes ran at 0.87 of the speed.
PACKS = ("gpu",)
PACKED = [jnp.dtype(x) for x in ("bool", "float32", "int32", "uint32", "float64", "int64")]


class EpisodeSums(NamedTuple):
    """Sums over the episodes that ended in a rollout; scalars."""

    returns: Array
    lengths: Array
    episodes: Array  # how many


class StepKeys(NamedTuple):
    action: Key
    step: Key
    reset: Key


def step_keys(key: Key, num_steps: int, start: Array | int = 0) -> StepKeys:
    """The keys of T steps from the start-th, [T] each."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(3 * start + jnp.arange(3 * num_steps))
    return StepKeys(*(keys[use::3] for use in range(3)))  # typed keys or rows of raw ones


def noise_function(agent: Agent, params: Params, obs):
    """Map keys [T] to the noise of actions [T, B, ...]; without `draw`, to keys [T, 1]."""

    def distribution(carry, obs):
        first = jnp.zeros((1, obs.shape[0]), bool)
        _, found = agent.policy.apply(params, carry, obs[None], first)
        return jax.tree.map(lambda x: x[0], found)

    carry = jax.eval_shape(lambda: initial_carry(agent, obs.shape[0]).policy)
    noise = getattr(jax.eval_shape(distribution, carry, obs), "noise", None)
    return jax.vmap(noise) if noise else lambda keys: keys[:, None]


def act(agent: Agent, params: Params, carry, obs, first, noise, greedy=False):
    """Act in B lanes; noise: [B, ...], or the keys [G] of their groups."""
    first = jnp.broadcast_to(first, obs.shape[:1])
    carry, distribution = agent.policy.apply(params, carry, obs[None], first[None])
    distribution = jax.tree.map(lambda x: x[0], distribution)
    if greedy:
        action = distribution.mode()
    elif hasattr(distribution, "draw"):
        action = distribution.draw(noise)
    else:
        groups = jax.tree.map(lambda x: x.reshape(len(noise), -1, *x.shape[1:]), distribution)
        action = lanes_together(jax.vmap(lambda own, key: own.sample(key))(groups, noise), 0)
    return action, distribution, carry


def lane_keys(keys: Key, size: int) -> Key:
    """The keys [G size] of the lanes of G groups with a key each."""
    return lanes_together(jax.vmap(lambda key: jax.random.split(key, size))(keys), 0)


def lanes_together(x: Array, axis: int) -> Array:
    """[..., G, size, ...] -> [..., G size, ...], with G at this axis."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def step_lanes(env: Env, keys, env_state, action):
    """Step the lanes of G groups; keys: [G]."""
    check_action(env, action)
    # XLA drops the split where the environment does not read its key.
    keys = lane_keys(keys, action.shape[0] // len(keys))
    env_state, result = jax.vmap(env.step)(keys, env_state, action)
    return env_state, result._replace(reward=jnp.asarray(result.reward, jnp.result_type(float)))


def reset_lanes(env: Env, keys):
    check_env(env)
    return jax.vmap(env.reset)(keys)


def check_sizes(num_episodes: int, num_steps: int) -> None:
    for name, value in (("num_episodes", num_episodes), ("the longest episode", num_steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def kept(keep, x):
    return select(keep, x, jnp.zeros_like(x))


def select(condition, yes, no):
    return jnp.where(
        condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim)), yes, no
    )


@partial(
    jax.tree_util.register_dataclass, data_fields=["words", "rest"], meta_fields=["tree", "fields"]
)
@dataclass(frozen=True)
class Packed:
    """A tree whose small fields lie in one array: a GPU writes it at once, not field by field."""

    words: Any  # [..., B, W] uint32, or () for none
    rest: list[Array]
    tree: Any
    fields: tuple  # of each leaf (shape of a lane, dtype), None if it is in `rest`


def small(tree: Any) -> bool:
    """Whether fields [B, ...] have few numbers per lane."""
    return sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(tree)) <= SMALL_FIELD


def pack(tree: Any) -> Packed:
    """Pack fields [B, ...] by their bits."""
    leaves, structure = jax.tree.flatten(tree)
    words, rest, fields = [], [], []
    for x in leaves:
        packs = backend() in PACKS and small(x) and x.dtype in PACKED
        fields.append((x.shape[1:], x.dtype) if packs else None)
        if not packs:
            rest.append(x)
            continue
        bits = (
            x.astype(jnp.uint32)
            if x.dtype.kind == "b"
            else jax.lax.bitcast_convert_type(x, jnp.uint32)
        )
        words.append(bits.reshape(len(x), -1))
    joined = jnp.concatenate(words, axis=-1) if words else ()
    return Packed(joined, rest, structure, tuple(fields))


def unpack(packed: Packed) -> Any:
    """Return the tree, its fields [..., B, ...] with the axes that were added in front, as by `scan`."""
    rest, leaves, place = iter(packed.rest), [], 0
    for field in packed.fields:
        if field is None:
            leaves.append(next(rest))
            continue
        shape, dtype = field
        width = math.prod(shape) * max(dtype.itemsize // 4, 1)
        bits = packed.words[..., place : place + width]
        place += width
        if dtype.kind == "b":
            leaves.append(bits.reshape(*bits.shape[:-1], *shape) != 0)
            continue
        double = (2,) if dtype.itemsize == 8 else ()
        bits = bits.reshape(*bits.shape[:-1], *shape, *double)
        leaves.append(jax.lax.bitcast_convert_type(bits, dtype))
    return jax.tree.unflatten(packed.tree, leaves)
