"""Settings that a configuration leaves to its row of the algorithm table."""

from dataclasses import replace

from jaxpg.optimizers.natural import NATURAL_OPTIMIZERS
from jaxpg.runs.config.config import COUNTS, Config, Grid, varying
from jaxpg.training.algorithm import algorithm


def settled(config: Config) -> Config:
    """The configuration with missing counts taken from its row. Raises ValueError."""
    return replace(config, **counts_of(config))


def counts_of(config: Config) -> dict[str, int]:
    """The configuration's counts, or else the row's. Raises ValueError."""
    row = algorithm(config.algorithm)
    given = {name: getattr(config, name) for name in COUNTS}
    return {name: getattr(row, name) if x is None else x for name, x in given.items()}


def check_varying(config: Config, grid: Grid) -> None:
    """Raises ValueError for a number that has several values and is read by nothing in the run."""
    row, name = algorithm(config.algorithm), config.algorithm
    natural = row.policy_optimizer in NATURAL_OPTIMIZERS
    critic = "" if row.critic_optimizer else f"{name} has no critic"
    shared = "learning_rate moves a shared torso, critic and all" if config.shared_torso else ""
    kinds = "" if natural else f"{name} takes no natural gradients"
    unread = {
        "learning_rate": f"{name} steps by max_kl" if natural else "",
        "critic_learning_rate": critic or shared,
        "value_clip_eps": critic,
        "value_coef": "" if config.shared_torso else "there is no shared torso",
        "max_kl": kinds,
        "damping": kinds,
        "schedule_updates": "the schedule is constant" if config.schedule == "constant" else "",
    }
    for number in varying(grid):
        if why := unread.get(number):
            raise ValueError(f"{number} has several values and no effect: {why}; give it one value")
