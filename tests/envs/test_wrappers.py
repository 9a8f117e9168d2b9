"""Wrappers against the environment they wrap, stepped alongside."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import clock, random_mdp

from jaxpg import Hyperparams, make_trainer, train
from jaxpg.envs import (
    Actor,
    Box,
    Discrete,
    Env,
    MultiDiscrete,
    check_env,
    flatten_observation,
    from_gymnax,
    from_mdp,
    history,
    mask_observation,
    repeat_action,
    unwrapped,
)
from jaxpg.envs.spaces import encode
from jaxpg.policies import actor_critic
from jaxpg.training.algorithm import algorithm
from jaxpg.types import Array, TimeStep


def drive(env, actions, key=0):
    """Observations [T + 1, ...] and time steps [T] along given actions."""
    step = jax.jit(env.step)
    state, obs = env.reset(jax.random.key(key))
    steps = []
    for t, action in enumerate(actions):
        state, result = step(jax.random.key(t), state, action)
        steps.append(result)
    return [np.asarray(o) for o in (obs, *(s.obs for s in steps))], steps


def echo(action, observation, horizon=9) -> Env:
    """An environment that shows its clock in any observation space, takes any action, and pays the clock."""

    def view(t):
        return jnp.broadcast_to(t % 2, observation.shape).astype(
            jnp.float32 if isinstance(observation, Box) else jnp.int32
        )

    def step(key, t, chosen):
        del key, chosen
        t = t + 1
        return t, TimeStep(view(t), t.astype(jnp.float32), t >= horizon, jnp.bool_(False))

    return Env(lambda key: (jnp.int32(0), view(jnp.int32(0))), step, observation, action, horizon)


def test_masked_observations_are_the_kept_entries():
    plain = from_gymnax("CartPole-v1")
    env = mask_observation(plain, (2, 0))
    actions = [jnp.int32(1)] * 30  # pushed one way, the pole falls
    (seen, steps), (all_, base) = drive(env, actions), drive(plain, actions)
    assert all((a == b[[2, 0]]).all() for a, b in zip(seen, all_, strict=True))
    assert env.observation.low.tolist() == plain.observation.low[[2, 0]].tolist()
    for one, other in zip(steps, base, strict=True):
        assert one.reward == other.reward and one.terminated == other.terminated
    assert any(s.terminated for s in steps)


SCALAR = Box(np.full(1, 0.25, np.float32), np.full(1, 2.0, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("observation", [SCALAR, Discrete(2), MultiDiscrete((2, 3))])
@pytest.mark.parametrize("action", [SCALAR, Discrete(3), MultiDiscrete((2, 2))])
def test_history_is_the_last_observations_and_actions(k, observation, action):
    """Compare with a list that grows by a row per step; actions are shown as the environment takes them."""
    env = history(echo(action, observation), k)
    chosen = [
        jnp.full(action.shape, t % 2, jnp.int32)
        if not isinstance(action, Box)
        else jnp.full(1, 1.5 * t, jnp.float32)
        for t in range(6)
    ]
    seen, _ = drive(env, chosen)

    def one_hot(space, x):
        if isinstance(space, Box):
            return np.clip(x, 0.25, 2.0)
        sizes, parts = ([space.n], [x]) if isinstance(space, Discrete) else (space.nvec, x)
        return np.concatenate([np.eye(n)[int(i)] for n, i in zip(sizes, parts, strict=True)])

    def shown(t):
        value = np.full(observation.shape, t % 2)
        return value if isinstance(observation, Box) else one_hot(observation, value)

    width = len(one_hot(action, np.asarray(chosen[0])))
    rows = [np.zeros(width + len(shown(0)))] * (k - 1)
    for t in range(7):
        taken = one_hot(action, np.asarray(chosen[t - 1])) if t else np.zeros(width)
        rows.append(np.concatenate([taken, shown(t)]))
        assert np.array_equal(seen[t], np.concatenate(rows[-k:])), t
        assert seen[t].shape == env.observation.shape and seen[t].dtype == np.float32
        assert (seen[t] >= env.observation.low).all() or isinstance(observation, Box)
        assert (seen[t] <= env.observation.high).all()


@pytest.mark.slow
def test_history_restarts_with_the_episode():
    """In a stream, the window after an automatic reset is the one after a fresh reset."""
    env = history(clock(5), 3)
    trainer = make_trainer(
        env, actor_critic(env, hidden=(4,)), algorithm("ppo"), num_envs=4, num_steps=12
    )
    state = trainer.init(jax.random.key(0))
    after, _ = jax.jit(lambda s: train(trainer, s, Hyperparams(), num_updates=1))(state)
    # Step 12 is the third of the third episode: its window reaches back to the reset and no further.
    window = np.asarray(after.data.obs).reshape(4, 3, 4)
    assert window[:, :, 2].tolist() == [[0.0, 1.0, 2.0]] * 4, "times"
    assert (window[:, 0, :2] == 0).all() and (window[:, 1:, :2].sum(-1) == 1).all()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_repeated_action_is_k_single_steps(k):
    """This includes the step that ends the episode, in the middle of a repetition too."""
    plain = from_gymnax("CartPole-v1", max_steps_in_episode=30)
    env = repeat_action(plain, k)
    assert env.horizon == -(-30 // k)
    reset, step = env.reset(jax.random.key(3)), jax.jit(env.step)
    state, base = reset[0], reset[0]
    over, total = False, 0.0
    for t in range(env.horizon):
        action = jnp.int32(t % 2)
        state, result = step(jax.random.key(t), state, action)
        reward = 0.0
        for _ in range(k):
            base, single = jax.jit(plain.step)(jax.random.key(0), base, action)
            reward += float(single.reward)
            over = bool(single.terminated | single.truncated)
            if over:
                break
        assert float(result.reward) == reward and np.allclose(result.obs, single.obs, atol=1e-6)
        assert (bool(result.terminated), bool(result.truncated)) == (
            bool(single.terminated),
            bool(single.truncated),
        )
        total += reward
        if over:
            break
    assert over and total > 0


@pytest.mark.parametrize(("limit", "death"), [(7, None), (9, 7)])
def test_ends_stay_apart_when_actions_repeat(limit, death):
    """Truncation after 7 of 8 steps stays truncation; and nothing is paid after the end."""
    _, steps = drive(repeat_action(clock(limit, death), 4), [jnp.int32(0)] * 2)
    assert [float(s.reward) for s in steps] == [4.0, 3.0]
    assert [bool(s.terminated) for s in steps] == [False, death is not None]
    assert [bool(s.truncated) for s in steps] == [False, death is None]


def test_repeated_steps_draw_fresh_chances():
    env = repeat_action(from_mdp(random_mdp(0, terminal=False)._replace(horizon=8)), 2)
    once = from_mdp(random_mdp(0, terminal=False)._replace(horizon=8))
    keys = jax.random.split(jax.random.key(0), 4000)
    state, _ = once.reset(jax.random.key(0))
    seen = jax.vmap(lambda key: env.step(key, state, jnp.int32(0))[1].obs)(keys)
    transition = random_mdp(0, terminal=False).transition[:, 0]
    exact = (transition @ transition)[int(state[0])]
    frequency = np.bincount(np.asarray(seen), minlength=3) / 4000
    assert (np.abs(frequency - exact) < 5 * np.sqrt(exact * (1 - exact) / 4000)).all()
    once_only = transition[int(state[0])]
    assert np.abs(once_only - exact).max() > 0.05, "control: one step would be seen"


VECTOR = "must name entries of the observation: 0 to 3"


def moving(discrete) -> Env:
    """An environment that moves as it is pushed, by real numbers or modulo 11."""
    bound = np.full(3, np.inf, np.float32)
    if discrete:
        observation, action = Discrete(11), Discrete(3)
    else:
        observation, action = Box(-bound, bound), Box(*np.float32([[-2], [2]]))

    def shown(x):
        return x if discrete else jnp.stack([x, jnp.sin(5 * x), x**2])

    def step(key, x, chosen):
        del key
        x = (3 * x + chosen + 1) % 11 if discrete else 0.7 * x + jnp.clip(chosen[0], -2, 2)
        return x, TimeStep(shown(x), jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    def reset(key):
        x = jax.random.randint(key, (), 0, 11) if discrete else jax.random.normal(key)
        return x, shown(x)

    return Env(reset, step, observation, action, 5)


def remembering(env) -> Actor:
    """An actor that acts by the sum of its observations in the episode, beyond the action space too."""

    def step(key, obs, carry, first):
        del key
        rows = encode(env.observation, obs).reshape(len(obs), -1)
        weights = jnp.cos(jnp.arange(1.0, rows.shape[1] + 1))
        carry = jnp.where(first, 0.0, carry) + rows @ weights
        if isinstance(env.action, Box):
            return 3 * jnp.sin(carry)[:, None], carry
        return (jnp.abs(carry) * 7).astype(jnp.int32) % 3, carry

    return Actor(jnp.zeros, step)


def driven(env, actor, first):
    """Actions [T, B, ...]; first [T, B] resets a lane to its own start."""
    lanes = first.shape[1]
    start = jax.vmap(env.reset)(jax.random.split(jax.random.key(1), lanes))
    keys = jax.random.split(jax.random.key(0), lanes)

    def step(loop, first):
        now, carry = loop
        state, obs = jax.tree.map(lambda a, b: jax.vmap(jnp.where)(first, a, b), start, now)
        action, carry = actor.step(keys[0], obs, carry, first)
        state, result = jax.vmap(env.step)(keys, state, action)
        return ((state, result.obs), carry), action

    return jax.lax.scan(step, (start, actor.initial_carry(lanes)), first)[1]


@pytest.mark.parametrize(
    ("discrete", "keep", "k", "repeat"),
    [
        (False, (2, 0), 0, 1),
        (False, None, 1, 1),
        (False, None, 3, 1),
        (False, None, 0, 2),
        (False, (1, 2), 3, 2),
        (True, None, 3, 2),
    ],
)
def test_an_actor_acts_inside_the_wrappers_as_it_does_outside(discrete, keep, k, repeat):
    """Two episodes of 5 steps, with the last repetition cut short; inside, lane b starts b steps later."""
    plain = env = moving(discrete)
    if keep:
        env = mask_observation(env, keep)
    if repeat > 1:
        env = repeat_action(env, repeat)
    if k:
        env = history(env, k)
    lanes, decisions = 3, -(-5 // repeat)
    raw, inside = unwrapped(env, remembering(env))
    assert raw is plain

    @jax.jit
    def both():
        first = jnp.arange(2 * decisions) % decisions == 0
        expected = driven(env, remembering(env), jnp.stack([first] * lanes, 1))
        delayed = jnp.arange(10 + lanes)[:, None] - jnp.arange(lanes)[None]
        return expected, driven(raw, inside, delayed % 5 == 0)

    expected, found = map(np.asarray, both())
    for b in range(lanes):
        of_decisions = expected[:, b].reshape(2, decisions, -1)
        of_steps = np.repeat(of_decisions, repeat, axis=1)[:, :5]
        np.testing.assert_allclose(
            found[b : b + 10, b].reshape(2, 5, -1), of_steps, rtol=1e-4, atol=1e-4
        )
    assert len(np.unique(expected)) > 2


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda: mask_observation(from_gymnax("CartPole-v1"), (0, 4)), f"keep=0,4 {VECTOR}"),
        (lambda: mask_observation(from_gymnax("CartPole-v1"), (-1,)), f"keep=-1 {VECTOR}"),
        (lambda: mask_observation(from_gymnax("CartPole-v1"), ()), VECTOR),
        (lambda: mask_observation(from_mdp(random_mdp(0)), (0,)), r"Discrete of shape \(\)"),
        (lambda: mask_observation(from_gymnax("Catch-bsuite"), (0,)), r"Box of shape \(10, 5\)"),
        (lambda: history(clock(5), 0), "history=0 must be at least 1"),
        (lambda: repeat_action(clock(5), 0), "repeat=0 must be at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(wrap, message):
    with pytest.raises(ValueError, match=message) as error:
        wrap()
    assert "\n" not in str(error.value)


def test_the_parts_of_an_observation_are_joined_in_the_documented_order():
    env = clock(3)

    class Seen(NamedTuple):
        second: Array
        first: dict

    def shown(obs):
        return Seen(obs[:1] > 0, {"b": jnp.stack([obs, obs + 1.0]), "a": obs[0].astype(jnp.int32)})

    def step(key, state, action):
        after, result = env.step(key, state, action)
        return after, result._replace(obs=shown(result.obs))

    def reset(key):
        state, obs = env.reset(key)
        return state, shown(obs)

    parts = env._replace(reset=reset, step=step)
    with pytest.raises(ValueError, match=r"flatten_observation\(env\) joins its parts"):
        check_env(parts)
    flat = flatten_observation(parts)
    check_env(flat)
    state, _ = flat.reset(jax.random.key(0))
    state, result = flat.step(jax.random.key(1), state, jnp.int32(0))
    obs = np.asarray(
        env.step(jax.random.key(1), env.reset(jax.random.key(0))[0], jnp.int32(0))[1].obs
    )
    by_hand = [obs[0] > 0, int(obs[0]), *obs, *(obs + 1)]
    np.testing.assert_allclose(result.obs, by_hand)
