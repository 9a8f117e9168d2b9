"""The variance laboratory: exact answers where they exist, honest measurements where they do not.

>>> env = jaxpg.envs.from_mdp(exact.bandits.bandit([0.0, 1.0]))
>>> policy, estimator = jaxpg.policies.tabular(env.observation, env.action), jaxpg.estimators.Estimator()
>>> source = Source(env, policy, estimator, policy.init(None), jax.random.key(0), jaxpg.Hyperparams())
>>> gradient_samples(source, 3).shape
(3, 2)
>>> found = gradient_statistics(source, 1024)
>>> isinstance(found, GradientStatistics), bool(found.trace.low < 0.125 < found.trace.high)
(True, True)
>>> isinstance(gradient_trace(source, 1024, route="jvp"), Estimate)
True
>>> isinstance(run("offset", quick=True, trajectories=4096), Study)
True
>>> known = world("A")
>>> isinstance(known, World), round(exact.objective(known.mdp, known.logits, 1.0), 3)
(True, 2.481)
>>> enumeration.count_trajectories(exact.bandits.bandit([0.0, 1.0]))
2
"""

from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration
from jaxpg.lab.measure.samples import Source, gradient_samples
from jaxpg.lab.measure.statistics import GradientStatistics, gradient_statistics
from jaxpg.lab.measure.traces import gradient_trace
from jaxpg.lab.running import Study, run
from jaxpg.lab.worlds.world import World, world
from jaxpg.stats.moments import Estimate

__all__ = [
    "Estimate",
    "GradientStatistics",
    "Source",
    "Study",
    "World",
    "enumeration",
    "exact",
    "gradient_samples",
    "gradient_statistics",
    "gradient_trace",
    "run",
    "world",
]
