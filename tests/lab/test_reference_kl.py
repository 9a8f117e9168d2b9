"""The KL to a fixed reference policy: what each estimate's gradient is, by enumeration in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from instances import random_instance

from jaxpg import Hyperparams, make_trainer
from jaxpg.envs import Mdp, from_mdp
from jaxpg.estimators import Estimator, baselines, credit, facts_of, importance, surrogates
from jaxpg.estimators.reference import ESTIMATES, charged, penalised
from jaxpg.lab import exact
from jaxpg.lab.exact import enumeration, reference
from jaxpg.lab.exact.tables import softmax, tabulate, visits
from jaxpg.optimizers import sgd
from jaxpg.policies import actor_critic, initial_carry
from jaxpg.training.algorithm import Algorithm, algorithm, check_algorithm
from jaxpg.training.data import Gathered, episodes, referring, stream, with_reference

pytestmark = pytest.mark.usefixtures("x64")
HP = Hyperparams(gamma=1.0, kl_coef=0.7)
TO_GO = credit.reward_to_go


def listed(row, numbers=HP, seed=0):
    mdp, logits, other = random_instance(seed)
    found = enumeration.moments(mdp, logits, row, numbers, reference_logits=other)
    return found, (mdp, logits, other, float(numbers.gamma))


def kl_by_hand(logits, mdp, other, gamma, weight=lambda p, q: p):
    """sum_t gamma^t E sum_a weight (log pi - log ref) in jax, for automatic differentiation."""
    p, q = jax.nn.softmax(logits), jnp.asarray(softmax(other))
    state, total = jnp.asarray(mdp.initial), 0.0
    going = 1.0 - np.asarray(mdp.terminal)
    policy = p[mdp.observation]
    for t in range(mdp.horizon):
        each = (p * (jnp.log(p) - jnp.log(q))).sum(axis=1)[mdp.observation]
        total += gamma**t * (state * going * each).sum()
        state = jnp.einsum("s,sa,sax->x", state, policy, jnp.asarray(mdp.transition))
    return total


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_divergence_and_its_gradient_are_those_of_automatic_differentiation(gamma):
    mdp, logits, other = random_instance(1)
    value, slope = jax.value_and_grad(kl_by_hand)(jnp.asarray(logits), mdp, other, gamma)
    given = mdp, logits, other, gamma
    assert abs(reference.kl(*given) - value) < 1e-12
    np.testing.assert_allclose(reference.kl_gradient(*given), slope.ravel(), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("surrogate", [surrogates.score, surrogates.clipped])
def test_a_penalty_has_the_gradient_of_its_closed_form(estimate, surrogate):
    found, world = listed(Estimator(surrogate=penalised(surrogate, estimate)))
    plain, _ = listed(Estimator(surrogate=surrogate))
    known = reference.penalty_moments(*world, estimate)
    np.testing.assert_allclose(plain.mean - found.mean, HP.kl_coef * known.mean, atol=1e-12)
    alone, _ = listed(Estimator(credit=nothing, surrogate=penalised(surrogate, estimate)))
    scaled = HP.kl_coef**2 * known.covariance
    np.testing.assert_allclose(alone.covariance, scaled, atol=1e-12)


def nothing(trace, trajectory, hyperparams):
    return jnp.zeros_like(trace)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_a_charge_has_the_gradient_of_its_closed_form(estimate):
    numbers = HP._replace(gamma=0.8)
    start = importance.from_start(importance.on_policy)
    found, world = listed(Estimator(charged(TO_GO, estimate), importance=start), numbers)
    plain, _ = listed(Estimator(importance=start), numbers)
    known = reference.reward_moments(*world, estimate)
    np.testing.assert_allclose(plain.mean - found.mean, HP.kl_coef * known.mean, atol=1e-12)


def directions(mdp, logits, other):
    """sum_t E grad KL(pi || ref)(s_t) and sum_t E grad KL(ref || pi)(s_t), the states as they are."""
    world = tabulate(mdp, logits)
    count = visits(world)[:, ~world.terminal].sum(axis=0)
    seen = np.asarray(mdp.observation)[~world.terminal]
    here, there = jnp.asarray(logits), jnp.asarray(softmax(other))

    def both(theta):
        p = jax.nn.softmax(theta)
        backward = (p * jnp.log(p / there)).sum(axis=1)[seen]
        forward = (there * jnp.log(there / p)).sum(axis=1)[seen]
        return jnp.stack([(count * backward).sum(), (count * forward).sum()])

    return np.asarray(jax.jacrev(both)(here)).reshape(2, -1)


def test_which_estimate_follows_which_gradient():
    """k1 nothing, k2 KL(pi || ref), k3 the other direction; in the reward only k1 the whole gradient."""
    mdp, logits, other = random_instance(0)
    given = mdp, logits, other, 1.0
    backward, forward = directions(mdp, logits, other)
    penalty = {k: reference.penalty_moments(*given, k).mean for k in ESTIMATES}
    np.testing.assert_allclose(penalty["k1"], 0.0, atol=1e-12)
    np.testing.assert_allclose(penalty["k2"], backward, atol=1e-12)
    np.testing.assert_allclose(penalty["k3"], forward, atol=1e-12)
    whole = reference.kl_gradient(*given)
    reward = {k: reference.reward_moments(*given, k).mean for k in ESTIMATES}
    np.testing.assert_allclose(reward["k1"], whole, atol=1e-12)
    np.testing.assert_allclose(reward["k3"], whole - forward, atol=1e-12)
    for wrong in (penalty["k1"], penalty["k2"], penalty["k3"], reward["k2"], reward["k3"]):
        assert np.linalg.norm(wrong - whole) > 0.05 * np.linalg.norm(whole)
    # With one step nothing comes after: the penalty k2 is the whole gradient.
    short = mdp._replace(horizon=1), logits, other, 1.0
    penalty = reference.penalty_moments(*short, "k2").mean
    np.testing.assert_allclose(penalty, reference.kl_gradient(*short), atol=1e-12)


def test_a_penalty_is_no_part_of_what_is_standardised():
    wrapped = penalised(surrogates.standardised(surrogates.clipped), "k3")
    assert wrapped.name == "standardised" and facts_of(wrapped).reads_reference
    assert wrapped.arguments[0].name == "penalised"


# Training.


def tree(horizon=2) -> Mdp:
    """Every action leads to a state of its own, so under even logits all trajectories are as likely."""
    size = 2**horizon
    transition, reward = np.zeros((size, 2, size)), np.zeros((size, 2))
    for state in range(size):
        for action in range(2):
            after = 2 * state + 1 + action
            transition[state, action, after if after < size else state] = 1.0
            reward[state, action] = np.sin(1.0 + 3 * state + action)
    start, plain = np.eye(size)[0], np.zeros(size, bool)
    return Mdp(start, transition, reward, 0 * reward, plain, np.arange(size), horizon)


@pytest.mark.parametrize("kind", [*ESTIMATES, "reward"])
def test_an_update_follows_the_closed_form(kind):
    """One step of SGD on all trajectories of a world, against grad J minus the closed form."""
    mdp = tree()
    even = np.zeros((4, 2))
    given = enumeration.enumerate_trajectories(mdp, even).trajectory
    row = Estimator(surrogate=surrogates.ratio)
    if kind == "reward":
        row = row._replace(credit=charged(TO_GO, "k1"))
    else:
        row = row._replace(surrogate=penalised(surrogates.ratio, kind))

    def gather(task, moment, state):
        return state, Gathered(given, given.log_prob, initial_carry(task.agent, 4), given, {})

    data = with_reference(episodes._replace(gather=gather))
    agent = actor_critic(from_mdp(mdp), "tabular")._replace(critic=None)
    trainer = make_trainer(from_mdp(mdp), agent, Algorithm(row, data, sgd), num_envs=4)
    other = np.random.default_rng(1).normal(size=(4, 2))
    state = trainer.init(jax.random.key(0))
    state = state._replace(data=referring(state.data, {"logits": jnp.asarray(other)}))
    numbers = HP._replace(learning_rate=1.0, max_grad_norm=1e9)
    after, metrics = trainer.update(state, numbers, None)
    moved = np.asarray(after.params.policy["logits"] - state.params.policy["logits"]).ravel()
    world = mdp, even, other, 1.0
    form = reference.reward_moments if kind == "reward" else reference.penalty_moments
    penalty = form(*world, "k1" if kind == "reward" else kind).mean
    truth = exact.gradient(mdp, even, 1.0)
    np.testing.assert_allclose(moved, truth - HP.kl_coef * penalty, atol=1e-12)
    assert (np.linalg.norm(moved - truth) > 0.1) == (kind != "k1")
    assert abs(2 * metrics["kl_reference"] - reference.kl(*world)) < 1e-12


@pytest.mark.slow
def test_without_a_run_the_reference_is_the_policy_at_the_start():
    env = from_mdp(tree())
    row = Algorithm(
        Estimator(surrogate=penalised(surrogates.score, "k2")), with_reference(episodes)
    )
    trainer = make_trainer(env, actor_critic(env, "tabular"), row, num_envs=8)
    state = trainer.init(jax.random.key(0))
    apart = []
    for _ in range(3):
        state, metrics = trainer.update(state, Hyperparams(learning_rate=0.5), None)
        apart.append(float(metrics["kl_reference"]))
    assert apart[0] == 0 < apart[1] < apart[2]


@pytest.mark.slow
def test_a_reference_remembers_its_own_stream():
    """On a stream, a recurrent reference sees what it has seen: as if the whole had come at once."""
    env = from_mdp(tree())
    agent = actor_critic(env, "gru", hidden=(), features=3)
    row = algorithm("a2c")._replace(data=with_reference(stream))
    row = row._replace(
        estimator=row.estimator._replace(surrogate=penalised(surrogates.score, "k3"))
    )

    def recorded(num_steps, count):
        # A frozen policy, so that both see the same stream.
        trainer = make_trainer(env, agent, row, num_envs=2, num_steps=num_steps)
        state = trainer.init(jax.random.key(0))
        start = state.data[0].carry
        for _ in range(count):
            numbers = Hyperparams(learning_rate=0.0, critic_learning_rate=0.0)
            state, _ = trainer.update(state, numbers, None)
        return start, state.data[0].carry, state.data[1].carry.policy

    start, reference_carry, own = recorded(3, 2)
    for a, b in zip(jax.tree.leaves(reference_carry), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert not all(map(np.array_equal, jax.tree.leaves(start), jax.tree.leaves(own)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            Algorithm(Estimator(surrogate=penalised(surrogates.score, "k2"))),
            r"penalised\(score, 'k2'\) reads a reference policy, which episodes does not record",
        ),
        (
            algorithm("off_policy")._replace(
                estimator=Estimator(
                    charged(TO_GO, "k1"), baselines.time_mean, importance.per_decision
                ),
                data=with_reference(algorithm("off_policy").data),
            ),
            r"charges the policy for its own actions, but replay\(with_reference\(episodes\), 4\) holds",
        ),
    ],
)
def test_a_reference_that_cannot_be_is_one_line(row, message):
    with pytest.raises(ValueError, match=message):
        check_algorithm(row, False)


def test_demonstrations_have_no_reference():
    with pytest.raises(ValueError, match="not on demonstrations"):
        with_reference(algorithm("behaviour_cloning").data)
