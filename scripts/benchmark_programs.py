"""What jaxpg's programs cost on a chip that is not there, read from the text that the chip's compiler writes.

scripts/benchmark programs --chip v5e|h100 [--case NAME ...] [--explain NAME] [--peers] [--json FILE]

Nothing is run on a device: counts are exact and repeat, rates are predictions. The compiler is installed on
first use, into an environment of its own (.venv-tpu takes 2 GB, .venv-cuda 6 GB).
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }
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


class Chip(NamedTuple):
    platform: str  # as jax.default_backend() calls it there
    lowering: str
    extra: str  # of this package, which installs the compiler into .venv-NAME
    environment: str
    topology: dict[str, str]
    memory: float  # bytes
    bandwidth: float  # bytes per second
    clock: float = 0.0  # Hz; 0: the compiler estimates no cycles
    launch: float = 0.0  # seconds of a small kernel
    round_trip: float = 0.0  # seconds in which the host reads a value to decide what runs next


# v5e:1x1 is refused, so a program is placed on one of four.
TPU = ("tpu", "tpu", "tpu", ".venv-tpu")
CHIPS = {
    "v5e": Chip(*TPU, {"topology_name": "v5e:2x2"}, 16e9, 819e9, clock=1.5e9),
    "v6e": Chip(*TPU, {"topology_name": "v6e:2x2"}, 32e9, 1640e9, clock=1.75e9),
    "h100": Chip(
        *("gpu", "cuda", "cuda12", ".venv-cuda"),
        {"topology_name": "", "topology": "1x1x1", "target_config": H100},
        *(85e9, 3.35e12),
        launch=3e-6,
        round_trip=15e-6,
    ),
}


# ---- the compiled text


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
    frames: dict[
        int, tuple[str, int]
    ]  # stack frame -> its source file and line, and the frame that called it
    parents: dict[int, int]


def parsed(text: str) -> Text:
    computations, entry, current = {}, "", {}
    tables: dict[str, list[str]] = {}
    table = []
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, [])
        elif found := re.match(r"(ENTRY )?%([\w.-]+) .*{$", line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif found := re.match(r" +(ROOT )?%([\w.-]+) = (.*)", line):
            shape, rest = _leading(found[3])
            opcode, _, rest = rest.strip().partition("(")
            operands, attributes = _leading("(" + rest)
            name, root = found[2], bool(found[1])
            current[name] = Operation(name, shape, opcode, operands, attributes, root)
        elif re.match(r"\d+ ", line):
            table.append(line)
    files = {
        n: name.strip('"') for n, name in (x.split(" ", 1) for x in tables.get("FileNames", []))
    }
    places, frames, parents = {}, {}, {}
    for line in tables.get("FileLocations", []):
        found = re.match(r"(\d+) {file_name_id=(\d+) .*?\bline=(\d+)", line)
        if found:
            places[found[1]] = files[found[2]], int(found[3])
    for line in tables.get("StackFrames", []):
        found = re.match(r"(\d+) {file_location_id=(\d+)(?: parent_frame_id=(\d+))?", line)
        if found:
            frames[int(found[1])] = places[found[2]]
            parents[int(found[1])] = int(found[3] or 1) - 1  # written one too high; 0: no caller
    return Text(computations, entry, frames, parents)


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
        file, line = text.frames[frame]
        innermost = innermost or f"{Path(file).name}:{line}"
        if Path(file).is_relative_to(ROOT / "jaxpg"):
            place = f"{Path(file).relative_to(ROOT / 'jaxpg')}:{line}"
            places += [place] if place not in places else []
        frame = text.parents[frame]
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
    inside, bounds = text.computations[condition], []
    for operation in inside.values():
        bounds += _bounds(text, inside, operation, body, loop)
    result = _result(inside)
    if result.opcode == "fusion":
        result = _result(text.computations[result.called("calls")[0]])
    return (max(bounds), False, result.opcode == "compare") if bounds else (1, False, False)


def _result(computation: Computation) -> Operation:
    return next(x for x in computation.values() if x.is_result)


def _bounds(text, inside, operation, body, loop) -> list[int]:
    if operation.opcode == "compare" and "direction=LT" in operation.attributes:
        value = _constant(inside, operation.inputs[1], body, loop)
        return [] if value is None else [value]
    if operation.opcode == "fusion":
        fused = text.computations[operation.called("calls")[0]]
        found = []
        for each in fused.values():
            if each.opcode == "compare" and "direction=LT" in each.attributes:
                one = fused[each.inputs[1]]
                if one.opcode == "parameter":
                    name = operation.inputs[int(one.operands.strip("()"))]
                    value = _constant(inside, name, body, loop)
                else:
                    value = _constant(fused, one.name, body, loop)
                found += [] if value is None else [value]
        return found
    return []


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


# ---- jaxpg's programs


class Program(NamedTuple):
    function: Callable
    arguments: tuple  # shapes
    steps: int  # of environments in an update
    updates: int = 1


def _numbers() -> Any:
    import jax

    from jaxpg import Hyperparams

    return jax.eval_shape(lambda: jax.tree.map(jax.numpy.float32, Hyperparams()))


def _shapes(function: Callable, count: int, *arguments: Any) -> Any:
    import jax

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    return jax.eval_shape(jax.vmap(function), keys, *arguments)


def _training(name, environment, agents, envs, steps, precision, network="mlp", **counts):
    import jax

    from jaxpg import make_trainer
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic
    from jaxpg.training.algorithm import algorithm

    env = from_gymnax(environment)
    agent = actor_critic(env, network, hidden=(64, 64), **precision)
    row = algorithm(name)._replace(**counts)
    trainer = make_trainer(env, agent, row, num_envs=envs, num_steps=steps)
    update = jax.vmap(trainer.update, (0, None))
    state = _shapes(trainer.init, agents)
    if agents == 1:
        update, state = trainer.update, jax.eval_shape(trainer.init, jax.random.key(0))
    return Program(update, (state, _numbers()), agents * envs * (steps or env.horizon))


def _ppo(agents, envs, steps, precision, environment="CartPole-v1", network="mlp"):
    counts = {"num_epochs": 4, "num_minibatches": 4}
    return _training("ppo", environment, agents, envs, steps, precision, network, **counts)


def _evaluation(episodes, precision):
    import jax

    from jaxpg import evaluate
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic, init_params

    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, hidden=(64, 64), **precision)
    params, key = jax.eval_shape(lambda key: (init_params(agent, key), key), jax.random.key(0))
    run = partial(evaluate, env, agent, num_episodes=episodes)
    return Program(run, (params, key), episodes * env.horizon)


def _statistics(trajectories, precision):
    import jax

    from jaxpg.envs import from_gymnax
    from jaxpg.estimators import Estimator
    from jaxpg.lab import Source
    from jaxpg.lab.measure import statistics
    from jaxpg.policies import mlp

    env = from_gymnax("CartPole-v1")
    policy = mlp(env.observation, env.action, **precision)

    def run(params, key, hyperparams):
        taken = Source(env, policy, Estimator(), params, key, hyperparams)
        # The part of gradient_statistics that is compiled.
        return statistics._measure(taken, *statistics.plan(taken, trajectories, None))

    params, key = jax.eval_shape(lambda key: (policy.init(key), key), jax.random.key(0))
    return Program(run, (params, key, _numbers()), trajectories * env.horizon)


def _quickstart(seeds, precision):
    """A chunk of `jaxpg train CartPole-v1 --seeds 256`, as the quickstart notebook runs it."""
    import jax

    from jaxpg import make_trainer, train
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic
    from jaxpg.runs.config.presets import preset
    from jaxpg.runs.train.build import build_algorithm
    from jaxpg.runs.train.loop import chunk_length

    config, _ = preset("CartPole-v1", "ppo")
    env = from_gymnax(config.environment)
    agent = actor_critic(env, hidden=config.hidden, **precision)
    row = build_algorithm(config)
    trainer = make_trainer(env, agent, row, num_envs=config.num_envs, num_steps=config.num_steps)
    updates = chunk_length(config.updates)
    run = jax.vmap(partial(train, trainer, num_updates=updates), (0, None))
    steps = seeds * config.num_envs * (config.num_steps or 128)
    return Program(run, (_shapes(trainer.init, seeds), _numbers()), steps, updates)


# Names say AGENTS x ENVIRONMENTS x STEPS. PPO takes 4 epochs of 4 minibatches; networks are 2x64 tanh.
CASES: dict[str, Callable[[dict[str, str]], Program]] = {
    "ppo-1x4096x128": partial(_ppo, 1, 4096, 128),
    "ppo-8x16x64": partial(_ppo, 8, 16, 64),
    "ppo-256x4x128": partial(_ppo, 256, 4, 128),
    "ppo-2048x4x128": partial(_ppo, 2048, 4, 128),
    "ppo-gru-8x16x64": partial(_ppo, 8, 16, 64, network="gru"),
    "ppo-pendulum-1x1024x128": partial(_ppo, 1, 1024, 128, environment="Pendulum-v1"),
    "ppo-breakout-1x1024x128": partial(_ppo, 1, 1024, 128, environment="Breakout-MinAtar"),
    "a2c-1x65536x1": partial(_training, "a2c", "CartPole-v1", 1, 65536, 1),
    "trpo-1x1024x128": partial(_training, "trpo", "CartPole-v1", 1, 1024, 128),
    "reinforce-65536": partial(_training, "reinforce_baseline", "CartPole-v1", 1, 65536, None),
    "evaluate-1024": partial(_evaluation, 1024),
    "statistics-100000": partial(_statistics, 10**5),
    "quickstart-256": partial(_quickstart, 256),
}
PEER_CASES = {"ppo-1x4096x128", "ppo-8x16x64", "ppo-256x4x128", "ppo-2048x4x128"}


def rejax(name: str) -> Program:
    """One iteration of rejax's PPO in the setting of a case."""
    import jax
    from rejax import get_algo

    agents, envs, steps = map(int, re.findall(r"\d+", name))
    algo = get_algo("ppo").create(
        env="CartPole-v1",
        agent_kwargs={"hidden_layer_sizes": (64, 64), "activation": "tanh"},
        num_envs=envs,
        num_steps=steps,
        num_epochs=4,
        num_minibatches=4,
        learning_rate=1e-3,
        total_timesteps=2**30,
        eval_freq=2**30,
    )
    update, state = algo.train_iteration, jax.eval_shape(algo.init_state, jax.random.key(0))
    if agents > 1:
        update, state = jax.vmap(update), _shapes(algo.init_state, agents)
    return Program(update, (state,), agents * envs * steps)


# ---- compiling them


def place(chip: Chip) -> Any:
    import jax
    from jax.experimental import topologies

    settings = dict(chip.topology)
    found = topologies.get_topology_desc(
        settings.pop("topology_name"), platform=chip.lowering, **settings
    )
    return jax.sharding.SingleDeviceSharding(found.devices[0])


def compiled(name: str, program: Program, chip: Chip, where: Any) -> tuple[Any, float, float]:
    """The program as the chip would run it, and the compiler's seconds: by the clock, and of processors."""
    import jax

    jitted = jax.jit(program.function, in_shardings=where, out_shardings=where)
    lowered = jitted.trace(*program.arguments).lower(lowering_platforms=(chip.lowering,))
    started, worked = time.perf_counter(), time.process_time()
    try:
        found = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        if said is None:
            raise
        fail(f"{name} needs {said[1]} of memory and the chip has {said[2]}; leave it out by --case")
    seconds, work = time.perf_counter() - started, time.process_time() - worked
    memory: Any = found.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > chip.memory:
        fail(
            f"{name} needs {needed / 1e9:.1f} GB of memory and the chip has {chip.memory / 1e9:.1f} "
            "GB; leave it out by --case"
        )
    return found, seconds, work


def row_of(name: str, program: Program, chip: Chip, where: Any) -> tuple[dict[str, Any], Text]:
    found, seconds, work = compiled(name, program, chip, where)
    text = parsed(found.as_text())
    block = measured(text, chip)
    total = Cost().plus(block.once, 1 / program.updates)
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
        "megacycles": total.cycles / 1e6 if chip.clock else None,
        "temporary_bytes": found.memory_analysis().temp_size_in_bytes,
        "largest": {shape: every[shape] for shape in largest},
        "collectives": total.collectives,
        "collective_bytes": total.collective_bytes,
        "compile_seconds": seconds,
        "compile_processor_seconds": work,
        "predicted_steps_per_second": program.steps / total.seconds,
        "loops": list(_loops(block, program.updates)),
        "bounds": any(not x.exact for x in _every(block)),
    }
    return row, text


def _every(block: Block) -> Iterator[Block]:
    yield block
    for inner in block.inner:
        yield from _every(inner)


def _loops(block: Block, updates: int, depth: int = 0, times: float = 1) -> Iterator[dict]:
    times *= block.trips
    own, share = block.own, block.once.plus(Cost(), 0)
    yield {
        "name": block.name,
        "depth": depth,
        "trips": block.trips,
        "exact": block.exact,
        "operations": own.operations,
        "cycles": own.cycles,
        "round_trips": own.round_trips,
        "total_operations": share.operations * times / updates,
        "total_megacycles": share.cycles * times / updates / 1e6,
        "total_seconds": share.seconds * times / updates,
    }
    for inner in block.inner:
        yield from _loops(inner, updates, depth + 1, times)


# ---- saying so


def caption(chip: str) -> str:
    found = CHIPS[chip]
    start = f"Per update, compiled for one {chip}; nothing ran on one. The rate is a prediction: "
    if found.clock:
        return start + (
            f"environment steps over the compiler's estimated cycles at {found.clock / 1e9:g} GHz. "
            "Operations are those with an estimate."
        )
    return start + (
        f"{found.launch * 1e6:g} us per kernel, or its bytes at {found.bandwidth / 1e12:g} TB/s if "
        f"that takes longer, and {found.round_trip * 1e6:g} us per round trip to the host."
    )


HEADER = (
    f"{'case':26}{'operations':>11}{'round trips':>12}{'Mcycles':>9}{'temporary':>11}"
    f"{'collectives':>14}{'compile (cpu)':>17}  predicted steps/s"
)


def show(row: dict[str, Any], whose: str = "") -> None:
    def number(value, form):
        return "-" if value is None else f"{value:{form}}"

    most = "<=" if row["bounds"] else ""
    moved = f"{row['collectives']:.0f}: {row['collective_bytes'] / 1e6:.2f} MB"
    print(
        f"{whose + row['case']:26}{most + number(row['operations'], '.0f'):>11}"
        f"{number(row['round_trips'], '.0f'):>12}{number(row['megacycles'], '.2f'):>9}"
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


def _known(names: list[str]) -> None:
    for name in names:
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, 3, 0.4) or list(CASES)
            fail(f"unknown case {name!r}; use {', '.join(near)}")


def installed(chip: str) -> Path:
    """The interpreter of the environment with the chip's compiler, which is made on first use."""
    found = CHIPS[chip]
    script = 'root=$0; . "$root/scripts/setup.sh"; ensure "$1" "$2"'
    done = subprocess.run(
        ["bash", "-c", script, ROOT, found.environment, found.extra],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        lines = [x.strip() for x in done.stderr.splitlines()]
        said = [x for x in lines if "ERROR:" in x] or lines  # pip indents what a build said
        fail(f"the compiler for {chip} does not install: {said[-1] if said else 'no reason given'}")
    return ROOT / found.environment / "bin" / "python"


def peer_rows(chip: str, names: list[str], precision: str) -> list[dict[str, Any]]:
    """rejax, compiled in the same jax in an environment of its own, because it needs an older gymnax."""
    import jax

    folder = ROOT / ".venv-rejax"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing rejax into {folder.name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = ("rejax==0.1.3", "gymnax<1", f"jax=={jax.__version__}")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    if done.returncode:
        said = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
        print(f"rejax is left out: {said[-1] if said else 'it does not install'}")
        return []
    # The compiler comes from the chip's environment: it is large, and the same for both.
    (libraries,) = (ROOT / CHIPS[chip].environment / "lib").glob("python*/site-packages")
    command = [python, __file__, "--chip", chip, "--precision", precision, "--case", *names]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"REJAX_WITH": str(libraries)}
    )
    if done.returncode:
        print("rejax is left out: it does not compile (see above)")
        return []
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
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
    chosen = parser.parse_args(arguments)
    if chosen.chip not in CHIPS:
        fail(f"unknown chip {chosen.chip!r}; use {', '.join(CHIPS)}")
    if chosen.precision not in ("own", "default", "high", "highest"):
        fail(f"unknown precision {chosen.precision!r}; use default, high or highest")
    _known([*chosen.case, *([chosen.explain] if chosen.explain else [])])
    if "REJAX_WITH" in os.environ:
        sys.path.append(os.environ["REJAX_WITH"])
        with contextlib.redirect_stdout(sys.stderr):
            rows = list(_rows(chosen, chosen.case, rejax))
        print(json.dumps(rows))
        return
    python = installed(chosen.chip)
    if Path(sys.prefix) != python.parent.parent:
        os.execv(python, [str(python), __file__, *(arguments or sys.argv[1:])])
    names = [chosen.explain] if chosen.explain else chosen.case or list(CASES)
    print(f"{caption(chosen.chip)}\n\n{HEADER}", flush=True)
    own = {} if chosen.precision == "own" else {"precision": chosen.precision}
    rows = list(_rows(chosen, names, lambda name: CASES[name](own)))
    peers = []
    if chosen.peers:
        peers = peer_rows(chosen.chip, [x for x in names if x in PEER_CASES], chosen.precision)
        _compare(rows, peers)
    if chosen.json:
        import jax

        about = {"chip": chosen.chip, "precision": chosen.precision, "jax": jax.__version__}
        found = {**about, "caption": caption(chosen.chip), "rows": rows, "peers": peers}
        Path(chosen.json).write_text(json.dumps(found, indent=1))


def _rows(chosen, names, make) -> Iterator[dict[str, Any]]:
    os.environ |= QUIET
    warnings.filterwarnings("ignore")
    import jax

    chip = CHIPS[chosen.chip]
    where = place(chip)
    precision = None if chosen.precision == "own" else chosen.precision
    platform = contextlib.nullcontext()
    if make is not rejax:
        from jaxpg.devices import built_for

        platform = built_for(chip.platform)
    with platform, jax.default_matmul_precision(precision):
        for name in names:
            row, text = row_of(name, make(name), chip, where)
            show(row, "rejax " if make is rejax else "")
            if chosen.explain:
                explain(text, measured(text, chip))
            yield row


def _compare(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> None:
    ours = {row["case"]: row for row in rows}
    for peer in peers:
        own = ours[peer["case"]]
        parts = []
        for what in ("operations", "round_trips", "megacycles", "temporary_bytes"):
            if own[what] is not None:
                ratio = f", ratio {own[what] / peer[what]:.2f}" if peer[what] else ""
                parts.append(f"{what} {own[what]:.4g} against {peer[what]:.4g}{ratio}")
        print(f"{peer['case']} against rejax: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
