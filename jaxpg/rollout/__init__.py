"""Rollouts: whole episodes, streams with automatic reset, and evaluation.

Every reset of every environment suite happens in this folder.
"""

from jaxpg.rollout.episodic import episodes, episodes_again, lanes_at_once
from jaxpg.rollout.evaluation import Evaluation, evaluate
from jaxpg.rollout.stepping import EpisodeSums
from jaxpg.rollout.stream import RolloutState, init_stream, unroll

__all__ = [
    "EpisodeSums",
    "Evaluation",
    "RolloutState",
    "episodes",
    "episodes_again",
    "evaluate",
    "init_stream",
    "lanes_at_once",
    "unroll",
]
