"""A batch is a set of lanes: their order changes no estimate, for any row of the table."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxpg import Hyperparams, make_trainer
from jaxpg.envs import from_mdp
from jaxpg.envs.mdp import Mdp
from jaxpg.estimators import masked
from jaxpg.policies import actor_critic, initial_carry
from jaxpg.training.algorithm import ALGORITHMS, GROUP_ROWS, algorithm
from jaxpg.training.data import Gathered, log_prob_of
from jaxpg.types import Trajectory

T, B, S, A = 5, 6, 3, 2
pytestmark = pytest.mark.usefixtures("x64")
# A failure shows its seed and order, and shrinking them would say nothing more.
few = settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
seeds = st.integers(0, 2**31)


def environment():
    """An environment for its spaces only: the data is given."""
    uniform = np.full((S, A, S), 1 / S)
    zeros = np.zeros((S, A))
    return from_mdp(
        Mdp(np.full(S, 1 / S), uniform, zeros, zeros, np.zeros(S, bool), np.arange(S), T)
    )


def lanes(seed, whole):
    """Episodes from row 0 of lengths 1 to T, or a stream with ends anywhere; both kinds of ends."""
    rng = np.random.default_rng(seed)
    row, x = np.arange(T)[:, None], rng.normal(size=(4, T, B))
    length = rng.integers(1, T + 1, B)
    last = row == length - 1 if whole else rng.random((T, B)) < 0.3
    mask = row < length if whole else np.ones((T, B), bool)
    first = np.concatenate(
        [np.ones((1, B), bool), np.zeros((T - 1, B), bool) if whole else last[:-1]]
    )
    dead = last & (rng.random((T, B)) < 0.5)
    found = Trajectory(
        rng.integers(0, S, (T, B)), rng.integers(0, A, (T, B)), 0.2 * x[0] - 0.7, x[1], 1.0 - dead,
        first, last, mask, x[2], x[3],
    )  # fmt: skip
    return masked(jax.tree.map(jnp.asarray, found))


def row_of(name):
    return algorithm(name, 3 if name in GROUP_ROWS else None)


def updated(name, network, trajectory):
    """The row's update on these lanes, in one minibatch, because it is random which lanes share one."""
    row, env = row_of(name), environment()

    def gather(task, moment, state):
        policy = moment.params.policy
        carry = initial_carry(task.agent, B)
        log_prob = log_prob_of(task.agent.policy, policy, carry.policy, trajectory)
        own = trajectory._replace(log_prob=log_prob)
        found = trajectory if row.data.reweighs else own
        return state, Gathered(found, log_prob, carry, found, {}, 0.7)

    row = row._replace(
        data=row.data._replace(init=lambda *_: (), gather=gather, demonstrations=False),
        num_minibatches=1,
        num_epochs=min(row.num_epochs, 2),
        critic_minibatches=1,
        critic_epochs=min(row.critic_epochs, 1),
    )
    agent = actor_critic(
        env, network, **({"hidden": (), "features": 3} if network == "gru" else {})
    )
    trainer = make_trainer(env, agent, row, num_envs=B, num_steps=T)
    state = trainer.init(jax.random.key(0))
    # Tables start from zeros, where many mistakes are invisible.
    policy = jax.tree.map(
        lambda x: x + 0.3 * jnp.sin(jnp.arange(1.0 * x.size)).reshape(x.shape), state.params.policy
    )
    state = state._replace(params=state.params._replace(policy=policy))
    numbers = Hyperparams(
        learning_rate=0.1,
        critic_learning_rate=0.1,
        gamma=0.9,
        entropy_coef=0.1,
        normaliser_coef=0.1,
    )
    after, metrics = trainer.update(state, numbers, None)
    return jax.tree.map(jnp.subtract, after.params, state.params), metrics


@cache
def compiled(name, network="tabular"):
    return jax.jit(partial(updated, name, network))


def assert_close(one, other):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-7, 1e-10, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "network"), [*((name, "tabular") for name in ALGORITHMS), ("ppo", "gru")]
)
def test_the_order_of_lanes_changes_nothing(name, network):
    whole = algorithm(name).data.whole_episodes
    update = compiled(name, network)

    @few
    @given(seeds, st.permutations(range(B)))
    def property_(seed, order):
        # Groups stay together; they and the lanes within each of them change places.
        size = row_of(name).group_size
        order = [
            i for g in dict.fromkeys(j // size for j in order) for i in order if i // size == g
        ]
        one = lanes(seed, whole)
        other = jax.tree.map(lambda x: x[:, np.array(order)], one)
        moved, metrics = update(one)
        assert_close((moved, metrics), update(other))
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved.policy)) > 1e-3
        # Negative control: moving rewards to other lanes changes the gradient.
        paid = one._replace(reward=jnp.roll(one.reward, 1, axis=1))
        if name != "behaviour_cloning":
            gained = metrics["grad_norm"], update(masked(paid))[1]["grad_norm"]
            assert not np.allclose(*gained, rtol=1e-6)

    property_()
