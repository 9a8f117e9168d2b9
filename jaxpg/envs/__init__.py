"""Environments: the protocol, tabular worlds, and one adapter file per outside suite."""

from jaxpg.envs.env import Actor, Env, check_action, check_env
from jaxpg.envs.factory import from_factory
from jaxpg.envs.gymnax import from_gymnax, gymnax_names
from jaxpg.envs.lqr import Lqr, check_lqr, from_lqr
from jaxpg.envs.masking import Masked, with_mask
from jaxpg.envs.mdp import Mdp, check_mdp, from_mdp
from jaxpg.envs.spaces import Box, Discrete, MultiDiscrete, Space
from jaxpg.envs.squashing import Squashed, squashed
from jaxpg.envs.suites import SUITES, env_names, installed, make_env
from jaxpg.envs.tabulate import mdp_from_gymnax
from jaxpg.envs.wrappers import (
    flatten_observation,
    history,
    mask_observation,
    repeat_action,
    unwrapped,
)

__all__ = [
    "SUITES",
    "Actor",
    "Box",
    "Discrete",
    "Env",
    "Lqr",
    "Masked",
    "Mdp",
    "MultiDiscrete",
    "Space",
    "Squashed",
    "check_action",
    "check_env",
    "check_lqr",
    "check_mdp",
    "env_names",
    "flatten_observation",
    "from_factory",
    "from_gymnax",
    "from_lqr",
    "from_mdp",
    "gymnax_names",
    "history",
    "installed",
    "make_env",
    "mask_observation",
    "mdp_from_gymnax",
    "repeat_action",
    "squashed",
    "unwrapped",
    "with_mask",
]
