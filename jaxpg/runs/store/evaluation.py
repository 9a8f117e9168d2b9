"""The final evaluation of a run, as stored in its folder."""

from pathlib import Path
from typing import NotRequired, TypedDict

from jaxpg.runs.config.schema import read_json
from jaxpg.runs.store.folder import EVALUATION


class Evaluation(TypedDict):
    """The required content of evaluation.json, for each replica."""

    mean_return: list[float | None]  # None: diverged
    update: NotRequired[int]  # number of updates before it; absent from older files


def read_evaluation(folder: Path, count: int) -> Evaluation | None:
    """Reads evaluation.json for this many replicas; None if there is none. Raises ValueError."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    found = read_json(path, Evaluation)
    returns = found["mean_return"]
    if len(returns) != count:
        raise ValueError(f"{path} has {len(returns)} returns for {count} replicas")
    return found
