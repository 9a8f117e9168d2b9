"""The help of training, generated from Config and Hyperparams."""

from dataclasses import fields
from typing import Any, get_args, get_origin

from jaxpg.runs.config.config import Config, Grid
from jaxpg.runs.config.flags import EITHER
from jaxpg.runs.config.processes import FLAGS
from jaxpg.runs.console import parser
from jaxpg.types import HYPERPARAMS

# Every setting but how a run starts, each in one section.
SECTIONS = {
    "task": "environment settings keep repeat history",
    "size": "seeds updates num_envs num_steps evaluation_episodes seed",
    "algorithm": "algorithm normalise_rewards num_epochs num_minibatches critic_epochs critic_minibatches "
    "optimizer schedule batch_scaling reference_batch adaptation fisher_samples group_size num_batches "
    "importance control_variate kl_estimate reference demonstrations imitate warm_start",
    "networks": "network shared_torso hidden activation layer_norm channels stride normalise precision "
    "distribution initial_std state_dependent_std",
    "numbers": " ".join(HYPERPARAMS),
    "output": "run quiet checkpoint_seconds tensorboard wandb measure_noise profile debug_nans",
    "machine": "devices shard compilation_cache force",
}
START = {
    "--config": ("RUN", "start a new run with this run's settings; other flags override them"),
    "--resume": ("RUN", "resume this run; --updates N is then its new total"),
    EITHER: (None, "resume the run in the folder --run, or start it"),
}
METAVARS = {
    "settings": "NAME=X,...",
    "devices": "N",
    "run": "DIR",
    "profile": "DIR",
    "reference": "RUN",
    "demonstrations": "FILE",
}


def show(prog: str, base: tuple[Config, Grid], where: str) -> None:
    """Prints help. base, where: the defaults, and where they come from."""
    config, grid = base
    found = parser(
        prog.removeprefix("jaxpg "),
        f"Train policies on an environment. Defaults are those of {where}. A number takes one value, or "
        "several as in 1e-3,3e-4 for a grid.",
        "example: jaxpg train CartPole-v1 --learning-rate 1e-3,3e-4 --seeds 16",
    )
    found.usage = f"{prog} ENV [--FLAG VALUE ...]"
    group = found.add_argument_group("start")
    for flag, (metavar, text) in START.items():
        _add(group, flag, metavar, text)
    kinds = {f.name: f for f in fields(Config)}
    for section, names in SECTIONS.items():
        group = found.add_argument_group(section)
        for name in names.split():
            flag = f"--{name.strip('_').replace('_', '-')}"
            if name in HYPERPARAMS:
                number = HYPERPARAMS[name]
                text = ": ".join(filter(None, (number.where, number.help)))
                _add(group, flag, "X,...", text, getattr(grid, name))
            elif name == "environment":
                group.add_argument("ENV", help=kinds[name].metadata["help"])
            elif getattr(config, name) is True:
                _add(group, f"--no-{flag[2:]}", None, f"do not {kinds[name].metadata['help']}")
            else:
                metavar = METAVARS.get(name) or _metavar(kinds[name].type)
                _add(group, flag, metavar, kinds[name].metadata["help"], getattr(config, name))
    group = found.add_argument_group("several processes, each started with this command")
    for flag, (metavar, text) in FLAGS.items():
        _add(group, flag, metavar, text)
    found.print_help()


def _metavar(kind: Any) -> str | None:
    if get_origin(kind) is tuple:
        return "N,..."
    kinds = {bool: None, int: "N", float: "X"}
    return next((kinds[k] for k in (kind, *get_args(kind)) if k in kinds), "NAME")


def _add(group, flag, metavar, text, value=None) -> None:
    if isinstance(value, tuple):
        value = ",".join(f"{x:g}" for x in value) or None
    if value is not None and value is not False:
        text = (
            f"{text}; default: {value:g}"
            if isinstance(value, float)
            else f"{text}; default: {value}"
        )
    how = {"action": "store_true"} if metavar is None else {"metavar": metavar}
    group.add_argument(flag, help=text.replace("%", "%%"), **how)
