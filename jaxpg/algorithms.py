"""The table of algorithms, under the name that scripts import."""

from jaxpg.training.algorithm import ALGORITHMS, Algorithm, algorithm

__all__ = ["ALGORITHMS", "Algorithm", "algorithm"]
