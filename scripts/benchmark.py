"""Speed of the command and of the laboratory, each case in a process of its own.

scripts/benchmark [CASE ...] [--json FILE] [--repeats N] [--quick]
scripts/benchmark programs --help    what programs cost on a GPU or TPU, by its compiler, without the device
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def output(*command: str, **environment: str) -> str:
    """The output of a process; if it fails, this program ends with its messages."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def process(*command: str, **environment: str) -> float:
    """Seconds of a whole process."""
    started = time.perf_counter()
    output(*command, **environment)
    return time.perf_counter() - started


def python(code: str) -> float:
    return process(sys.executable, "-c", code)


def startup(repeats: int, quick: bool) -> list[Row]:
    """The time that `import jaxpg` adds to its libraries', in alternation; and that of the command's help."""
    every = "; import jaxpg.training.trainer, jaxpg.policies, jaxpg.envs"
    libraries, package, console = [], [], []
    for _ in range(repeats):
        libraries.append(python("import jax, flax.linen, optax"))
        package.append(python(f"import jax, flax.linen, optax{every}"))
        console.append(process(sys.executable, "-m", "jaxpg", "--help"))
    added = [a - b for a, b in zip(package, libraries, strict=True)]
    return [
        {"case": "import jax, flax.linen, optax", "seconds": statistics.median(libraries)},
        {"case": "import jaxpg adds", "seconds": statistics.median(added)},
        {"case": "jaxpg --help", "seconds": statistics.median(console)},
    ]


def command(repeats: int, quick: bool) -> Iterator[Row]:
    """The default command and two others, from the start of the process to the evaluation of 8 seeds."""
    for algorithm in ("ppo", "reinforce_baseline", "vpg"):
        for seed in range(1 if quick else repeats):
            with tempfile.TemporaryDirectory() as parent:
                for cache in ("empty", "full"):
                    run = Path(parent, cache)
                    arguments = f"train CartPole-v1 --algorithm {algorithm} --seed {seed}"
                    command = [sys.executable, "-m", "jaxpg", *arguments.split()]
                    started = time.perf_counter()
                    said = output(
                        *(*command, "--run", str(run)),
                        JAX_COMPILATION_CACHE_DIR=f"{parent}/compiled",
                    )
                    seconds = time.perf_counter() - started
                    compiling = re.search(r"after ([\d.]+) s of compilation", said)
                    assert compiling
                    yield {
                        "case": f"train CartPole-v1 {algorithm} seed {seed}, {cache} cache",
                        "seconds": seconds,
                        "compile_seconds": float(compiling[1]),
                        **_found(run),
                    }


def _found(run: Path) -> Row:
    last = json.loads(run.joinpath("metrics.jsonl").read_text().splitlines()[-1])
    returns = json.loads(run.joinpath("evaluation.json").read_text())["mean_return"]
    return {
        "train_seconds": last["seconds"],
        "steps_per_second": sum(last["env_steps"]) / last["seconds"],
        "seeds_at_475": sum(value >= 475 for value in returns),
        "worst": min(returns),
    }


def laboratory(repeats: int, quick: bool) -> list[Row]:
    """Per-trajectory gradients of a tabular world, and streaming statistics of CartPole's."""
    import jax
    import numpy as np

    from jaxpg import Hyperparams
    from jaxpg.envs import from_gymnax, from_mdp
    from jaxpg.estimators import Estimator, credit, importance
    from jaxpg.lab import Source, gradient_samples, gradient_statistics
    from jaxpg.lab.worlds.world import world
    from jaxpg.policies import mlp

    hyperparams, rows = Hyperparams(), []
    a, num = world("A"), 10**5 if quick else 10**6
    estimators = {
        "total return": (Estimator(credit.total_return), None),
        "per-decision": (
            Estimator(importance=importance.per_decision),
            {"logits": a.table.behaviour_logits},
        ),
    }
    env = from_mdp(a.mdp)
    for name, (estimator, behaviour) in estimators.items():
        run = jax.jit(
            lambda key, estimator=estimator, behaviour=behaviour: gradient_samples(
                Source(env, a.policy, estimator, a.params, key, hyperparams, behaviour), num
            )
        )
        row = _timed(run, repeats)
        rows.append({"case": f"gradient_samples A, {name}, {num:.0e}", **row})
    env = from_gymnax("CartPole-v1")
    policy, num = mlp(env.observation, env.action), 10**3 if quick else 10**5
    params = policy.init(jax.random.key(0))
    started = time.perf_counter()
    found = gradient_statistics(
        Source(env, policy, Estimator(), params, jax.random.key(1), hyperparams), num
    )
    assert np.isfinite(found.trace.value)
    rows.append(
        {
            "case": f"gradient_statistics CartPole 2x64, {num:.0e} (with compile)",
            "seconds": time.perf_counter() - started,
            "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    )
    return rows + _probes(env, policy, params, hyperparams, repeats)


def _probes(env, policy, params, hyperparams, repeats: int) -> list[Row]:
    """The probes of the trace against a plain gradient, on one batch, in alternation."""
    import jax

    from jaxpg.estimators import Estimator
    from jaxpg.lab.measure import samples, traces

    source = samples.Source(env, policy, Estimator(), params, jax.random.key(2), hyperparams)
    chunk = jax.jit(lambda: samples.gather(source, 0, 64))()

    def plain(chunk):
        _, pull = jax.vjp(samples.log_probs(source, chunk.trajectory), params)
        return pull(chunk.coefficient / 64)

    key = jax.random.key(3)
    routes = {"plain gradient": jax.jit(plain)} | {
        name: jax.jit(lambda chunk, route=traces.ROUTES[name]: route(source, chunk, key))
        for name in ("jvp", "vjp", "trajectories")
    }
    seconds = {name: [] for name in routes}
    for run in routes.values():
        jax.block_until_ready(run(chunk))
    for _ in range(10 * repeats):
        for name, run in routes.items():
            started = time.perf_counter()
            jax.block_until_ready(run(chunk))
            seconds[name].append(time.perf_counter() - started)
    floor = statistics.median(seconds["plain gradient"])
    return [
        {
            "case": f"64 CartPole episodes: {name}",
            "seconds": statistics.median(values),
            "ratio": statistics.median(values) / floor,
        }
        for name, values in seconds.items()
    ]


def _timed(run: Any, repeats: int) -> Row:
    import jax

    key = jax.random.key(0)
    started = time.perf_counter()
    compiled = run.lower(key).compile()
    compile_seconds, seconds = time.perf_counter() - started, []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(key))
        seconds.append(time.perf_counter() - started)
    spread = max(seconds) - min(seconds)
    return {
        "seconds": statistics.median(seconds),
        "spread": spread,
        "compile_seconds": compile_seconds,
    }


def runs(repeats: int, quick: bool) -> list[Row]:
    """Time the command with a cold and a warm cache and on resuming; time a checkpoint and recording."""
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        updates = 40 if quick else 200
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{parent}/cache"}
        train = [sys.executable, "-m", "jaxpg", "train"]
        start = [*train, "CartPole-v1", "--seeds", "64", "--updates", str(updates), "--quiet"]
        for name in ("cold", "warm"):
            seconds = process(*start, "--run", f"{parent}/{name}", **caches)
            rows.append({"case": f"train 64 seeds, {name} cache", "seconds": seconds})
        for i in range(repeats):
            more = str(updates + updates // 20 * (i + 1))
            resume = [*train, "--resume", f"{parent}/warm", "--updates", more, "--quiet"]
            seconds = process(*resume, **caches)
            rows.append(
                {"case": "resume 64 seeds for one chunk, with evaluation", "seconds": seconds}
            )
        rows += _recording(Path(parent), repeats, updates)
    return rows


def _recording(parent: Path, repeats: int, updates: int) -> list[Row]:
    """Training with everything that is written and shown, against the bare program."""
    import jax

    from jaxpg.runs.config.config import points
    from jaxpg.runs.config.flags import parse
    from jaxpg.runs.host.progress import display
    from jaxpg.runs.store import folder as files
    from jaxpg.runs.store.checkpoint import on_host
    from jaxpg.runs.train import loop, run
    from jaxpg.runs.train.replicas import compile_programs, make_replicas

    flags = f"CartPole-v1 --seeds 64 --updates {updates} --run {parent / 'loop'}"
    experiment = run.prepare(*parse(flags.split(), "jaxpg train"))
    config, grid, parts, folder, _ = experiment
    replicas = make_replicas(config, points(grid))
    bare, recorded, saves, inside, shares = [], [], [], [], []

    def paired(state, hyperparams):
        """Run a chunk of the recorded run, after one of an unrecorded twin."""
        started = time.perf_counter()
        twin[0] = jax.block_until_ready(train(twin[0], hyperparams)[0])
        between = time.perf_counter()
        found = jax.block_until_ready(train(state, hyperparams))
        bare.append(between - started)
        inside.append(time.perf_counter() - between)
        return found

    with loop.workers() as executor, display(False) as show:
        job = loop.TrainingJob(config, grid, parts, folder, replicas, executor, lambda: 0, show)
        chunk = loop.chunk_length(updates)
        programs = compile_programs(parts, replicas, config, chunk, executor)
        train, init = programs.train.result(), programs.init.result()  # type: ignore[union-attr]
        for i in range(repeats):
            (parent / str(i)).mkdir()
            about = files.description(config, grid, replicas.labels)
            files.write_json(parent / str(i) / files.CONFIG, about, exact=True)
            recorder = run._recorder(job._replace(folder=parent / str(i)), (), 0, {})
            twin = [init(replicas.keys)]
            state, progress = init(replicas.keys), loop.Progress(0, [0] * 64, 0.0, {})
            bare.clear()
            inside.clear()
            started = time.perf_counter()
            state, *_ = loop.train_chunks(job, paired, state, progress, recorder, 0.0)
            recorded.append(time.perf_counter() - started - sum(bare))
            shares.append((recorded[-1] / sum(bare) - 1, 1 - sum(inside) / recorded[-1]))
            started = time.perf_counter()
            recorder.checkpoints.save(updates + 1, on_host(state), {}, 0.0)
            blocked = time.perf_counter() - started
            recorder.checkpoints.wait()
            saves.append((time.perf_counter() - started, blocked))
    seconds, blocked = zip(*saves, strict=True)
    added, between = zip(*shares, strict=True)
    return [
        {
            "case": f"{updates} updates of 64 agents with metrics, progress and two checkpoints",
            "seconds": statistics.median(recorded),
            # Against an unrecorded twin, chunk by chunk in alternation.
            "share_added": statistics.median(added),
            "lowest": min(added),
            "highest": max(added),
            "share_between_chunks": statistics.median(between),
        },
        {
            "case": "checkpoint of 64 agents",
            "seconds": statistics.median(seconds),
            "blocking_seconds": statistics.median(blocked),
        },
    ]


def rounding(repeats: int, quick: bool) -> Iterator[Row]:
    """How far a seed's parameters drift when other seeds are trained with it: no time is measured."""
    import jax
    import numpy as np

    from jaxpg.runs.train.saved import read_run

    updates = "4" if quick else "100"
    for algorithm in ("ppo", "reinforce_baseline"):
        with tempfile.TemporaryDirectory() as parent:
            found = {}
            for seeds in (8, 4, 1):
                arguments = f"train CartPole-v1 --algorithm {algorithm} --seeds {seeds} --quiet"
                command = [sys.executable, "-m", "jaxpg", *arguments.split()]
                output(*command, "--updates", updates, "--run", f"{parent}/{seeds}")
                found[seeds] = jax.tree.leaves(read_run(f"{parent}/{seeds}").params)
            for seeds in (4, 1):
                pairs = zip(found[8], found[seeds], strict=True)
                differences = [np.abs(one[:seeds] - other).max() for one, other in pairs]
                yield {
                    "case": f"{updates} updates of {algorithm}, 8 seeds against {seeds}",
                    "largest_difference_of_a_parameter": float(max(differences)),
                }


def training(repeats: int, quick: bool) -> Iterator[Row]:
    """See benchmark_training.py."""
    from benchmark_training import training

    return training(repeats, quick)


def peers(repeats: int, quick: bool) -> Iterator[Row]:
    """See benchmark_training.py. Installs the peers' environments, so it runs only when asked for."""
    from benchmark_training import peers

    return peers(repeats, quick)


CASES = {
    "startup": startup,
    "command": command,
    "laboratory": laboratory,
    "runs": runs,
    "rounding": rounding,
    "training": training,
}


def main() -> None:
    if sys.argv[1:2] == ["programs"]:
        import benchmark_programs

        benchmark_programs.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; default: all"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows and versions to FILE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to try the script itself"
    )
    parser.add_argument(
        "--peers", action="store_true", help="compare PPO with rejax and stable-baselines3"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {min(unknown)!r}; use {', '.join(CASES)}")
    rows = []
    cases = [CASES[name] for name in chosen.cases or ([] if chosen.peers else CASES)]
    for case in [*cases, *([peers] if chosen.peers else [])]:
        for row in case(chosen.repeats, chosen.quick):
            rows.append(row)
            values = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "case")
            print(f"{row['case']}\n    {values}", flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1))


def _machine() -> Row:
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
