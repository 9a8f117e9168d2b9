"""Fewer and larger programs: what a test traces and compiles takes longer than what it runs."""

import jax

from jaxpg import Trainer, train


def traced_once(trainer: Trainer) -> Trainer:
    """The same trainer, whose init is one program and whose update is traced once for all programs."""
    return trainer._replace(init=jax.jit(trainer.init), update=jax.jit(trainer.update))


def trained(trainer: Trainer, hyperparams, num_updates: int, seeds: int | None = None):
    """The state and the metrics after training from a fresh start, in one program, or [seeds] of them."""

    def run(key):
        return train(trainer, trainer.init(key), hyperparams, num_updates=num_updates)

    key = jax.random.key(0)
    if seeds is None:
        return jax.jit(run)(key)
    return jax.jit(jax.vmap(run))(jax.random.split(key, seeds))


@jax.jit
def take(tree, i):
    """Entry i of every leaf."""
    return jax.tree.map(lambda x: x[i], tree)
