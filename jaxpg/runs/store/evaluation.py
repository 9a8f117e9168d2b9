"""The final evaluation of a run, as its folder keeps it."""

from pathlib import Path
from typing import NotRequired, TypedDict

from jaxpg.runs.config.schema import read_json
from jaxpg.runs.store.folder import EVALUATION


class Evaluation(TypedDict):
    """What evaluation.json has to have, for each replica."""

    mean_return: list[float | None]  # None: diverged
    update: NotRequired[int]  # after how many; older ones do not say


def read_evaluation(folder: Path, count: int) -> Evaluation | None:
    """What evaluation.json says of so many replicas; None where there is none. Raises ValueError."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    found = read_json(path, Evaluation)
    returns = found["mean_return"]
    if len(returns) != count:
        raise ValueError(f"{path} has {len(returns)} returns for {count} replicas")
    return found
