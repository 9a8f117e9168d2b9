"""The console command. A user's mistake is one line on stderr and exit status 2."""

import atexit
import gc
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from jaxpg.runs.config.processes import take
from jaxpg.runs.console import Ended, Unheard, flush, nearest, say, shortened, tell
from jaxpg.runs.host import cluster

HELP = """\
usage: jaxpg COMMAND ...

Policy-gradient methods in JAX.

commands:
  train ENV    train policies on an environment (jaxpg train ENV --help: the
               flags, with their defaults for that environment)
  sweep ENV    rank points of a grid or a random search (jaxpg sweep --help)
  evaluate RUN evaluate trained policies over fresh episodes
  record RUN   record episodes as a file of demonstrations (.npz)
  render RUN   draw one episode as a film (.gif, .mp4)
  plot RUN...  draw learning curves, diagnostics and comparisons of runs
  envs [WORD]  list the environments that can be made on this machine
  lab NAME     measure gradients (jaxpg lab list: the experiments)

options:
  -h, --help   show this help message and exit
  --version    show the version and exit

example: jaxpg train CartPole-v1 --learning-rate 1e-3,3e-3
"""
# Signs in errors of Python, NumPy and jax that a process has run out of memory or threads.
EXHAUSTED = (
    "MemoryError",
    "can't start new thread",
    "RESOURCE_EXHAUSTED",
    "Out of memory",
    "failed to map segment",
)
STOPPED = {
    "train": " before the first update; nothing was saved",
    "sweep": " before the first update; nothing was saved",
    "lab": "; the running experiment was not saved",
}
COMMANDS = ("train", "sweep", "evaluate", "record", "render", "plot", "envs", "lab")
MEANT = {
    **dict.fromkeys(("list", "ls"), "envs, or lab list"),
    **dict.fromkeys(("resume", "continue"), "train --resume RUN"),
    **dict.fromkeys(("play", "playback", "film", "video", "watch"), "render"),
    **dict.fromkeys(("tune", "search", "grid"), "sweep"),
    **dict.fromkeys(("test", "eval"), "evaluate"),
    **dict.fromkeys(("run", "learn"), "train ENV"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Exits with 0; 2 after a user's mistake; 1 when it could not write; 130, 141 or 143 after a signal.
    """
    # Skip garbage collection at exit, which would take half a second.
    atexit.register(gc.freeze)
    # Collect rarely before it, too: doing so every 700 objects took a twelfth of the whole time.
    gc.set_threshold(200_000)
    argv = sys.argv[1:] if argv is None else list(argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    try:
        try:
            _run(command, rest)
        finally:  # also after help, which exits by itself
            flush()
    except KeyboardInterrupt as stop:  # not during training, which handles it itself
        _leave(str(stop) or f"stopped{STOPPED.get(command, '')}", getattr(stop, "status", 130))
    except Ended as end:
        _leave(f"{'error: ' * (end.status == 1)}{end}", end.status)
    except (Unheard, BrokenPipeError) as lost:
        if BrokenPipeError in (type(lost), type(lost.__cause__)):  # `jaxpg train ... | head`
            _leave("", 141)
        _leave(f"error: cannot write to standard output: {lost}", 1)
    except ValueError as error:
        _fail(error)
    except OSError as error:
        what = "" if error.filename is None else f" {error.filename}"
        _fail(f"cannot read or write{what}: {error.strerror or error}", status=1)
    except Exception as error:
        kinds = (MemoryError, RuntimeError, ImportError)
        if not isinstance(error, kinds) or not any(sign in repr(error) for sign in EXHAUSTED):
            # Python's own end would wait for the other processes, which wait for this one.
            if cluster.size() > 1:
                traceback.print_exc()
                _leave(f"error: {error!r}"[:300], 1)
            raise
        why = str(error).partition("\n")[0] or "no memory is left"
        _leave(
            f"error: this process ran out of memory or threads: {why}; give it more, or use smaller sizes",
            1,
        )


def _run(command, rest):
    if command in ("-h", "--help"):
        say(*HELP.splitlines())
    elif command == "--version":
        say(f"jaxpg {_version()}")
    elif command == "train":
        _train(rest)
    elif command == "sweep":
        _sweep(rest)
    elif command in ("evaluate", "record", "render"):
        _play(command, rest)
    elif command == "plot":
        _plot(rest)
    elif command == "envs":
        from jaxpg.runs.listing import execute

        execute(rest)
    elif command == "lab":
        _lab(rest)
    else:
        hint = nearest(command, COMMANDS, MEANT)
        if not hint and re.search(r"[-/:]", command.lstrip("-")):
            hint = f"; did you mean train {shortened(command)}?"
        hint = f"{hint} The" if hint else "; the"
        _fail(f"unknown command {shortened(command)!r}{hint} commands are {', '.join(COMMANDS)}")


def _train(argv):
    # Imported here, so that help does not wait for jax.
    from jaxpg.runs.config.flags import request

    processes, argv = take(argv, "jaxpg train")
    if {"-h", "--help"} & {*argv}:
        processes = None
    with cluster.joined(processes):
        _trained(request(argv, prog="jaxpg train"))


def _trained(asked):
    from jaxpg.runs.host.cache import use_compilation_cache
    from jaxpg.runs.train.run import begin, execute

    experiment = begin(asked)
    if experiment is None:
        return
    if asked.config.compilation_cache:
        use_compilation_cache()
    with _writing(f" {experiment.folder}", at_once=True), _only_own_exceptions():
        execute(experiment)


def _sweep(argv):
    from jaxpg.runs.sweep.search import HELP as SWEEP_HELP

    if not argv or {"-h", "--help"} & {*argv}:
        say(*SWEEP_HELP.splitlines())
        return
    processes, argv = take(argv, "jaxpg sweep")
    if any(word.partition("=")[0] == "--join" for word in argv):
        from jaxpg.runs.sweep import parts

        if processes is not None:
            raise ValueError("--join is the work of one process; leave out the flags of several")
        joined = parts.prepare(argv)
        with _writing(f" {joined.folder}"):
            parts.execute(joined)
        return
    if processes is not None:
        from jaxpg.runs.sweep import together

        with cluster.joined(processes), _writing():
            together.execute(argv)
        return
    from jaxpg.runs.host.cache import use_compilation_cache
    from jaxpg.runs.sweep.sweep import execute, prepare

    sweep = prepare(argv)
    if sweep.done:
        say(f"the sweep in {sweep.folder} has finished")
        return
    if sweep.config.compilation_cache:
        use_compilation_cache()
    with _writing(f" {sweep.folder}"):
        execute(sweep)


@contextmanager
def _only_own_exceptions():
    """Prints no tracebacks but the main thread's: after a failed write, tensorstore's threads print theirs.

    Also silences asyncio, which logs those of orbax's tasks.
    """
    log = logging.getLogger("asyncio")
    level = log.level
    log.setLevel(logging.CRITICAL)
    hooks = {name: getattr(sys, name) for name in ("excepthook", "unraisablehook")}

    def only_main(hook):
        def show(*exception):
            if threading.current_thread() is threading.main_thread():
                hook(*exception)

        return show

    for name, hook in hooks.items():
        setattr(sys, name, only_main(hook))
    try:
        yield
    finally:
        log.setLevel(level)
        for name, hook in hooks.items():
            setattr(sys, name, hook)


def _play(command, argv):
    from jaxpg.runs.host.cache import use_compilation_cache
    from jaxpg.runs.play import playback

    use_compilation_cache()
    with _only_own_exceptions():
        getattr(playback, command)(argv)


def _plot(argv):
    from jaxpg.runs.plot.command import execute, prepare

    request = prepare(argv)
    with _writing(f" {request.out}"):
        execute(request)


def _lab(argv):
    import signal

    from jaxpg.runs.laboratory import execute, prepare

    def terminate(number, frame):
        del number, frame
        # Raise again in a second: an exception inside a callback, such as a garbage collector's, is lost.
        signal.signal(signal.SIGALRM, terminate)
        signal.alarm(1)
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)  # by default it would leave an empty folder
    with _writing():
        execute(prepare(argv))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""

    status = 143


@contextmanager
def _writing(place: str = "", at_once: bool = False):
    """Ends the command with one line if `place` cannot be written; at_once: without waiting for threads."""
    try:
        yield
    except OSError as error:  # a full disk, a folder that went away
        message, status = f"cannot write{place}: {error.strerror or error}", 1
    except ValueError as error:  # a folder in use, a damaged checkpoint
        message, status = error, 2
    else:
        return
    if at_once:
        _leave(f"error: {message}", status)
    _fail(message, status)


def _fail(message: object, status: int = 2) -> NoReturn:
    if cluster.size() > 1:
        _leave(f"error: {message}", status)
    tell(f"error: {message}")
    raise SystemExit(status)


def _leave(message: object, status: int) -> NoReturn:
    """Ends the process, and others that it runs with, without waiting for threads that still compile."""
    cluster.end(str(message), status)
    if message:
        tell(message)
    with suppress(Unheard):
        flush()
    os._exit(status)


def _version():
    try:
        return version("jaxpg")
    except PackageNotFoundError:
        return "(not installed)"
