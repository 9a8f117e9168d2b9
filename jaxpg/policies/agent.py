"""The agent: a policy network and, separately, a critic network.

>>> env = jaxpg.envs.from_lqr(jaxpg.envs.Lqr())
>>> agent = actor_critic(env, "linear", normalise=True)
>>> check_agent(env, agent)
>>> params, carry = init_params(agent, jax.random.key(0)), initial_carry(agent, 2)
>>> check_params(agent, params)
>>> isinstance(agent, Agent), isinstance(params, AgentParams), isinstance(carry, AgentCarry)
(True, True, True)
>>> trajectory = Trajectory(*[jnp.ones((3, 2, 1))] * 7, jnp.ones((3, 2), bool), None, None)
>>> float(observed(agent, params, trajectory).policy["statistics"].seen), [*NETWORKS]
(6.0, ['mlp', 'linear', 'cnn', 'gru', 'lstm', 'mingru', 'transformer', 'tabular'])
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax

from jaxpg.envs import Box, Discrete, Env, Masked, Squashed
from jaxpg.envs.factory import names_factory
from jaxpg.policies import networks
from jaxpg.policies.bounded import Beta, TanhGaussian
from jaxpg.policies.distributions import Bernoulli, Categorical, Gaussian, MultiCategorical
from jaxpg.policies.masking import masked
from jaxpg.policies.networks import Network, example_observation, value_layer
from jaxpg.policies.normalisation import normalised
from jaxpg.policies.own import own_network
from jaxpg.types import Carry, Key, Params, Trajectory


class Agent(NamedTuple):
    """A policy and a critic; without one every value is 0.

    shared: the critic is one more layer on the policy's torso (`networks.value_layer`), and both are trained
    in the same steps.
    """

    policy: Network
    critic: Network | None = None
    shared: bool = False


class AgentParams(NamedTuple):
    policy: Params
    critic: Params  # () without a critic


class AgentCarry(NamedTuple):
    policy: Carry
    critic: Carry


def init_params(agent: Agent, key: Key) -> AgentParams:
    """Fresh parameters of both networks."""
    k_policy, k_critic = jax.random.split(key)
    critic = agent.critic.init(k_critic) if agent.critic else ()
    return AgentParams(agent.policy.init(k_policy), critic)


def critic_of(agent: Agent, params: AgentParams) -> tuple[Network | None, Params]:
    """The critic as a network of its own, with its parameters: on a shared torso these are the agent's.

    >>> env = jaxpg.envs.from_lqr(jaxpg.envs.Lqr())
    >>> agent = actor_critic(env, hidden=(8,), shared_torso=True)
    >>> params = init_params(agent, jax.random.key(0))
    >>> critic_of(agent, params)[1] is params
    True
    """
    if agent.critic is None or not agent.shared:
        return agent.critic, params.critic
    return agent.critic._replace(init=partial(init_params, agent)), params


def check_params(agent: Agent, params: AgentParams) -> None:
    """Raises ValueError if parameters, as of a row without a critic, have none for the agent's critic."""
    if agent.critic is None or not isinstance(params.critic, tuple) or params.critic:
        return
    if jax.tree.leaves(jax.eval_shape(agent.critic.init, jax.random.key(0))):
        raise ValueError(
            "the parameters have none for the agent's critic: they are of an algorithm without one; "
            "use Agent(agent.policy)"
        )


def initial_carry(agent: Agent, num_lanes: int) -> AgentCarry:
    """The carry at the start of an episode, for `num_lanes` environments."""
    critic = agent.critic.initial_carry(num_lanes) if agent.critic else ()
    return AgentCarry(agent.policy.initial_carry(num_lanes), critic)


def observed(agent: Agent, params: AgentParams, trajectory: Trajectory) -> AgentParams:
    """The params after an update: networks with observation statistics add the trajectory's."""
    chex.assert_tree_shape_prefix(trajectory, trajectory.mask.shape)

    def after(network, params):
        if network is None or network.observe is None:
            return params
        return network.observe(params, trajectory.obs, trajectory.mask)

    return AgentParams(after(agent.policy, params.policy), after(agent.critic, params.critic))


def actor_critic(
    env: Env,
    network: str = "mlp",
    *,
    normalise: bool = False,
    shared_torso: bool = False,
    **settings,
) -> Agent:
    """An agent whose policy and critic are built alike for an environment's spaces.

    network: one of NETWORKS, or MODULE:FUNCTION (`own_network`); settings go to its builder
    (`hidden=(64, 64)`, `distribution="beta"`). normalise: both see normalised observations. shared_torso: all
    layers but the last are those of both. Actions that the observation's mask forbids are never taken.
    Raises ValueError for an unknown network, and for one without a torso to share.
    """
    builder = network_builder(network)
    space = env.observation
    seen = space.inner if isinstance(space, Masked) else space

    def made(output):
        network = builder(seen, output, **settings)
        if normalise:
            network = normalised(network, seen)
        return masked(network, space) if isinstance(space, Masked) else network

    policy = made(env.action)
    if not shared_torso:
        return Agent(policy, made(None))
    return Agent(policy, value_layer(policy, space, settings.get("precision", "highest")), True)


def network_builder(name: str) -> Callable[..., Network]:
    """(observation, action or None, **settings) -> Network, by its name. Raises ValueError.

    >>> network_builder("mpl")
    Traceback (most recent call last):
    ValueError: unknown network 'mpl'; did you mean mlp...
    """
    if names_factory(name):
        return own_network(name)
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=3, cutoff=0.4) or NETWORKS
        raise ValueError(f"unknown network {name!r}; did you mean {', '.join(near)}?")
    return NETWORKS[name]


def check_agent(env: Env, agent: Agent) -> None:
    """Raises ValueError when the policy's distribution cannot act in the environment."""

    def outputs():
        params = agent.policy.init(jax.random.key(0))
        carry, first = agent.policy.initial_carry(1), jax.numpy.zeros((1, 1), bool)
        return agent.policy.apply(params, carry, example_observation(env.observation), first)[1]

    distribution = jax.eval_shape(outputs)
    action = env.action
    mode = jax.eval_shape(lambda found: found.mode(), distribution)
    fits = mode.shape[2:] == action.shape
    if isinstance(action, Squashed):
        suits = isinstance(distribution, TanhGaussian | Beta)
    elif isinstance(action, Box):
        # The density of tanh(u) is right only where the environment takes u.
        suits = isinstance(distribution, Gaussian) and not isinstance(distribution, TanhGaussian)
    elif isinstance(action, Discrete):
        suits = isinstance(distribution, Categorical)
        fits = fits and distribution[0].shape[2:] == (action.n,)
    else:
        suits = isinstance(distribution, MultiCategorical | Bernoulli)
    if not suits:
        kind = "continuous" if isinstance(env.action, Box) else "discrete"
        raise ValueError(
            f"the policy returns a {type(distribution).__name__} distribution but the action space is "
            f"{kind} ({type(env.action).__name__}); build it for env.action"
        )
    if not fits:
        raise ValueError(
            f"the policy's actions do not fit the action space {env.action}; build it for env.action"
        )


NETWORKS = {
    "mlp": networks.mlp,
    "linear": networks.linear,
    "cnn": networks.cnn,
    "gru": networks.gru,
    "lstm": networks.lstm,
    "mingru": networks.mingru,
    "transformer": networks.transformer,
    "tabular": networks.tabular,
}
