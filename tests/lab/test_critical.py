"""The regulator in the laboratory, and the law of batch sizes."""

import jax
import numpy as np
import pytest

from jaxpg.envs import Lqr, from_gymnax
from jaxpg.estimators import Estimator, baselines, credit, importance
from jaxpg.lab import Source, gradient_samples, gradient_statistics
from jaxpg.lab.exact import lqr
from jaxpg.lab.studies import critical, regulated
from jaxpg.lab.studies.estimators import form, true_gradient
from jaxpg.lab.studies.study import Settings, estimated, tidy
from jaxpg.lab.studies.training import best_objective, scaled, small_rate
from jaxpg.lab.worlds.world import World, regulator_world, world
from jaxpg.policies import mlp
from jaxpg.runs.store import artifacts
from jaxpg.stats import figures
from jaxpg.stats.intervals import Estimate
from jaxpg.stats.lines import lines
from jaxpg.types import Hyperparams

GAMMA = 0.95
PUBLIC = regulator_world(gamma=GAMMA)
ON = importance.from_start(importance.on_policy)
THREE = np.array([-0.6, np.log(0.5), 0.3])


def silent(line):
    del line


def test_gradient_and_hessian_are_derivatives():
    h = 1e-4
    rows = h * np.eye(3)

    def j(x):
        return lqr.objective(Lqr(), x, GAMMA)

    slope = [(j(THREE + e) - j(THREE - e)) / (2 * h) for e in rows]
    np.testing.assert_allclose(lqr.gradient(Lqr(), THREE, GAMMA), slope, rtol=1e-6)
    bend = [
        [
            (j(THREE + e + f) - j(THREE + e - f) - j(THREE - e + f) + j(THREE - e - f)) / (4 * h**2)
            for f in rows
        ]
        for e in rows
    ]
    np.testing.assert_allclose(lqr.hessian(Lqr(), THREE, GAMMA), bend, rtol=1e-4, atol=1e-5)


def test_an_offset_keeps_the_moments_exact():
    numbers = Hyperparams(gamma=GAMMA)
    true = lqr.gradient(Lqr(), THREE, GAMMA)
    for estimator in (
        Estimator(credit.total_return),
        Estimator(credit.reward_to_go, baselines.none, ON),
        Estimator(credit.reward_to_go, baselines.critic, ON),
    ):
        found = lqr.moments(Lqr(), THREE, estimator, numbers)
        np.testing.assert_allclose(found.mean, true, rtol=1e-9, atol=1e-9)
    scores = lqr.moments(Lqr(), THREE, Estimator(credit.unit), numbers)
    np.testing.assert_allclose(scores.mean, 0.0, atol=1e-10)
    np.testing.assert_allclose(scores.covariance, lqr.fisher(Lqr(), THREE), rtol=1e-9, atol=1e-9)
    # With an offset of 0, the moments of the other two parameters are the same as without it.
    pair, both = THREE[:2], [*THREE[:2], 0.0]
    two = lqr.moments(Lqr(), pair, Estimator(), numbers)
    three = lqr.moments(Lqr(), both, Estimator(), numbers)
    np.testing.assert_allclose(three.covariance[:2, :2], two.covariance, rtol=1e-11)
    with pytest.raises(ValueError, match="4 parameters; a regulator's policy has k"):
        lqr.objective(Lqr(), [*THREE, 0.0], GAMMA)


KNOWN = {"total": 577.6159755379, "rtg": 299.1503465347, "rtg_value": 35.8225719794}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_sampled_gradients_agree_with_the_exact_moments(name):
    each = form(name, PUBLIC)
    known = each.exact()
    assert known.trace == pytest.approx(KNOWN[name], rel=1e-7)  # the parameters are in float32
    found = gradient_statistics(
        Source(
            PUBLIC.env,
            PUBLIC.policy,
            each.estimator,
            PUBLIC.params,
            jax.random.key(5),
            each.hyperparams,
            critic=each.critic,
            critic_params=each.critic_params,
        ),
        2**19,
    )
    np.testing.assert_allclose(known.mean, (-2.50209729, -0.91037696), rtol=1e-6)
    error = np.sqrt(np.diag(known.covariance) / 2**19)
    assert (np.abs(found.mean - known.mean) < 5 * error).all()
    # 95 % intervals of 32 groups: 2.04 standard errors either way.
    half = (found.trace.high - found.trace.low) / 2
    assert abs(found.trace.value - known.trace) < 5 * half / 2.04
    assert half < 0.03 * known.trace


def test_dropping_the_discount_of_states_is_seen():
    # Negative control: c_t = 1 changes the mean by more than 5 standard errors.
    rows = gradient_samples(
        Source(
            PUBLIC.env,
            PUBLIC.policy,
            Estimator(credit.reward_to_go, baselines.critic),
            PUBLIC.params,
            jax.random.key(0),
            Hyperparams(gamma=0.5),
            critic=PUBLIC.critic,
            critic_params=PUBLIC.critic_params,
        ),
        2**17,
    )
    rows = np.asarray(rows, float)
    error = rows.std(axis=0) / len(rows) ** 0.5
    true = lqr.gradient(Lqr(), (-0.6, np.log(0.5)), 0.5)
    assert (np.abs(rows.mean(axis=0) - true) > 5 * error).any()


def test_the_world_of_a_regulator():
    assert world("LQR").regulator == Lqr()
    np.testing.assert_allclose(true_gradient(PUBLIC), (-2.50209729, -0.91037696), rtol=1e-6)
    fixed = regulator_world(gain=-1.0, offset=0.2, gamma=GAMMA, fixed_std=True)
    pair = lqr.gradient(Lqr(), (-1.0, np.log(0.5), 0.2), GAMMA)[[0, 2]]
    np.testing.assert_allclose(true_gradient(fixed), pair, rtol=1e-6)
    gain = regulator_world(gamma=GAMMA, fixed_std=True)
    assert best_objective(gain) == pytest.approx(-2.068897889713579, rel=1e-5)
    assert not world("LQR", "mlp").is_regulator


# Batch sizes.


def test_updates_to_a_target_count_until_nine_in_ten_runs_are_there_at_the_same_time():
    scores = np.zeros((100, 6))
    scores[:, 3:] = 1.0
    scores[:50, 1] = 1.0  # half of the runs, by luck
    assert critical.updates_to(scores, 0.5) == (3.0, 3.0, 3.0)
    scores[:8, 3] = 0.0  # 92 of 100: within the error of nine in ten
    assert critical.updates_to(scores, 0.5) == (3.0, 3.0, 4.0)
    scores[:15, 3:] = 0.0
    assert critical.updates_to(scores, 0.5) == (np.inf, 3.0, np.inf)


def test_the_law_is_found_again():
    sizes = np.array([1, 4, 16, 64, 256])
    fronts = [{"batch": n, "measured": 5 * (1 + 20 / n), "rate": 0.3 / (1 + 30 / n)} for n in sizes]
    found = critical.fitted(fronts)
    np.testing.assert_allclose(found, (5, 20, 0.3, 30), rtol=1e-4)
    assert critical.fitted(fronts[:2]) is None


def arrivals(sizes, least, data, seed, flattest=1 / 0.3, slope=100.0):
    """Runs that need about S_min + E_min / N updates to the target, spread by a fifth, at three rates."""
    rng, trials, fronts = np.random.default_rng(seed), [], []
    for size in sizes:
        rates = 2.0 ** np.arange(-1, 2) / (flattest + slope / size)
        mean = 10 * (least + data / size) * np.array([1.5, 1.0, 1.5])
        steps = mean[:, None] * np.exp(0.2 * rng.normal(size=(3, 40)))
        there = np.arange(int(4 * mean.max())) >= steps[..., None]
        updates = [critical.updates_to(each, 0.5).value for each in there]
        best = int(np.argmin(updates))
        fronts.append({"batch": size, "measured": updates[best], "rate": rates[best]})
        trials.append(critical.Trial(size, rates, there))
    return fronts, trials


def test_a_critical_batch_has_an_interval_or_a_bound():
    """Intervals from resampled runs cover the truth; a curve that never levels off has a bound."""
    held = []
    for seed in range(8):
        law = critical.law_of(*arrivals((1, 8, 64, 512), 5, 100, seed))
        assert law.critical_batch.low < law.fit.critical_batch < law.critical_batch.high < np.inf
        held += [law.critical_batch.low <= 20 <= law.critical_batch.high]
    assert np.mean(held) >= 0.75
    # At these sizes, updates fall as 1 / N: any much larger B fits.
    law = critical.law_of(*arrivals((1, 2, 4), 0, 100, 0, flattest=0.0))
    for name in ("critical_batch", "rate_knee", "largest_rate"):
        found = getattr(law, name)
        assert np.isnan(found.value) and found.high == np.inf, name
        assert 0 < found.low == law.stated()[name]["above"], name
    assert law.critical_batch.low > 4
    assert critical.said(law.critical_batch).startswith("not resolved; above")
    # Rates are a factor of 2 apart, so the interval of the best one cannot be narrower than that.
    law = critical.law_of(*arrivals((64, 256, 1024), 5, 0, 0))
    assert (
        law.critical_batch.high < 64 and law.largest_rate.low < 0.28 < 0.32 < law.largest_rate.high
    )


def test_the_noise_scale_of_one_parameter_is_simple():
    place = regulator_world(gain=-1.0, gamma=GAMMA, fixed_std=True)
    found = critical.noise_scales(place, -2.1)
    for name in ("start", "target"):
        simple, curved = found[f"noise_scale_at_{name}"], found[f"curved_noise_scale_at_{name}"]
        assert simple == pytest.approx(curved)
    assert found["noise_scale_at_start"] == pytest.approx(139, rel=5e-3)
    assert found["noise_scale_at_target"] > found["noise_scale_at_start"]


@pytest.fixture(scope="module")
def short_cartpole():
    env = from_gymnax("CartPole-v1", max_steps_in_episode=32)
    policy = mlp(env.observation, env.action, (8,))
    return World(
        "CartPole-v1", env, policy, policy.init(jax.random.key(0)), Hyperparams(gamma=0.99)
    )


@pytest.mark.slow
def test_rates_of_measured_worlds_are_in_units_of_a_trajectory(short_cartpole):
    """Ten times the reward gives a tenth of the rate, and the target lies above the start."""
    rate = small_rate(short_cartpole, jax.random.key(0))
    large = short_cartpole._replace(env=scaled(short_cartpole.env, 10.0))
    assert small_rate(large, jax.random.key(0)) == pytest.approx(rate / 10, rel=1e-4)
    rows = gradient_samples(
        Source(
            short_cartpole.env,
            short_cartpole.policy,
            Estimator(),
            short_cartpole.params,
            jax.random.key(9),
            Hyperparams(gamma=short_cartpole.gamma),
        ),
        256,
    )
    lengths = rate * np.sqrt((np.asarray(rows) ** 2).sum(axis=1))
    assert np.sqrt((lengths**2).mean()) == pytest.approx(1 / 32, rel=0.3)
    grid = critical.Grid((4, 16), rate * 2.0 ** np.arange(0, 6, 2), 20, 0.8)
    settings = Settings(env="CartPole-v1", repeats=4, quick=True)
    found, target, _ = critical.train_to_target(short_cartpole, grid, settings, silent)
    fronts = [r for r in found if r["quantity"] == "updates_at_best_rate"]
    assert 20 < target <= 32 and [r["batch"] for r in fronts] == [4, 16]
    assert np.isfinite(fronts[-1]["measured"])
    assert set(np.asarray([r["rate"] for r in found])) <= set(grid.rates)


def test_where_no_rate_improves_it_says_so(short_cartpole):
    falling = np.linspace(20, 10, 12) * np.ones((3, 4, 1))
    with pytest.raises(
        ValueError, match="no learning rate tried on CartPole-v1 improves on the start"
    ):
        critical._target(short_cartpole, falling, 0.8)


@pytest.mark.slow
def test_a_batch_of_the_noise_scale_makes_half_the_progress():
    rows, scale = regulated.one_step(Settings(quick=True, seed=1), silent)
    for row in rows:
        # The law holds for a quadratic objective, and J is nearly quadratic.
        assert row["measured"] == pytest.approx(1 / (1 + scale / row["batch"]), abs=0.03)
        assert row["high"] - row["low"] < 0.1
    assert {row["batch"] for row in rows} >= {round(scale)}


@pytest.mark.slow
def test_the_best_rate_grows_linearly_and_then_no_more():
    result = critical.large_batch(critical.EXPERIMENTS["large-batch"].quick, silent)
    found = result.summary
    # The knee lies between the noise scales at the start and at the target.
    low, high = (found[f"curved_noise_scale_at_{x}"] for x in ("start", "target"))
    for name in ("rate_knee", "critical_batch"):
        seen = found[name]
        assert low / 2 < seen["value"] < high and seen["low"] < seen["value"] < seen["high"]
    table = result.table
    front = {
        n: (rate, updates)
        for n, rate, updates, quantity in zip(
            *(table[c] for c in ("batch", "rate", "measured", "quantity")), strict=True
        )
        if quantity == "updates_at_best_rate"
    }
    rates, updates = (np.array(x) for x in zip(*front.values(), strict=True))
    sizes = np.array(list(front), float)
    exponents = np.diff(np.log(rates)) / np.diff(np.log(sizes))
    assert exponents[0] > 0.6 > exponents[-1]
    # Small batches need the least data and large ones the fewest updates: no size has both.
    assert (np.diff(updates) < 0).all() and sizes[-1] * updates[-1] > 2 * sizes[0] * updates[0]


@pytest.mark.slow
def test_what_has_no_upper_end_is_an_arrow(tmp_path):
    """Arrows mark updates that the runs may never reach, and a knee that has only a bound."""
    rows = [
        {"estimator": "rtg", "batch": n, "rate": rate, "measured": s, "low": 0.8 * s, "high": high,
         "quantity": quantity}
        for n, rate, s, high in ((4, 0.1, 40.0, np.inf), (16, 0.3, 20.0, 25.0), (64, 0.5, 9.0, 10.0))
        for quantity in ("updates", "updates_at_best_rate")
    ]  # fmt: skip
    fronts = rows[1::2]
    fit = critical.fitted(fronts)
    value, bound = Estimate(6.0, 5.0, 7.0), Estimate(np.nan, 24.0, np.inf)
    law = critical.Law(fit, value, bound, bound, value, bound)
    drawn = []

    def draw(figure):
        critical._draw(figure, rows, fronts, law, {})
        drawn.extend(figure.axes)

    assert artifacts.write_figure(tmp_path, draw)
    arrows = [{x.get_label(): x.get_xydata() for x in axis.get_lines()} for axis in drawn]
    assert arrows[0][figures.ENDLESS].tolist() == [[0.1, 40.0]]
    assert arrows[1][figures.ENDLESS].tolist() == [[160.0, 40.0]]
    assert arrows[2][figures.BOUND].tolist() == [[24.0, fit.largest_rate / 2]]
    assert "square root" not in arrows[2]

    def of_least(figure):
        (axis,) = figures.panels(figure)
        ratios = [(f"{x} / least", n, e) for n in (4, 16) for x, e in
                  (("updates", Estimate(2.0, 1.5, 3.0)), ("trajectories", bound))]  # fmt: skip
        found = [estimated(e, quantity=x, batch=n) for x, n, e in ratios]
        regulated.draw_hyperbola(axis, found, law)
        drawn.append(axis)

    assert artifacts.write_figure(tmp_path, of_least, "least")
    found = {x.get_label(): x.get_xydata() for x in drawn[-1].get_lines()}
    assert found[figures.BOUND].tolist() == [[24.0, 2.0]] * 2


def test_a_figure_is_drawn_where_no_batch_reaches_the_target(tmp_path):
    inf = np.inf
    row = {"estimator": "rtg", "batch": 4, "rate": 0.1, "measured": inf, "low": inf, "high": inf}
    rows = [{**row, "quantity": name} for name in ("updates", "updates_at_best_rate")]
    artifacts.write_figure(tmp_path, lambda f: critical._draw(f, rows, rows[1:], None, {}))
    table = tidy([row | {"quantity": "updates", "measured": 3.0, "low": 3.0, "high": 3.0}])
    assert "±" not in "".join(lines(table)), "counted in whole updates, not exact"
