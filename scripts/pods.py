"""What splitting an agent over many chips costs, from the text that the chips' compilers write.

scripts/benchmark programs --chips v5e:4x4 v5e:16x16 h100:1x8 h100:8x8 [--page FILE]

v5e:AxB is a slice of A x B chips, h100:HxN are H hosts of N. Nothing is run on a device: messages and their
bytes are counted, efficiency is a prediction.
"""

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_programs import CHIPS, QUIET, building, fail, libtpu
from compiled_text import measured, parsed

STEPS = 128
LANES = (64, 1024)  # environments on each chip


class Link(NamedTuple):
    bandwidth: float  # bytes per second out of a chip
    latency: float  # seconds that a small sum over all takes


class Pod(NamedTuple):
    chip: str
    size: int  # chips
    topology: dict[str, str]
    link: Link


def pod(name: str) -> Pod:
    """Published: 1600 Gbit/s of ICI on each v5e, both ways together; 450 GB/s of NVLink on each H100 and way;
    400 Gbit/s of InfiniBand for each H100 of several hosts. Assumed: 1 us per hop between v5e chips; for a
    small sum over H100s, 10 us within a host and 30 us between hosts."""
    found = re.fullmatch(r"(v5e|h100):(\d+)x(\d+)", name)
    if not found:
        fail(
            f"unknown chips {name!r}; use v5e:AxB or h100:HOSTSxCHIPS, as in v5e:16x16 or h100:8x8"
        )
    chip, one, other = found[1], int(found[2]), int(found[3])
    if chip == "v5e":
        return Pod(chip, one * other, {"topology_name": name}, Link(100e9, (one + other) * 1e-6))
    link = Link(50e9, 30e-6) if one > 1 else Link(450e9, 10e-6)
    topology = CHIPS[chip].topology | {"topology": f"1x{one}x{other}"}
    return Pod(chip, one * other, topology, link)


def chips_of(found: Pod) -> list[Any]:
    """The chips of a pod, as its compiler is told of them."""
    os.environ |= QUIET  # jax reads it when it is imported
    from jax.experimental import topologies

    chip, settings = CHIPS[found.chip], dict(found.topology)
    if chip.platform == "tpu":
        libtpu(install=True)
    name = settings.pop("topology_name")
    return topologies.get_topology_desc(name, platform=chip.lowering, **settings).devices


def rows(name: str, devices: list[Any]) -> Iterator[dict[str, Any]]:
    """The costs of an update of PPO on CartPole, with agents and with environments split."""
    import jax

    found = pod(name)
    chip = CHIPS[found.chip]
    with building(chip) as target:
        for split, lanes in (("replicas", LANES[0]), *(("environments", n) for n in LANES)):
            function, arguments, shardings = _program(split, lanes, devices)
            jitted = jax.jit(function, in_shardings=shardings[0], out_shardings=shardings[1])
            lowered = jitted.trace(*arguments).lower(lowering_platforms=(chip.lowering,))
            text = lowered.compile(target.options).as_text() or ""
            cost = measured(parsed(text), chip).once
            moved = 2 * (found.size - 1) / found.size * cost.collective_bytes
            waiting = cost.collectives * found.link.latency + moved / found.link.bandwidth
            yield {
                "chips": name,
                "split": split,
                "lanes": lanes,
                "messages": cost.collectives,
                "bytes": cost.collective_bytes,
                "seconds": cost.seconds,
                "efficiency": cost.seconds / (cost.seconds + waiting),
            }


def _program(split: str, lanes: int, devices: list[Any]) -> tuple[Any, tuple, tuple]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxpg import Hyperparams, make_trainer
    from jaxpg.devices import SHARDS, lane_specs, mesh_of, split_over
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic
    from jaxpg.training.algorithm import algorithm

    env, count, same = from_gymnax("CartPole-v1"), len(devices), PartitionSpec()
    agent, key = actor_critic(env, hidden=(64, 64)), jax.random.key(0)
    numbers = jax.eval_shape(lambda: jax.tree.map(jax.numpy.float32, Hyperparams()))
    over = lanes * (count if split == "environments" else 1)
    trainer = make_trainer(env, agent, algorithm("ppo"), num_envs=over, num_steps=STEPS)
    mesh = mesh_of({SHARDS: count}, devices)

    def placed(specs):
        is_spec = {"is_leaf": lambda x: isinstance(x, PartitionSpec)}
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, **is_spec)

    if split == "environments":
        state, specs = jax.eval_shape(trainer.init, key), lane_specs(trainer.init, mesh)
        update, out = split_over(trainer, devices).update, (specs, same)
    else:
        keys = jax.eval_shape(lambda: jax.random.split(key, count))
        state = jax.eval_shape(jax.vmap(trainer.init), keys)
        # Another name, because SHARDS would be taken for a split of environments.
        mesh = mesh_of({"replica": count}, devices)
        specs = out = PartitionSpec("replica")
        mapped = {"mesh": mesh, "in_specs": (specs, same), "out_specs": out, "check_vma": False}
        update = jax.shard_map(jax.vmap(trainer.update, (0, None)), **mapped)
    return update, (state, numbers), (placed((specs, same)), placed(out))


COLUMNS = "chips", "split", "environments per chip", "messages", "bytes", "compute", "efficiency"


def line(row: dict[str, Any]) -> list[str]:
    return [
        row["chips"],
        row["split"],
        f"{row['lanes']:,}",
        f"{row['messages']:.0f}",
        f"{row['bytes'] / 1e3:,.1f} kB",
        f"{row['seconds'] * 1e3:.1f} ms",
        f"{row['efficiency']:.2f}",
    ]


def benchmark(names: list[str], page: str | None) -> None:
    found = []
    # Before anything is compiled for a TPU: later jax finds no compiler for a GPU.
    devices = {name: chips_of(pod(name)) for name in sorted(names)}
    for name in names:
        for row in rows(name, devices[name]):
            found.append(row)
            print("  ".join(cell.rjust(12) for cell in line(row)), flush=True)
    if page:
        Path(page).write_text(_page(found))


def _page(found: list[dict[str, Any]]) -> str:
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *(line(row) for row in found)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    split = [row for row in found if row["split"] == "environments"]
    worst = [f"{row['chips']} with {row['lanes']:,}" for row in split if row["efficiency"] < 0.5]
    said = "In no row does waiting take half of the time."
    if worst:
        said = f"More than half of the time is waiting on {', '.join(worst)} environments per chip."
    chips = " ".join(dict.fromkeys(row["chips"] for row in found))
    about = f"""One update of PPO on CartPole (2x64 tanh, 4 epochs x 4 minibatches, {STEPS} steps),
        compiled for these chips by their own compilers on a machine without any. Messages and their bytes are
        counted in the compiled program, per update and chip. Efficiency is compute / (compute +
        waiting): compute is the time that `scripts/benchmark programs` predicts for a chip, waiting
        that of the messages one after another. {pod.__doc__}"""
    meaning = f"""Replicas share nothing, so they scale until they run out. Environments of one agent cost at
        most one message for each network and optimizer step, of the size of its parameters, and a
        few per update for what is averaged over the batch; none grows with the data. Their number
        is fixed, so the more environments a chip has, the less waiting matters. {said} It breaks
        down where a minibatch step takes a chip less time than a sum over all chips: give each more
        environments, take fewer minibatches, or split agents."""
    made = f"`scripts/benchmark programs --chips {chips} --page FILE` makes this page."
    parts = "# Scaling: predicted, not measured", _filled(about), text, _filled(meaning), made
    return "\n\n".join(parts) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 115)
