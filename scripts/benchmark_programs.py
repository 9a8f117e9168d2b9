"""What jaxpg's programs cost on a chip that is not there, read from the text that the chip's compiler writes.

scripts/benchmark programs --chip v5e|h100 [--case NAME ...] [--explain NAME] [--peers] [--json FILE]
scripts/benchmark programs --budgets
scripts/benchmark programs --chips v5e:16x16 ... [--page FILE]

Nothing is run on a device: counts are exact and repeat, rates are predictions. The compiler is installed on
first use: a TPU's (140 MB) apart in .venv, a GPU's (6 GB) in .venv-cuda. --budgets rewrites the table of what
every algorithm may cost on a v5e, to which a test holds them. --chips counts the messages of agents and
environments that are split over many: slices of v5e (v5e:AxB) or hosts of H100s (h100:HOSTSxCHIPS).
"""

import argparse
import contextlib
import difflib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from compiled_text import (
    ROOT,
    Block,
    Chip,
    Cost,
    Text,
    arrays,
    launches,
    measured,
    parsed,
    source,
)
from program_cases import CASES, PEER_CASES, Program, budgeted, rejax

BUDGETS = ROOT / "tests" / "budgets.json"
ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1")  # of discrete and of continuous actions
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 driver_version: "12.9.0" runtime_version: "12.9.0" }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# No device is looked for: libtpu would ask in vain where it is, and refuse to be loaded twice on a machine.
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


# v5e:1x1 is refused, so a program is placed on one of four.
CHIPS = {
    "v5e": Chip("tpu", "tpu", {"topology_name": "v5e:2x2"}, 16e9, 819e9, clock=1.5e9),
    "v6e": Chip("tpu", "tpu", {"topology_name": "v6e:2x2"}, 32e9, 1640e9, clock=1.75e9),
    "h100": Chip(
        *("gpu", "cuda"),
        {"topology_name": "", "topology": "1x1x1", "target_config": H100},
        *(85e9, 3.35e12),
        launch=3e-6,
        round_trip=15e-6,
    ),
}


# ---- compiling them


class Target(NamedTuple):
    chip: Chip
    place: Any  # of one chip, among those that the compiler is told of
    options: dict[str, Any]  # of the compiler


def place(chip: Chip) -> Any:
    import jax
    from jax.experimental import topologies

    settings = dict(chip.topology)
    found = topologies.get_topology_desc(
        settings.pop("topology_name"), platform=chip.lowering, **settings
    )
    return jax.sharding.SingleDeviceSharding(found.devices[0])


TOO_LARGE = "{} needs {} of memory and the chip has {}; leave it out by --case"


def compiled(
    name: str, program: Program, target: Target, **options: Any
) -> tuple[Any, float, float]:
    """The program as the chip would run it, and the compiler's seconds: by the clock, and of processors."""
    import jax

    chip, where = target.chip, target.place
    jitted = jax.jit(program.function, in_shardings=where, out_shardings=where)
    lowered = jitted.trace(*program.arguments).lower(lowering_platforms=(chip.lowering,))
    started, worked = time.perf_counter(), time.process_time()
    try:
        found = lowered.compile(target.options | options)
    except jax.errors.JaxRuntimeError as error:
        if (sizes := too_large(str(error))) is None:
            raise
        fail(TOO_LARGE.format(name, *(f"{x}B" for x in sizes)))
    seconds, work = time.perf_counter() - started, time.process_time() - worked
    memory: Any = found.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > chip.memory:
        fail(TOO_LARGE.format(name, *(f"{x / 1e9:.3g} GB" for x in (needed, chip.memory))))
    return found, seconds, work


def too_large(message: str) -> tuple[str, str] | None:
    """The memory that a compiler says a program needs, and what the chip has; None if it says neither."""
    found = re.search(r"(?:Used |\()(\S+?)(?: of |\) exceeds available HBM \()([\d.]+\w)", message)
    return (found[1], found[2]) if found else None


def row_of(name: str, program: Program, target: Target) -> tuple[dict[str, Any], Text]:
    chip, starts = target.chip, None
    with tempfile.TemporaryDirectory() as folder:
        dumps = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if chip.launch else {}
        found, seconds, work = compiled(name, program, target, **dumps)
        text = parsed(found.as_text())
        if dumps:  # the last is of the program; each pass that changes the sequence writes it again
            sequence, metadata = (
                max(
                    Path(folder).glob(f"*thunk_{what}*.txt"),
                    key=lambda x: (x.stat().st_mtime, x.name),
                )
                for what in ("sequence", "metadata")
            )
            starts = launches(text, sequence.read_text(), metadata.read_text()) / program.updates
    block = measured(text, chip)
    total = Cost().plus(block.once, 1 / program.updates)
    loops = list(_loops(block, program.updates))
    every: dict[str, float] = {}
    for computation in text.computations.values():
        if any(x.opcode in ("while", "conditional") for x in computation.values()):
            for operation in computation.values():
                every |= dict(arrays(operation.shape))
    largest = sorted(every, key=lambda x: -every[x])[:3]
    row = {
        "case": name,
        "operations": total.operations,
        "round_trips": total.round_trips if chip.round_trip else None,
        "launches": starts,
        "megacycles": total.cycles / 1e6 if chip.clock else None,
        "temporary_bytes": found.memory_analysis().temp_size_in_bytes,
        "largest": {shape: every[shape] for shape in largest},
        "collectives": total.collectives,
        "collective_bytes": total.collective_bytes,
        "compile_seconds": seconds,
        "compile_processor_seconds": work,
        "predicted_steps_per_second": program.steps / total.seconds,
        "loops": loops,
        "bounds": not all(x["exact"] for x in loops),
    }
    return row, text


def _loops(block: Block, updates: int, depth: int = 0, times: float = 1) -> Iterator[dict]:
    times *= block.trips / updates
    yield {
        "name": block.name,
        "depth": depth,
        "trips": block.trips,
        "exact": block.exact,
        "operations": block.own.operations,
        "cycles": block.own.cycles,
        "round_trips": block.own.round_trips,
        "total_operations": block.once.operations * times,
        "total_megacycles": block.once.cycles * times / 1e6,
        "total_seconds": block.once.seconds * times,
    }
    for inner in block.inner:
        yield from _loops(inner, 1, depth + 1, times)


# ---- saying so


def caption(chip: str) -> str:
    found = CHIPS[chip]
    rate = (
        f"{found.launch * 1e6:g} us per kernel, or its bytes at {found.bandwidth / 1e12:g} TB/s if "
        f"that takes longer, and {found.round_trip * 1e6:g} us per round trip to the host, as if "
        "there were no graphs. With graphs the host starts what is called launches."
    )
    if found.clock:
        rate = (
            f"environment steps over the compiler's estimated cycles at {found.clock / 1e9:g} GHz. "
            "Operations are those with an estimate."
        )
    return (
        f"Per update, compiled for one {chip}; nothing ran on one. The rate is a prediction: {rate}"
    )


HEADER = (
    f"{'case':26}{'operations':>11}{'round trips':>12}{'launches':>9}{'Mcycles':>9}{'temporary':>11}"
    f"{'collectives':>14}{'compile (cpu)':>17}  predicted steps/s"
)


def show(row: dict[str, Any], whose: str = "") -> None:
    def number(value, form):
        return "-" if value is None else f"{value:{form}}"

    most = "<=" if row["bounds"] else ""
    moved = f"{row['collectives']:.0f}: {row['collective_bytes'] / 1e6:.2f} MB"
    print(
        f"{whose + row['case']:26}{most + number(row['operations'], '.0f'):>11}"
        f"{number(row['round_trips'], '.0f'):>12}{number(row['launches'], '.0f'):>9}"
        f"{number(row['megacycles'], '.2f'):>9}"
        f"{row['temporary_bytes'] / 1e6:>8.1f} MB{moved if row['collectives'] else '0':>14}"
        f"{row['compile_seconds']:>8.1f} ({row['compile_processor_seconds']:>4.1f}) s  "
        f"{row['predicted_steps_per_second']:.2e}"
    )
    sizes = ", ".join(f"{shape} {count / 1e6:.1f} MB" for shape, count in row["largest"].items())
    print(f"    largest arrays: {sizes}")
    for loop in row["loops"]:
        times = "" if loop["name"] == "whole program" else f" x{loop['trips']}"
        most = "" if loop["exact"] else " at most" if loop["trips"] > 1 else " (trips unknown)"
        cost = f"{loop['operations']:.0f} operations"
        if loop["cycles"]:
            cost += f", {loop['cycles'] / 1e3:.1f} kcycles"
        if loop["round_trips"]:
            cost += f", {loop['round_trips']:.0f} round trips"
        whole = f"{loop['total_megacycles']:.2f} Mcycles" if loop["total_megacycles"] else ""
        whole = whole or f"{loop['total_operations']:.0f} operations"
        print(f"    {'  ' * loop['depth']}{loop['name']}{most}{times}: {cost}; in all {whole}")
    print(flush=True)


def explain(text: Text, block: Block, depth: int = 0) -> None:
    indent = "  " * depth
    print(f"{indent}{block.name} x{block.trips}")
    for operation, cost in sorted(block.operations, key=lambda x: -x[1].seconds):
        about = re.search(r'op_name="([^"]*)"', operation.attributes)
        shape = " ".join(x for x, _ in list(arrays(operation.shape))[:2])
        price = f"{cost.cycles:.0f} cycles" if cost.cycles else f"{cost.seconds * 1e6:.1f} us"
        where = source(text, operation) or (about[1].rsplit("/", 1)[-1] if about else "")
        print(f"{indent}  {price:>15}  {operation.opcode:14} {shape:34} {where}  {operation.name}")
    for inner in block.inner:
        explain(text, inner, depth + 1)


def fail(message: str) -> NoReturn:
    sys.exit(f"scripts/benchmark programs: {message}")


def installed(chip: str) -> Path:
    """The folder of the chip's compiler, which is installed on first use."""
    if CHIPS[chip].platform == "tpu":
        return libtpu(install=True)
    script = 'root=$0; . "$root/scripts/setup.sh"; ensure .venv-cuda cuda12'
    done = subprocess.run(["bash", "-c", script, ROOT], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        fail(f"the compiler for {chip} does not install: {_complaint(done.stderr)}")
    return next((ROOT / ".venv-cuda" / "lib").glob("python*/site-packages"))


def libtpu(install: bool) -> Path:
    """The folder of a TPU's compiler, the one that this jax asks for, put on Python's path.

    It lies apart from other packages, because where jax finds it by itself it looks for a TPU, noisily.
    Raises FileNotFoundError if it is not there and not to be installed.
    """
    found = find_spec("libtpu")
    if found and found.origin:
        return Path(found.origin).parent.parent
    wanted = next(x for x in requires("jax") or () if x.startswith("libtpu")).partition(";")[0]
    folder = Path(sys.prefix) / re.sub(r"[^\w.]+", "-", wanted.strip().removesuffix(".*"))
    if not (folder / "libtpu").exists():
        if not install:
            raise FileNotFoundError(f"{wanted} is not in {folder}")
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            fail(f"{wanted} installs on Linux on x86-64 only, and this is another machine")
        print(f"installing {wanted} into {folder} (140 MB)", file=sys.stderr)
        if said := _pip(sys.executable, "--no-deps", "--target", folder, wanted):
            fail(f"the compiler for a TPU does not install: {said}")
    sys.path.append(str(folder))
    return folder


def _pip(python: Any, *arguments: Any) -> str:
    """Installs; returns what pip complains of, or nothing."""
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return _complaint(done.stderr) if done.returncode else ""


def _complaint(said: str) -> str:
    """The line in which pip says what failed; it indents what a build said."""
    lines = [x.strip() for x in said.splitlines()]
    return next(iter([x for x in lines if "ERROR:" in x][::-1] + lines[::-1]), "no reason given")


def peer_rows(chip: str, names: list[str], precision: str, libraries: Path) -> list[dict[str, Any]]:
    """rejax, compiled in the same jax in an environment of its own, because it needs an older gymnax."""
    import jax

    folder = ROOT / ".venv-rejax"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing rejax into {folder.name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = ("rejax==0.1.3", "gymnax<1", f"jax=={jax.__version__}")
    if said := _pip(python, *wanted):
        print(f"rejax is left out: {said}")
        return []
    # The compiler comes from elsewhere: it is large, and the same for both.
    command = [python, __file__, "--chip", chip, "--precision", precision, "--case", *names]
    environment = os.environ | {"REJAX_WITH": str(libraries)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        print("rejax is left out: it does not compile (see above)")
        return []
    return json.loads(done.stdout.splitlines()[-1])


def spending(row: str, environment: str) -> list[list]:
    """What an update costs on a v5e, in all and in each loop: its name, its trips, and of one trip the
    operations and the thousands of cycles."""
    with building(CHIPS["v5e"]) as target:
        found, _ = row_of(row, budgeted(row, environment), target)
    rows = [["in all", 1, round(found["operations"]), round(1e3 * found["megacycles"], 1)]]
    for loop in found["loops"]:
        name = "  " * loop["depth"] + loop["name"]
        rows.append(
            [name, loop["trips"], round(loop["operations"]), round(loop["cycles"] / 1e3, 1)]
        )
    return rows


def write_budgets() -> None:
    from jaxpg.training.algorithm import ALGORITHMS

    entries = [f' "libtpu": "{version("libtpu")}"']
    for name in ALGORITHMS:
        for environment in ENVIRONMENTS:
            # Without the numbers of lines, which every edit moves.
            rows = [[re.sub(r":\d+", "", x), *rest] for x, *rest in spending(name, environment)]
            lines = ",\n".join(f"  {json.dumps(x)}" for x in rows)
            entries.append(f' "{name} {environment}": [\n{lines}\n ]')
            print(
                f"{name} {environment}: {rows[0][2]} operations, {rows[0][3]} kcycles", flush=True
            )
    BUDGETS.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def main(arguments: list[str] | None = None) -> None:
    chosen = _chosen(arguments)
    names = list(dict.fromkeys([*chosen.case, *filter(None, [chosen.explain])])) or list(CASES)
    if chosen.chip not in CHIPS:
        fail(f"unknown chip {chosen.chip!r}; use {', '.join(CHIPS)}")
    if chosen.precision not in ("own", "default", "high", "highest"):
        fail(f"unknown precision {chosen.precision!r}; use default, high or highest")
    for name in names:
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, 3, 0.4) or list(CASES)
            fail(f"unknown case {name!r}; use {', '.join(near)}")
    if "REJAX_WITH" in os.environ:
        sys.path.append(os.environ["REJAX_WITH"])
        with contextlib.redirect_stdout(sys.stderr):
            rows = list(_rows(chosen, names, rejax))
        print(json.dumps(rows))
        return
    if chosen.json:
        _check_writable(Path(chosen.json))
    if chosen.budgets:
        libtpu(install=True)
        return write_budgets()
    if chosen.chips:
        import pods

        for name in chosen.chips:
            pods.pod(name)
        chosen.chip = "h100" if any("h100" in name for name in chosen.chips) else "v5e"
    libraries = installed(chosen.chip)
    if chosen.install:
        return
    if CHIPS[chosen.chip].platform == "gpu" and not libraries.is_relative_to(sys.prefix):
        python = str(ROOT / ".venv-cuda" / "bin" / "python")
        os.execv(python, [python, __file__, *(arguments or sys.argv[1:])])
    if chosen.chips:
        import pods

        return pods.benchmark(chosen.chips, chosen.page)
    print(f"{caption(chosen.chip)}\n\n{HEADER}", flush=True)
    own = {} if chosen.precision == "own" else {"precision": chosen.precision}
    rows = list(_rows(chosen, names, lambda name: CASES[name](own)))
    peers = []
    if chosen.peers:
        shared = [name for name in names if name in PEER_CASES]
        if not shared:
            print(f"rejax is left out: it has none of these cases, but {', '.join(PEER_CASES)}")
        else:
            peers = peer_rows(chosen.chip, shared, chosen.precision, libraries)
            _compare(rows, peers)
    if chosen.json:
        about = {"chip": chosen.chip, "precision": chosen.precision, "jax": version("jax")}
        found = {**about, "caption": caption(chosen.chip), "rows": rows, "peers": peers}
        Path(chosen.json).write_text(json.dumps(found, indent=1) + "\n")


def _chosen(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark programs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", default="v5e", help=f"{', '.join(CHIPS)}; default: v5e")
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="NAME", help=f"{', '.join(CASES)}; default: all"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument(
        "--explain", metavar="NAME", help="list the operations of each loop with their source lines"
    )
    parser.add_argument(
        "--precision",
        default="own",
        help="of the networks' products: default, high or highest; by default each library's own",
    )
    parser.add_argument("--peers", action="store_true", help="compile rejax's PPO alike")
    parser.add_argument(
        "--budgets", action="store_true", help=f"rewrite {BUDGETS.relative_to(ROOT)}, for a v5e"
    )
    parser.add_argument("--chips", nargs="+", metavar="NAME", help="v5e:AxB or h100:HOSTSxCHIPS")
    parser.add_argument("--page", metavar="FILE", help="write what --chips finds to FILE")
    parser.add_argument("--install", action="store_true", help="only install the chip's compiler")
    return parser.parse_args(arguments)


def _check_writable(path: Path) -> None:
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; name another file with --json")
    if new:
        path.unlink()


@contextlib.contextmanager
def building(chip: Chip, own: bool = True, precision: str | None = None) -> Iterator[Target]:
    """Provides what programs are compiled for. own: they are jaxpg's, with the options of its command."""
    os.environ |= QUIET
    import jax

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(jax.default_matmul_precision(precision))
        options = None
        if own:
            from jaxpg.devices import built_for, compiler_options

            stack.enter_context(built_for(chip.platform))
            options = compiler_options(None)
        yield Target(chip, place(chip), options or {})


def _rows(chosen, names, make) -> Iterator[dict[str, Any]]:
    chip = CHIPS[chosen.chip]
    precision = None if chosen.precision == "own" else chosen.precision
    with building(chip, make is not rejax, precision) as target:
        for name in names:
            row, text = row_of(name, make(name), target)
            show(row, "rejax " if make is rejax else "")
            if chosen.explain == name:
                explain(text, measured(text, chip))
            yield row


def _compare(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> None:
    ours = {row["case"]: row for row in rows}
    for peer in peers:
        own = ours[peer["case"]]
        parts = []
        for what in ("operations", "round_trips", "launches", "megacycles", "temporary_bytes"):
            if own[what] is not None:
                ratio = f", ratio {own[what] / peer[what]:.2f}" if peer[what] else ""
                parts.append(f"{what} {own[what]:.4g} against {peer[what]:.4g}{ratio}")
        print(f"{peer['case']} against rejax: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
