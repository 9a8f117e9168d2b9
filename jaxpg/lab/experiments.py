"""The studies of the laboratory, under the name that notebooks import."""

from jaxpg.lab.studies import EXPERIMENTS

__all__ = ["EXPERIMENTS"]
