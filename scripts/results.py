"""Measure what each method learns, on fresh episodes: every case is one `jaxpg train` command.

scripts/results [CASE ...] [--out DIR] [--quick]
scripts/results suites            tasks of other suites and MinAtar's games, against untrained policies
scripts/results minatar --long    MinAtar's games for 10^7 steps, which is for an accelerator
"""

import argparse
import itertools
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

from jaxpg.runs.config.flags import parse
from jaxpg.stats.intervals import attained
from jaxpg.stats.seeds import interval, number, robust, summarise

ROOT = Path(__file__).parent.parent
EPISODES, SEEDS = 128, 10
QUICK = ["--updates", "2", "--seeds", "2", "--evaluation-episodes", "4"]
Row = dict[str, Any]


class Case(NamedTuple):
    arguments: str  # of jaxpg train, beyond seeds and episodes
    target: float | None  # the mean should reach it; None: a control, which should not
    digits: int = 1
    record: str | None = None  # arguments of jaxpg record, which makes demonstrations.npz first
    seeds: int = SEEDS
    untrained: bool = False  # measured against the policy that training starts from


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
    "pendulum-tanh": Case("Pendulum-v1 --distribution tanh", -200),
    "pendulum-beta": Case("Pendulum-v1 --distribution beta", -200),
    "cartpole-shared": Case("CartPole-v1 --shared-torso --normalise-rewards", 475),
    "acrobot-shared": Case("Acrobot-v1 --shared-torso --normalise-rewards", -90),
    "pendulum-shared": Case("Pendulum-v1 --shared-torso --normalise-rewards", -200),
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

# A few seeds, because a CPU should take minutes for each; `untrained` is what they are compared with.
MINATAR = {
    f"minatar-{game.lower()}": Case(
        f"{game}-MinAtar --network cnn --hidden 64 --updates 40", None, 1, None, 4, True
    )
    for game in ("Asterix", "Breakout", "Freeway", "SpaceInvaders")
}
LONG = 10_000_000  # steps of an agent
SUITES = {
    name: Case(arguments, None, digits, None, seeds, True)
    for name, arguments, digits, seeds in (
        ("inverted-pendulum", "brax/inverted_pendulum", 0, 4),
        ("reacher", "brax/reacher", 0, 4),
        ("snake", "jumanji/Snake-v1", 1, 4),
        ("game2048", "jumanji/Game2048-v1", 0, 4),
        ("empty", "navix/Navix-Empty-5x5-v0", 2, 4),
        ("doorkey", "navix/Navix-DoorKey-5x5-v0", 2, 4),
        ("breakout-dense", "Breakout-MinAtar", 1, 10),
        ("craftax-classic", "craftax/Craftax-Classic-Symbolic-v1", 1, 4),
    )
} | MINATAR
GROUPS = {"methods": CASES, "suites": SUITES, "minatar": MINATAR}
ALL = CASES | SUITES
UNTRAINED = "--updates 1 --schedule constant --learning-rate 0 --critic-learning-rate 0"


def run(name: str, quick: bool, long: bool = False) -> Row:
    """Run one case in a process of its own."""
    case = ALL[name]
    full = ["--seeds", str(case.seeds), "--evaluation-episodes", str(EPISODES)]
    arguments = shlex.split(case.arguments)
    if long:
        config, _ = parse(arguments, "jaxpg train")
        arguments += ["--updates", str(LONG // (config.num_envs * (config.num_steps or 128)))]
    row = _trained(case, [*arguments, *(QUICK if quick else full)])
    row |= {"command": f"jaxpg train {shlex.join(arguments)}"}
    if case.untrained:
        given = [*arguments, *(QUICK if quick else full), *UNTRAINED.split()]
        row |= {"untrained": _trained(case, given)["returns"]}
    return row


def _trained(case: Case, given: list[str]) -> Row:
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
    _, target, digits, *_ = CASES[name]
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


def against_untrained(name: str, row: Row) -> list[str]:
    """The cells of the second table's line."""
    digits = SUITES[name.removesuffix("-long")].digits
    returns, before = np.array(row["returns"]), np.array(row["untrained"])

    def told(values):
        found = summarise(values, attained(values))
        return f"{number(found.mean, digits)} {interval(found, digits)}"

    return [
        f"`{row['command']}`",
        told(before),
        told(returns),
        f"{improvement(returns, before):.2g}",
        str(len(returns)),
        f"{row['steps']:.2g}",
        f"{row['seconds']:.0f}",
    ]


def improvement(returns: np.ndarray, before: np.ndarray) -> float:
    """The p-value of no improvement: the share of the ways to tell which seeds were trained with as large a
    difference of means (one-sided permutation test; all ways up to 10 against 10)."""
    both, size = np.concatenate([returns, before]), len(returns)
    sums = [sum(chosen) for chosen in itertools.combinations(both, size)]
    # Sums in another order round differently.
    least = returns.sum() - 1e-9 * np.abs(both).sum()
    return float(np.mean(np.array(sums) >= least))


AGAINST = ["command", "untrained", "trained", "p", "seeds", "steps", "seconds"]
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

## Other suites and MinAtar

`scripts/results suites` measures these, with the extras of the suites installed; `scripts/results minatar
--long` trains MinAtar's games for 10^7 steps, which is for an accelerator.

{against}

Untrained is the policy that training starts from, with the same seeds and as many episodes. p is the share
of all ways to tell which seeds were trained with a difference of means as large (a permutation test; 4 seeds
against 4 cannot get below 0.014).
"""


def page(rows: dict[str, Row]) -> str:
    long = [f"{name}-long" for name in MINATAR]
    return PAGE.format(
        table=_table(COLUMNS, [cells(name, rows[name]) for name in CASES if name in rows]),
        against=_table(
            AGAINST, [against_untrained(x, rows[x]) for x in [*SUITES, *long] if x in rows]
        ),
        episodes=EPISODES,
        seeds=SEEDS,
        teach=TEACH,
        machines=". ".join(sorted({row["machine"] for row in rows.values()})),
    )


def _table(columns: list[str], lines: list[list[str]]) -> str:
    shown = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"{', '.join(ALL)}, or a group: {', '.join(GROUPS)}; default: methods",
    )
    parser.add_argument("--long", action="store_true", help="10^7 steps; for MinAtar's games")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of results.json and results.md to update"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny runs, to try the script itself; needs --out"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.cases) - set(ALL) - set(GROUPS)
    if unknown:
        parser.error(f"unknown case {min(unknown)!r}; use {', '.join([*ALL, *GROUPS])}")
    names = [n for case in chosen.cases or ["methods"] for n in GROUPS.get(case, [case])]
    if chosen.long and set(names) - set(MINATAR):
        parser.error(f"--long is for {', '.join(['minatar', *MINATAR])}")
    if chosen.quick and not chosen.out:
        parser.error("--quick must not overwrite the page of this repository; give --out DIR")
    out = Path(chosen.out or ROOT / "scripts")
    stored = out / "results.json"
    rows = json.loads(stored.read_text()) if stored.exists() else {}
    for name in names:
        row = run(name, chosen.quick, chosen.long)
        line = against_untrained(name, row) if name in SUITES else cells(name, row)
        key = f"{name}-long" if chosen.long else name
        rows[key] = row
        print("  ".join([key, *line[1:]]), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(rows, indent=1) + "\n")
        out.joinpath("results.md").write_text(page(rows))


if __name__ == "__main__":
    main()
