"""A run's structure, and the lists of numbers that form its grid. Imports nothing heavy."""

import math
import struct
import sys
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jaxpg.runs.config.schema import expect, read_json
from jaxpg.types import HYPERPARAMS, Hyperparams

CONFIG = "config.json"
ALL = "all"  # of the devices
SHARD = ("replicas", "environments", "both")

Grid = Hyperparams  # each field is a tuple of values
# Counts that default to those of the row of the algorithm table.
COUNTS = ("num_epochs", "num_minibatches", "critic_epochs", "critic_minibatches")

# Settings that may change on resume.
FREE = (
    "updates",
    "schedule",
    "schedule_updates",
    "quiet",
    "checkpoint_seconds",
    "tensorboard",
    "wandb",
    "profile",
    "debug_nans",
    "compilation_cache",
    "force",
    "devices",
    "shard",
)


MOST = 2**31 - 1  # largest size: devices count in 32 bits
MOST_EPOCHS = 10**6  # an update stores a key and metrics for each epoch
MOST_STEPS = 10**4  # shown in one observation, or taken by one action
MOST_ENTRIES = 1000  # in a list of sizes
LEAST_SINGLE = 2.0**-126  # processors may flush smaller float32 numbers to 0


class Resumed(TypedDict):
    """The required content of config.json for each time that the run was resumed."""

    recorded_from: NotRequired[int]  # the first update with stored metrics


class Stored(TypedDict):
    """The required content of config.json; the rest is for human readers."""

    config: dict[str, Any]
    hyperparameters: dict[str, tuple[float, ...]]
    replicas: NotRequired[list[dict[str, float]]]
    demonstrations_sha256: NotRequired[str | None]
    resumed: NotRequired[list[Resumed]]


def _flag(default: Any, help: str, least: int = 1, most: int = MOST) -> Any:
    """A field with its help; least and most bound a whole number, or each one in a list."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    """The structure of a run: what changes a shape or the program."""

    environment: str = field(
        metadata={
            "help": "an environment: CartPole-v1, SUITE/NAME or MODULE:FACTORY (see jaxpg envs)"
        }
    )
    algorithm: str = _flag(
        "ppo",
        "reinforce, reinforce_to_go, reinforce_baseline, gpomdp, gpomdp_continuing, enac, vpg, a2c, "
        "impala, ppo, ppo_kl, npg, trpo, off_policy, guided, behaviour_cloning, rloo, grpo, dr_grpo, dapo, "
        "gspo or cispo; sets the defaults",
    )
    seeds: int = _flag(8, "agents trained side by side, for every point of the grid")
    updates: int = _flag(200, "updates per agent")
    num_envs: int = _flag(
        32, "parallel environments per agent; for reinforce*, episodes per update"
    )
    num_steps: int | None = _flag(
        None, "steps per environment and update; for reinforce*, the longest episode"
    )
    settings: str | None = _flag(None, "environment parameters, as in size=16,unscaled_move_cost=0")
    keep: tuple[int, ...] = _flag((), "observation entries to show, as in 0,2; by default all", 0)
    repeat: int = _flag(1, "times to repeat each action; rewards are summed", 1, MOST_STEPS)
    history: int | None = _flag(None, "stack the last N observations and actions", 1, MOST_STEPS)
    normalise: bool = _flag(False, "scale observations by their running mean and deviation")
    normalise_rewards: bool = _flag(False, "divide rewards by the running deviation of returns")
    network: str = _flag(
        "mlp",
        "mlp, linear, cnn, gru, lstm, mingru, transformer, tabular or MODULE:FUNCTION; policy and critic "
        "are built alike",
    )
    shared_torso: bool = _flag(
        False,
        "let policy and critic share all layers but the last; --learning-rate then moves both",
    )
    hidden: tuple[int, ...] = _flag((64, 64), "widths of the hidden layers")
    channels: tuple[int, ...] = _flag((16,), "filters of each 3 x 3 convolution of a cnn")
    stride: int = _flag(1, "of each convolution", 1, MOST_STEPS)
    layer_norm: bool = _flag(False, "normalise the outputs of each layer before its activation")
    activation: str = _flag("tanh", "tanh, relu, silu or gelu")
    precision: str | None = _flag(
        None,
        "of matrix products: default, high or highest; by default high on a TPU, else highest; a CPU's "
        "are full",
    )
    initial_std: float = _flag(
        0.5, "initial std of continuous actions, as a fraction of half the range"
    )
    distribution: str | None = _flag(
        None,
        "of actions: gaussian, tanh or beta of real ones, categorical or bernoulli of whole numbers; "
        "None: gaussian or categorical",
    )
    state_dependent_std: bool = _flag(
        False, "let the network also choose the standard deviation, of gaussian or tanh"
    )
    optimizer: str = _flag(
        "adam", "sgd, momentum, rmsprop, adam, adamw, lion or muon, for policy and critic"
    )
    schedule: str = _flag("constant", "schedule of both learning rates: constant, linear or cosine")
    batch_scaling: str = _flag(
        "none", "scale both learning rates by (batch / reference-batch)^p: none, linear or sqrt"
    )
    reference_batch: int | None = _flag(
        None, "batch size the learning rates are tuned for, in steps; for reinforce*, in episodes"
    )
    num_epochs: int | None = _flag(
        None,
        "passes over each batch that update the policy; None: the algorithm's",
        1,
        MOST_EPOCHS,
    )
    num_minibatches: int | None = _flag(
        None, "minibatches per pass, one optimizer step each; None: the algorithm's"
    )
    critic_epochs: int | None = _flag(
        None, "further passes that update only the critic; None: the algorithm's", 0, MOST_EPOCHS
    )
    critic_minibatches: int | None = _flag(None, "minibatches per such pass; None: the algorithm's")
    fisher_samples: int | None = _flag(
        None, "steps (or lanes) of the batch to estimate the Fisher matrix from; by default all"
    )
    adaptation: str | None = _flag(
        None,
        "how to hold each update's KL at --target-kl: fixed (off), kl_penalty or learning_rate",
    )
    group_size: int | None = _flag(
        None, "episodes that share a start, for rloo, grpo and the like; None: the algorithm's"
    )
    num_batches: int | None = _flag(None, "reuse the last N batches, importance-weighted", 1, 1000)
    importance: str | None = _flag(
        None,
        "weights of old data: per_decision, trajectory, prefix, one_step, truncated, or "
        "normalised_ before trajectory, prefix or one_step",
    )
    kl_estimate: str | None = _flag(
        None,
        "of the KL to a reference policy, times --kl-coef: k1, k2 or k3 as a penalty; or reward, which is k1 "
        "in the reward",
    )
    reference: str | None = _flag(
        None, "folder of the run whose policy is the reference; by default the policy at the start"
    )
    demonstrations: str | None = _flag(None, "file from jaxpg record, for guided and imitation")
    imitate: int = _flag(
        0, "updates of behaviour cloning before training; guided uses its policy in the weights", 0
    )
    warm_start: bool = _flag(False, "start from the policy that --imitate fitted")
    control_variate: str | None = _flag(
        None, "baseline per parameter, for reinforce*: optimal_per_parameter or peters_schaal"
    )
    measure_noise: bool = _flag(
        False, "log the gradient's noise scale and signal-to-noise, for one more backward pass"
    )
    evaluation_episodes: int = _flag(128, "fresh episodes per agent for the final evaluation")
    seed: int = _flag(0, "master seed, from which every agent's is derived", 0, 2**32 - 1)
    run: str | None = _flag(None, "folder to write, new or empty; by default a new one under runs/")
    quiet: bool = _flag(False, "print only the result")
    checkpoint_seconds: float = _flag(
        30.0, "minimum seconds between checkpoints; one is always written at the end"
    )
    tensorboard: bool = _flag(False, "also write TensorBoard event files")
    wandb: bool = _flag(False, "also log to Weights & Biases, offline unless WANDB_MODE is set")
    profile: str | None = _flag(
        None, "new folder for a trace of two chunks of updates by jax's profiler"
    )
    devices: str = _flag("all", "how many of the devices to use: all or a number")
    shard: str | None = _flag(
        None,
        "what they share: replicas, environments of each agent, or both; None: replicas where these divide",
    )
    debug_nans: bool = _flag(False, "name the operation that first gave a NaN; slower")
    compilation_cache: bool = _flag(True, "keep compiled programs for later runs")
    force: bool = _flag(False, "try even if the estimated memory is more than is free")


def points(grid: Grid) -> list[Hyperparams]:
    """The full grid: every combination of the listed values, the last field varying fastest."""
    return [Hyperparams(*values) for values in product(*grid)]


def num_points(grid: Grid) -> int:
    """The number of points in the full grid."""
    return math.prod(map(len, grid))


def varying(grid: Grid) -> list[str]:
    """The hyperparameters that have several values."""
    return [name for name, values in grid._asdict().items() if len(values) > 1]


def completed(config: Config, grid: Grid) -> Grid:
    """The grid with 0 schedule_updates replaced by the number of updates."""
    horizon = tuple(value or config.updates for value in grid.schedule_updates)
    return grid._replace(schedule_updates=horizon)


def check(config: Config, grid: Grid) -> None:
    """Raises ValueError, with the value and a remedy, for a setting that no run can have."""
    for each in fields(Config):
        value = getattr(config, each.name)
        expect(value, each.type, each.name)
        _check_sizes(each.name, value, each.metadata)
    if config.devices != ALL and not (config.devices.isdecimal() and int(config.devices) > 0):
        raise ValueError(f"devices={config.devices} must be {ALL}, or a number of at least 1")
    if config.shard not in (None, *SHARD):
        raise ValueError(f"shard={config.shard} must be {', '.join(SHARD[:-1])} or {SHARD[-1]}")
    for name in ("initial_std", "checkpoint_seconds"):
        _held(name, getattr(config, name))
    if config.initial_std <= 0:
        raise ValueError(f"initial_std={config.initial_std} must be finite and above 0; try 0.5")
    if config.checkpoint_seconds < 0:
        raise ValueError(
            f"checkpoint_seconds={config.checkpoint_seconds:g} must not be negative; 0 saves every chunk"
        )
    for name, values in grid._asdict().items():
        if not values:
            raise ValueError(f"{name} has no value; give one, or several for a grid")
        for value in values:
            HYPERPARAMS[name].check(name, _held(name, value))


def _check_sizes(name, value, limits) -> None:
    """Raises ValueError for a whole number, or a list of them, outside the limits."""
    if isinstance(value, tuple) and len(value) > MOST_ENTRIES:
        raise ValueError(
            f"{name} has {len(value):,} entries; at most {MOST_ENTRIES:,} are possible"
        )
    for size in value if isinstance(value, tuple) else (value,):
        if isinstance(size, bool) or not isinstance(size, int):
            continue
        if name == "hidden" and size < 1:
            raise ValueError(
                f"hidden={_listed(value)}: every width must be at least 1; for no hidden layer, "
                "use network=linear"
            )
        if size < limits["least"]:
            raise ValueError(f"{name}={size} must be at least {limits['least']}")
        if size > limits["most"]:
            raise ValueError(f"{name}={size} must be at most {limits['most']}")


def _held(name, value) -> float:
    """The value as arrays store it. Raises ValueError for one that they cannot hold."""
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    try:
        single = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        single = math.inf
    if value == 0 or LEAST_SINGLE <= abs(single) < math.inf:
        return single
    # The dtype of arrays matters only beyond float32, so jax is imported only here.
    from jax.numpy import result_type

    if result_type(float) == "float64" and abs(value) >= sys.float_info.min:
        return value
    why = "is beyond float32, which ends at 3.4e38; give less"
    if abs(single) < 1:
        why = f"would be 0: float32 begins at {LEAST_SINGLE:.2g}; give 0 or more"
    raise ValueError(f"{name}={value:g} {why}, or set JAX_ENABLE_X64=1 to compute in float64")


def load_config(run: str | Path) -> tuple[Config, Grid]:
    """Reads a run's config.json; run: its folder, or the file. Raises ValueError."""
    path, saved = read_config(run)
    structure: dict[str, Any] = {k: _tuple(value) for k, value in saved["config"].items()}
    numbers: dict[str, Any] = {k: _tuple(v) for k, v in saved["hyperparameters"].items()}
    unknown = structure.keys() - {f.name for f in fields(Config)}
    unknown |= numbers.keys() - set(Hyperparams._fields)
    if unknown:
        raise ValueError(
            f"{path} has the setting {min(unknown)!r}, which this version of jaxpg does not know"
        )
    if "environment" not in structure:
        raise ValueError(f"cannot read {path}: config.environment is missing")
    # A setting newer than the run takes its default, which is how the run behaved.
    defaults = {name: (value,) for name, value in Hyperparams()._asdict().items()}
    config, grid = Config(**structure), Grid(**(defaults | numbers))
    try:
        check(config, completed(config, grid))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return config, grid


def read_config(run: str | Path) -> tuple[Path, Stored]:
    """The path and the stored content of a run's config.json. Raises ValueError."""
    path = Path(run)
    try:
        path = path / CONFIG if path.is_dir() else path
        found = path.is_file()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"cannot read {run}: {error.strerror or error}") from error
    if not found:
        best = Path(run) / "best"  # of a sweep
        where = f"name the run of its best point, {best}" if (best / CONFIG).is_file() else ""
        raise ValueError(
            f"{run} has no {CONFIG}; {where or 'name the folder of a jaxpg train run'}"
        )
    return path, read_json(path, Stored)


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value  # JSON has only lists


def _listed(values):
    return ",".join(f"{value:g}" for value in values)
