from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpg.devices import built_for
from jaxpg.policies import Categorical, Gaussian, MultiCategorical
from jaxpg.policies.distributions import MASKED_LOGIT

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4))
MULTI = np.where(np.arange(4) < np.array([[2], [4], [3]]), RNG.normal(size=(3, 4)), MASKED_LOGIT)


def test_categorical_against_scipy():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    d = Categorical(jnp.asarray(LOGITS))
    actions = np.array([0, 3, 1, 2, 2])
    assert np.allclose(
        d.log_prob(jnp.asarray(actions)), np.log(p[np.arange(5), actions]), atol=1e-6
    )
    assert np.allclose(d.entropy(), [stats.entropy(row) for row in p], atol=1e-6)
    q = np.roll(p, 1, axis=0)
    assert np.allclose(
        d.kl(Categorical(jnp.log(q))),
        [stats.entropy(a, b) for a, b in zip(p, q, strict=True)],
        atol=1e-6,
    )
    assert (d.mode() == p.argmax(-1)).all()


def test_gaussian_against_scipy():
    mean, log_std = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3))
    d, x = Gaussian(jnp.asarray(mean), jnp.asarray(log_std)), RNG.normal(size=(5, 3))
    normal = stats.norm(mean, np.exp(log_std))
    assert np.allclose(d.log_prob(jnp.asarray(x)), normal.logpdf(x).sum(-1), rtol=1e-5, atol=1e-5)
    assert np.allclose(d.entropy(), normal.entropy().sum(-1), atol=1e-5)
    other_mean, other_std = mean[::-1], np.exp(log_std[::-1])
    kl = (
        np.log(other_std / np.exp(log_std))
        + (np.exp(log_std) ** 2 + (mean - other_mean) ** 2) / (2 * other_std**2)
        - 0.5
    ).sum(-1)
    assert np.allclose(d.kl(Gaussian(jnp.asarray(other_mean), jnp.log(other_std))), kl, rtol=1e-4)
    assert (d.mode() == d.mean).all()


def test_multi_categorical_is_a_product_of_its_parts():
    d = MultiCategorical(jnp.asarray(MULTI))
    action = jnp.array([1, 3, 2])
    parts = [Categorical(jnp.asarray(row[:n])) for row, n in zip(MULTI, (2, 4, 3), strict=True)]
    assert np.isclose(
        d.log_prob(action),
        sum(p.log_prob(a) for p, a in zip(parts, action, strict=True)),
        atol=1e-5,
    )
    assert np.isclose(d.entropy(), sum(p.entropy() for p in parts), atol=1e-5)
    flat = MultiCategorical(jnp.where(MULTI > MASKED_LOGIT / 2, 0.0, MULTI))
    uniform = [Categorical(jnp.zeros(n)) for n in (2, 4, 3)]
    expected = sum(p.kl(u) for p, u in zip(parts, uniform, strict=True))
    assert np.isclose(d.kl(flat), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [(), (0,), (3,), (0, 3)])
def test_categorical_samples_have_the_right_frequencies(masked):
    logits = np.array([0.3, -1.0, 1.0, 0.1])
    logits[list(masked)] = MASKED_LOGIT
    p = np.exp(logits - logits.max())
    p /= p.sum()
    num = 100_000
    draws = Categorical(jnp.broadcast_to(jnp.asarray(logits), (num, 4))).sample(jax.random.key(0))
    share = np.bincount(np.asarray(draws), minlength=4) / num
    assert np.abs(share - p).max() < 5 * 0.5 / np.sqrt(num)
    assert (share[list(masked)] == 0).all(), "an action of probability 0 is never drawn"


def test_gaussian_samples_have_the_right_moments():
    num = 100_000
    d = Gaussian(jnp.full((num, 2), 1.5), jnp.full((num, 2), jnp.log(0.3)))
    draws = np.asarray(d.sample(jax.random.key(1)))
    assert np.abs(draws.mean(0) - 1.5).max() < 5 * 0.3 / np.sqrt(num)
    assert np.abs(draws.std(0) - 0.3).max() < 5 * 0.3 / np.sqrt(2 * num)


def test_log_derivative_trick_and_zero_mean_score(x64):
    """grad pi = pi grad log pi, and E[grad log pi] = 0 by enumeration, in float64."""
    theta = jnp.asarray(LOGITS[0])

    def log_prob(theta, a):
        return Categorical(theta).log_prob(a)

    total = 0.0
    for a in range(4):
        p, score = jnp.exp(log_prob(theta, a)), jax.grad(log_prob)(theta, a)
        direct = jax.grad(lambda theta, a=a: jnp.exp(log_prob(theta, a)))(theta)
        assert np.abs(direct - p * score).max() < 1e-12
        # Cross-entropy pushes the other logits down by itself: d log pi / d logit = onehot - pi.
        assert np.abs(score - (np.eye(4)[a] - jax.nn.softmax(theta))).max() < 1e-12
        total = total + p * score
    assert np.abs(total).max() < 1e-12
    x, mean, log_std = jnp.array([0.7]), jnp.array([0.2]), jnp.array([-0.4])
    score = jax.grad(lambda m, s: Gaussian(m, s).log_prob(x), argnums=(0, 1))(mean, log_std)
    standard = (x - mean) / jnp.exp(log_std)
    assert np.abs(score[0] - standard / jnp.exp(log_std)).max() < 1e-12
    assert np.abs(score[1] - (standard**2 - 1)).max() < 1e-12


def test_masked_logits_give_finite_gradients():
    def loss(logits):
        d = MultiCategorical(logits)
        return d.log_prob(jnp.array([1, 3, 2])) + d.entropy()

    assert np.isfinite(np.asarray(jax.grad(loss)(jnp.asarray(MULTI)))).all()


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_few_actions_are_written_out_without_changing_a_number(platform, x64):
    logits, others = jax.random.normal(jax.random.key(0), (2, 5, 3))
    action = jnp.array([0, 1, 2, 1, 0])

    def found(logits):
        policy, other = Categorical(logits), Categorical(others)
        return jnp.stack([policy.log_prob(action), policy.entropy(), policy.kl(other)])

    expected = found(logits), jax.jacobian(found)(logits)
    with built_for(platform):
        written = found(logits), jax.jacobian(found)(logits)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), written, expected)
