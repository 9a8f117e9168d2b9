"""The natural gradient against exact matrices, closed forms and enumerations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.devices import built_for
from jaxpg.envs import Mdp, from_gymnax
from jaxpg.lab import exact
from jaxpg.optimizers.natural import (
    backtrack,
    conjugate_gradients,
    enac,
    npg,
    precondition_by_fisher,
    precondition_by_scores,
    scale_to_kl,
    trpo,
)
from jaxpg.policies import actor_critic
from jaxpg.training.algorithm import algorithm

LOGITS = np.array([(0.2, -0.1), (-0.4, 0.3), (0.5, 0.1)])


def instance_a() -> Mdp:
    transition = np.array(
        [
            [(0.7, 0.2, 0.1), (0.1, 0.6, 0.3)],
            [(0.4, 0.5, 0.1), (0.2, 0.2, 0.6)],
            [(0.3, 0.3, 0.4), (0.05, 0.15, 0.8)],
        ]
    )
    reward = np.array([(1.0, -0.5), (0.0, 2.0), (0.5, -1.0)])
    initial, none = np.array([0.5, 0.3, 0.2]), np.zeros(3, bool)
    return Mdp(initial, transition, reward, np.zeros((3, 2)), none, np.arange(3), 5)


def states_of(mdp, logits):
    """The mean distribution of states over the steps, by a loop."""
    policy = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    state, total = mdp.initial, np.zeros(3)
    for _ in range(mdp.horizon):
        total = total + state / mdp.horizon
        state = np.einsum("s,sa,sat->t", state, policy, mdp.transition)
    return total


def kl_on(states, logits):
    old = jax.nn.log_softmax(jnp.asarray(logits))

    def kl(new):
        each = (jnp.exp(old) * (old - jax.nn.log_softmax(new))).sum(-1)
        return jnp.asarray(states) @ each

    return kl


def loss_of(mdp):
    """-J by dynamic programming, differentiable."""

    def loss(logits):
        policy, value = jax.nn.softmax(logits), jnp.zeros(3)
        for _ in range(mdp.horizon):
            ahead = jnp.einsum("sat,t->sa", jnp.asarray(mdp.transition), value)
            value = (policy * (jnp.asarray(mdp.reward) + ahead)).sum(-1)
        return -jnp.asarray(mdp.initial) @ value

    return loss


def test_conjugate_gradients_solve_and_stop_where_there_is_nothing_left(x64):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, target = root @ root.T + np.eye(6), rng.normal(size=6)
    for iterations in (6, 40):
        found = conjugate_gradients(
            lambda v: jnp.asarray(matrix) @ v, jnp.asarray(target), iterations
        )
        assert np.allclose(found, np.linalg.solve(matrix, target), atol=1e-9)
    assert not np.allclose(
        conjugate_gradients(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(target), 2),
        np.linalg.solve(matrix, target),
        atol=1e-3,
    )
    nothing = conjugate_gradients(lambda v: v, jnp.zeros(3), 5)
    assert np.array_equal(nothing, np.zeros(3))


@pytest.mark.slow
def test_the_trust_region_step_of_a_small_world(x64):
    """The numbers of the three-state world at max_kl = 0.01, to published precision."""
    mdp = instance_a()
    kl, loss = kl_on(states_of(mdp, LOGITS), LOGITS), loss_of(mdp)
    params = jnp.asarray(LOGITS)
    gradient = jax.grad(loss)(params)
    natural = optax.chain(precondition_by_fisher(0.0), optax.scale(-1.0 / mdp.horizon))
    found, _ = natural.update(gradient, natural.init(params), params, kl=kl, loss=loss)
    expected = np.array([0.68285094, -0.75384527, 0.90575048])
    assert np.allclose(found, np.stack([expected, -expected], 1), atol=1e-8)
    for method in (npg, trpo):
        optimizer = method(Hyperparams(max_kl=0.01, damping=0.0))
        step, _ = optimizer.update(gradient, optimizer.init(params), params, kl=kl, loss=loss)
        expected = np.array([0.12608091, -0.13918923, 0.16723686])
        assert np.allclose(step, np.stack([expected, -expected], 1), atol=1e-8)
        assert float(kl(params + step)) == pytest.approx(0.00975187, abs=1e-8)
        assert -float(loss(params + step)) == pytest.approx(2.9990634251, abs=1e-8)
    # The same answer as the exact module's, which forms the matrix.
    assert np.allclose(step.ravel(), exact.trpo_step(mdp, LOGITS, 1.0, 0.01).step, atol=1e-9)


def test_the_natural_gradient_does_not_see_the_parameters(x64):
    """theta = M phi: the policies after the step are the same; after a plain gradient step they are not."""
    mdp = instance_a()
    kl, loss = kl_on(states_of(mdp, LOGITS), LOGITS), loss_of(mdp)
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)) + 2 * np.eye(6))

    def logits_of(phi):
        return (matrix @ phi).reshape(3, 2)

    phi = jnp.linalg.solve(matrix, jnp.asarray(LOGITS).ravel())

    def after(optimizer):
        theta, here = jnp.asarray(LOGITS), optimizer.init(phi)
        plain, _ = optimizer.update(jax.grad(loss)(theta), here, theta, kl=kl, loss=loss)
        functions = {"kl": lambda p: kl(logits_of(p)), "loss": lambda p: loss(logits_of(p))}
        gradient = jax.grad(functions["loss"])(phi)
        moved, _ = optimizer.update(gradient, here, phi, **functions)
        return jax.nn.softmax(theta + plain), jax.nn.softmax(logits_of(phi + moved))

    exactly = optax.chain(
        precondition_by_fisher(0.0, 30), scale_to_kl(0.01), optax.scale(-1.0), backtrack(0.01)
    )
    one, other = after(exactly)
    assert np.abs(one - other).max() < 1e-5
    one, other = after(optax.with_extra_args_support(optax.sgd(0.1)))
    assert np.abs(one - other).max() > 1e-2, "control"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_line_search_takes_the_longest_step_that_is_good_enough(platform, x64):
    params = {"x": jnp.array([0.0, 0.0])}
    step = {"x": jnp.array([-1.0, 0.0])}

    def run(loss, kl, max_kl=1.0):
        search = backtrack(max_kl)
        with built_for(platform):  # on a GPU every attempt is made
            found, _ = jax.jit(
                lambda: search.update(step, search.init(params), params, loss=loss, kl=kl)
            )()
        return found["x"]

    def square(params):
        return (params["x"] ** 2).sum()

    def nothing(params):
        return jnp.zeros(())

    def nearer(params):  # lowest at -0.2: a step of 1/4 improves, one of 1/2 does not
        return (params["x"][0] + 0.2) ** 2

    assert np.allclose(run(lambda p: p["x"][0], nothing), [-1.0, 0.0])
    assert np.allclose(run(nearer, nothing), [-0.25, 0.0])
    assert np.allclose(run(lambda p: p["x"][0], square, 0.1), [-0.25, 0.0])
    for hopeless in (square, lambda p: jnp.log(p["x"][0]), nothing):
        assert np.array_equal(run(hopeless, nothing), [0.0, 0.0])
    # An infinite step is refused too, without a NaN.
    search = backtrack(1.0)
    endless = jax.tree.map(lambda x: x * jnp.inf, step)
    found, _ = search.update(endless, search.init(params), params, loss=square, kl=nothing)
    assert np.array_equal(found["x"], [0.0, 0.0])


def test_regression_on_scores_is_the_natural_gradient(x64):
    """Exact in expectation: all trajectories of a world of thirds, in proportion to their probability."""
    logits = np.log(np.array([(1.0, 2.0), (2.0, 1.0), (1.0, 2.0)]))
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1:, :, 0] = 1.0
    reward = np.random.default_rng(2).normal(size=(3, 2))
    none = np.zeros(3, bool)
    mdp = Mdp(np.eye(3)[0], transition, reward, 0 * reward, none, np.arange(3), 2)
    episodes = []
    for a in (0, 1):
        for b in (0, 1):
            s = a + 1
            times = [(1, 2), (2, 1), (1, 2)][0][a] * [(1, 2), (2, 1), (1, 2)][s][b]
            episodes += [(a, s, b, reward[0, a] + reward[s, b])] * times
    first, state, second, returns = map(np.array, zip(*episodes, strict=True))
    assert len(returns) == 9

    def episode_log_probs(params):
        log_p = jax.nn.log_softmax(params)
        return log_p[0, first] + log_p[state, second]

    def loss(params):
        return -(episode_log_probs(params) * (returns - returns.mean())).mean()

    params = jnp.asarray(logits)
    optimizer = optax.chain(precondition_by_scores(0.0, 30), optax.scale(-1.0))
    found, _ = optimizer.update(
        jax.grad(loss)(params), optimizer.init(params), params, episode_log_probs=episode_log_probs
    )
    expected = exact.natural_gradient(mdp, logits, 1.0)
    assert np.allclose(np.ravel(found), expected, atol=1e-8)
    assert algorithm("enac").policy_optimizer is enac


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment", "network"),
    [("trpo", "CartPole-v1", "mlp"), ("trpo", "Pendulum-v1", "gru"), ("npg", "Pendulum-v1", "mlp")],
)
def test_steps_stay_within_the_trust_region(name, environment, network):
    """Test discrete and continuous actions, with and without memory, and TRPO with a part's Fisher matrix.

    With a part, the plain step may be as long as 20 times the limit; only the line search bounds it.
    """
    env = from_gymnax(environment)
    agent = actor_critic(env, network, hidden=(8,))
    lanes = 8 if network == "gru" else 8 * 16
    row = algorithm(name)._replace(fisher_samples=lanes // 2 if name == "trpo" else None)
    trainer = make_trainer(env, agent, row, num_envs=8, num_steps=16)
    numbers = jax.tree.map(jnp.float32, Hyperparams(max_kl=0.02))
    learn = jax.jit(jax.vmap(partial(train, trainer, num_updates=4), (0, None)))
    states = jax.jit(jax.vmap(trainer.init))(jax.random.split(jax.random.key(0), 3))
    _, metrics = learn(states, numbers)
    assert (metrics["kl"] > 1e-4).any(), "something moves"
    if name == "trpo":
        assert (metrics["kl"] <= 0.02 * (1 + 1e-5)).all()
    small = numbers._replace(max_kl=jnp.float32(1e-4))
    _, metrics = learn(states, small)
    assert metrics["kl"].max() <= 1e-4 * (1 + 1e-3)
    if name == "npg":  # damping alone makes 240 steps fall short: 0.5 to 0.97 of the limit
        assert metrics["kl"].min() > 4e-5
    # No step is acceptable at a KL of 0: the policy stays as it is, to the bit.
    if name == "trpo":
        still, _ = learn(states, numbers._replace(max_kl=jnp.float32(0.0)))
        for before, now in zip(
            jax.tree.leaves(states.params.policy), jax.tree.leaves(still.params.policy), strict=True
        ):
            assert np.array_equal(before, now)


@pytest.mark.parametrize("samples", [0, 129])
def test_a_fisher_subsample_must_fit(samples):
    env = from_gymnax("CartPole-v1")
    row = algorithm("trpo")._replace(fisher_samples=samples)
    message = f"fisher_samples={samples} must be between 1 and the batch's num_envs x num_steps=128"
    with pytest.raises(ValueError, match=message):
        make_trainer(env, actor_critic(env, hidden=(8,)), row, num_envs=8, num_steps=16)
