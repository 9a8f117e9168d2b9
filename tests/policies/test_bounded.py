"""Actions between bounds: densities, entropies and divergences by quadrature, scores by closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from jaxpg.policies import Bernoulli, Beta, Gaussian, TanhGaussian

PAIRS = [(1.3, 1.7), (2.0, 2.0), (6.0, 1.1), (30.0, 50.0)]
NORMALS = [(0.0, 1.0), (0.7, 0.3), (-2.0, 0.8), (1.5, 1.2)]


def beta(a, b):
    return Beta(jnp.array([a]), jnp.array([b]))


def tanh_normal(mean, std):
    return TanhGaussian(jnp.array([mean]), jnp.log(jnp.array([std])))


def expectation(distribution, function):
    """E f(u): over all u, with the density of a times da/du."""
    log_prob = jax.jit(lambda u: distribution.log_prob(u[None]))

    def integrand(u):
        slope = 1 / np.cosh(u) ** 2
        return float(np.exp(log_prob(jnp.asarray(u)))) * slope * function(u)

    return integrate.quad(integrand, -12, 12, epsabs=1e-11, limit=200)[0]


CASES = [beta, tanh_normal]
POINTS = {beta: PAIRS, tanh_normal: NORMALS}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "point"), [(k, p) for k in CASES for p in POINTS[k]])
def test_density_score_and_entropy_by_quadrature(kind, point, x64):
    d = kind(*point)
    score = jax.jit(jax.grad(lambda d, u: d.log_prob(u[None])))
    assert abs(expectation(d, lambda u: 1.0) - 1) < 1e-8
    for part in (0, 1):
        assert abs(expectation(d, lambda u, i=part: float(score(d, jnp.asarray(u))[i][0]))) < 1e-8
    minus_log = expectation(d, lambda u: -float(d.log_prob(jnp.asarray([u]))))
    # The tanh's is a rule of 32 nodes: its error grows with the standard deviation, here up to 1.2.
    assert abs(float(d.entropy()) - minus_log) < (1e-6 if kind is tanh_normal else 1e-8)


@pytest.mark.parametrize("kind", CASES)
def test_kl_by_quadrature(kind, x64):
    one, other = (kind(*point) for point in POINTS[kind][:2])

    def gap(u):
        u = jnp.asarray([u])
        return float(one.log_prob(u) - other.log_prob(u))

    assert abs(float(one.kl(other)) - expectation(one, gap)) < 1e-8
    assert abs(float(one.kl(one))) < 1e-12


def test_scores_are_the_closed_forms(x64):
    u = 0.6
    z = 1 / (1 + np.exp(-2 * u))
    for a, b in PAIRS:
        score = jax.grad(lambda d: d.log_prob(jnp.array([u])))(beta(a, b))
        both = special.digamma(a + b)
        assert abs(score.alpha[0] - (np.log(z) - special.digamma(a) + both)) < 1e-12
        assert abs(score.beta[0] - (np.log(1 - z) - special.digamma(b) + both)) < 1e-12
    mean, std = 0.2, 0.7
    score = jax.grad(lambda d: d.log_prob(jnp.array([u])))(tanh_normal(mean, std))
    assert abs(score.mean[0] - (u - mean) / std**2) < 1e-12
    assert abs(score.log_std[0] - (((u - mean) / std) ** 2 - 1)) < 1e-12
    logits, action = jnp.array([0.3, -2.0, 5.0]), jnp.array([1, 1, 0])
    score = jax.grad(lambda d: d.log_prob(action))(Bernoulli(logits))
    assert np.abs(score.logits - (action - special.expit(logits))).max() < 1e-12


def test_beta_against_scipy(x64):
    u = np.linspace(-3, 3, 7)
    z = special.expit(2 * u)
    for a, b in PAIRS:
        d, reference = beta(a, b), stats.beta(a, b)
        found = jax.vmap(d.log_prob)(jnp.asarray(u)[:, None])
        # jax's log B is off by 4e-9 at (30, 50).
        np.testing.assert_allclose(found, reference.logpdf(z) - np.log(2), 1e-8)
        np.testing.assert_allclose(d.entropy(), reference.entropy() + np.log(2), 1e-8, 1e-8)
        mode = special.expit(2 * float(d.mode()[0]))
        np.testing.assert_allclose(mode, (a - 1) / (a + b - 2), 1e-9)


@pytest.mark.parametrize("u", [-400.0, -30.0, 30.0, 400.0])
def test_density_and_score_are_exact_where_tanh_saturates(u):
    """In float32 tanh(30) is 1, where a density found from the action would be infinite or NaN."""
    assert jnp.abs(jnp.tanh(jnp.float32(u))) == 1
    action = jnp.array([u], jnp.float32)
    for d in (beta(1.3, 1.7), tanh_normal(0.5, 0.8)):
        value, score = jax.value_and_grad(lambda d: d.log_prob(action))(d)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in score)
    # log(1 + |a|) = log 2 and log(1 - |a|) = log 2 - 2|u|, up to rounding.
    logs = (-2 * abs(u), 0.0) if u < 0 else (0.0, -2 * abs(u))
    expected = 0.3 * logs[0] + 0.7 * logs[1] - special.betaln(1.3, 1.7) - np.log(2)
    np.testing.assert_allclose(beta(1.3, 1.7).log_prob(action), expected, 1e-5)
    normal = stats.norm(0.5, 0.8).logpdf(u) - 2 * np.log(2) + 2 * abs(u)
    np.testing.assert_allclose(tanh_normal(0.5, 0.8).log_prob(action), normal, 1e-5)


def test_a_uniform_beta_has_a_mode():
    assert beta(1.0, 1.0).mode()[0] == 0
    assert np.isfinite(beta(1.0, 3.0).mode()).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_beta_samples_follow_the_distribution(pair):
    """Kolmogorov and Smirnov's distance; 1.95 / sqrt(N) is exceeded with a probability of 0.001."""
    num = 20_000
    d = Beta(*(jnp.full((num, 1), x) for x in pair))
    keys = jax.random.split(jax.random.key(0), 4)
    one = d.sample(keys[0])
    parts = jax.tree.map(lambda x: x.reshape(4, -1, 1), d)
    mapped = jax.vmap(lambda d, key: d.sample(key))(parts, keys).reshape(num, 1)
    for u in (one, mapped):
        z = special.expit(2 * np.asarray(u[:, 0], float))
        assert stats.ks_1samp(z, stats.beta(*pair).cdf).statistic < 1.95 / np.sqrt(num)
        assert stats.ks_1samp(z, stats.beta(pair[0] + 0.5, pair[1]).cdf).statistic > 1.95 / np.sqrt(
            num
        ), "control: another alpha"


def test_a_tanh_gaussian_has_the_gaussians_samples_and_divergence():
    key, parts = jax.random.key(0), (jnp.array([0.3, -1.0]), jnp.array([0.1, -0.5]))
    one, other = (Gaussian(*parts), TanhGaussian(*parts))
    assert (one.sample(key) == other.sample(key)).all() and (one.mode() == other.mode()).all()
    shifted = [kind(parts[0] + 1, parts[1]) for kind in (Gaussian, TanhGaussian)]
    assert one.kl(shifted[0]) == other.kl(shifted[1]) > 0


def test_bernoulli_is_a_product_of_scipys(x64):
    logits, other = np.array([0.3, -2.0, 5.0]), np.array([1.0, 0.0, -1.0])
    p, q = special.expit(logits), special.expit(other)
    d = Bernoulli(jnp.asarray(logits))
    every = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    found = d.log_prob(jnp.asarray(every))
    expected = stats.bernoulli(p).logpmf(every).sum(-1)
    np.testing.assert_allclose(found, expected, 1e-12, 1e-12)
    np.testing.assert_allclose(np.exp(found).sum(), 1, 1e-12)
    np.testing.assert_allclose(d.entropy(), -(np.exp(expected) * expected).sum(), 1e-12)
    others = stats.bernoulli(q).logpmf(every).sum(-1)
    np.testing.assert_allclose(
        d.kl(Bernoulli(jnp.asarray(other))), (np.exp(expected) * (expected - others)).sum(), 1e-12
    )
    score = jax.vmap(jax.grad(lambda logits, a: Bernoulli(logits).log_prob(a)), (None, 0))
    mean = np.exp(found) @ score(jnp.asarray(logits), jnp.asarray(every))
    assert np.abs(mean).max() < 1e-12
    assert d.mode().tolist() == [1, 0, 1]
    extreme = Bernoulli(jnp.array([-1e4, 1e4]))
    assert extreme.entropy() == 0 and extreme.log_prob(jnp.array([0, 1])) == 0


def test_bernoulli_samples_have_the_right_frequencies():
    p, num = np.array([0.1, 0.5, 0.99]), 100_000
    logits = jnp.broadcast_to(jnp.asarray(special.logit(p), jnp.float32), (num, 3))
    share = np.asarray(Bernoulli(logits).sample(jax.random.key(0))).mean(0)
    assert np.abs(share - p).max() < 5 * 0.5 / np.sqrt(num)
