"""Exact answers in float64, without sampling: values, gradients, moments, baselines, geometry.

Parameters are tabular logits [O, A] over the observations of an Mdp, flattened state-major.
"""

from jaxpg.lab.exact import bandits, gaussian, lqr, stationary
from jaxpg.lab.exact.baselines import OptimalBaselines, control_variate_moments, optimal_baselines
from jaxpg.lab.exact.compose import moments
from jaxpg.lab.exact.coupled import Cosine, cosine, leave_one_out_moments
from jaxpg.lab.exact.decompositions import (
    DoobDecomposition,
    TuckerDecomposition,
    doob_decomposition,
    tucker_decomposition,
)
from jaxpg.lab.exact.forms import (
    action_baseline_moments,
    advantage_moments,
    all_action_moments,
    marginal_moments,
    note_literal_moments,
    surrogate_moments,
)
from jaxpg.lab.exact.geometry import TrustRegionStep, fisher, mean_kl, natural_gradient, trpo_step
from jaxpg.lab.exact.recursions import Coefficients, pair_moments
from jaxpg.lab.exact.tables import (
    Moments,
    gradient,
    objective,
    observation_values,
    occupancy,
    return_variance,
    values,
)
from jaxpg.lab.exact.weights import WeightMoments, weight_growth, weight_moments

__all__ = [
    "Coefficients",
    "Cosine",
    "DoobDecomposition",
    "Moments",
    "OptimalBaselines",
    "TrustRegionStep",
    "TuckerDecomposition",
    "WeightMoments",
    "action_baseline_moments",
    "advantage_moments",
    "all_action_moments",
    "bandits",
    "control_variate_moments",
    "cosine",
    "doob_decomposition",
    "fisher",
    "gaussian",
    "gradient",
    "leave_one_out_moments",
    "lqr",
    "marginal_moments",
    "mean_kl",
    "moments",
    "natural_gradient",
    "note_literal_moments",
    "objective",
    "observation_values",
    "occupancy",
    "optimal_baselines",
    "pair_moments",
    "return_variance",
    "stationary",
    "surrogate_moments",
    "trpo_step",
    "tucker_decomposition",
    "values",
    "weight_growth",
    "weight_moments",
]
