"""Policies and critics: distributions, networks, and the agent that holds one of each."""

from jaxpg.policies.agent import (
    NETWORKS,
    Agent,
    AgentCarry,
    AgentParams,
    actor_critic,
    check_agent,
    check_params,
    critic_of,
    init_params,
    initial_carry,
    network_builder,
    observed,
)
from jaxpg.policies.bounded import Beta, TanhGaussian
from jaxpg.policies.distributions import Bernoulli, Categorical, Gaussian, MultiCategorical
from jaxpg.policies.heads import DISTRIBUTIONS, Distribution
from jaxpg.policies.initializers import orthogonal
from jaxpg.policies.masking import masked
from jaxpg.policies.networks import (
    Network,
    cnn,
    gru,
    linear,
    lstm,
    mingru,
    mlp,
    tabular,
    transformer,
)
from jaxpg.policies.normalisation import normalised
from jaxpg.policies.own import own_network

__all__ = [
    "DISTRIBUTIONS",
    "NETWORKS",
    "Agent",
    "AgentCarry",
    "AgentParams",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Distribution",
    "Gaussian",
    "MultiCategorical",
    "Network",
    "TanhGaussian",
    "actor_critic",
    "check_agent",
    "check_params",
    "cnn",
    "critic_of",
    "gru",
    "init_params",
    "initial_carry",
    "linear",
    "lstm",
    "masked",
    "mingru",
    "mlp",
    "network_builder",
    "normalised",
    "observed",
    "orthogonal",
    "own_network",
    "tabular",
    "transformer",
]
