"""The command `lab`: checks settings, runs experiments and writes their files."""

import argparse
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NamedTuple

from rich.markup import escape

from jaxpg.runs.console import note, parser, say, terminal, whole
from jaxpg.runs.store import artifacts
from jaxpg.stats.figures import WIDTHS
from jaxpg.stats.lines import WIDTH, lines

FLAGS = ("env", "policy", "estimators", "trajectories", "repeats", "seed", "gamma", "checkpoint")
WIDEST = 120  # columns of a table
QUIET_SECONDS = 5.0  # between lines of progress that cannot be overwritten


class LabJob(NamedTuple):
    """One experiment, checked as far as possible without running it."""

    name: str
    experiment: Any
    settings: Any
    refusal: str  # why `all` leaves it out, or ""


class LabPlan(NamedTuple):
    jobs: list[LabJob]  # none: only show the list
    out: str | None
    together: bool  # `all`: one folder each, without the experiments that do not apply
    width: str = "page"
    devices: int | None = None  # None: all


def prepare(argv: Sequence[str]) -> LabPlan:
    """Checks what the arguments ask for. Raises ValueError if it is impossible; exits after --help."""
    arguments = _parser().parse_intermixed_args(list(argv))
    if arguments.name == "list":
        return LabPlan([], None, False)
    # Imported here, so that help does not wait for jax.
    from jaxpg.devices import check_devices, check_present
    from jaxpg.lab.running import known, refusal, settings_of
    from jaxpg.lab.studies import EXPERIMENTS

    if arguments.devices is not None:
        from jaxpg.runs.train.replicas import use_cpu_cores

        use_cpu_cores()  # each is a device that can be asked for
    check_devices()
    check_present(arguments.devices)
    together = arguments.name == "all"
    given = {k: getattr(arguments, k) for k in FLAGS if getattr(arguments, k) is not None}
    if arguments.names:
        if "estimators" in given:
            raise ValueError("name estimators once: after the experiment, or with --estimators")
        ignores = () if together else EXPERIMENTS[known(arguments.name, EXPERIMENTS)].ignores
        if "estimators" in ignores:
            raise ValueError(
                f"{arguments.name} takes no estimators, so leave out {arguments.names[0]!r}"
            )
        given["estimators"] = ",".join(arguments.names)
    if "estimators" in given:
        given["estimators"] = tuple(x for x in given["estimators"].split(",") if x)
    if "checkpoint" in given:
        from jaxpg.runs.play.policy import load

        given["checkpoint"] = load(given["checkpoint"], arguments.replica)
        given.setdefault("env", given["checkpoint"].environment)
    names = list(EXPERIMENTS) if together else [known(arguments.name, EXPERIMENTS)]
    jobs = []
    for name in names:
        experiment = EXPERIMENTS[name]
        # `all` passes a setting to the experiments that take it; a single one must take it.
        meant = {k: v for k, v in given.items() if not (together and k in experiment.ignores)}
        refused = refusal(name, experiment, meant) if together else ""
        settings = experiment.defaults
        if not refused:
            settings = settings_of(name, experiment, meant, arguments.quick)
        jobs.append(LabJob(name, experiment, settings, refused))
    return LabPlan(jobs, arguments.out, together, arguments.width, arguments.devices)


def execute(plan: LabPlan) -> None:
    """Runs the jobs one after the other, each into its folder. Raises ValueError."""
    if not plan.jobs:
        say(*_listing())
        return
    started, parent = time.perf_counter(), None
    if plan.together:
        parent = _folder(plan.out, "lab-all")
    for job in plan.jobs:
        if job.refusal:
            say(f"{job.name}: left out; {job.refusal}")
            continue
        folder = _folder(plan.out, f"lab-{job.name}") if parent is None else parent / job.name
        folder.mkdir(exist_ok=True)
        try:
            result, seconds = _run(job, folder, plan.devices)
        except ValueError as error:
            _discard(folder)
            if not plan.together:
                raise
            say(f"{job.name}: left out; {error}")
            continue
        except BaseException:
            _discard(folder)
            raise
        say(*_report(job, result), f"{seconds:.1f} s, saved in {folder}")
        try:
            artifacts.write_figure(folder, result.draw, width=plan.width)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"stopped while drawing; the numbers are in {folder}") from None
    if parent is not None:
        say(f"all in {time.perf_counter() - started:.0f} s, saved in {parent}")


def _run(job: LabJob, folder: Path, devices: int | None = None) -> tuple[Any, float]:
    """Runs the experiment and saves its result; returns it, and the seconds that it took."""
    from jaxpg.devices import at_most
    from jaxpg.lab.running import departure, noted

    started = time.perf_counter()
    settings = job.settings
    with at_most(devices), _progress() as progress:
        progress(f"{job.name} on {settings.env}")
        result = job.experiment.run(settings, progress)
    seconds = time.perf_counter() - started
    table = noted(result.table, departure(job.experiment, settings))
    artifacts.write_table(folder, table)
    summary = {
        "experiment": job.name,
        "settings": _described(job),
        "summary": result.summary,
        "seconds": seconds,
        **_surroundings(),
    }
    artifacts.write_summary(folder, summary)  # after the table, whose presence it vouches for
    return result._replace(table=table), seconds


def _report(job: LabJob, result) -> list[str]:
    headline = f"{job.name} on {_where_from(job.settings)}: {job.experiment.summary}"
    width = min(get_terminal_size((WIDTH, 24)).columns, WIDEST)
    rows = (f"  {line}" for line in lines(result.table, width - 2))
    return [textwrap.fill(headline, WIDTH, break_on_hyphens=False), *rows]


def _described(job: LabJob) -> dict[str, Any]:
    """The settings, with a checkpoint named by its run, and how they depart from that run."""
    from jaxpg.lab.running import departure

    settings = job.settings
    found, checkpoint = settings._asdict(), settings.checkpoint
    if settings.gamma is None:
        found["gamma"] = 1.0 if checkpoint is None else checkpoint.hyperparams.gamma
    found["checkpoint"] = None if checkpoint is None else checkpoint.origin
    return found | {"not_the_runs": departure(job.experiment, settings) or None}


def _where_from(settings) -> str:
    """The world, and the run whose policy acts in it."""
    if settings.checkpoint is None:
        return settings.env
    origin = settings.checkpoint.origin
    return f"{settings.env}, seed {origin['seed']} of {origin['run']} at update {origin['update']}"


def _surroundings() -> dict[str, Any]:
    import jax

    from jaxpg.runs.store.folder import PACKAGES, package_version

    device = jax.devices()[0]
    return {
        "versions": {name: package_version(name) for name in (*PACKAGES, "numpy", "scipy")},
        "device": {"platform": device.platform, "kind": device.device_kind},
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _listing() -> list[str]:
    from jaxpg.lab.studies import EXPERIMENTS
    from jaxpg.lab.studies.estimators import ESTIMATORS
    from jaxpg.lab.worlds.instances import INSTANCES

    experiments = {name: f"{each.summary} [{_where(each)}]" for name, each in EXPERIMENTS.items()}
    estimators = {name: each.summary for name, each in ESTIMATORS.items()}
    # A docstring's first line is "A: three states, ...".
    instances = {
        name: str(each.__doc__).partition("\n")[0].partition(": ")[2].rstrip(".")
        for name, each in INSTANCES.items()
    }
    worlds = (
        "any: --env takes A, T or C, LQR, or any of jaxpg envs, and --checkpoint a policy trained "
        "there. Exact lines are drawn where probabilities are known: in the worked instances, "
        "FrozenLake-misc, Catch-bsuite and DiscountingChain-bsuite, and in part in LQR."
    )
    return [
        "experiments (jaxpg lab NAME; jaxpg lab all --quick runs every one), and where:",
        *_columns(experiments),
        textwrap.fill(worlds, WIDTH, break_on_hyphens=False),
        "",
        "worked instances, small tabular worlds of which every number is known:",
        *_columns(instances),
        "",
        "estimators of the gradient (--estimators, where an experiment takes them):",
        *_columns(estimators),
    ]


def _columns(summaries: dict[str, str]) -> list[str]:
    """Lines of names and what they are, in two columns."""
    width = max(map(len, summaries))
    return [
        textwrap.fill(
            summary,
            WIDTH,
            initial_indent=f"  {name.ljust(width)}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
        for name, summary in summaries.items()
    ]


def _where(experiment) -> str:
    """The worlds that an experiment runs on."""
    if experiment.worlds:
        return ", ".join(experiment.worlds)
    if "env" in experiment.ignores:
        return "its own"
    own = " and ".join(experiment.defaults.env.split(","))
    return "any" if own == "A" else f"{own}, or any"


def _parser() -> argparse.ArgumentParser:
    found = parser(
        "lab",
        "Experiments on the variance of policy gradients. Each writes a table (Parquet and CSV), a JSON "
        "summary and a figure (PNG, SVG and PDF).",
        "example: jaxpg lab ladder --env FrozenLake-misc --trajectories 100000",
    )
    add = found.add_argument
    add("name", metavar="NAME", help="an experiment, `all`, or `list` to see them")
    add("names", metavar="ESTIMATOR", nargs="*", help="such as total rtg; see `jaxpg lab list`")
    add("--env", help="A, T or C (worked instances) or any of jaxpg envs; default: A")
    add("--policy", help="mlp, linear, gru or tabular, at its initial parameters")
    add(
        "--checkpoint",
        metavar="RUN",
        help="folder of a jaxpg train run: use its final policy, critic and hyperparameters",
    )
    add("--replica", type=whole(), default=0, help="number of the run's agent; default: 0")
    add(
        "--estimators",
        metavar="NAME,...",
        help="names separated by commas, such as total,rtg,gae_0.9",
    )
    add(
        "--trajectories",
        type=whole(1),
        metavar="N",
        help="trajectories per measured point, such as 1000, 1e6 or 2**20",
    )
    add("--repeats", type=whole(1, 100_000), metavar="N", help="independent batches or runs")
    add("--seed", type=whole(0, 2**32 - 1), help="seed of all randomness; default: 0")
    add("--gamma", type=float, help="discount; default: the run's, or 1")
    add(
        "--out", metavar="DIR", help="folder to write, new or empty; default: a new one under runs/"
    )
    add("--devices", type=whole(1), help="how many of the devices to measure on; default: all")
    add("--width", choices=WIDTHS, default="page", help="of the figure; default: page")
    add(
        "--quick",
        action="store_true",
        help="small sizes, for a first look; episodes are cut at 50 steps without exact answers",
    )
    return found


def _folder(out: str | None, name: str) -> Path:
    from jaxpg.runs.store.folder import RUNS, empty_folder, new_folder

    return new_folder(RUNS, name) if out is None else empty_folder(out, "--out")


def _discard(folder: Path) -> None:
    from jaxpg.runs.store.folder import remove_empty

    with suppress(OSError):
        for name in artifacts.FILES:
            (folder / name).unlink(missing_ok=True)
        remove_empty(folder)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows progress: one line that changes in a terminal, a line now and then elsewhere."""
    console, shown = terminal(), [time.perf_counter()]
    if console is not None:
        with console.status("", refresh_per_second=4) as status:
            yield lambda line: status.update(escape(line[: WIDTH - 3]))
        return

    def show(line: str) -> None:
        if time.perf_counter() - shown[0] > QUIET_SECONDS:
            shown[0] = time.perf_counter()
            note(f"  {line}")

    yield show
