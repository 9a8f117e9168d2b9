"""Precision: what the rounding of a chip's matrix products does to an estimate, exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.envs import Box, Discrete
from jaxpg.estimators import Estimator, assess, credit, importance, objective
from jaxpg.lab import exact
from jaxpg.lab.exact.enumeration import enumerate_trajectories
from jaxpg.lab.measure.emulation import ROUNDINGS, emulated
from jaxpg.lab.studies.rows import draw_exact, where
from jaxpg.lab.studies.study import Experiment, Progress, Result, Settings, key_of, tidy, world_of
from jaxpg.lab.worlds.world import World
from jaxpg.optimizers.natural import precondition_by_fisher
from jaxpg.policies import Network, mlp
from jaxpg.stats.figures import caption, label, legend, panels
from jaxpg.types import Params

ESTIMATOR = Estimator(credit.reward_to_go, importance=importance.from_start(importance.on_policy))
HIDDEN = (64, 64)
EPISODES = 4096  # of the batch whose standard error a bias is compared with
STATES = 2**16  # equally likely, of FEATURES normal numbers each
FEATURES = 4
BATCH = 4096  # of these states, for natural gradients
RARE = 1e-4  # the share of steps whose ratios may deviate more than the number that is told
ODDS = (0.03, 0.3, 1.0, 3.0, 6.0, 12.0)  # of the policies: see `sharpened`
TRAINED = 6.0
KLS = (1e-4, 1e-3, 1e-2)
BIAS, RATIO, ALIKE = "bias / standard error", "|ratio - 1|, float32 updates", "|ratio - 1|"
KL, TURN = "relative error of the KL", "1 - cosine of natural gradients"
# What is good enough: a tenth of a standard error, of clip_eps, of the KL; 8 degrees.
LIMITS = {BIAS: 0.1, ALIKE: 0.02, RATIO: 0.02, KL: 0.1, TURN: 0.01}


@contextmanager
def wide() -> Iterator[None]:
    """Run in 64 bits."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(True):
            yield
    else:  # jax before 0.8
        with import_module("jax.experimental").enable_x64():
            yield


def widened(tree):
    """The same numbers in float64, within `wide`."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)


def roundings_of(network: Network) -> dict[str, Network]:
    """The network with every rounding, and again with sums in the other order."""
    named = ROUNDINGS | {
        _other(name): each._replace(from_last=True) for name, each in ROUNDINGS.items()
    }
    return {name: emulated(network, each) for name, each in named.items()}


def _other(name):
    return f"{name} from the last"


def sharpened(network: Network, params: Params, obs, odds: float) -> Params:
    """Parameters with the last layer scaled to root mean square log-odds over obs [1, B], of two actions.

    They are some 0.01 before training, and were 4.9 to 6.8 for four policies trained on CartPole.
    """
    logits = np.asarray(_logits(network, params, obs))
    scale = odds / np.sqrt(np.mean((logits[:, 1] - logits[:, 0]) ** 2))
    return {**params, "head": jax.tree.map(lambda x: x * scale, params["head"])}


@partial(jax.jit, static_argnums=0)
def _logits(network, params, obs):
    """[B, A] of obs [1, B]."""
    return network.apply(params, (), obs, jnp.zeros(obs.shape[:2], bool))[1].logits[0]


def precision(settings: Settings, progress: Progress) -> Result:
    """Bias, ratios, KL and natural gradients of each rounding, without sampling error.

    The bias is |E g - grad J| over all trajectories of the world. The rest is summed over all actions in a
    world of STATES equally likely states. The reference is float64.
    """
    world, (weights, drawn) = world_of(settings), jax.random.split(key_of(settings))
    states = jax.random.normal(drawn, (1, STATES, FEATURES), jnp.float32)
    ends = np.full(FEATURES, np.inf, np.float32)
    seen, two = _observations(world), Discrete(2)
    inside, outside = (
        mlp(space, two, HIDDEN) for space in (world.env.observation, Box(-ends, ends))
    )
    rounded = {network: roundings_of(network) for network in (inside, outside)}
    rows = []
    for odds in (ODDS[1], TRAINED) if settings.quick else ODDS:
        progress(f"policies of log-odds {odds:g}")
        params = sharpened(inside, inside.init(weights), seen, odds)
        found = bias_rows(world, inside, rounded[inside], params)
        params = sharpened(outside, outside.init(weights), states, odds)
        found += ratio_rows(rounded[outside], params, states, float(world.hyperparams.clip_eps))
        found += natural_rows(
            outside, rounded[outside], params, states[:, :BATCH], world.hyperparams.damping
        )
        rows += [{"estimator": "", **row, "odds": odds} for row in found]
    return Result(tidy(rows), _summary(rows), partial(_draw, rows=rows, world=world.name))


def _observations(world):
    return jnp.arange(int(np.max(world.mdp.observation)) + 1)[None]


# The estimator's bias.


def bias_rows(
    world: World, network: Network, rounded: dict[str, Network], params: Params
) -> list[dict[str, Any]]:
    """Relative bias, bias in standard errors, and trace of the gradient with products rounded.

    They are rounded in rollouts, in the gradient, or in both.
    """
    seen, mdp = _observations(world), world.mdp
    with wide():
        known = widened(params)
        true = _gradient(world, network, known)
        laws = {"float64": _law(mdp, _logits(network, known, seen))}
        _, trace = gradient_moments(world, network, known, laws)["float64"]
    laws |= {name: _law(mdp, _logits(rounded[name], params, seen)) for name in ROUNDINGS}
    plain = gradient_moments(world, rounded["float32"], params, laws)
    rows = []
    for name in ROUNDINGS:
        mine = {k: laws[k] for k in (name, "float64")}
        of = gradient_moments(world, rounded[name], params, mine)
        parts = {"both": of[name], "gradients": of["float64"], "rollouts": plain[name]}
        for part, (mean, own_trace) in parts.items():
            bias = np.linalg.norm(mean - true)
            numbers = {
                "relative bias": bias / np.linalg.norm(true),
                BIAS: bias / np.sqrt(trace / EPISODES),
                "trace / trace in float64": own_trace / trace,
            }
            more = {"estimator": "rtg", "rounded": part}
            rows += [_row(name, *each, **more) for each in numbers.items()]
    return rows


def _gradient(world, network, params) -> np.ndarray:
    """The exact gradient of J in a network's parameters [P]: that of the table, by the chain rule."""
    flat, unravel = ravel_pytree(params)
    of = jax.jit(lambda x: _logits(network, unravel(x), _observations(world)))
    table, jacobian = np.asarray(of(flat)), np.asarray(jax.jacrev(of)(flat))
    return exact.gradient(world.mdp, table, world.gamma) @ jacobian.reshape(table.size, -1)


def _law(mdp, logits) -> np.ndarray:
    """The probabilities of all trajectories [N]."""
    return enumerate_trajectories(mdp, np.asarray(logits, np.float64)).probability


def gradient_moments(
    world: World, network: Network, params: Params, laws: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, float]]:
    """The mean [P] and trace of training's gradient of one episode, for every law [N] of the episodes.

    The steps of an episode are added up in float64.
    """
    listed = enumerate_trajectories(world.mdp, np.zeros_like(world.logits)).trajectory
    batch = assess(ESTIMATOR, listed, listed.log_prob, world.hyperparams)
    # Steps with equal rows have equal gradients, so each is taken once.
    fields = listed.obs, listed.action, batch.advantage, listed.mask
    columns = np.stack([np.asarray(x, np.float64).reshape(-1) for x in fields])
    _, once, index = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    index = index.reshape(listed.mask.shape)
    steps = jax.tree.map(lambda x: x.reshape(1, -1)[:, once], batch)
    each = np.asarray(_step_gradients(network, params, steps, world.hyperparams), np.float64)
    inner = each @ each.T
    squares = sum(inner[one, other] for one in index for other in index)
    total = {}
    for name, law in laws.items():
        mean = sum(np.bincount(step, law, len(each)) for step in index) @ each
        total[name] = mean, float(law @ squares - mean @ mean)
    return total


@partial(jax.jit, static_argnums=0)
def _step_gradients(network, params, steps, hyperparams):
    """[N, P] of steps [1, N]."""

    def gradient(step):
        def gain(params):
            return objective(ESTIMATOR, network, params, (), step, hyperparams)[0]

        return ravel_pytree(jax.grad(gain)(params))[0]

    return jax.vmap(gradient)(jax.tree.map(lambda x: x.reshape(-1, 1, 1), steps))


# The ratio in the first minibatch, where the parameters have not moved.


def ratio_rows(
    rounded: dict[str, Network], params: Params, states, clip_eps: float
) -> list[dict[str, Any]]:
    """|ratio - 1| that one step in 1 / RARE exceeds, and the share beyond clip_eps, at equal parameters.

    The update sums in another order than the rollout, or is in float32.
    """
    log_probs = {
        name: np.asarray(jax.nn.log_softmax(_logits(each, params, states)), np.float64)
        for name, each in rounded.items()
    }
    rows = []
    for name in ROUNDINGS:
        then = log_probs[name]
        weight = (np.exp(then) / len(then)).reshape(-1)
        for quantity, update in ((ALIKE, _other(name)), (RATIO, "float32")):
            far = np.abs(np.expm1(log_probs[update] - then)).reshape(-1)
            order = np.argsort(-far)
            beyond = int(np.searchsorted(np.cumsum(weight[order]), RARE))
            share = weight[far > clip_eps].sum()
            rows.append(_row(name, quantity, far[order][beyond]))
            rows.append(_row(name, quantity.replace("|ratio - 1|", "share clipped"), share))
    return rows


def _row(name, quantity, value, **more) -> dict[str, Any]:
    return {"rounding": name, "quantity": quantity, "exact": float(value), **more}


# The natural gradient, and the KL that bounds its steps.


def natural_rows(
    network: Network, rounded: dict[str, Network], params: Params, states, damping
) -> list[dict[str, Any]]:
    """Errors of the KL of steps along float64's natural gradient, and a rounded one's angle to it."""
    with wide():
        known, seen = widened(params), widened(states)
        true = np.asarray(_natural(network, known, seen, damping), np.float64)
        flat, unravel = ravel_pytree(known)
        moves = {}
        for target in KLS:
            move = 1e-3 * true / np.linalg.norm(true)
            for _ in range(6):  # the KL grows with the square of the step, nearly
                move = move * np.sqrt(
                    target / float(_kl(network, known, unravel(flat + move), seen))
                )
            moved = widened(np.asarray(flat + move, np.float32))
            moves[target] = np.asarray(moved), float(_kl(network, known, unravel(moved), seen))
    unravel, rows = ravel_pytree(params)[1], []
    for name in ROUNDINGS:
        for target, (moved, kl) in moves.items():
            found = float(_kl(rounded[name], params, unravel(jnp.asarray(moved)), states))
            rows.append(_row(name, KL, abs(found / kl - 1), kl=target))
        found = np.asarray(_natural(rounded[name], params, states, damping), np.float64)
        cosine = found @ true / np.linalg.norm(found) / np.linalg.norm(true)
        rows.append(_row(name, TURN, max(1 - cosine, 0.0)))
    return rows


@partial(jax.jit, static_argnums=0)
def _kl(network, old, new, states):
    first = jnp.zeros(states.shape[:2], bool)
    before, after = (network.apply(params, (), states, first)[1] for params in (old, new))
    return before.kl(after).mean()


@partial(jax.jit, static_argnums=0)
def _natural(network, params, states, damping):
    """(F + damping I)^-1 grad mean_s sum_a pi(a|s) A(s, a) [P], where A(s, a) is the a-th entry of s."""

    def gain(params):
        return (jax.nn.softmax(_logits(network, params, states)) * states[0, :, :2]).sum(1).mean()

    transform = precondition_by_fisher(damping)
    gradient, old = jax.grad(gain)(params), jax.lax.stop_gradient(params)
    step, _ = transform.update(
        gradient, transform.init(params), params, kl=lambda new: _kl(network, old, new, states)
    )
    return ravel_pytree(step)[0]


# What it comes to.


def _summary(rows) -> dict[str, Any]:
    """The worst number of each kind over all policies, and the roundings for which it is small enough.

    Biases count where rollouts and gradients round, and KLs of the largest step.
    """
    counted = [
        r for r in rows if r.get("rounded", "both") == "both" and r.get("kl", KLS[-1]) == KLS[-1]
    ]
    worst = {
        name: {
            q: max(r["exact"] for r in where(counted, rounding=name, quantity=q)) for q in LIMITS
        }
        for name in ROUNDINGS
    }
    enough = {q: [n for n in ROUNDINGS if worst[n][q] <= most] for q, most in LIMITS.items()}
    return {"limits": LIMITS, "worst": worst, "good_enough": enough}


def _draw(figure, rows, world):
    axes = panels(figure, 6)
    exceeded = f"|ρ − 1| of 1 step in {1 / RARE:g}"
    drawn = (
        (BIAS, f"Bias of {EPISODES} episodes, {world}", "bias / standard error", {"rounded": "both"}),
        ("trace / trace in float64", f"Variance of the gradient, {world}", "|ratio to float64 − 1|",
         {"rounded": "both"}),
        (ALIKE, "First minibatch, sums in another order", exceeded, {}),
        (RATIO, "First minibatch: update in float32", exceeded, {}),
        (KL, f"KL of a natural step, log-odds {TRAINED:g}", "relative error", {"odds": TRAINED}),
        (TURN, "Direction of the natural gradient", "1 − cosine to float64's", {}),
    )  # fmt: skip
    for axis, (quantity, title, unit, fields) in zip(axes, drawn, strict=True):
        for index, name in enumerate(ROUNDINGS):
            mine = where(rows, rounding=name, quantity=quantity, **fields)
            if quantity not in LIMITS:
                mine = [row | {"exact": abs(row["exact"] - 1)} for row in mine]
            draw_exact(axis, mine, "kl" if quantity == KL else "odds", index, name)
        if quantity in LIMITS:
            axis.axhline(LIMITS[quantity], color="0.4", linewidth=0.9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        across = (
            "KL per step in float64, nats" if quantity == KL else "log-odds of the policy (RMS)"
        )
        label(axis, title, across, unit, legend=False)
    legend(figure)
    caption(figure, "grey line: good enough below")


EXPERIMENTS = {
    "precision": Experiment(
        "what the rounding of a GPU's or TPU's products does to bias, ratios, KL and natural gradients",
        precision,
        Settings(),
        Settings(quick=True),
        worlds=("A", "T", "C"),
        ignores=("estimators", "policy", "trajectories", "repeats"),
    ),
}
