"""Rollouts: whole episodes, streams with automatic reset, and evaluation.

Every reset of every environment suite happens in this folder.

>>> env = jaxpg.envs.from_mdp(jaxpg.lab.exact.bandits.bandit([0.0, 1.0]))
>>> agent = jaxpg.policies.actor_critic(env, "tabular")
>>> params, key = jaxpg.policies.init_params(agent, jax.random.key(0)), jax.random.key(1)
>>> trajectory, sums = episodes(env, agent, params, key, 2)
>>> trajectory.reward.shape, int(sums.episodes), lanes_at_once(2)
((1, 2), 2, 2)
>>> bool((episodes_again(env, agent, params, key, 2, 1, 0).action == trajectory.action).all())
True
>>> state = init_stream(env, agent, key, 2)
>>> state, (trajectory, _) = unroll(env, agent, params, state, key, 3)
>>> trajectory.last.tolist()
[[True, True], [True, True], [True, True]]
>>> found = evaluate(env, agent, params, key, 2)
>>> [type(x).__name__ for x in (sums, state, found)]
['EpisodeSums', 'RolloutState', 'Evaluation']
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
