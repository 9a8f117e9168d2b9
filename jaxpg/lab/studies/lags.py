"""Lags: a behaviour policy, and policies further and further ahead of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg.lab import exact
from jaxpg.lab.measure.samples import log_probs, roll
from jaxpg.lab.studies.estimators import form
from jaxpg.lab.studies.sampling import source_of
from jaxpg.lab.studies.study import Settings, key_of, shortened, world_of
from jaxpg.lab.worlds.world import Table, World, table_params

SPREAD = 0.5  # of an episode's log weight at lag 1, to first order, where the step is random
PILOT = 256  # episodes that set the size of a random step


class Lag(NamedTuple):
    """A behaviour policy, and the step from it to the policy to improve: target = behaviour + lag step."""

    world: World
    behaviour: Any  # [O, A] logits, or a network's parameters where the world has no tables
    step: Any  # of the same form

    def at(self, lag: float) -> World:
        """The world with its policy ahead of its data by this lag."""
        moved = jax.tree.map(lambda x, step: x + lag * step, self.behaviour, self.step)
        if not self.world.is_tabular:
            return self.world._replace(params=moved, behaviour_params=self.behaviour)
        return self.world._replace(
            exact=Table(self.world.mdp, moved, self.behaviour),
            params=table_params(moved),
            behaviour_params=table_params(self.behaviour),
        )


def lag_of(settings: Settings) -> Lag:
    """The world's own behaviour policy at lag 0 and its policy at 1; or one step up the gradient.

    A network steps in a random direction, and its world has no exact answers.
    """
    world = measured_world(settings)
    if not world.is_tabular:
        return _random_lag(world, settings)
    behaviour = world.table.behaviour_logits
    if behaviour is not None:
        return Lag(world, behaviour, world.logits - behaviour)
    up = exact.gradient(world.mdp, world.logits, world.gamma).reshape(world.logits.shape)
    return Lag(world, world.logits, up / max(np.abs(up).max(), 1e-12))


def measured_world(settings: Settings) -> World:
    """The world, without the tables of a network; a quick run without tables has short episodes."""
    world = world_of(settings)
    if world.is_tabular and not world.is_projected:
        return world
    return shortened(world, settings)._replace(exact=None)


def _random_lag(world: World, settings: Settings) -> Lag:
    """A random step, scaled so that an episode's log weight at lag 1 has a spread of SPREAD."""
    walk, draw = jax.random.split(jax.random.fold_in(key_of(settings), 1))
    flat, unravel = ravel_pytree(world.params)
    step = unravel(jax.random.normal(draw, flat.shape, flat.dtype))
    source = source_of(world, form("rtg", world), walk)

    @jax.jit
    def spread(params, step):
        trajectory = roll(source, 0, PILOT)
        _, change = jax.jvp(log_probs(source, trajectory), (params,), (step,))
        return jnp.sqrt((change.sum(axis=0) ** 2).mean())

    size = SPREAD / spread(world.params, step)
    return Lag(world, world.params, jax.tree.map(lambda x: size * x, step))
