"""Policies that take only the actions that the observation says are allowed."""

import jax.numpy as jnp

from jaxpg.envs import Masked
from jaxpg.policies.distributions import MASKED_LOGIT, Categorical
from jaxpg.policies.networks import Network


def masked(network: Network, space: Masked) -> Network:
    """The network on observations without their mask, and with it the logits of actions that it forbids.

    These become MASKED_LOGIT, a probability of 0; where nothing is allowed, all actions have the same.

    >>> action = jaxpg.envs.Discrete(3)
    >>> space = Masked(jaxpg.envs.Discrete(2), 3)
    >>> policy = masked(jaxpg.policies.tabular(space.inner, action), space)
    >>> obs, first = jnp.array([[[1.0, 1.0, 0.0, 1.0]]]), jnp.zeros((1, 1), bool)
    >>> jax.nn.softmax(policy.apply(policy.init(None), (), obs, first)[1].logits[0, 0]).tolist()
    [0.5, 0.0, 0.5]
    """

    def apply(params, carry, obs, first):
        inner, mask = space.split(obs)
        carry, out = network.apply(params, carry, inner, first)
        if isinstance(out, Categorical):
            out = Categorical(jnp.where(mask, out.logits, MASKED_LOGIT))
        return carry, out

    observe, features = network.observe, network.features
    return network._replace(
        apply=apply,
        observe=observe and (lambda params, obs, mask: observe(params, space.split(obs)[0], mask)),
        features=features
        and (lambda params, carry, obs, first: features(params, carry, space.split(obs)[0], first)),
    )
