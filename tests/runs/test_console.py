"""What a command prints, where it prints it, and which environment variables it respects."""

import errno
import io
import logging
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jax
import pytest
from small_runs import FLAGS, ROOT
from test_plots import write_run

from jaxpg import cli
from jaxpg.cli import main
from jaxpg.runs import console, laboratory
from jaxpg.runs.host.cache import use_compilation_cache
from jaxpg.runs.store import checkpoint
from jaxpg.runs.train import replicas

# An environment without a home, or a folder to keep programs in.
HIDDEN = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "NO_COLOR", "TERM")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in HIDDEN} | {
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "80",
}


def test_an_unknown_command_lists_all_of_them(capsys):
    for word, hint in (("frobnicate", ""), ("trian", "did you mean train? "), ("x" * 5000, "")):
        with pytest.raises(SystemExit) as exit_:
            main([word])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.count("\n") == 1 and len(error) < 250
        assert hint in error and ", ".join(cli.COMMANDS) in error


@pytest.fixture
def left(monkeypatch):
    """Replaces an immediate end of the process by SystemExit."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)


HEARD = [
    "--version",
    "--help",
    "train --help",
    "sweep --help",
    "plot --help",
    "lab --help",
    "lab list",
]


@pytest.mark.usefixtures("left")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
@pytest.mark.parametrize("full", [True, False])
def test_output_that_nobody_takes_is_no_traceback(full, monkeypatch, capsys):
    """A full device is reported in one line; a reader that has left is told nothing."""
    for arguments in HEARD:
        reader, writer = os.pipe()
        os.close(reader)
        with open("/dev/full" if full else writer, "w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            with pytest.raises(SystemExit) as exit_:
                main(arguments.split())
            # Python would try to write again what is still in its buffer.
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if full:
            os.close(writer)
        said = "jaxpg: error: cannot write to standard output: No space left on device\n"
        assert capsys.readouterr().err == (said if full else ""), arguments
        assert exit_.value.code == (1 if full else 141), arguments


@pytest.mark.slow
@pytest.mark.usefixtures("left")
@pytest.mark.parametrize(("number", "status"), [(errno.EPIPE, 141), (errno.ENOSPC, 1)])
def test_training_whose_output_nobody_takes_is_saved(number, status, monkeypatch, capsys, tmp_path):
    """The reader leaves, or the disk fills, after the first chunk: neither is reported as a signal."""

    class Out(io.StringIO):
        def write(self, text):
            if "updates  " in text:
                raise OSError(number, os.strerror(number))
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Out())
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        main(["train", *FLAGS.replace("--quiet", "--updates 40 --run").split(), str(folder)])
    said = "jaxpg: error: cannot write to standard output: No space left on device\n"
    assert capsys.readouterr().err == ("" if number == errno.EPIPE else said)
    assert exit_.value.code == status
    assert 0 < checkpoint.steps(folder / "checkpoints")[-1] < 40
    assert (folder / "params.npz").exists()


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nMore"),
        ImportError("lib.so: failed to map segment from shared object"),
        RuntimeError("anything else"),
    ],
)
def test_a_lack_of_memory_or_threads_is_said(error, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        raise error

    known = "else" not in str(error)
    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(SystemExit if known else RuntimeError) as raised:
        main(["train"])
    said = capsys.readouterr().err
    if known:
        assert raised.value.args == (1,) and said.count("\n") == 1
        assert "this process ran out of memory or threads: " in said
    # Nor is it reported as a checkpoint that cannot be written, or with the logs of orbax's tasks.
    with cli._only_own_exceptions():
        assert not logging.getLogger("asyncio").isEnabledFor(logging.ERROR)
    assert logging.getLogger("asyncio").isEnabledFor(logging.ERROR)
    with pytest.raises(type(error) if known else OSError):
        checkpoint._written(tmp_path, run)


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_lines_that_change_need_a_terminal_that_can(term, monkeypatch):
    """A capable terminal redraws lines, without colours under NO_COLOR; others get one line after another."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(laboratory, "QUIET_SECONDS", -1.0)
    shown = console.terminal()
    assert (shown is None) == (term == "dumb")
    assert shown is None or shown.no_color
    with laboratory._progress() as progress:
        progress("half of [it]")
    text = screen.getvalue()
    assert "half of [it]" in text
    assert ("\x1b" in text) == (term != "dumb")
    assert not re.search(r"\x1b\[[0-9;]*m", text)
    # If standard error is closed or full, progress is lost and the experiment goes on.
    with open(os.devnull) as closed:
        for nobody in (None, closed):
            monkeypatch.setattr(sys, "stderr", nobody)
            with laboratory._progress() as progress:
                progress("half")


def on_a_terminal(program, **environment):
    """The output of a child process on a terminal of 80 columns."""
    import pty

    own, its = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", program],
        env=ENVIRONMENT | {"TERM": "xterm"} | environment,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    found = b""
    with suppress(OSError):  # how Linux signals the end
        while part := os.read(own, 65536):
            found += part
    os.close(own)
    assert done.wait(timeout=60) == 0, found
    return found.decode()


HELP = "from jaxpg.cli import main; main(['train', '--help'])"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")
def test_help_has_no_colours_where_they_are_not_wanted():
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        text = on_a_terminal(HELP, **environment)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80


LIVE = """
import numpy as np
from jaxpg.runs.host.progress import Status, display
with display(False) as show:
    for k in range(1, 9):
        show(Status(k, 8, k, k, 0.0, np.array([[k, k + 2.0]])))
    show("evaluating")
print("the end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")
def test_the_live_curve_stays_on_the_screen():
    text = on_a_terminal(LIVE, NO_COLOR="1", COLUMNS="100")
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.split("\x1b[1A")[-1])
    assert "2.0 ▁▂▃▄▅▆▇█ 9.0" in last and "8/8 updates" in last and "evaluating" not in last
    assert last.split()[-2:] == ["the", "end"]
    assert max(len(line.rstrip()) for line in last.splitlines()) == 100


@pytest.mark.parametrize("given", [{"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, {}])
def test_the_number_of_devices_in_xla_flags_is_kept(given, monkeypatch):
    asked = []
    monkeypatch.setattr(replicas, "prefer", lambda *each: asked.append(each))
    monkeypatch.setenv("XLA_FLAGS", given.get("XLA_FLAGS", ""))
    replicas.use_cpu_cores()
    assert bool(asked) == (not given)


def test_without_a_home_nothing_is_kept(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# A notebook's shell whose user has neither a home nor a name.
NOTEBOOK = """
import pwd, jax
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from jaxpg.cli import main
from jaxpg.runs.host.cache import use_compilation_cache
from jaxpg.runs.train.replicas import use_cpu_cores
use_cpu_cores()
assert jax.device_count() == 1
use_compilation_cache()
assert jax.config.jax_compilation_cache_dir is None
main(["plot", "r"])
"""

NOWHERE = """
from jaxpg.cli import main
for arguments in (
    "train CartPole-v1 --run q", "train --config r --run q", "train --resume r --updates 9",
    "train CartPole-v1 --run q --resume-or-start", "sweep CartPole-v1 --gamma .9,.99 --run q",
    "evaluate r", "record r --episodes 2 --out a.npz", "render r --out a.gif", "lab gae", "lab all",
    "record FrozenLake-misc --expert --episodes 2 --out a.npz",
):
    try:
        main(arguments.split())
    except SystemExit as stop:
        print(stop.code)
"""


@pytest.mark.slow
def test_the_environment_of_a_process_is_heeded(tmp_path):
    write_run(tmp_path / "r", rates=(0.1,))

    def child(program, **environment):
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=ENVIRONMENT | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = child(NOTEBOOK, MPLBACKEND="module://not_here.inline", JAX_NUM_CPU_DEVICES="1")
    assert (done.returncode, done.stderr) == (0, "")
    names = {
        f"{name}.{kind}" for name in ("curves", "diagnostics") for kind in ("png", "svg", "pdf")
    }
    assert {f.name for f in (tmp_path / "r" / "figures").iterdir()} == names
    before = {*tmp_path.rglob("*")}
    done = child(NOWHERE, JAX_PLATFORMS="cpuu")
    errors = done.stderr.splitlines()
    assert {*done.stdout.split()} == {"2"} and len(errors) == len(done.stdout.split()) == 11
    assert all(line.startswith("jaxpg: error: JAX_PLATFORMS=cpuu: ") for line in errors)
    assert {*tmp_path.rglob("*")} == before
