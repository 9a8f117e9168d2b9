"""Health: runs that diverge, that do not fit in memory, or that have too few updates to learn."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpg.envs import Env
from jaxpg.memory import available_bytes, check_fits, giga, needed_bytes
from jaxpg.rollout.stepping import reset_lanes, step_lanes
from jaxpg.runs.config.config import Config
from jaxpg.runs.config.rows import counts_of
from jaxpg.runs.console import Ended
from jaxpg.training.algorithm import algorithm

# A run has diverged when one of these is not finite; NaN in any other metric means no value yet.
WATCHED = ("objective", "critic_loss", "grad_norm", "entropy")
FEW_UPDATES = 100
REPLICA_BYTES = 2000  # host memory per replica, besides its state
PACKAGE, JAX = Path(__file__).parents[2], Path(jax.__file__).parent
MANY_STEPS = 100_000  # steps of one agent, enough for FEW_UPDATES or more
MANY_EPISODES = 2**16  # of all agents; fewer fit, unless networks are huge


class Diverged(Ended):
    """A loss or a parameter is no longer finite."""


def first_divergence(update: np.ndarray, metrics: dict[str, np.ndarray]) -> list[tuple[int, str]]:
    """For each replica, the first update at which a watched metric is not finite, and the metric's name.

    update: [K]; metrics: [N, K] each. A replica without any has (0, "").
    """
    names = [name for name in WATCHED if name in metrics]
    found = []
    for i in range(len(next(iter(metrics.values())))):
        bad = [(int(update[k]), name) for name in names if (k := _first(metrics[name][i])) >= 0]
        found.append(min(bad, key=lambda each: each[0], default=(0, "")))
    return found


def _first(values) -> int:
    bad = ~np.isfinite(values)
    return int(bad.argmax()) if bad.any() else -1


def finite(params: Any) -> np.ndarray:
    """[N] bool: whether every parameter of a replica is finite; params: arrays [N, ...]."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(params)]
    floats = [x for x in leaves if np.issubdtype(x.dtype, np.floating)]
    return np.all([np.isfinite(x).reshape(len(x), -1).all(axis=1) for x in floats], axis=0)


def diverged_message(label: dict[str, float], replica: int, update: int, what: str) -> str:
    """Says which replica diverged, when, in which number, and with which hyperparameters."""
    numbers = ", ".join(f"{k.strip('_')}={v:g}" for k, v in label.items() if k != "seed")
    return (
        f"seed {label['seed']:g} (replica {replica}) diverged: {what} is not finite at update "
        f"{update}, with {numbers}"
    )


def starving(updates: int, steps_per_update: int) -> str:
    """A warning if large batches leave too few updates, otherwise ""."""
    if updates >= FEW_UPDATES or updates * steps_per_update < MANY_STEPS:
        return ""
    return (
        f"warning: only {updates} updates of {steps_per_update:,} steps each; large batches\n"
        "starve learning: with smaller ones (--num-envs, --num-steps) the same steps\n"
        f"make more updates; a run usually needs at least about {FEW_UPDATES} to learn"
    )


def check_sizes(config: Config, env: Env, state_bytes: int, replicas: int) -> None:
    """Raises ValueError, before anything is allocated, for sizes that cannot fit in memory.

    state_bytes: the size of one replica's state, which an update holds twice, before and after. The estimate
    is a lower bound: `check_memory` may still refuse what passes here.
    """
    available = available_bytes()
    if available is None or config.force:
        return
    start = jax.eval_shape(env.reset, jax.random.key(0))
    lane, row = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(x)) for x in (start, start[1])
    )
    # A large batch of whole episodes in one minibatch is not kept, but rolled out again.
    data, counts = algorithm(config.algorithm).data, counts_of(config)
    kept = not data.repeats or counts["num_minibatches"] > 1
    batch = max(2 * lane, row * num_steps(config, env) * kept)
    epochs = counts["num_epochs"] + counts["critic_epochs"]
    agent = 2 * state_bytes + REPLICA_BYTES
    for what, noun, one, count, remedy in (
        (
            "one agent's batch of",
            "environment",
            batch,
            config.num_envs,
            "--num-envs or --num-steps",
        ),
        (
            "the states of",
            "agent",
            agent,
            replicas,
            "--seeds or --num-envs, or a narrower --hidden",
        ),
        ("evaluating", "episode", 2 * lane * replicas, config.evaluation_episodes, "episodes"),
        ("the metrics of", "epoch", 4 * replicas, epochs, "epochs"),
    ):
        check_fits(available, one, count, what, noun, f"give fewer {remedy}, or --force to try")


def num_steps(config: Config, env: Env) -> int:
    """Steps per environment and update; for whole episodes, the largest number."""
    usual = env.horizon if algorithm(config.algorithm).data.whole_episodes else 128
    return config.num_steps or usual


def check_memory(compiled: Any, replicas: int = 1, force: bool = False) -> None:
    """Raises ValueError if a compiled program for this many replicas needs more memory than there is."""
    needed, available = needed_bytes(compiled), available_bytes()
    if force or needed is None or available is None or needed <= available:
        return
    fits = int(replicas * available / needed)
    more = f"about {fits:,} of {replicas:,} agents fit; " if fits else ""
    raise ValueError(
        f"training needs about {giga(needed)} of memory, and there is {giga(available)}; {more}give "
        "fewer --seeds, --num-envs or --num-steps, or a smaller grid, or --force to try"
    )


def check_episodes(compiled: Any, count: int, remedy: str = "give fewer") -> None:
    """Raises ValueError if a compiled program of this many episodes needs more memory than there is."""
    each = (needed_bytes(compiled) or 0) / count
    check_fits(available_bytes(), each, count, "playing", "episode", remedy)


def explain(environment: str, update: Callable, *arguments: Any) -> str:
    """Runs one update operation by operation, and says which first gave a NaN; "" if none does.

    Rewards and observations come first, so a NaN of the environment is reported as its own. Infinities are
    not watched, because jax's check stops at the -inf from which every maximum starts.
    """
    called = step_lanes.__name__, reset_lanes.__name__
    with jax.debug_nans(True), jax.disable_jit():
        try:
            update(*arguments)
        except FloatingPointError as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]
            own = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
            text = str(error).splitlines()[0]
            if any(
                f.name in called and f.filename == str(PACKAGE / "rollout" / "stepping.py")
                for f in own
            ):
                own = [f for f in frames if not Path(f.filename).is_relative_to(JAX)]
                text = f"{environment} gave it, in its reset or step: {text}"
            return text + (f" at {own[-1].filename}:{own[-1].lineno}" if own else "")
    return ""
