"""Streams: sums over windows of an auto-reset stream, lane by lane, and their exact law for one world."""

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.envs import Mdp, from_mdp
from jaxpg.estimators import credit
from jaxpg.lab.studies.sampling import check_episodes, options_for
from jaxpg.lab.worlds.world import Table, World
from jaxpg.policies import Agent, AgentParams, Categorical, Network
from jaxpg.rollout import init_stream, unroll
from jaxpg.types import Hyperparams

LONG_SHORT = "LONG-SHORT"
PROBABILITY = 0.5  # of LONG: 3 steps that pay 4 at the end; SHORT is one step that pays 1
WORKING_SET = 2**22  # numbers held at a time


class Lanes(NamedTuple):
    """Sums over one window of each environment, [B]; gradients are along one direction."""

    completed: np.ndarray  # sum over completed episodes of their gradient
    ends: np.ndarray  # number of completed episodes
    started: np.ndarray  # sum over all episodes, including the one that the window cuts
    starts: np.ndarray  # number of all episodes
    unmasked: np.ndarray  # reward-to-go that runs on across resets
    returns: np.ndarray  # sum of the completed episodes' returns


def long_short() -> World:
    """One decision with one parameter, LONG or SHORT: d J / d theta = p(1-p)(4 - 1) = 0.75, J = 2.5."""
    transition = np.zeros((4, 2, 4))
    transition[0, 0, 1] = transition[0, 1, 3] = 1.0
    transition[1, :, 2] = transition[2:, :, 3] = 1.0
    reward = np.array([(0.0, 1.0), (0.0, 0.0), (4.0, 4.0), (0.0, 0.0)])
    terminal = np.array([0, 0, 0, 1], bool)
    initial = np.array([1.0, 0.0, 0.0, 0.0])
    mdp = Mdp(initial, transition, reward, 0.0 * reward, terminal, np.arange(4), 3)

    def apply(params, carry, obs, first):
        del first
        preference = jnp.where(obs == 0, params["preference"], 0.0)
        return carry, Categorical(jnp.stack([preference, jnp.zeros_like(preference)], axis=-1))

    params = {"preference": jnp.log(PROBABILITY / (1 - PROBABILITY))}
    policy = Network(lambda key: params, lambda num_lanes: (), apply)
    logits = np.zeros((4, 2))
    logits[0, 0] = params["preference"]
    one = np.eye(8)[:, :1]
    return World(
        LONG_SHORT, from_mdp(mdp), policy, params, Hyperparams(gamma=1.0),
        Table(mdp, logits, factor=one, basis=np.eye(1)),
    )  # fmt: skip


def measure_windows(world: World, direction, key, num_envs: int, lengths) -> list[Lanes]:
    """num_envs windows of each length from fresh resets, in chunks of bounded memory.

    direction: like world.params; gradients are sum_t u_t psi_t along it, psi the reward to go. The shorter
    windows are the beginnings of the longest ones, so one simulation serves all.
    """
    agent = Agent(world.policy)
    check_episodes(12 * len(Lanes._fields) * (len(lengths) + 2), num_envs, "the windows of")
    size = max(1, min(num_envs, WORKING_SET // (max(lengths) * 16)))

    def run(key):
        def chunk(index):
            k_reset, k_steps = jax.random.split(jax.random.fold_in(key, index))
            stream = init_stream(world.env, agent, k_reset, size)
            params = AgentParams(world.params, ())
            _, (whole, _) = unroll(world.env, agent, params, stream, k_steps, max(lengths))
            cuts = [jax.tree.map(lambda x, n=n: x[:n], whole) for n in lengths]
            return [lane_sums(world, direction, cut) for cut in cuts]

        return jax.lax.map(chunk, jnp.arange(-(-num_envs // size)))

    program = jax.jit(run, compiler_options=options_for(num_envs * max(lengths)))
    return jax.tree.map(lambda x: np.asarray(x, np.float64).reshape(-1)[:num_envs], program(key))


def lane_sums(world: World, direction, trajectory) -> Lanes:
    """Lanes of a trajectory that starts with fresh resets: one forward-mode pass for all scores.

    Rewards and scores are discounted from the start of their episode: the exact gradient of its return.
    """
    policy, params, hyperparams = world.policy, world.params, world.hyperparams
    carry = policy.initial_carry(trajectory.reward.shape[1])

    def log_prob(params):
        return policy.apply(params, carry, trajectory.obs, trajectory.first)[1].log_prob(
            trajectory.action
        )

    ones, row = jnp.ones_like(trajectory.reward), jnp.arange(len(trajectory.reward))[:, None]
    age = row - jax.lax.cummax(jnp.where(trajectory.first, row, 0), axis=0)
    discount = hyperparams.gamma**age
    score = discount * jax.jvp(log_prob, (params,), (direction,))[1]
    to_go = credit.reward_to_go(ones, trajectory, hyperparams)
    endless = trajectory._replace(last=jnp.zeros_like(trajectory.last))
    across = credit.reward_to_go(ones, endless, hyperparams)
    complete = jax.lax.cummax(trajectory.last.astype(jnp.int32), axis=0, reverse=True)
    ends, starts = trajectory.last.sum(axis=0), trajectory.first.sum(axis=0)
    return Lanes(
        completed=(complete * score * to_go).sum(axis=0),
        ends=ends,
        started=(score * to_go).sum(axis=0),
        starts=starts,
        unmasked=(score * across).sum(axis=0),
        returns=(complete * discount * trajectory.reward).sum(axis=0),
    )


def window_law(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes (short, long, cut) [K, 3] of one LONG-SHORT window, and their probabilities [K]."""
    laws: list[dict] = [{(0, 0, 0): 1.0}]
    for steps in range(1, length + 1):
        law = defaultdict(float)
        for (short, long, cut), weight in laws[steps - 1].items():
            law[short + 1, long, cut] += (1 - PROBABILITY) * weight
        if steps < 3:
            law[0, 0, 1] += PROBABILITY
        else:
            for (short, long, cut), weight in laws[steps - 3].items():
                law[short, long + 1, cut] += PROBABILITY * weight
        laws.append(law)
    return np.array(list(laws[-1])), np.array(list(laws[-1].values()))


def exact_windows(length: int) -> dict[str, float]:
    """The expectation of each way to average LONG-SHORT windows; pooled ones are over many environments."""
    (short, long, cut), weight = window_law(length)[0].T, window_law(length)[1]
    count = short + long
    gain = 4 * (1 - PROBABILITY) * long - PROBABILITY * short
    own = np.divide(gain, count, out=np.zeros(len(gain)), where=count > 0)
    known = {
        "per_environment": weight @ own,
        "pooled": (weight @ gain) / (weight @ count),
        "partial_as_full": weight @ (gain / (count + cut)),
        "unmasked": _gradient_per_window(length),
        "pooled_return": (weight @ (4 * long + short)) / (weight @ count),
    }
    return {name: float(value) for name, value in known.items()}


def exact_pooled(length: int, num_envs: int) -> float:
    """The expected pooled gradient of num_envs LONG-SHORT windows: a convolution of their counts."""
    outcomes, weight = window_law(length)
    shape = (num_envs * length + 1, num_envs * (length // 3) + 1)
    one = np.zeros(shape)
    np.add.at(one, (outcomes[:, 0], outcomes[:, 1]), weight)
    law = np.fft.irfft2(np.fft.rfft2(one) ** num_envs, s=shape)
    short, long = np.indices(shape)
    gain = 4 * (1 - PROBABILITY) * long - PROBABILITY * short
    return float((law * gain / np.maximum(short + long, 1)).sum())


def _gradient_per_window(length) -> float:
    """d/d theta of the expected reward in a window, by forward recursion over its length."""
    p, value, slope = PROBABILITY, [0.0], [0.0]
    for steps in range(1, length + 1):
        long, d_long = (4 + value[steps - 3], slope[steps - 3]) if steps >= 3 else (0.0, 0.0)
        short, d_short = 1 + value[steps - 1], slope[steps - 1]
        value.append(p * long + (1 - p) * short)
        slope.append(long - short + p * d_long + (1 - p) * d_short)
    return p * (1 - p) * slope[length]
