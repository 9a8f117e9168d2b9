"""Exact answers in float64, without sampling: values, gradients, moments, baselines, geometry.

Parameters are tabular logits [O, A] over the observations of an Mdp, flattened state-major.

>>> mdp, even, ahead = bandits.bandit([0.0, 1.0]), np.zeros((1, 2)), np.array([[0.0, 1.0]])
>>> objective(mdp, even, 1.0), gradient(mdp, even, 1.0).tolist(), return_variance(mdp, even, 1.0)
(0.5, [-0.25, 0.25], 0.25)
>>> values(mdp, even, 1.0)[1].tolist(), observation_values(mdp, even, 1.0)[0].tolist()
([[[0.0, 1.0]]], [[0.5]])
>>> occupancy(mdp, even).tolist(), fisher(mdp, even).tolist(), natural_gradient(mdp, even, 1.0).round(3)
([[1.0]], [[0.25, -0.25], [-0.25, 0.25]], array([-0.5,  0.5]))
>>> to_go = jaxpg.estimators.credit.reward_to_go
>>> found = moments(mdp, even, jaxpg.estimators.Estimator(to_go), jaxpg.Hyperparams())
>>> round(found.trace, 3), round(cosine(found, 4).to_truth, 3)
(0.125, 0.954)
>>> best, step = optimal_baselines(mdp, even, to_go, 1.0), trpo_step(mdp, even, 1.0, 0.01)
>>> best.scalar, round(mean_kl(mdp, even, even + step.step[None]), 3)
(0.5, 0.01)
>>> same = (
...     leave_one_out_moments(mdp, even, to_go, 1.0, 4),
...     control_variate_moments(mdp, even, to_go, 1.0, best.per_parameter),
...     advantage_moments(mdp, even, 1.0),
...     all_action_moments(mdp, even, 1.0),
...     action_baseline_moments(mdp, even, 1.0, np.zeros((1, 1, 2))),
...     pair_moments(mdp, even, Coefficients(np.array([[0.0, 1.0]]), 1.0)),
... )
>>> [round(each.trace, 3) for each in same]
[0.021, 0.0, 0.0, 0.0, 0.125, 0.125]
>>> [float(each(mdp, ahead, even, 1.0).mean.round(3)[1]) for each in (surrogate_moments, marginal_moments)]
[0.197, 0.197]
>>> float(note_literal_moments(mdp, ahead, even, 1.0).mean.round(3)[1])
0.287
>>> parts = doob_decomposition(mdp, even, 1.0, 0.0), tucker_decomposition(mdp, even, 1.0, 0.0)
>>> weight = weight_moments(mdp, ahead, even)
>>> [round(x, 3) for x in (*(part.total for part in parts), weight.square, weight_growth(mdp, ahead, even))]
[0.125, 0.125, 1.214, 0.194]
>>> round(gaussian.gaussian_chain(1.0, 2).ess_fraction, 3), stationary.average_reward(mdp, even)
(0.135, 0.5)
>>> round(lqr.objective(jaxpg.envs.Lqr(), (-0.6, 0.0, 0.0), 1.0), 3)
-4.602
>>> kinds = Moments, Cosine, OptimalBaselines, TrustRegionStep, DoobDecomposition, TuckerDecomposition
>>> all(map(isinstance, (found, cosine(found), best, step, *parts, weight), (*kinds, WeightMoments)))
True
"""

from jaxpg.lab.exact import bandits, gaussian, lqr, reference, stationary
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
    "reference",
    "return_variance",
    "stationary",
    "surrogate_moments",
    "trpo_step",
    "tucker_decomposition",
    "values",
    "weight_growth",
    "weight_moments",
]
