"""A sweep by several processes: each trains one part of the points, and process 0 ranks all of them."""

from collections.abc import Sequence
from pathlib import Path

from jaxpg.devices import apart
from jaxpg.runs.config.flags import EITHER, request
from jaxpg.runs.console import say
from jaxpg.runs.host import cluster
from jaxpg.runs.host.cache import use_compilation_cache
from jaxpg.runs.host.interrupt import Interrupted
from jaxpg.runs.store.folder import SWEEP
from jaxpg.runs.sweep import parts, sweep
from jaxpg.runs.sweep.record import new_folder
from jaxpg.runs.sweep.search import take_options


def execute(argv: Sequence[str]) -> None:
    """Trains this process's part in a folder of its own, inside that of the sweep, which process 0 fills.

    Raises what a sweep of one process and a join raise.
    """
    options, rest = take_options(argv)
    for name in ("part", "halving", "study"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"several processes train a part of the points each, so --{name} does not go with them; "
                "leave it out"
            )
    asked = request(rest, prog="jaxpg sweep")
    cluster.agree({"arguments": list(argv)})

    count = cluster.size()

    def place():
        folder = new_folder(asked.config) if asked.resume is not None else asked.config.run
        done = (Path(str(folder)) / SWEEP).exists()
        for other in Path(str(folder)).glob("part-1-of-*"):
            if not done and (began := other.name.rpartition("-")[2]) != str(count):
                raise ValueError(
                    f"{folder} was begun by {began} processes, not {count}; resume it with as many, or name "
                    "another folder with --run"
                )
        return str(folder), done

    name, done = cluster.first(place)
    whole = Path(name)
    if done:
        say(f"the sweep in {whole} has finished")
        return
    folders = [whole / f"part-{number}-of-{count}" for number in range(1, count + 1)]
    own = folders[cluster.index()]
    cluster.advise(f"the same command with --run {whole} {EITHER} resumes it")
    with apart():
        part = sweep.prepare([*_without(argv), "--run", str(own), EITHER, "--part", _part(count)])
        if not part.done:
            if part.config.compilation_cache:
                use_compilation_cache()
            try:
                sweep.execute(part)
            except Interrupted as stop:
                said = f"before the end; the same command with --run {whole} {EITHER} resumes it"
                raise Interrupted(stop.status - cluster.SIGNALS, said) from stop
    cluster.collected(None)  # until all parts are done
    cluster.first(lambda: parts.execute(parts.prepare(["--join", *map(str, folders)], whole)))


def _part(count: int) -> str:
    return f"{cluster.index() + 1}/{count}"


def _without(argv: Sequence[str]) -> list[str]:
    """The arguments without those that name the folder."""
    words, rest = list(argv), []
    while words:
        word = words.pop(0)
        if word == "--run":
            words[:1] = []
        elif word != EITHER and not word.startswith("--run="):
            rest.append(word)
    return rest
