"""Tokens: a prompt, then tokens one by one, and a reward at the end by a rule that can be checked.

The prompt asks for a residue; digits follow until the token `stop`; the answer is right if there is at least
one digit and their sum has that residue. Seen token by token it needs memory; tabulated it is exact.

>>> env = make_tokens(vocabulary=3, length=4, modulus=5)
>>> env.observation, env.action, env.horizon
(Discrete(n=8), Discrete(n=4), 5)
>>> float(tokens_mdp(Tokens(2, 2, 2)).reward.sum())
4.0
>>> skilled_logits(Tokens(2, 2, 2), 1.0).shape
(13, 3)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs.env import Env
from jaxpg.envs.mdp import Mdp
from jaxpg.envs.spaces import Discrete
from jaxpg.types import TimeStep


class Tokens(NamedTuple):
    """The sizes of a task: digits 0 .. vocabulary-1, at most `length` of them, sums modulo `modulus`."""

    vocabulary: int = 5
    length: int = 4
    modulus: int = 5


def _checked(tokens: Tokens) -> Tokens:
    for name, value, least in zip(tokens._fields, tokens, (1, 1, 2), strict=True):
        if isinstance(value, bool) or value != int(value) or value < least:
            raise ValueError(f"tokens: {name}={value} must be a whole number of at least {least}")
    return Tokens(*map(int, tokens))


def make_tokens(
    vocabulary: int = 5, length: int = 4, modulus: int = 5, truncates: bool = False
) -> Env:
    """The task seen token by token: `jaxpg train jaxpg.envs.tokens:make_tokens --network gru`.

    Observations: the prompt 0 .. modulus-1, then modulus + the last digit. The last action is `stop`. An
    answer that is longer than `length` digits fails; truncates: it is cut by the clock instead.
    Raises ValueError for sizes below 1, and a modulus below 2.
    """
    sizes = _checked(Tokens(vocabulary, length, modulus))

    def reset(key):
        prompt = jax.random.randint(key, (), 0, sizes.modulus)
        return (prompt, jnp.int32(0), jnp.int32(0)), prompt

    def step(key, state, action):
        del key
        prompt, count, total = state
        over = count > sizes.length  # an end lasts
        stops = (action == sizes.vocabulary) & ~over
        right = stops & (count > 0) & (total % sizes.modulus == prompt)
        after = (
            prompt,
            jnp.where(stops, sizes.length, count) + 1,
            total + jnp.where(stops, 0, action),
        )
        full = over | (~stops & (count >= sizes.length))
        shown = jnp.where(stops, prompt, sizes.modulus + action).astype(jnp.int32)
        terminated = stops if truncates else stops | full
        return after, TimeStep(
            shown, right.astype(jnp.float32), terminated, full & jnp.bool_(truncates)
        )

    observation = Discrete(sizes.modulus + sizes.vocabulary)
    return Env(reset, step, observation, Discrete(sizes.vocabulary + 1), sizes.length + 1)


def _states(sizes: Tokens) -> np.ndarray:
    """(prompt, number of digits, sum modulo m) of every state but the last, in which episodes have ended."""
    ranges = (sizes.modulus, sizes.length + 1, sizes.modulus)
    return np.stack(np.meshgrid(*map(np.arange, ranges), indexing="ij"), -1).reshape(-1, 3)


def tokens_mdp(tokens: Tokens) -> Mdp:
    """The task as a table over (prompt, number of digits, sum), which is all that a policy needs to know.

    Longer answers than `length` digits fail. Raises ValueError as `make_tokens`.
    """
    sizes = _checked(tokens)
    states = _states(sizes)
    number = {tuple(state): i for i, state in enumerate(states.tolist())}
    end = len(states)
    transition = np.zeros((end + 1, sizes.vocabulary + 1, end + 1))
    reward = np.zeros((end + 1, sizes.vocabulary + 1))
    transition[end, :, end] = transition[:, sizes.vocabulary, end] = 1.0
    for (prompt, count, total), i in number.items():
        reward[i, sizes.vocabulary] = count > 0 and total == prompt
        for digit in range(sizes.vocabulary):
            after = prompt, count + 1, (total + digit) % sizes.modulus
            transition[i, digit, number.get(after, end)] = 1.0
    opens = (states[:, 1] == 0) & (states[:, 2] == 0)
    initial = np.append(opens / opens.sum(), 0.0)
    terminal = np.arange(end + 1) == end
    return Mdp(
        initial, transition, reward, 0 * reward, terminal, np.arange(end + 1), sizes.length + 1
    )


def skilled_logits(tokens: Tokens, skill: float, spread: float = 0.0) -> np.ndarray:
    """Logits [S, V+1] of a policy that stops where the answer is right, the surer the larger its skill.

    At 0 all tokens are equally likely. A negative skill stops where the answer is wrong. spread: how much
    more skill the policy has for each prompt than for the one before.
    """
    sizes = _checked(tokens)
    prompt, count, total = _states(sizes).T
    right = (count > 0) & (prompt == total)
    logits = np.zeros((len(right) + 1, sizes.vocabulary + 1))
    own = skill + spread * (prompt - (sizes.modulus - 1) / 2)
    logits[:-1, -1] = own * np.where(right, 1.0, -1.0)
    return logits
