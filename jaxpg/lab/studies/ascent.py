"""How to step along a gradient: what each optimizer ignores, and how a baseline can decide the limit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxpg.estimators import Estimator
from jaxpg.lab import exact
from jaxpg.lab.exact.tables import softmax
from jaxpg.lab.studies import training
from jaxpg.lab.studies.rows import draw_exact, draw_measured, where
from jaxpg.lab.studies.study import (
    Experiment,
    Progress,
    Result,
    Settings,
    estimated,
    key_of,
    tidy,
    world_of,
)
from jaxpg.lab.worlds.world import World, has_exact
from jaxpg.optimizers import OPTIMIZERS
from jaxpg.stats import figures
from jaxpg.stats.intervals import attained, mean_interval
from jaxpg.stats.moments import Estimate
from jaxpg.stats.words import words
from jaxpg.training.algorithm import Algorithm
from jaxpg.types import Hyperparams

RATES = {"sgd": 0.1, "adam": 0.05, "natural": 0.1}  # of the optimizers compared, on tables
MAX_KL, SCALE, BATCH = 0.01, 1000.0, 16
BANDIT = "bandit"


def optimizers(settings: Settings, progress: Progress) -> Result:
    """SGD, Adam, the natural gradient and TRPO's step: J by update, and the rescalings that each ignores."""
    world = world_of(settings, whole=True)
    num_updates = 40 if settings.quick else 200
    rows = []
    scales = (1.0, SCALE)
    for name in ("sgd", "adam"):
        progress(f"{settings.repeats} runs of {name}, rewards times 1 and times {SCALE:g}")
        for scale, curves in zip(
            scales, _sampled(world, name, scales, settings, num_updates), strict=True
        ):
            steps = curves.env_steps.sum(axis=0)
            score = mean_interval(curves.score, attained(curves.score))
            for update, values in enumerate(zip(*score, strict=True)):
                row = {"estimator": name, "reward_scale": scale, "update": update, "quantity": "J"}
                count = update * BATCH * settings.repeats
                rows.append(estimated(values, trajectories=count, env_steps=steps[update], **row))
    summary = {"rewards_times_1000": {n: _largest_gap(rows, n) for n in ("sgd", "adam")}}
    if world.is_tabular and not world.is_projected:
        rows += _exact_rows(world, num_updates)
        matrix = mixing(world.logits.size, settings.seed)
        gaps = {
            name: reparameterisation_gap(world, name, matrix) for name in ("natural", "trpo", "sgd")
        }
        summary["reparameterised"] = gaps
    return Result(tidy(rows), summary, lambda figure: _draw_optimizers(figure, rows))


def ascend(
    world: World, name: str, num_updates: int, matrix=None, scale: float = 1.0
) -> np.ndarray:
    """Logits [U + 1, O A] of exact ascent: sgd, adam, natural (Kakade, 2002) or trpo (Schulman et al., 2015).

    matrix: M in theta = M phi, for an ascent in phi with gradient M^T g and Fisher matrix M^T F M.
    scale: multiplies the rewards.
    """
    shape, theta = world.logits.shape, np.asarray(world.logits, np.float64).reshape(-1)
    m = np.eye(len(theta)) if matrix is None else matrix
    numbers = Hyperparams(learning_rate=RATES.get(name, 0.0), max_grad_norm=training.NO_CLIP)
    transform = OPTIMIZERS[name](numbers) if name in OPTIMIZERS else None
    state: Any = transform.init(jnp.zeros(len(theta))) if transform else None
    path = [theta]
    for _ in range(num_updates):
        logits = path[-1].reshape(shape)
        gradient = scale * m.T @ exact.gradient(world.mdp, logits, world.gamma)
        if transform is not None:
            updates, state = transform.update(-jnp.asarray(gradient), state)
            step = np.asarray(updates, np.float64)
        else:
            fisher = m.T @ exact.fisher(world.mdp, logits) @ m
            step = np.linalg.pinv(fisher, rcond=1e-10, hermitian=True) @ gradient
            # TRPO constrains the mean divergence per step of the episode, F / H.
            length = np.sqrt(2 * MAX_KL * world.mdp.horizon / max(step @ gradient, 1e-300))
            step = step * (length if name == "trpo" else RATES[name])
        path.append(path[-1] + m @ step)
    return np.stack(path)


def reparameterisation_gap(world: World, name: str, matrix, num_updates: int = 20) -> float:
    """The largest difference of an action's probability between ascent in theta and in phi, theta = M phi."""
    one, other = (
        softmax(ascend(world, name, num_updates, m).reshape(-1, *world.logits.shape))
        for m in (None, matrix)
    )
    return float(np.abs(one - other).max())


def mixing(size: int, seed: int) -> np.ndarray:
    """A well-conditioned M that mixes and rescales parameters."""
    rng = np.random.default_rng(seed)
    return np.diag(rng.uniform(0.5, 2.0, size)) + 0.3 * rng.normal(size=(size, size)) / np.sqrt(
        size
    )


def _sampled(world, name, scales, settings, num_updates) -> list[training.Curves]:
    """Train with the same seeds at every scale of the rewards."""
    slots = Algorithm(Estimator(), policy_optimizer=OPTIMIZERS[name])
    run = training.learner(
        world, slots, num_envs=BATCH, num_updates=num_updates, per_repeat=len(scales)
    )
    keys = jnp.tile(jax.random.split(key_of(settings), settings.repeats), len(scales))
    rate = training.own_rate(settings, name)
    if rate is None and has_exact(world):
        rate = RATES[name]
    elif rate is None and name == "sgd":
        rate = training.small_rate(world, key_of(settings))
    elif rate is None:
        rate = training.adam_rate(world)
    numbers = world.hyperparams._replace(learning_rate=rate, max_grad_norm=training.NO_CLIP)
    curves = run(keys, numbers, np.repeat(scales, settings.repeats))
    parts = [np.split(x, len(scales)) for x in curves]
    return [training.Curves(*each) for each in zip(*parts, strict=True)]


def _replaces(settings, checkpoint) -> list[str]:
    others = [f"{each}'s learning rate is the laboratory's" for each in ("sgd", "adam")
              if training.own_rate(settings, each) is None]  # fmt: skip
    return [*others, *training.replaced(checkpoint, BATCH, unlimited=True)]


def _exact_rows(world, num_updates):
    for name in ("sgd", "adam", "natural", "trpo"):
        for update, logits in enumerate(ascend(world, name, num_updates)):
            value = exact.objective(world.mdp, logits.reshape(world.logits.shape), world.gamma)
            yield {"estimator": name, "reward_scale": 1.0, "update": update, "quantity": "J_exact_ascent",
                   "exact": value}  # fmt: skip


def _largest_gap(rows, name) -> float:
    """The largest gap in mean J between rewards and rewards times 1000, in the units of the rewards."""
    one, other = (
        np.array([r["measured"] for r in where(rows, estimator=name, reward_scale=scale)])
        for scale in (1.0, SCALE)
    )
    return float(np.nanmax(np.abs(one - other)))


def committal(settings: Settings, progress: Progress) -> Result:
    """Natural gradient on a bandit, baselines b* + delta of equal variance: some commit to a wrong arm.

    See Chung et al. (2021).
    """
    progress(f"{len(DELTAS)} × {settings.repeats} runs of {NUM_UPDATES} updates")
    final, paths = commit(key_of(settings), np.array(DELTAS), settings.repeats)
    rows, summary = [], {"not_on_best_arm": {}, "mean_regret": {}}
    for delta, policy in zip(DELTAS, final, strict=True):
        stuck, regret = policy[:, 0] < 0.5, max(ARMS) - policy @ np.array(ARMS)
        row = {"estimator": "natural", "delta": delta, "trajectories": NUM_UPDATES * len(stuck)}
        row |= {"env_steps": NUM_UPDATES * len(stuck)}
        share = proportion(int(stuck.sum()), len(stuck))
        rows.append(estimated(share, quantity="not_on_best_arm", **row))
        most = max(ARMS) - min(ARMS)
        rows.append(estimated(mean_interval(regret, (0.0, most)), quantity="regret", **row))
        summary["not_on_best_arm"][str(delta)] = share.value
        summary["mean_regret"][str(delta)] = float(regret.mean())
    return Result(tidy(rows), summary, lambda figure: _draw_committal(figure, rows, paths))


def commit(key, deltas, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Final policies [D, R, A], and P(best arm) before each update [D, K, U]: QUANTILES, then SHOWN runs.

    theta_a += rate (r_a - b) / pi_a is the natural gradient of one sample up to a shift of all logits;
    b = b* + delta with b* = sum_a (r_a / pi_a) / sum_a (1 / pi_a), which minimises its variance.
    """
    reward, rate = jnp.array(ARMS), 0.05
    shape = (len(deltas), num_runs)

    def step(theta, t):
        log_policy = jax.nn.log_softmax(theta)
        cdf = jnp.cumsum(jnp.exp(log_policy), axis=-1)
        uniform = jax.random.uniform(jax.random.fold_in(key, t), (*shape, 1))
        arm = (uniform * cdf[..., -1:] >= cdf[..., :-1]).sum(axis=-1)
        best = jax.nn.softmax(-log_policy) @ reward
        advantage = reward[arm] - best - jnp.asarray(deltas)[:, None]
        chosen = jax.nn.one_hot(arm, len(ARMS))
        # Mask before multiplying: 1 / pi of an arm that is never drawn may overflow.
        size = jnp.exp(-(chosen * jnp.where(chosen > 0, log_policy, 0.0)).sum(axis=-1))
        theta = theta + rate * chosen * (advantage * size)[..., None]
        best = jnp.exp(log_policy[..., 0])
        spread = jnp.quantile(best, jnp.array(QUANTILES), axis=1).T
        seen = jnp.concatenate([spread, best[:, :SHOWN]], axis=1)
        return theta - theta.mean(axis=-1, keepdims=True), seen

    @jax.jit
    def run(theta):
        theta, paths = jax.lax.scan(step, theta, jnp.arange(NUM_UPDATES))
        return jax.nn.softmax(theta), jnp.moveaxis(paths, 0, -1)

    final, paths = run(jnp.zeros((*shape, len(ARMS))))
    return np.asarray(final, np.float64), np.asarray(paths)


def proportion(count: int, total: int) -> Estimate:
    """A share with Wilson's 95 % interval."""
    found = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return Estimate(count / total, float(found.low), float(found.high))


def _draw_optimizers(figure, rows):
    axes = figures.panels(figure, 2)
    for i, name in enumerate(dict.fromkeys(r["estimator"] for r in rows)):
        found = where(rows, estimator=name, quantity="J_exact_ascent")
        draw_exact(axes[0], found, "update", i, words(name))
        found = where(rows, estimator=name, quantity="J", reward_scale=1.0)
        found = found[:: max(1, len(found) // 10)]
        draw_measured(axes[0], found, "update", i, words(name))
    figures.label(axes[0], "Ascent by update", "updates", "J (return)")
    for i, (name, scale) in enumerate((n, s) for n in ("sgd", "adam") for s in (1.0, SCALE)):
        found = where(rows, estimator=name, quantity="J", reward_scale=scale)
        figures.line(axes[1], [r["update"] for r in found], [r["measured"] for r in found], i,
                     f"{words(name)}, rewards × {scale:g}")  # fmt: skip
    figures.label(axes[1], "The unit of the reward", "updates", "J (return in the original unit)")
    figures.caption(figure, f"lines: exact ascent (right: means of batches of {BATCH}); markers: batches "
                    f"of {BATCH}, 95 % intervals over runs")  # fmt: skip


def _draw_committal(figure, rows, paths):
    axes = figures.panels(figure, 2)
    draw_measured(axes[0], where(rows, quantity="not_on_best_arm"), "delta", 0)
    axes[0].set_ylim(bottom=-0.005)
    axes[0].set_xticks(DELTAS)
    title, x = (
        "Runs that do not find the best arm",
        "δ of the baseline b* + δ (reward)",
    )
    figures.label(axes[0], title, x, f"share after {NUM_UPDATES} updates", legend=False)
    for i, delta in enumerate((DELTAS[0], DELTAS[-1])):
        low, middle, high, *runs = paths[DELTAS.index(delta)]
        at = np.arange(1, NUM_UPDATES + 1)
        figures.line(
            axes[1], at, middle, i, f"δ = {delta:+g}: median, band of 80 %".replace("-", "−")
        )
        figures.band(axes[1], at, low, high, i)
        for run in runs:
            axes[1].plot(at, run, linewidth=0.5, color=figures.COLOURS[i], alpha=0.8)
    axes[1].set_xscale("log")
    title = f"Of all runs, and {SHOWN} runs of each (thin)"
    figures.label(axes[1], title, "updates", "probability of the best arm")


ARMS, DELTAS, NUM_UPDATES, SHOWN = (1.0, 0.7, 0.0), (-1.0, -0.5, 0.0, 0.5, 1.0), 1000, 3
QUANTILES = (0.1, 0.5, 0.9)

EXPERIMENTS = {
    "optimizers": Experiment(
        "SGD, Adam, natural gradient, TRPO: J by update, and invariance to rescaling and reparameterising",
        optimizers,
        Settings(repeats=64),
        Settings(repeats=16, quick=True),
        ignores=("estimators", "trajectories"),
        replaces=_replaces,
    ),
    "committal": Experiment(
        "baselines of equal variance that decide whether a bandit finds its best arm",
        committal,
        Settings(env=BANDIT, repeats=4000),
        Settings(env=BANDIT, repeats=500, quick=True),
        worlds=(BANDIT,),
        ignores=("estimators", "policy", "trajectories", "gamma", "checkpoint"),
    ),
}
