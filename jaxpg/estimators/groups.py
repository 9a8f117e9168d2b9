"""Groups: episodes from one start, compared with each other and with nothing else.

Lanes come in groups of G, side by side, as `rollout.episodes(..., group_size=G)` gathers them.

>>> psi = jnp.array([[1.0, 0.0, 3.0, 3.0]])  # one step of two groups of two
>>> mask = jnp.ones((1, 4), bool)
>>> trajectory = jaxpg.types.Trajectory(*[psi] * 7, mask, psi, psi)
>>> baselines = jaxpg.estimators.baselines
>>> given = psi, baselines.Scores(psi, None, None), trajectory, jaxpg.Hyperparams()
>>> kinds = baselines.leave_one_out, baselines.batch_mean
>>> [grouped(kind, 2)(*given).ravel().tolist() for kind in kinds]
[[0.0, 1.0, 3.0, 3.0], [0.5, 0.5, 3.0, 3.0]]
>>> advantage = psi - grouped(baselines.batch_mean, 2)(*given)
>>> score = jaxpg.estimators.surrogates.score
>>> for scaled in (group_scaled(score, 2), episode_scaled(score)):
...     print(facts_of(scaled).scale(advantage, 0 * psi, mask).round(2))
[[ 1. -1.  0.  0.]]
[[ 1.41 -1.41  0.    0.  ]]
>>> facts_of(dropping(score, 2)).scale(advantage, 0 * psi, mask).tolist()
[[1.0, -1.0, 0.0, 0.0]]
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpg.devices import across, largest, mean_across, shards, undivided
from jaxpg.estimators.baselines import Baseline
from jaxpg.estimators.slot import Rescale, Slot, describe, facts_of
from jaxpg.types import Array


def grouped(baseline: Baseline, group_size: int) -> Slot:
    """The baseline within each group of G lanes: leave_one_out is RLOO's, batch_mean GRPO's.

    Unbiased where the baseline is (Kool et al., 2019; Ahmadian et al., 2024; Shao et al., 2024).
    Raises ValueError for G below what the baseline compares.
    """
    facts = facts_of(baseline)
    _check_size(describe(baseline), group_size, facts.min_lanes)
    facts = facts._replace(min_lanes=group_size, group_size=group_size, whole_episodes=True)
    return Slot(_grouped, "grouped", (baseline, group_size), facts)


def _grouped(baseline, group_size, psi, scores, trajectory, hyperparams):
    def within(psi, step, trajectory):
        return baseline(psi, scores._replace(step=step), trajectory, hyperparams)

    parts = jax.tree.map(partial(_split, group_size), (psi, scores.step, trajectory))
    with undivided():  # a group is on one device
        return _joined(jax.vmap(within, 1, 1)(*parts))


def _split(group_size, x):
    """[T, B, ...] -> [T, B/G, G, ...]."""
    return x.reshape(x.shape[0], -1, group_size, *x.shape[2:])


def _joined(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def group_scaled(surrogate: Any, group_size: int) -> Slot:
    """The surrogate of A / std of the group's returns, over its G episodes (Shao et al., 2024).

    Biased: starts from which returns rarely differ count more. The std is that of the advantages of first
    steps, which are the returns minus the baseline; a group whose returns are equal up to rounding has A = 0.
    """
    return _scaled("group_scaled", partial(_group_scale, group_size), group_size, surrogate)


def episode_scaled(surrogate: Any) -> Slot:
    """The surrogate of A / std of the returns of the batch's episodes (Hu, 2025; Liu et al., 2025).

    One number for all advantages, so that the direction of their gradient stays.
    """
    return _scaled("episode_scaled", _batch_scale, 1, surrogate)


def dropping(surrogate: Any, group_size: int, per_step: bool = False) -> Slot:
    """The surrogate without the groups whose advantages are all 0 (dynamic sampling; Yu et al., 2025).

    They have no gradient, so dropping them multiplies that of the others by the divisor of all over that of
    the rest: episodes, or steps for a reduction per step.
    """
    scale = partial(_drop, per_step, group_size)
    return _scaled("dropping", scale, group_size, surrogate, per_step)


def _scaled(name: str, scale: Rescale, group_size: int, surrogate, *arguments) -> Slot:
    if name != "episode_scaled":
        _check_size(name, group_size)
        arguments = (*arguments, group_size)
    facts = facts_of(surrogate)
    inner = facts.scale

    def both(advantage, resolution, mask):
        if inner is not None:
            advantage = inner(advantage, resolution, mask)
        return scale(advantage, resolution, mask)

    facts = facts._replace(
        couples=True,
        splits=True,
        min_lanes=max(facts.min_lanes, group_size, 2),
        group_size=max(facts.group_size, group_size),
        whole_episodes=True,
        scale=both,
    )
    return Slot(partial(_inside, len(arguments)), name, (surrogate, *arguments), facts)


def _check_size(name, group_size, least=2):
    if group_size < least:
        raise ValueError(
            f"{name} compares the episodes of a group: group_size={group_size} must be at least {least}"
        )


def _inside(count, surrogate, *inputs):
    return surrogate(*inputs[count:])  # `assess` has scaled the advantages


def _group_scale(group_size, advantage, resolution, mask):
    parts = (_split(group_size, x) for x in (advantage, resolution, mask))
    with undivided():
        return _joined(jax.vmap(_batch_scale, 1, 1)(*parts))


def _batch_scale(advantage, resolution, mask):
    del mask
    returns, rounding = advantage[0], largest(jnp.abs(resolution[0]).max())
    count = returns.size * shards()
    mean = across(returns.sum()) / count
    spread = jnp.sqrt(across(((returns - mean) ** 2).sum()) / count)
    resolved = spread > rounding
    return jnp.where(resolved, advantage / jnp.where(resolved, spread, 1.0), 0.0)


def _drop(per_step, group_size, advantage, resolution, mask):
    silent = _silent(group_size, advantage, resolution)
    kept = jnp.repeat(~silent, group_size)[None] & jnp.ones_like(mask)
    counts = mask if per_step else jnp.ones_like(mask)
    left, count = across(((counts & kept).sum(), counts.sum()))
    share = left / count
    return jnp.where(kept, advantage / jnp.where(share > 0, share, 1.0), 0.0)


def _silent(group_size, advantage, resolution):
    """Whether all advantages of a group are 0, up to rounding: [B/G]."""
    nothing = (jnp.abs(advantage) <= resolution).all(axis=0)
    return nothing.reshape(-1, group_size).all(axis=1)


def silent_share(group_size: int, advantage: Array, resolution: Array) -> Array:
    """The share of groups without any gradient, such as those whose returns are all equal."""
    silent = _silent(group_size, advantage, resolution)
    return mean_across(silent.mean(dtype=advantage.dtype), 1.0)[0]
