"""Speed of training: cases against a floor measured in the same run, and against peers.

The floor of a step is the work that cannot be left out, each part timed alone at its best: the environment's
bare transition, the policy's forward pass and one draw, and one gradient pass in blocks of the best size.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import Env, from_gymnax
from jaxpg.estimators import assess
from jaxpg.policies import Agent, actor_critic, init_params
from jaxpg.rollout import episodes, init_stream, unroll
from jaxpg.training.accumulation import gradient_of
from jaxpg.training.algorithm import Algorithm, algorithm

# Otherwise this process would take most of a GPU's memory before a peer's starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Row = dict[str, Any]
STEPS = 128
LARGE = (10**3, 10**4, 10**5, 10**6)  # episodes per update
PEERS = {"rejax": ("rejax==0.1.3", "gymnax<1"), "sb3": ("stable-baselines3",)}


def measured(run: Callable, *arguments, repeats: int) -> Row:
    """Compile seconds, steady seconds of several runs after a first, and the memory that the program needs.

    repeats: with 0 the first run itself counts, for programs that take minutes.
    """
    started = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    compile_seconds, seconds = time.perf_counter() - started, []
    out = None
    for _ in range(repeats + 1):
        started = time.perf_counter()
        out = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - started)
    seconds = seconds[1:] or seconds
    memory: Any = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "compile_seconds": compile_seconds,
        "seconds": statistics.median(seconds),
        "spread": max(seconds) - min(seconds),
        "gigabytes": size / 2**30,
        "out": out,
    }


def floor(env: Env, agent: Agent, params: Any, lanes: int, passes: int, repeats: int) -> Row:
    """Seconds per environment step of each part alone; passes: gradient passes over each step."""
    length = 128
    state, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), lanes))
    first = jnp.zeros((1, lanes), bool)
    policy = agent.policy

    def act(obs, key):
        _, distribution = policy.apply(params.policy, policy.initial_carry(lanes), obs[None], first)
        return jax.tree.map(lambda x: x[0], distribution).sample(key)

    def step(state, action):
        # One step's keys for all lanes, which a deterministic environment never reads.
        keys = jax.random.split(jax.random.key(0), lanes)
        return jax.vmap(env.step)(keys, state, action)[0], None

    def transitions(state, action):
        return jax.lax.scan(lambda s, _: step(s, action), state, length=length)[0]

    def forwards(obs, key):
        # The observation depends on the action, or the compiler would drop the computation.
        def once(obs, t):
            action = act(obs, jax.random.fold_in(key, t))
            return obs + 1e-3 * action.reshape(lanes, *[1] * (obs.ndim - 1)), None

        return jax.lax.scan(once, obs, jnp.arange(length))[0]

    action = act(obs, jax.random.key(1))
    stepping = measured(transitions, state, action, repeats=repeats)["seconds"]
    acting = measured(forwards, obs, jax.random.key(2), repeats=repeats)["seconds"]
    bare = agent._replace(critic=None)
    batch, _ = episodes(
        env, bare, params._replace(critic=()), jax.random.key(3), lanes, min(length, env.horizon)
    )
    batch = batch._replace(mask=jnp.ones_like(batch.mask))
    estimator = algorithm("reinforce").estimator
    assessed = assess(estimator, batch, batch.log_prob, Hyperparams())
    carry = policy.initial_carry(lanes)

    def gradient(block, params):
        return gradient_of(estimator, policy, params, carry, assessed, Hyperparams(), block)[0]

    improving = min(
        measured(partial(gradient, block), params.policy, repeats=repeats)["seconds"]
        for block in (128, 512, 2048, 10**9)
    )
    steps = lanes * length
    return {
        "stepping": stepping / steps,
        "acting": acting / steps,
        "improving": passes * improving / (lanes * batch.mask.shape[0]),
    }


def trained(
    row: Algorithm, env: Env, agent: Agent, num_envs: int, num_steps: int | None, updates: int
) -> tuple[Callable, Any]:
    """(state, numbers) -> (state, metrics) after this many updates, and a fresh state."""
    trainer = make_trainer(env, agent, row, num_envs=num_envs, num_steps=num_steps)
    return partial(train, trainer, num_updates=updates), trainer.init(jax.random.key(0))


def numbers(rate: float, **others: float) -> Hyperparams:
    found = Hyperparams(learning_rate=rate, critic_learning_rate=rate, **others)
    return jax.tree.map(jnp.float32, found)


def report(name: str, found: Row, steps: float, base: Row | None = None) -> Row:
    row = {"case": name, "steps_per_second": steps / found["seconds"]}
    row["spread_percent"] = 100 * found["spread"] / found["seconds"]
    row |= {key: found[key] for key in ("compile_seconds", "gigabytes")}
    if base is not None:
        row["of_floor"] = steps * sum(base.values()) / found["seconds"]
    return row


def training(repeats: int, quick: bool) -> Iterator[Row]:
    """Rollout, REINFORCE in large batches, PPO in the peers' setting, many agents, MinAtar.

    Cases for accelerators alone run only on one; with --quick they run everywhere, at small sizes.
    """
    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, hidden=(64, 64))
    params = init_params(agent, jax.random.key(0))
    for lanes in (64,) if quick else (64, 1024, 16384):
        state = init_stream(env, agent, jax.random.key(0), lanes)
        run = partial(unroll, env, agent, num_steps=STEPS)
        found = measured(run, params, state, jax.random.key(1), repeats=repeats)
        base = floor(env, agent, params, lanes, 0, repeats)
        yield report(f"rollout with critic, {lanes} lanes", found, lanes * STEPS, base)
    yield from _reinforce(env, agent, repeats, (100,) if quick else LARGE)
    for lanes in (4, 64) if quick else (4, 64, 1024, 4096):
        updates = max(2, min(100, 2**17 // (lanes * STEPS)))
        row = algorithm("ppo")
        run, state = trained(row, env, agent, lanes, STEPS, updates)
        found = measured(run, state, numbers(1e-3, entropy_coef=0.01), repeats=repeats)
        # Four epochs of policy and critic: eight passes over every step.
        base = floor(env, agent, params, lanes, 8, repeats)
        yield report(f"PPO 4x4, {lanes} environments", found, lanes * STEPS * updates, base)
    yield _agents(env, agent, 8 if quick else 64, (16, 64, 20), repeats)
    if not quick:
        yield _breakout(1, 5, repeats)
    if quick or jax.default_backend() != "cpu":
        yield from _wide(env, agent, repeats, quick)


def _wide(env: Env, agent: Agent, repeats: int, quick: bool) -> Iterator[Row]:
    """Batches, agents, and agents on MinAtar, as many as fill an accelerator."""
    for lanes in (128,) if quick else (2**14, 2**16, 2**18):
        run, state = trained(algorithm("a2c"), env, agent, lanes, STEPS, 3)
        found = measured(run, state, numbers(1e-3), repeats=repeats)
        name = f"actor-critic, one step per rollout, {lanes} environments"
        yield report(name, found, lanes * STEPS * 3)
    # 5e5 steps of each agent, as published for another trainer.
    count, updates = (4, 2) if quick else (2048, 977)
    yield _agents(env, agent, count, (4, STEPS, updates), 0)
    count, updates = (2, 1) if quick else (300, 5)
    yield _breakout(count, updates, repeats)


def _reinforce(env, agent, repeats, counts) -> Iterator[Row]:
    """One gradient per rollout, at the length of episodes that a half-trained policy has."""
    bare = agent._replace(critic=None)
    row = algorithm("reinforce_baseline")
    warm, state = trained(row, env, bare, 64, None, 40)
    state, metrics = jax.jit(warm)(state, numbers(1e-2))
    length = float(metrics["episode_length"][-1])
    base = floor(env, bare, state.params, 1024, 1, repeats)
    for count in counts:
        # Several updates, as in training: the first pays for memory that the others use again.
        run, fresh = trained(row, env, bare, count, None, 4 if count <= 10_000 else 1)
        start = fresh._replace(params=state.params)
        often = 0 if count == LARGE[-1] and jax.default_backend() == "cpu" else repeats
        found = measured(run, start, numbers(0.0), repeats=often)
        steps = int(found["out"][1]["env_steps"].sum())
        name = f"REINFORCE, {count:,} episodes of {length:.0f} steps per update"
        yield report(name, found, steps, base)


def _agents(env, agent, count, sizes, repeats) -> Row:
    num_envs, num_steps, updates = sizes
    row = algorithm("ppo")
    trainer = make_trainer(env, agent, row, num_envs=num_envs, num_steps=num_steps)
    states = jax.jit(jax.vmap(trainer.init))(jax.random.split(jax.random.key(0), count))
    together = jax.vmap(partial(train, trainer, num_updates=updates), in_axes=(0, None))
    found = measured(together, states, numbers(1e-3), repeats=repeats)
    steps = num_envs * num_steps * updates
    return report(f"{count} PPO agents side by side, {steps:.1e} steps each", found, count * steps)


def _breakout(count, updates, repeats) -> Row:
    env = from_gymnax("Breakout-MinAtar")
    agent = actor_critic(env, hidden=(64, 64))
    row = _agents(env, agent, count, (64, STEPS, updates), repeats)
    return row | {"case": f"PPO 4x4 on MinAtar Breakout, 64 environments, {count} agents"}


def peers(repeats: int, quick: bool) -> Iterator[Row]:
    """PPO in one setting against peers, each run in a process of its own, in alternation."""
    accelerated = () if jax.default_backend() == "cpu" else (4096,)
    for lanes in (64,) if quick else (4, 64, 1024, *accelerated):
        updates = max(4, (2**15 if quick else 10**6) // (lanes * STEPS))
        for name in PEERS:
            python = peer_environment(name)
            if python is None:
                yield {"case": f"{name} could not be installed"}
                continue
            yield _against(name, python, lanes, updates, repeats)
    yield from _from_cold(1 if quick else repeats)


SEEDS, ENOUGH = 8, 475  # agents, and the return that each must reach
BUDGETS = (100_000, 150_000, 200_000, 300_000, 400_000, 600_000)  # steps per agent, for a peer


def _from_cold(repeats: int) -> Iterator[Row]:
    """Whole processes from start to the returns of 8 seeds, all at 475, in alternation.

    jaxpg runs its default command, which also fills a run's folder. A peer trains and evaluates once, in its
    own setting for CartPole, with the smallest of BUDGETS at which all its seeds reach 475; a user would have
    to know it.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder, found = Path(parent), {}
        for seed in range(repeats):
            for cache in ("empty", "full"):
                arguments = f"train CartPole-v1 --seed {seed} --quiet --run {folder}/{cache}{seed}"
                command = [sys.executable, "-m", "jaxpg", *arguments.split()]
                seconds = _process(command, folder / f"jaxpg{seed}")[0]
                run = folder / f"{cache}{seed}"
                returns = json.loads((run / "evaluation.json").read_text())["mean_return"]
                arrived = sum(value >= ENOUGH for value in returns)
                last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                row = (seconds, arrived, last["env_steps"][0])
                found.setdefault(("jaxpg", cache), []).append(row)
            for name in PEERS:
                python = peer_environment(name)
                # stable-baselines3 takes minutes, and is too far off for its ratio to need more runs.
                if python is not None and not (name == "sb3" and seed):
                    for cache, row in _peer_from_cold(name, python, folder, seed):
                        found.setdefault((name, cache), []).append(row)
    own = {
        cache: statistics.median(r[0] for r in found["jaxpg", cache]) for cache in ("empty", "full")
    }
    for (name, cache), rows in found.items():
        seconds, arrived, steps = (list(column) for column in zip(*rows, strict=True))
        yield {
            "case": f"{SEEDS} seeds at {ENOUGH} from a cold process: {name}, {cache} cache",
            "seconds": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
            "seeds_arrived": statistics.mean(arrived),
            "steps_per_seed": statistics.mean(steps),
            "of_jaxpg_empty": statistics.median(seconds) / own["empty"],
            "of_jaxpg_full": statistics.median(seconds) / own["full"],
        }


def _peer_from_cold(name: str, python: str, folder: Path, seed: int) -> Iterator[tuple[str, tuple]]:
    script = str(Path(__file__).with_name("peers.py"))
    for steps in BUDGETS:
        command = [python, script, f"{name}-seeds", str(SEEDS), str(steps), str(seed)]
        cache = folder / f"{name}{seed}-{steps}"
        seconds, out = _process(command, cache)
        arrived = sum(value >= ENOUGH for value in json.loads(out.splitlines()[-1])["returns"])
        if arrived == SEEDS or steps == BUDGETS[-1]:
            yield "empty", (seconds, arrived, steps)
            if name == "rejax":
                yield "full", (_process(command, cache)[0], arrived, steps)
            return


def _process(command: list[str], cache: Path) -> tuple[float, str]:
    """Seconds and output of a whole process with its own compilation cache."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | variables
    )
    return time.perf_counter() - started, done.stdout


def _against(name, python, lanes, updates, repeats) -> Row:
    theirs, ours, found, mine = [], [], {}, {}
    # Much slower, so it gets a part of the budget, and its return is not comparable.
    fewer = max(1, updates // 20) if name == "sb3" else updates
    for _ in range(repeats):
        found = _speed(python, name, lanes, fewer)
        theirs.append(lanes * STEPS * fewer / found["seconds"][0])
        mine = _speed(sys.executable, "jaxpg", lanes, updates)
        ours.append(lanes * STEPS * updates / mine["seconds"][0])
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "case": f"PPO 4x4, {lanes} environments, against {name}",
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "steps_per_second": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "compile_seconds": mine["compile_seconds"],
        "their_compile_seconds": found["compile_seconds"],
        "return": mine["return"],
        "their_return": found["return"],
    }


def _speed(python: str, name: str, lanes: int, updates: int) -> Row:
    """The speed of one run, the first after its compilation, in a process of its own."""
    script = str(Path(__file__).with_name("peers.py"))
    command = [python, script, name, str(lanes), str(updates), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peer_environment(name: str) -> str | None:
    """The interpreter of the peer's own environment, made at first use; None if that fails."""
    import venv

    folder = Path(__file__).resolve().parent.parent / f".venv-{name}"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {' '.join(PEERS[name])} into {folder.name}", file=sys.stderr)
        venv.create(folder, with_pip=True)
    wanted = [*PEERS[name], f"jax{_extra()}=={jax.__version__}"] if name == "rejax" else PEERS[name]
    if name == "sb3":
        wanted = (*wanted, "gymnasium")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    return str(python) if done.returncode == 0 else None


def _extra() -> str:
    """The extra with which pip installs jax for the device that this process computes on."""
    if jax.default_backend() == "tpu":
        return "[tpu]"
    plugins = {"jax-cuda12-plugin": "[cuda12]", "jax-cuda13-plugin": "[cuda13]"}
    installed = (extra for name, extra in plugins.items() if _installed(name))
    return next(installed, "")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
