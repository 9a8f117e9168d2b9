"""Worlds: an environment with a policy for the studies to run on, and its tables where they exist."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.envs import Discrete, Env, Lqr, Mdp, env_names, from_lqr, from_mdp, make_env
from jaxpg.envs.factory import names_factory
from jaxpg.lab.exact.tables import Moments, Tables, tabulate
from jaxpg.lab.worlds.instances import INSTANCES
from jaxpg.lab.worlds.regulators import PARAMS, coefficients, gain_policy, value_critic
from jaxpg.policies import NETWORKS, Agent, AgentParams, Network, actor_critic, critic_of
from jaxpg.types import Hyperparams, Params

REGULATOR = "LQR"
TABULATED = ("FrozenLake-misc", "Catch-bsuite", "DiscountingChain-bsuite")
TABLES = (*INSTANCES, *TABULATED)


class Table(NamedTuple):
    """Tables of a world and of its policies."""

    mdp: Mdp
    logits: np.ndarray  # [O, A] of the policy, for every observation
    behaviour_logits: np.ndarray | None = None  # [O, A]
    # [O A, R], and [P, R] orthonormal: the gradient in a network's parameters is basis factor^T g.
    factor: np.ndarray | None = None
    basis: np.ndarray | None = None


class World(NamedTuple):
    """An environment and a policy at fixed parameters, with exact answers where they exist."""

    name: str
    env: Env
    policy: Network
    params: Params
    hyperparams: Hyperparams  # those of a checkpoint's run; else the defaults with a gamma
    exact: Table | Lqr | None = None  # an Lqr with a gain_policy; None: no exact answers
    behaviour_params: Params = None  # of another policy that gathers data; None: on-policy only
    critic: Network | None = None  # trained (from a checkpoint), or exact (a regulator's)
    critic_params: Params = ()

    @property
    def gamma(self) -> float:
        return float(self.hyperparams.gamma)

    @property
    def is_tabular(self) -> bool:
        return isinstance(self.exact, Table)

    @property
    def is_regulator(self) -> bool:
        return isinstance(self.exact, Lqr)

    @property
    def is_projected(self) -> bool:
        """Whether a network stands between the parameters and the table."""
        return self.is_tabular and self.table.factor is not None

    @property
    def table(self) -> Table:
        """Raises ValueError for a world without tables."""
        if not isinstance(self.exact, Table):
            raise ValueError(f"{self.name} has no tables, so no exact answers")
        return self.exact

    @property
    def mdp(self) -> Mdp:
        return self.table.mdp

    @property
    def logits(self) -> np.ndarray:
        return self.table.logits

    @property
    def regulator(self) -> Lqr:
        """Raises ValueError for a world that is not a regulator."""
        if not isinstance(self.exact, Lqr):
            raise ValueError(f"{self.name} is not a linear-quadratic regulator")
        return self.exact


class Checkpoint(NamedTuple):
    """One agent of a run: its final policy and critic, and the hyperparameters that trained them."""

    environment: str
    env: Env  # as the agent saw it
    agent: Agent
    params: AgentParams
    hyperparams: Hyperparams
    tables: Callable[[], Mdp] | None  # builds those of env; None if it has none
    origin: dict[str, Any]  # JSON-able: which run, update, replica and seed, and its settings


def world(
    name: str,
    policy: str | None = None,
    checkpoint: Checkpoint | None = None,
    gamma: float | None = None,
) -> World:
    """A world by name: A, T or C (small worked instances), LQR, or any environment of `make_env`.

    FrozenLake-misc, Catch-bsuite and DiscountingChain-bsuite are tabulated, so they have exact answers too.
    policy: the name of a network, used at its initial parameters; by default tabular if observations are
    discrete, else mlp. gamma: None is the checkpoint's, or 1. Raises ValueError for unknown names, a
    network that does not fit, and a checkpoint of another environment.
    """
    if gamma is not None and not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma} must lie in [0, 1]")
    if policy is not None and policy not in NETWORKS and ":" not in policy:
        raise ValueError(f"unknown policy {policy!r}; did you mean {_near(policy, NETWORKS)}?")
    if checkpoint is not None:
        return _trained(name, policy, checkpoint, gamma)
    gamma = 1.0 if gamma is None else gamma
    if name in INSTANCES:
        return tabular_world(name, *INSTANCES[name](), gamma=gamma, policy=policy)
    if name == REGULATOR:
        return regulator_world(gamma=gamma, policy=policy)
    if name in TABULATED:
        mdp = tabulated(name)
        shape = (int(np.max(mdp.observation)) + 1, mdp.reward.shape[1])
        return tabular_world(name, mdp, np.zeros(shape), gamma=gamma, policy=policy)
    known = [*INSTANCES, REGULATOR, *env_names()]
    if name not in known and "/" not in name and not names_factory(name):
        raise ValueError(
            f"unknown environment {name!r}; did you mean {_near(name, known)}? Exact answers exist for "
            f"{', '.join([*INSTANCES, REGULATOR, *TABULATED])}"
        )
    env = make_env(name)
    kind = policy or ("tabular" if isinstance(env.observation, Discrete) else "mlp")
    network = actor_critic(env, kind).policy
    return World(name, env, network, network.init(_init_key()), Hyperparams(gamma=gamma))


def tabular_world(
    name: str,
    mdp: Mdp,
    logits: np.ndarray,
    behaviour_logits: np.ndarray | None = None,
    *,
    gamma: float = 1.0,
    policy: str | None = None,
) -> World:
    """The world of an Mdp with tabular logits [O, A], or with another network at its initial parameters.

    A network's exact moments follow from the table's by its Jacobian J = factor basis^T: the gradient of
    each trajectory is J^T g. Raises ValueError for a recurrent network, which no table describes.
    """
    env = from_mdp(mdp)
    if policy not in (None, "tabular"):
        network = actor_critic(env, policy).policy
        return _tabled(
            World(name, env, network, network.init(_init_key()), Hyperparams(gamma=gamma)), mdp
        )
    network = NETWORKS["tabular"](env.observation, env.action)
    params = table_params(logits)
    behaviour = None if behaviour_logits is None else table_params(behaviour_logits)
    numbers = Hyperparams(gamma=gamma)
    table = Table(mdp, logits, behaviour_logits)
    return World(name, env, network, params, numbers, table, behaviour)


def regulator_world(
    regulator: Lqr | None = None,
    gain: float = -0.6,
    std: float = 0.5,
    offset: float | None = None,
    *,
    gamma: float = 1.0,
    policy: str | None = None,
    fixed_std: bool = False,
) -> World:
    """The world of a linear-quadratic regulator under u ~ Normal(gain s + offset, std^2), with its exact V.

    offset: None fixes it at 0 instead of making it a parameter; fixed_std fixes std. policy: another
    network at its initial parameters, without exact answers.
    """
    regulator = regulator or Lqr()
    env = from_lqr(regulator)
    if policy is not None:
        network = actor_critic(env, policy).policy
        return World(REGULATOR, env, network, network.init(_init_key()), Hyperparams(gamma=gamma))
    network = gain_policy(std if fixed_std else None, offset=offset is not None)
    numbers = gain, np.log(std), offset or 0.0
    params = {
        name: jnp.full(1, number, jnp.result_type(float))
        for name, number in zip(PARAMS, numbers, strict=True)
        if name in network.init(_init_key())
    }
    critic, table = value_critic(regulator, numbers, gamma)
    return World(
        REGULATOR, env, network, params, Hyperparams(gamma=gamma), regulator, critic=critic,
        critic_params=table,
    )  # fmt: skip


def at_horizon(world: World, steps: int) -> World:
    """The same world with episodes of another length; a network's world loses its exact answers."""
    if world.is_regulator:
        regulator = world.regulator._replace(horizon=steps)
        numbers = coefficients(world.policy, world.params)
        critic, table = value_critic(regulator, numbers, world.gamma)
        return world._replace(
            env=from_lqr(regulator), exact=regulator, critic=critic, critic_params=table
        )
    if not world.is_tabular or world.is_projected:
        return world._replace(env=world.env._replace(horizon=steps), exact=None)
    mdp, behaviour = world.mdp._replace(horizon=steps), world.table.behaviour_logits
    return tabular_world(world.name, mdp, world.logits, behaviour, gamma=world.gamma)


def has_exact(world: World) -> bool:
    """Whether moments and gradients are known: the world has tables, or is a regulator."""
    return world.exact is not None


def table_params(logits: np.ndarray) -> Params:
    """Parameters of the tabular network with these logits."""
    return {"logits": jnp.asarray(logits, jnp.result_type(float))}


def tables(world: World) -> Tables:
    """The tables of the world for the exact recursions, with scores in the basis of `coordinates`.

    Raises ValueError for a world without tables.
    """
    found, factor = tabulate(world.mdp, world.logits), world.table.factor
    return found if factor is None else found._replace(score=found.score @ factor)


def coordinates(world: World, moments: Moments) -> Moments:
    """Moments of the gradient in parameters, in an orthonormal basis [R], from those of the table's [O A].

    Norms, traces and cosines are the same as in the parameters [P], to which `lifted` returns.
    """
    factor = world.table.factor if world.is_tabular else None
    if factor is None:
        return moments
    return Moments(factor.T @ moments.mean, factor.T @ moments.covariance @ factor)


def lifted(world: World, vector: np.ndarray) -> np.ndarray:
    """Turn a vector in coordinates [R] into one in parameters [P]."""
    basis = world.table.basis if world.is_tabular else None
    return vector if basis is None else basis @ vector


def num_params(world: World) -> int:
    """The number of policy parameters, P."""
    return sum(x.size for x in jax.tree.leaves(world.params))


def step_table(observations: int) -> Network:
    """A critic that knows the time: value[step in the episode, observation], for whole episodes.

    Params: {"value": [T, O]}; steps from T on read the last row.
    """

    def apply(params, carry, obs, first):
        table = params["value"]
        row = jnp.broadcast_to(jnp.arange(obs.shape[0])[:, None], obs.shape)
        started = jax.lax.cummax(jnp.where(first, row, 0), axis=0)
        return carry, table[jnp.minimum(row - started, table.shape[0] - 1), obs]

    def init(key):
        del key
        return {"value": jnp.zeros((1, observations))}

    return Network(init, lambda num_lanes: (), apply)


def _trained(name, policy, checkpoint, gamma) -> World:
    if checkpoint.environment != name:
        raise ValueError(
            f"the checkpoint was trained on {checkpoint.environment}, not on {name}; use "
            f"--env {checkpoint.environment}"
        )
    if policy is not None:
        raise ValueError(
            f"policy={policy} and a checkpoint contradict each other; leave out the policy"
        )
    agent, params = checkpoint.agent, checkpoint.params
    numbers = checkpoint.hyperparams
    numbers = numbers if gamma is None else numbers._replace(gamma=gamma)
    found = World(name, checkpoint.env, agent.policy, params.policy, numbers)
    critic, critic_params = critic_of(agent, params)
    found = found._replace(critic=critic, critic_params=critic_params)
    if checkpoint.tables is None:
        return found
    # The table has the environment's observations, so a policy trained in one can act in the other.
    mdp = checkpoint.tables()
    return _tabled(found._replace(env=from_mdp(mdp)), mdp)


def _tabled(found: World, mdp: Mdp) -> World:
    """The world with the table of its network: logits [O, A] and their Jacobian by the parameters."""
    if jax.tree.leaves(found.policy.initial_carry(1)):
        raise ValueError(
            f"a recurrent policy has no table of logits, which {found.name} needs; use mlp, linear or tabular"
        )
    flat, unravel = ravel_pytree(found.params)
    obs = jnp.arange(int(np.max(mdp.observation)) + 1)[None]

    def table(flat):
        _, distribution = found.policy.apply(unravel(flat), (), obs, jnp.zeros(obs.shape, bool))
        return distribution.logits[0]

    logits = np.asarray(table(flat), np.float64)
    jacobian = np.asarray(jax.jit(jax.jacrev(table))(flat), np.float64).reshape(logits.size, -1)
    left, size, right = np.linalg.svd(jacobian, full_matrices=False)
    rank = int((size > 1e-6 * size.max()).sum())
    factor, basis = left[:, :rank] * size[:rank], right[:rank].T
    return found._replace(exact=Table(mdp, logits, factor=factor, basis=basis))


def tabulated(name: str, **settings) -> Mdp:
    """The tables of one of TABULATED."""
    from jaxpg.envs.tabulate import mdp_from_gymnax  # importing gymnax takes seconds

    return mdp_from_gymnax(name, **settings)


def _init_key():
    return jax.random.key(0)


def _near(name, known) -> str:
    lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)
    return ", ".join(lower[each] for each in near) or ", ".join(list(known)[:6])
