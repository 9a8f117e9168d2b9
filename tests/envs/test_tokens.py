"""The token task against a list of all answers."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import check_adapter

from jaxpg.envs import check_mdp
from jaxpg.envs.tokens import Tokens, make_tokens, skilled_logits, tokens_mdp
from jaxpg.lab import exact

SIZES = Tokens(2, 3, 3)


def probability_of_success(logits) -> float:
    """Over every prompt and every sequence of tokens, by hand."""
    pi = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total = 0.0
    for prompt in range(SIZES.modulus):
        for count in range(SIZES.length + 1):
            for digits in product(range(SIZES.vocabulary), repeat=count):
                p, so_far = 1 / SIZES.modulus, 0
                for i, token in enumerate((*digits, SIZES.vocabulary)):
                    state = np.ravel_multi_index(
                        (prompt, i, so_far % SIZES.modulus),
                        (SIZES.modulus, SIZES.length + 1, SIZES.modulus),
                    )
                    p *= pi[state, token]
                    so_far += token if i < count else 0
                total += p * (count > 0 and so_far % SIZES.modulus == prompt)
    return total


@pytest.mark.parametrize("skill", [-1.0, 0.0, 2.0])
def test_the_table_succeeds_as_often_as_a_list_of_all_answers(skill):
    mdp, logits = check_mdp(tokens_mdp(SIZES)), skilled_logits(SIZES, skill, 0.5)
    found = exact.objective(mdp, logits, 1.0)
    assert found == pytest.approx(probability_of_success(logits), abs=1e-12)
    assert exact.objective(mdp, skilled_logits(SIZES, skill + 1), 1.0) > found


@pytest.mark.parametrize("truncates", [False, True])
def test_token_by_token_it_is_the_same_task(truncates):
    env = make_tokens(*SIZES, truncates=truncates)
    check_adapter(env)
    step = jax.jit(env.step)
    for digits, stops in (((1, 1), True), ((0,), True), ((), True), ((1, 0, 1, 1), False)):
        state, prompt = env.reset(jax.random.key(3))
        for i, digit in enumerate(digits):
            state, result = step(jax.random.key(0), state, jnp.int32(digit))
            assert result.obs == SIZES.modulus + digit and result.reward == 0
            full = i == SIZES.length
            assert (result.terminated, result.truncated) == (
                full and not truncates,
                full and truncates,
            )
        if stops:
            _, result = step(jax.random.key(0), state, jnp.int32(SIZES.vocabulary))
            right = len(digits) > 0 and sum(digits) % SIZES.modulus == int(prompt)
            assert result.terminated and result.reward == right


@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 1), (2.5, 3, 3), (True, 3, 3)])
def test_sizes_that_are_none_are_one_line(sizes):
    with pytest.raises(ValueError, match="must be a whole number of at least"):
        make_tokens(*sizes)
