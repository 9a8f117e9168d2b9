"""Settings that a configuration leaves to its row of the algorithm table."""

from dataclasses import replace

from jaxpg.runs.config.config import COUNTS, Config
from jaxpg.training.algorithm import algorithm


def settled(config: Config) -> Config:
    """The configuration with missing counts taken from its row. Raises ValueError."""
    return replace(config, **counts_of(config))


def counts_of(config: Config) -> dict[str, int]:
    """The configuration's counts, or else the row's. Raises ValueError."""
    row = algorithm(config.algorithm)
    given = {name: getattr(config, name) for name in COUNTS}
    return {name: getattr(row, name) if x is None else x for name, x in given.items()}
