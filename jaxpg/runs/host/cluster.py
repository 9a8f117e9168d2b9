"""Several processes that run one command: how they join, agree, and end together.

jax's own service carries every word between them, and process 0 alone speaks and writes the run's folder.
"""

import ctypes
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, NamedTuple, NoReturn

from jaxpg.runs import console
from jaxpg.runs.config.processes import Cluster
from jaxpg.runs.console import Ended, shortened

GRACE = 1.0  # seconds in which an error that all processes make is every one's own
LEAVING = 5.0  # seconds that process 0, which carries the messages, waits for the others to leave
FOREVER = 2**31 - 1  # milliseconds
PREFIX = "jaxpg/"
# Signs that an error of jax is about a lost connection.
LOST = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
    *("Gloo", "NCCL", "RCCL", "Connection", "oordination", "arrier"),
)
LEAST = (0, 8, 2)  # jax: its signal handler can be left out, and its shutdown is bounded
SIGNALS = 128  # an exit status above it is a signal's


class _Joined(NamedTuple):
    """What a process holds while it is one of several."""

    client: Any  # of jax's service: a store of texts that all processes see
    process: int
    total: int
    number: Iterator[int]  # of what they have asked each other
    ending: threading.Lock  # whoever holds it ends this process


_joined: list[_Joined] = []  # empty: this process is alone
_stopping: list[int] = []  # signals that this process has had, or that all have agreed to heed
_advice: list[str] = []  # what to do when a process is lost, last the newest


def leads() -> bool:
    """Whether this process speaks and writes: process 0, or one that is alone."""
    return not _joined or _joined[0].process == 0


def size() -> int:
    """How many processes run this command."""
    return _joined[0].total if _joined else 1


def index() -> int:
    """Which of the processes this is, from 0."""
    return _joined[0].process if _joined else 0


@contextmanager
def joined(cluster: Cluster | None) -> Iterator[None]:
    """Joins the processes of a cluster, and leaves them at the end, with all of them; None: does nothing.

    Raises Ended, in each process, if they do not come together within the cluster's timeout. From then on
    a process that fails, falls silent or is killed ends all of them, with one line of process 0 or, without
    it, of each.
    """
    if cluster is None:
        yield
        return
    import jax

    if jax.__version_info__ < LEAST:
        needed = ".".join(map(str, LEAST))
        raise Ended(f"several processes need jax {needed} or newer, and this is {jax.__version__}")
    _reach(cluster)
    heard = _hush()
    _on_abort(heard, cluster)
    jax.config.update("jax_enable_preemption_service", False)  # signals are handled here
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            initialization_timeout=cluster.timeout,
            heartbeat_timeout_seconds=cluster.timeout,
            shutdown_timeout_seconds=cluster.timeout,
        )
    except (ValueError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        if cluster.coordinator is None:
            why += " found no other processes; name them: --coordinator HOST:PORT --processes N --process I"
            why = f"--distributed{why.partition(' defined.')[2] or ': ' + why}"
        raise Ended(why) from error
    from jax._src.distributed import global_state as state

    own = _Joined(state.client, state.process_id, state.num_processes, count(), threading.Lock())
    _joined.append(own)
    if own.process:
        console.mute()
    listening = threading.Thread(target=_listen, args=(own,), daemon=True)
    listening.start()
    try:
        yield
        agree({})  # while each still listens: one that is not done yet may fail
        _leave(own)
        listening.join(LEAVING)  # a thread of jax's client crashes a Python that ends before it
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise  # its own: no memory, or an environment's function that failed
        time.sleep(GRACE)  # which it may still say
        with own.ending, suppress(jax.errors.JaxRuntimeError):  # nobody has said why
            _follow(own, json.loads(own.client.key_value_try_get(f"{PREFIX}end")))
        why = re.sub(r"^[A-Z_]+: |:? \[.*", "", str(error).partition("\n")[0])
        raise Ended(_lost("another process", f" ({shortened(why)})")) from error


def _leave(own: _Joined) -> None:
    """Waits for all processes, and leaves them."""
    import jax

    with own.ending:  # from here on this process ends no other
        jax.distributed.shutdown()
        _joined.clear()


def _reach(cluster: Cluster) -> None:
    """Raises Ended if the coordinator's port is taken, or if it does not answer within the timeout."""
    if cluster.coordinator is None:
        return
    host, _, port = cluster.coordinator.rpartition(":")
    host, deadline = host.strip("[]"), time.monotonic() + cluster.timeout
    if cluster.process == 0:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", int(port)))
            except OSError as error:
                raise Ended(
                    f"process 0 cannot listen at --coordinator {cluster.coordinator}: "
                    f"{error.strerror}; use another port in every process"
                ) from error
        return
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=cluster.timeout):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Ended(
                    f"process {cluster.process} cannot reach process 0 at --coordinator "
                    f"{cluster.coordinator} within {cluster.timeout} s: {error.strerror or error}; is it "
                    "running, with the same --coordinator?"
                ) from error
        time.sleep(0.2)


def _hush() -> int:
    """Lets Python alone print, and keeps what jax's libraries say in a file. Returns its descriptor.

    Their service ends a process with a page of C++, and gloo greets every peer on standard output.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream.fileno() == number:
            stream.flush()
            # By lines, because a process that ends with others does not flush.
            own = os.fdopen(os.dup(number), "w", 1, stream.encoding, stream.errors)
            setattr(sys, name, own)
    heard, name = tempfile.mkstemp()
    os.unlink(name)
    for number in (1, 2):
        os.dup2(heard, number)
    return heard


def _on_abort(heard: int, cluster: Cluster) -> None:
    """Ends the process with one line when jax's service aborts it, as it does when another is lost.

    Python cannot handle this signal, which comes in a thread of C++ that does not return from it.
    """

    def handle(number):
        last = max(os.fstat(heard).st_size - 2**20, 0)
        said = os.pread(heard, 2**20, last).decode(errors="replace")
        line, speaks = _understood(said, cluster)
        if line is None:
            print(said, file=sys.stderr, flush=True)
            os._exit(128 + number)
        if speaks:
            console.unmute()
        console.tell(f"error: {line}")
        os._exit(1)

    found = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _KEPT.append(found)
    ctypes.CDLL(None).signal(signal.SIGABRT, found)


_KEPT: list[Any] = []  # C holds only a pointer to it


def _understood(said: str, cluster: Cluster) -> tuple[str | None, bool]:
    """What jax's service means by its last words, and whether this process says it; None: not its words."""
    if "JAX distributed service" not in said:
        return None, True
    if twice := re.search(r"(\d+) unexpectedly tried to connect", said):
        return f"two processes have --process {twice[1]}; give each its own", True
    if not _joined:
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        return (
            f"the processes did not come together{where} within {cluster.timeout} s; start each of them "
            f"{'' if cluster.processes is None else f'(0 to {cluster.processes - 1}) '}"
            "with the same command, or give more --heartbeat-timeout",
            True,
        )
    if silent := re.search(r"stopped sending heartbeats\):\s*([\d, ]+)", said):
        which = silent[1].strip().replace(",", ", ")
        plural = "es" * ("," in which)
        return _lost(f"process{plural} {which}"), False
    return _lost("process 0"), True


def _lost(who: str, why: str = "") -> str:
    way = f"; {_advice[-1]}" if _advice else ""
    return f"{who} is gone{why}, so this run has ended{way}"


def advise(way_out: str) -> None:
    """What a line about a lost process tells the user to do."""
    _advice.append(way_out)


def first(make: Callable[[], Any]) -> Any:
    """The value of make(), plain enough for JSON, that process 0 alone computes and tells the others.

    An error that it raises there ends all of them.

    >>> first(lambda: 3)  # alone
    3
    """
    if not _joined:
        return make()
    own, key = _joined[0], _next("first")
    if own.process == 0:
        value = make()
        own.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(own.client.blocking_key_value_get(key, FOREVER))


def collected(value: Any) -> list[Any]:
    """Each process's value, plain enough for JSON, in process 0; elsewhere only its own.

    >>> collected(3)  # alone
    [3]
    """
    if not _joined:
        return [value]
    own, key = _joined[0], _next("all")
    if own.process:
        own.client.key_value_set(f"{key}/{own.process}", json.dumps(value))
        return [value]
    found = [value]
    for other in (f"{key}/{i}" for i in range(1, own.total)):
        found.append(json.loads(own.client.blocking_key_value_get(other, FOREVER)))
        own.client.key_value_delete(other)  # the service keeps in memory what it is told
    return found


def agree(asked: dict[str, Any]) -> None:
    """Waits for all processes. Raises ValueError in process 0 unless all were asked for the same, by name."""
    each = collected(asked)
    first(lambda: _compare(each))


def _compare(each: list[dict[str, Any]]) -> None:
    for number, other in enumerate(each):
        for name in (*each[0], *other):
            here, there = (json.dumps(x.get(name)) for x in (each[0], other))
            if here != there:
                raise ValueError(
                    f"process {number} has {name}={shortened(there)}, and process 0 {shortened(here)}; "
                    "start all of them with the same command, files and versions"
                )


def voted(stopped: int, due: bool) -> tuple[int, bool]:
    """The first signal that any process has had, and whether process 0 finds a checkpoint due.

    >>> voted(0, True)  # alone
    (0, True)
    """
    if not _joined:
        return stopped, due
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    votes = process_allgather(np.array([stopped, due], np.int32))
    if stopped := int(votes[:, 0].max()):
        stopping(stopped)
    return stopped, bool(votes[0, 1])


def stopping(number: int) -> None:
    """Says that this process is about to save and stop after a signal, whatever the others do."""
    _stopping.append(number)


def end(message: str, status: int) -> None:
    """Tells the other processes that this one ends with this message, and waits until they have left.

    Returns at once in a process that is alone, and never while another thread is ending this process.
    """
    if not _joined:
        return
    own = _joined[0]
    own.ending.acquire()
    said = json.dumps({"process": own.process, "message": message, "status": status})
    with suppress(Exception):  # another was first, or the service is gone
        own.client.key_value_set(f"{PREFIX}end", said)
    _left(own)


def fail(message: str) -> NoReturn:
    """Ends this process with this message, and the others, from any thread."""
    end(message, 1)
    console.tell(message)
    os._exit(1)


def _left(own: _Joined) -> None:
    """Says that this process leaves; process 0 waits for the others to say so."""
    deadline = time.monotonic() + LEAVING
    with suppress(Exception):
        if own.process:
            own.client.key_value_set(f"{PREFIX}left/{own.process}", "")
            return
        while time.monotonic() < deadline:
            if len(own.client.key_value_dir_get(f"{PREFIX}left/")) == own.total - 1:
                return
            time.sleep(0.05)


def _listen(own: _Joined) -> None:
    """Ends this process when another says that it has ended."""
    try:
        said = json.loads(own.client.blocking_key_value_get(f"{PREFIX}end", FOREVER))
    except Exception:  # the service is gone: its own abort says so
        return
    if said["process"] == own.process:
        return
    if own.process == 0:
        time.sleep(GRACE)
    own.ending.acquire()
    heeds = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
    if said["status"] > SIGNALS and heeds:
        # It was stopped, so this process saves what it has and stops, too.
        if not _stopping:
            os.kill(os.getpid(), signal.SIGTERM)
        own.ending.release()
        return
    _follow(own, said)


def _follow(own: _Joined, said: dict[str, Any]) -> NoReturn:
    """Ends this process as another has ended, in its words."""
    what, colon, rest = said["message"].partition("error: ")
    console.tell(f"{what}{colon}process {said['process']}: {rest}" if colon else what)
    _left(own)
    os._exit(said["status"])


def _next(kind: str) -> str:
    """A key that every process makes at the same place of the program."""
    return f"{PREFIX}{kind}/{next(_joined[0].number)}"
