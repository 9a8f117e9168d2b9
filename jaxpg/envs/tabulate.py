"""Finite gymnax environments as tables of all reachable states, found by the environment's own functions."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs.gymnax import resolve
from jaxpg.envs.mdp import Mdp
from jaxpg.envs.narrow import narrow

LIMIT = 4096  # states


class _Law(NamedTuple):
    """What an environment's functions do not reveal: its probabilities, and what identifies a state."""

    identity: Callable[[Any], tuple]  # the fields that tell states apart
    observation: Callable[
        [Any, Any], Any
    ]  # (environment, state) -> int: what a table of logits reads
    coins: Callable[
        [Any], list
    ]  # environment -> [(probability, deterministic environment, actions)]
    starts: Callable[[Any, Any], list]  # (environment, state) -> equally likely first states
    check: Callable[[Any], str] = lambda params: ""  # why these parameters are not covered


@narrow()
def mdp_from_gymnax(environment, params=None, **settings) -> Mdp:
    """The Mdp of a finite gymnax environment, named or already made: breadth-first from its reset.

    An Mdp pays r(s, a), so a chance that decides where the action leads (a slippery lake) is drawn one
    step ahead and stored in the state, hidden from `observation`. The table's observation is the position
    (FrozenLake), ball and paddle columns (Catch), the square (DeepSea), or nothing (DiscountingChain).
    The horizon is the time limit, or the longest episode if that is shorter.
    Raises ValueError for an environment without a known law, and for more than 4096 states.

    >>> mdp_from_gymnax("Catch-bsuite").reward.shape
    (220, 3)
    """
    environment, params = resolve(environment, params, settings)
    law = _LAWS.get(type(environment).__name__)
    if law is None:
        raise ValueError(f"{environment.name} has no known table; these have: {', '.join(_LAWS)}")
    if reason := law.check(params):
        raise ValueError(f"{environment.name} {reason}")
    coins = law.coins(environment)
    states, edges = _explore(environment, params, law, coins)
    return _assemble(environment, params, law, coins, states, edges)


def _explore(environment, params, law, coins):
    """All states by identity, in order of discovery, and the edges of each that is not final."""
    _, first = environment.reset_env(jax.random.key(0), params)
    frontier = law.starts(environment, first)
    states, edges = {law.identity(s): s for s in frontier}, {}
    steps = [_stepper(coin, params) for _, coin, _ in coins]
    for _ in range(int(params.max_steps_in_episode)):  # a clock would make states for ever
        if not frontier:
            break
        results, found = [step(frontier) for step in steps], {}
        for i, state in enumerate(frontier):
            rows = edges[law.identity(state)] = []
            for (after, reward, terminated), (_, _, actions) in zip(results, coins, strict=True):
                for action in actions:
                    successor = jax.tree.map(lambda x, i=i, a=action: x[i, a], after)
                    name = law.identity(successor)
                    rows.append((name, float(reward[i, action])))
                    if name not in states:
                        states[name] = successor
                        found |= {} if terminated[i, action] else {name: successor}
        if len(states) > LIMIT:
            raise ValueError(f"{environment.name} has more than {LIMIT} states; make it smaller")
        frontier = list(found.values())
    return states, edges


def _stepper(environment, params):
    """Map a list of states to (successor, reward, terminated) for every action, [states, actions]."""
    actions = jnp.arange(environment.num_actions)

    def step(state, action):
        _, after, reward, terminated, _ = environment.step_env(
            jax.random.key(0), state, action, params
        )
        return after, reward, terminated

    step_all = jax.jit(jax.vmap(jax.vmap(step, (None, 0)), (0, None)))

    def of_list(states):
        padded = states + states[:1] * (-len(states) % 32)  # few shapes, so few compilations
        stacked = jax.tree.map(lambda *x: np.stack(x), *padded)
        return jax.tree.map(np.asarray, step_all(stacked, actions))

    return of_list


def _assemble(environment, params, law, coins, states, edges) -> Mdp:
    """State s * C + c is state s with coin c in hand; edges of a state run coin by coin."""
    index = {name: i for i, name in enumerate(states)}
    num_actions, c, chance = environment.num_actions, len(coins), np.array([p for p, _, _ in coins])
    size = len(states) * c
    transition, reward = np.zeros((size, num_actions, size)), np.zeros((size, num_actions))
    terminal = np.ones(size, bool)
    for name, rows in edges.items():
        terminal[index[name] * c : (index[name] + 1) * c] = False
        for k, (after, paid) in enumerate(rows):
            row, action = index[name] * c + k // num_actions, k % num_actions
            transition[row, action, index[after] * c : (index[after] + 1) * c] = chance
            reward[row, action] = paid
    transition[terminal] = np.eye(size)[terminal][:, None]
    _, first = environment.reset_env(jax.random.key(0), params)
    initial = np.zeros(size)
    starts = law.starts(environment, first)
    for state in starts:
        initial[index[law.identity(state)] * c + np.arange(c)] += chance / len(starts)
    observation = np.repeat([int(law.observation(environment, s)) for s in states.values()], c)
    horizon = _longest(initial, transition, terminal, int(params.max_steps_in_episode))
    return Mdp(initial, transition, reward, np.zeros_like(reward), terminal, observation, horizon)


def _longest(initial, transition, terminal, limit):
    reached, leads = initial > 0, transition.any(axis=1)
    for steps in range(limit):
        reached = reached & ~terminal
        if not reached.any():
            return steps
        reached = leads[reached].any(axis=0)
    return limit


def _certain(environment):
    return [(1.0, environment, range(environment.num_actions))]


def _slippery(environment):
    """The action, or the one to its left or right, each on a lake that is not slippery."""
    num_actions = environment.num_actions
    if not environment.is_slippery:
        return _certain(environment)
    firm = copy.copy(environment)
    firm.is_slippery = False
    slip = (1.0 - environment.success_rate) / 2.0
    chances = ((environment.success_rate, 0), (slip, -1), (slip, 1))
    return [
        (chance, firm, [(a + offset) % num_actions for a in range(num_actions)])
        for chance, offset in chances
        if chance > 0
    ]


def _ball_columns(environment, state):
    return [state.replace(ball_x=jnp.int32(x)) for x in range(environment.columns)]


def _fields(*names):
    return lambda state: tuple(int(getattr(state, name)) for name in names)


def _one_start(environment, state):
    del environment
    return [state]


def _deterministic_only(params):
    fixed = params.deterministic and not params.sample_action_map
    return "" if fixed else "is a table only with deterministic=True and sample_action_map=False"


_LAWS = {
    "FrozenLake": _Law(
        _fields("position"), lambda environment, state: state.position, _slippery, _one_start
    ),
    "Catch": _Law(
        _fields("ball_x", "ball_y", "paddle_x"),
        lambda environment, state: state.ball_x * environment.columns + state.paddle_x,
        _certain,
        _ball_columns,
    ),
    "DiscountingChain": _Law(
        _fields("context", "time"), lambda environment, state: 0, _certain, _one_start
    ),
    "DeepSea": _Law(
        _fields("row", "column"),
        lambda environment, state: (
            min(int(state.row), environment.size - 1) * environment.size + state.column
        ),
        _certain,
        _one_start,
        _deterministic_only,
    ),
}
