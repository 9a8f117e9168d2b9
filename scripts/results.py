"""Measure what each method learns, on fresh episodes: every case is one `jaxpg train` command.

scripts/results [CASE ...] [--out DIR] [--quick]
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.stats.intervals import attained
from jaxpg.stats.seeds import interval, number, robust, summarise

ROOT = Path(__file__).parent.parent
EPISODES, SEEDS = 128, 10
Row = dict[str, Any]


class Case(NamedTuple):
    arguments: str  # of jaxpg train, beyond seeds and episodes
    target: float | None  # the mean should reach it; None: a control, which should not
    digits: int = 1
    record: str | None = None  # arguments of jaxpg record, which makes demonstrations.npz first


DEEP = "DeepSea-bsuite --settings size=12,max_steps_in_episode=12"
TEACH = f"{DEEP} --expert --episodes 20"
LEARN = f"{DEEP} --updates 200 --num-envs 32 --learning-rate 1e-2"
NO_VELOCITIES = "CartPole-v1 --keep 0,2 --normalise"
# Of 30 seeds, 4 ended below 475 at the preset's rates of 2.5e-3 with 300 updates, and 2 with these.
SLOWER = "--hidden 64,64 --updates 500 --learning-rate 1e-3 --critic-learning-rate 1e-3"
CASES = {
    "cartpole-reinforce_baseline": Case("CartPole-v1 --algorithm reinforce_baseline", 475),
    "cartpole-vpg": Case("CartPole-v1 --algorithm vpg", 475),
    "cartpole-a2c": Case("CartPole-v1 --algorithm a2c", 475),
    "cartpole-npg": Case("CartPole-v1 --algorithm npg", 475),
    "cartpole-trpo": Case("CartPole-v1 --algorithm trpo", 475),
    "cartpole-ppo": Case("CartPole-v1", 475),
    "acrobot-ppo": Case("Acrobot-v1", -90),
    "acrobot-trpo": Case("Acrobot-v1 --algorithm trpo", -90),
    "pendulum-ppo": Case("Pendulum-v1", -200),
    "pendulum-trpo": Case("Pendulum-v1 --algorithm trpo", -200),
    "mountaincar-ppo": Case("MountainCar-v0", -130),
    "mountaincar-repeat": Case("MountainCar-v0 --repeat 8", -130),
    "mountaincar-plain": Case("MountainCar-v0 --no-normalise", None),
    "mountaincarcontinuous-ppo": Case("MountainCarContinuous-v0", 85),
    "mountaincarcontinuous-single": Case("MountainCarContinuous-v0 --repeat 1", None),
    "catch-ppo": Case("Catch-bsuite", 0.95, 2),
    "memorychain-gru": Case("MemoryChain-bsuite", 0.95, 2),
    "memorychain-history": Case("MemoryChain-bsuite --network mlp --history 6", 0.95, 2),
    "memorychain-memoryless": Case("MemoryChain-bsuite --network mlp", None, 2),
    "hidden-history": Case(f"{NO_VELOCITIES} --history 3 {SLOWER}", 475),
    "hidden-gru": Case(
        f"{NO_VELOCITIES} --network gru --hidden 32 --algorithm trpo --num-envs 64 --num-steps 64",
        475,
    ),
    "hidden-memoryless": Case(f"{NO_VELOCITIES} {SLOWER}", None),
    "deepsea-guided": Case(
        f"{LEARN} --algorithm guided --demonstrations demonstrations.npz", 0.95, 2, TEACH
    ),
    "deepsea-cloning": Case(
        f"{LEARN} --algorithm behaviour_cloning --demonstrations demonstrations.npz", None, 2, TEACH
    ),
    "deepsea-reinforce": Case(f"{LEARN} --algorithm reinforce_baseline", None, 2),
}


def run(name: str, quick: bool) -> Row:
    """Run one case in a process of its own."""
    case = CASES[name]
    small = ["--updates", "2", "--seeds", "2", "--evaluation-episodes", "4"]
    full = ["--seeds", str(SEEDS), "--evaluation-episodes", str(EPISODES)]
    given = shlex.split(case.arguments) + (small if quick else full)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "run")
        if case.record:
            _jaxpg(parent, "record", *shlex.split(case.record), "--out", "demonstrations.npz")
        _jaxpg(parent, "train", *given, "--quiet", "--run", str(folder))
        evaluation = json.loads(folder.joinpath("evaluation.json").read_text())
        last = json.loads(folder.joinpath("metrics.jsonl").read_text().splitlines()[-1])
        config = json.loads(folder.joinpath("config.json").read_text())["config"]
    names = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")
    versions = [f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]
    return {
        "command": f"jaxpg train {case.arguments}",
        "returns": evaluation["mean_return"],
        "episodes": evaluation["episodes"],
        # Steps of the environment itself, where one decision takes several.
        "steps": max(last["env_steps"]) * config["repeat"],
        "seconds": last["seconds"],
        "machine": f"{os.cpu_count()} CPU cores; {', '.join(versions)}",
    }


def _jaxpg(folder: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "jaxpg", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def cells(name: str, row: Row) -> list[str]:
    """The cells of the table's line for this case."""
    _, target, digits, _ = CASES[name]
    returns = np.array(row["returns"])
    mean, middle = summarise(returns, attained(returns)), robust(returns)
    return [
        f"`{row['command']}`",
        "control" if target is None else f"{target:g}",
        f"{number(mean.mean, digits)} {interval(mean, digits)}",
        f"{number(middle.value, digits)} {interval(middle, digits)}",
        number(mean.smallest, digits),
        f"{row['steps']:.2g}",
        f"{row['seconds']:.0f}",
    ]


COLUMNS = ["command", "target", "mean", "interquartile mean", "worst seed", "steps", "seconds"]
PAGE = """# What each method learns

`scripts/results` writes this page; `scripts/results CASE` updates one line of it.

{table}

Returns are undiscounted, averaged over {episodes} fresh episodes for each of {seeds} seeds, with sampled
actions. Brackets hold 95 % intervals over seeds: Student's t for the mean where it stays within the range of
the seeds, and the bootstrap otherwise and for the interquartile mean. Steps are the environment steps of one
agent. Seconds are the time to train all seeds together, without compilation. {machines}.

Settings that a command leaves out come from the presets, which `jaxpg train ENV --help` shows; with
`--seeds {seeds}` it reproduces its line.

- **MountainCar** pays -1 a step until the goal. Its preset normalises observations (`--normalise`), because
  velocities are in hundredths: unscaled, no seed finds the goal. `--repeat 8` takes every action 8
  times, which explores farther and uses more environment steps.
- **MountainCarContinuous** fines every action and pays at the goal only, so standing still is a trap. The
  preset normalises and repeats actions 8 times, so that noise adds up; single actions are the control.
- **MemoryChain** shows a bit at the start and asks for it five steps later. A GRU (the preset) and a
  history of six observations remember it; without memory, a guess is worth 0.
- **CartPole without velocities** (`--keep 0,2`) needs several observations; the control sees only the last.
  With `--seed 1`, `2` and `3`, three observations bring 28 of the 30 seeds above 475; their mean is 494.
- **DeepSea** of 12 rows pays 1 for one of 2^12 paths and fines every step of it. `demonstrations.npz` comes
  from `jaxpg record {teach} --out demonstrations.npz`,
  an expert that slips once in four episodes. REINFORCE alone never sees the reward in as many steps;
  imitation slips as the expert does; guided does better than its teacher.
"""


def page(rows: dict[str, Row]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [cells(name, rows[name]) for name in CASES if name in rows]
    return PAGE.format(
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
        episodes=EPISODES,
        seeds=SEEDS,
        teach=TEACH,
        machines=". ".join(sorted({row["machine"] for row in rows.values()})),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/results", description=__doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; default: all"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of results.json and results.md to update"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny runs, to try the script itself; needs --out"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {min(unknown)!r}; use {', '.join(CASES)}")
    if chosen.quick and not chosen.out:
        parser.error("--quick must not overwrite the page of this repository; give --out DIR")
    out = Path(chosen.out or ROOT / "scripts")
    stored = out / "results.json"
    rows = json.loads(stored.read_text()) if stored.exists() else {}
    for name in chosen.cases or CASES:
        rows[name] = run(name, chosen.quick)
        print("  ".join([name, *cells(name, rows[name])[1:]]), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(rows, indent=1) + "\n")
        out.joinpath("results.md").write_text(page(rows))


if __name__ == "__main__":
    main()
