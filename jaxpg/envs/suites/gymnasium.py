"""gymnasium: environments that exist only in Python, stepped on the host, all lanes in one call."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from jaxpg.envs.env import Env
from jaxpg.envs.spaces import Box, Discrete, MultiDiscrete, Space, limits
from jaxpg.envs.suites.raw import package, silence
from jaxpg.types import TimeStep

EPISODE = 1000  # for environments without a limit of their own


def names() -> list[str]:
    return sorted(package("gymnasium").registry)


def make(name: str, horizon: int | None = None, **settings) -> Env:
    """horizon: by default gymnasium's max_episode_steps; the rest goes to `gymnasium.make`.

    A state holds the seed of its episode and the number of steps taken; the environment that plays it lives
    on the host. Dictionaries and tuples of observations are flattened as gymnasium does. Where the host no
    longer plays an episode, as after a resume, a step truncates it at its last observation.
    """
    with silence():
        gymnasium, wrappers = package("gymnasium"), package("gymnasium.wrappers")
        limit = gymnasium.spec(name).max_episode_steps
    horizon = int(horizon or limit or EPISODE)

    def one():
        with silence():
            made = gymnasium.make(name, max_episode_steps=horizon, **settings)
            nested = type(made.observation_space).__name__ in ("Dict", "Tuple")
            return wrappers.FlattenObservation(made) if nested else made

    scratch = one()
    observation, action = (
        _space(name, x) for x in (scratch.observation_space, scratch.action_space)
    )
    shown = jax.ShapeDtypeStruct(observation.shape, _kind(observation))
    host = Host(one, scratch, shown)
    scalars = [jax.ShapeDtypeStruct((), kind) for kind in (np.float32, np.bool_, np.bool_)]
    start_on_host = on_host(host.reset, [shown])
    step_on_host = on_host(host.step, [shown, *scalars])

    def reset(key):
        episode = jax.random.bits(key, (2,), np.uint32)
        (obs,) = start_on_host(episode)
        return (episode, jnp.int32(0), obs), obs

    def step(key, state, chosen):
        del key
        episode, time, before = state
        chosen = jnp.asarray(chosen, _kind(action))
        if isinstance(action, Box):
            chosen = jnp.clip(chosen, action.low, action.high)
        obs, reward, terminated, truncated = step_on_host(episode, time, before, chosen)
        result = TimeStep(obs, reward, terminated, truncated & ~terminated)
        return (episode, time + 1, obs), result

    return Env(reset, step, observation, action, horizon)


def on_host(function: Callable, shapes: list[jax.ShapeDtypeStruct]) -> Callable:
    """A function of arrays of one lane, computed on the host for all lanes at once, whatever was mapped."""

    @custom_vmap
    def many(*arguments):  # [B, ...] each
        size = len(arguments[0])
        lanes = [jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in shapes]
        return jax.pure_callback(function, lanes, *arguments)

    @many.def_vmap
    def _(size, mapped, *arguments):
        whole = [
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(arguments, mapped, strict=True)
        ]
        lanes = whole[0].shape[1]
        found = many(*(x.reshape(size * lanes, *x.shape[2:]) for x in whole))
        return [x.reshape(size, lanes, *x.shape[1:]) for x in found], [True] * len(shapes)

    return lambda *arguments: [x[0] for x in many(*(x[None] for x in arguments))]


class Game(NamedTuple):
    """An episode that the host plays, or has played."""

    env: Any
    time: int  # steps taken
    result: tuple  # of the last one: obs, reward, terminated, truncated

    @property
    def ended(self) -> bool:
        return self.result[2] or self.result[3]


class Host:
    """Environments at play, found by their episode; at most twice as many as there are lanes."""

    def __init__(self, make: Callable[[], Any], scratch: Any, shown: jax.ShapeDtypeStruct):
        self.make, self.scratch, self.shown = make, scratch, shown
        self.games: OrderedDict[tuple[int, int], Game] = OrderedDict()
        self.lock = threading.Lock()

    def reset(self, episodes: Any) -> list[np.ndarray]:
        """The first observations [B, ...]; the environment that plays begins at its first step."""
        with self.lock:
            return [np.stack([self.begin(self.scratch, x) for x in np.asarray(episodes)])]

    def step(self, episodes: Any, times: Any, before: Any, actions: Any) -> list[np.ndarray]:
        """The results [B, ...] of one step; of one that was taken already, the same again."""
        rows = zip(*(np.asarray(x) for x in (episodes, times, before, actions)), strict=True)
        with self.lock:
            found = [self.advance(len(times), *row) for row in rows]
        kinds = self.shown.dtype, np.float32, np.bool_, np.bool_
        return [np.array(x, kind) for x, kind in zip(zip(*found, strict=True), kinds, strict=True)]

    def advance(self, lanes, episode, time, before, action):
        name = tuple(episode.tolist())
        game = self.games.pop(name, None)
        if time == 0:
            env = game.env if game else self.spare(lanes)
            self.begin(env, episode)
            game = Game(env, 0, (before, 0.0, False, False))
        if game and time == game.time and not game.ended:
            space = game.env.action_space
            chosen = np.asarray(action + getattr(space, "start", 0), space.dtype)
            obs, *outcome, _ = game.env.step(chosen if chosen.shape else chosen.item())
            game = Game(game.env, time + 1, (self.seen(obs), *outcome))
        if game:
            self.games[name] = game
        return game.result if game and time == game.time - 1 else (before, 0.0, False, True)

    def spare(self, lanes):
        """The environment of an episode that has ended or that waited longest for a step, or a new one."""
        over = next((name for name, game in self.games.items() if game.ended), None)
        if over is None and len(self.games) >= 2 * lanes:
            over = next(iter(self.games))
        return self.games.pop(over).env if over else self.make()

    def begin(self, env, episode):
        # Some environments seed a signed 32-bit generator.
        return self.seen(env.reset(seed=int(episode[0]) // 2)[0])

    def seen(self, obs):
        space = self.scratch.observation_space
        return np.asarray(obs - space.start if hasattr(space, "start") else obs, self.shown.dtype)


def _kind(space: Space):
    return np.dtype(np.float32 if isinstance(space, Box) else np.int32)


def _space(name, space) -> Space:
    kind = type(space).__name__
    if kind == "Discrete":
        return Discrete(int(space.n))
    if kind == "MultiDiscrete" and len(space.shape) == 1:
        return MultiDiscrete(tuple(space.nvec.tolist()))
    if kind == "MultiBinary":
        return MultiDiscrete((2,) * int(np.prod(space.shape)))
    if kind == "Box":
        return Box(*limits(Box(space.low, space.high)))
    raise ValueError(f"gymnasium/{name} has a space of the kind {kind}; jaxpg knows {_KNOWN}")


_KNOWN = "Box, Discrete, MultiDiscrete and MultiBinary, and observations of them in a Dict or Tuple"
