"""What a compiled program costs on a chip, read from the text that the chip's compiler writes."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Chip(NamedTuple):
    platform: str  # as jax.default_backend() calls it there
    lowering: str
    topology: dict[str, str]
    memory: float  # bytes
    bandwidth: float  # bytes per second
    clock: float = 0.0  # Hz; 0: the compiler estimates no cycles
    launch: float = 0.0  # seconds of a small kernel
    round_trip: float = 0.0  # seconds in which the host reads a value to decide what runs next


class Operation(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_result: bool  # of its computation

    def called(self, attribute: str) -> list[str]:
        found = re.search(rf"\b{attribute}=(%[\w.-]+|{{[^}}]*}})", self.attributes)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []

    @property
    def inputs(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.operands)


Computation = dict[str, Operation]
WIDTH = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "c64": 8, "c128": 16}
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"}
# What costs nothing by itself: names for memory, and calls that are followed.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("optimization-barrier", "partition-id", "replica-id", "while", "conditional", "call"),
}


class Text(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    # Of a stack: its file and line, and the frame that called it.
    frames: dict[int, tuple[str, int, int]]


def parsed(text: str) -> Text:
    computations, entry, current = {}, "", {}
    tables: dict[str, dict[int, str]] = {}
    table = {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif found := re.match(r"(ENTRY )?%([\w.-]+) .*{$", line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif found := re.match(r" +(ROOT )?%([\w.-]+) = (.*)", line):
            shape, rest = _leading(found[3])
            opcode, _, rest = rest.strip().partition("(")
            operands, attributes = _leading("(" + rest)
            name, root = found[2], bool(found[1])
            current[name] = Operation(name, shape, opcode, operands, attributes, root)
        elif found := re.match(r"(\d+) (.*)", line):
            table[int(found[1])] = found[2]

    def number(said, name):
        found = re.search(rf"\b{name}=(\d+)", said)
        return int(found[1]) if found else 1

    frames = {}
    for frame, said in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"][number(said, "file_location_id")]
        file = tables["FileNames"][number(place, "file_name_id")].strip('"')
        # A caller is written one too high; 0 is none.
        frames[frame] = file, number(place, "line"), number(said, "parent_frame_id") - 1
    return Text(computations, entry, frames)


def _leading(text: str) -> tuple[str, str]:
    """A shape or a list in brackets, and what follows it."""
    if not text.startswith("("):
        return tuple(text.split(" ", 1))  # type: ignore[return-value]
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def arrays(shape: str) -> Iterator[tuple[str, float]]:
    """Each array of a shape with its bytes, unpadded."""
    for kind, sizes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", kind)
        width = WIDTH[kind] if kind in WIDTH else int(bits[0]) / 8 if bits else 0
        yield f"{kind}[{sizes}]", width * math.prod(int(x) for x in sizes.split(",") if x)


def size(shape: str) -> float:
    return sum(count for _, count in arrays(shape))


def source(text: Text, operation: Operation, callers: int = 0) -> str:
    """The file and line that asked for an operation, and its callers': of this package, if any is."""
    found = re.search(r"stack_frame_id=(\d+)", operation.attributes)
    frame, innermost, places = int(found[1]) if found else 0, "", []
    while frame in text.frames:
        file, line, caller = text.frames[frame]
        innermost = innermost or f"{Path(file).name}:{line}"
        if Path(file).is_relative_to(ROOT / "jaxpg"):
            place = f"{Path(file).relative_to(ROOT / 'jaxpg')}:{line}"
            places += [place] if place not in places else []
        frame = caller
    return " < ".join(places[: callers + 1]) or innermost


# ---- its costs


class Cost(NamedTuple):
    operations: float = 0.0  # on a TPU those that the compiler estimates, on a GPU kernels
    cycles: float = 0.0
    round_trips: float = 0.0
    seconds: float = 0.0  # predicted
    collectives: float = 0.0
    collective_bytes: float = 0.0

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class Block(NamedTuple):
    """A loop's body, the dearest branch of a conditional, or the whole program."""

    name: str
    trips: int
    exact: bool  # otherwise the trips are the most there can be, or unknown and counted once
    own: Cost  # of one trip, without the inner blocks
    operations: list[tuple[Operation, Cost]]
    inner: list["Block"]

    @property
    def once(self) -> Cost:
        total = self.own
        for block in self.inner:
            total = total.plus(block.once, block.trips)
        return total


def measured(text: Text, chip: Chip) -> Block:
    return _block(text, chip, text.entry, "whole program", 1, True)


def _block(text, chip, computation, name, trips, exact) -> Block:
    operations, inner, own = [], [], Cost()
    body = text.computations[computation]
    for operation in body.values():
        cost = _cost(text, chip, body, operation)
        if operation.opcode == "while":
            count, known, whole = _trips(text, body, operation)
            label = f"loop at {source(text, operation, 2)}"
            (called,) = operation.called("body")
            block = _block(text, chip, called, label, count, whole)
            if chip.round_trip and not known:  # the host reads the condition in every trip
                (asked,) = operation.called("condition")
                asking = _block(text, chip, asked, "", 1, True)
                block = block._replace(
                    own=block.own.plus(asking.own).plus(_round_trip(chip)),
                    operations=block.operations + asking.operations,
                )
            inner.append(block)
        elif operation.opcode == "conditional":
            branches = operation.called("branch_computations") or (
                operation.called("true_computation") + operation.called("false_computation")
            )
            label = f"dearest branch at {source(text, operation)}"
            found = [_block(text, chip, branch, label, 1, True) for branch in branches]
            inner.append(max(found, key=lambda x: (x.once.seconds, x.once.operations)))
            cost = _round_trip(chip)
        elif operation.opcode in ("call", "async-start"):
            for called in operation.called("to_apply") + operation.called("calls"):
                block = _block(text, chip, called, "", 1, True)
                own, operations = own.plus(block.own), operations + block.operations
                inner += block.inner
        own = own.plus(cost)
        if cost.operations or cost.round_trips:
            operations.append((operation, cost))
    return Block(name, trips, exact, own, operations, inner)


def _round_trip(chip: Chip) -> Cost:
    return Cost(round_trips=float(chip.round_trip > 0), seconds=chip.round_trip)


def _cost(text: Text, chip: Chip, body: Computation, operation: Operation) -> Cost:
    kind = operation.opcode.removesuffix("-start")
    if operation.opcode in FREE or operation.opcode.endswith("-done") or kind == "async":
        return Cost()
    cost = Cost()
    if kind in COLLECTIVES:
        cost = Cost(collectives=1, collective_bytes=size(operation.shape))
    if chip.clock:
        found = re.search(r'"estimated_cycles":"(\d+)"', operation.attributes)
        if not found:
            return cost
        cycles = int(found[1])
        return cost.plus(Cost(1, cycles, seconds=cycles / chip.clock))
    moved = _moved(text, body, operation)
    return cost.plus(Cost(1, seconds=max(chip.launch, moved / chip.bandwidth)))


def _moved(text: Text, body: Computation, operation: Operation) -> float:
    """Bytes that a kernel reads and writes; of an array that it slices or updates in place, that part."""
    fused = operation.called("calls") if operation.opcode == "fusion" else []
    if not fused:
        return size(operation.shape) + sum(
            size(body[name].shape) for name in operation.inputs if name in body
        )
    inside, total = text.computations[fused[0]], 0.0
    users: dict[str, list[Operation]] = {}
    for user in inside.values():
        for name in user.inputs:
            users.setdefault(name, []).append(user)
    for found in inside.values():
        if found.opcode == "parameter":
            total += sum(_read(found, user) for user in users.get(found.name, [])[:1])
    updates = [x for x in inside.values() if x.opcode == "dynamic-update-slice"]
    written = sum(size(inside[x.inputs[1]].shape) for x in updates)
    return total + written + max(0.0, size(operation.shape) - sum(size(x.shape) for x in updates))


def _read(parameter: Operation, user: Operation) -> float:
    if user.opcode == "dynamic-update-slice" and user.inputs[0] == parameter.name:
        return 0.0
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.inputs[0] == parameter.name:
        return size(user.shape)
    return size(parameter.shape)


def _trips(text: Text, body: Computation, loop: Operation) -> tuple[int, bool, bool]:
    """Trips of a loop, whether the compiler knows them, and whether they are exact.

    Where the compiler does not say, the bound is the constant with which the condition compares a counter
    from 0; with a further condition, as of episodes that may all have ended, it is the most there can be.
    """
    found = re.search(r'"known_trip_count":{"n":"(\d+)"', loop.attributes)
    if found:
        return int(found[1]), True, True
    (condition,) = loop.called("condition")
    inside = text.computations[condition]
    bounds, result = list(_bounds(text, inside, body, loop)), _result(inside)
    if result.opcode == "fusion":
        result = _result(text.computations[result.called("calls")[0]])
    return (max(bounds), False, result.opcode == "compare") if bounds else (1, False, False)


def _result(computation: Computation) -> Operation:
    return next(x for x in computation.values() if x.is_result)


def _bounds(text: Text, inside: Computation, body: Computation, loop: Operation) -> Iterator[int]:
    for operation in inside.values():
        calls = operation.called("calls") if operation.opcode == "fusion" else []
        scope = text.computations[calls[0]] if calls else inside
        given = {
            x.name: int(x.operands.strip("()"))
            for x in scope.values()
            if calls and x.opcode == "parameter"
        }
        for each in scope.values() if calls else [operation]:
            if each.opcode == "compare" and "direction=LT" in each.attributes:
                name, where = each.inputs[1], scope
                if name in given:
                    name, where = operation.inputs[given[name]], inside
                value = _constant(where, name, body, loop)
                if value is not None and value > 0:  # a counter is also compared with 0, to wrap it
                    yield value
            elif each.opcode == "dynamic-slice" and each.shape.startswith("pred["):
                # The last of an array of answers must end the loop.
                yield int(size(scope[each.inputs[0]].shape)) - 1


def _constant(inside: Computation, name: str, body: Computation, loop: Operation) -> int | None:
    """The value of an integer constant, also where it enters the loop in its tuple."""
    for _ in range(10):
        operation = inside.get(name)
        if operation is None:
            return None
        if operation.opcode == "constant":
            found = re.fullmatch(r"\((-?\d+)\)", operation.operands)
            return int(found[1]) if found else None
        if operation.opcode == "get-tuple-element" and inside is not body:
            entry = body.get(loop.inputs[0])
            index = re.search(r"index=(\d+)", operation.attributes)
            if entry is None or entry.opcode != "tuple" or index is None:
                return None
            inside, name = body, entry.inputs[int(index[1])]
        elif operation.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            name = operation.inputs[0]
        else:
            return None
    return None


# ---- what a GPU's host starts


class Thunk(NamedTuple):
    """What the host starts, or evaluates to decide what to start."""

    kind: str
    number: int
    parts: dict[
        str, list["Thunk"]
    ]  # by their label: a loop's condition and body, a choice's branches


def launches(text: Text, sequence: str, metadata: str) -> float:
    """How often the host starts a kernel or a graph, or reads a value, in one run of the program.

    sequence, metadata: as XLA dumps them. A graph is started once, whatever loops are in it.
    """
    loops = {
        operation.name: _trips(text, body, operation)
        for body in text.computations.values()
        for operation in body.values()
        if operation.opcode == "while"
    }
    pairs = re.findall(r'profile_annotation: "(.*)"\n    thunk_id: (\d+)', metadata)
    names = {int(number): name for name, number in pairs}
    return _started(_thunks(sequence), names, loops)


def _thunks(sequence: str) -> list[Thunk]:
    root = Thunk("", 0, {"": []})
    above, label, outside = [(-1, root)], "", 0
    for spaces, number, kind, found in re.findall(
        r"^( *)(?:(\d+): (k\w+).*|(\w+:))$", sequence, re.MULTILINE
    ):
        if found:  # a label; that of a condition is not indented
            label, outside = found, 0 if found == "condition:" else len(spaces)
            continue
        while above[-1][0] >= len(spaces):
            above.pop()
        parent, thunk = above[-1][1], Thunk(kind, int(number), {})
        if label and len(spaces) > outside:  # an empty branch leaves its label behind
            parent.parts[label] = []
        label = ""
        parent.parts.setdefault(next(reversed(parent.parts), ""), []).append(thunk)
        above.append((len(spaces), thunk))
    return root.parts[""]


def _started(thunks: list[Thunk], names: dict[int, str], loops: dict) -> float:
    total = 0.0
    for thunk in thunks:
        inside = {label: _started(part, names, loops) for label, part in thunk.parts.items()}
        if thunk.kind == "kWhile":
            trips, known, _ = loops[names[thunk.number]]
            # Unless trips are known, the host runs the condition and reads its answer.
            total += trips * (inside["body:"] + (0 if known else inside["condition:"] + 1))
        elif thunk.kind == "kConditional":
            total += 1 + max(inside.values(), default=0.0)
        else:  # a kernel, or a graph with all that is in it
            total += 1
    return total
