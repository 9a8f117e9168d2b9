"""First-order optimizers as functions of the hyperparameters, so that every number in them is traced.

`adam(hyperparams)` is called inside the update: the numbers may be tracers, and the structure of the
optimizer's state does not depend on them.

>>> for optimizer in (sgd, momentum, rmsprop, adam, adamw, lion, muon):
...     step = optimizer(Hyperparams(learning_rate=0.1, max_grad_norm=9.0))
...     update, _ = step.update(jnp.ones(1), step.init(jnp.ones(1)), jnp.ones(1))
...     print(optimizer.__name__, bool(update[0] < 0))
sgd True
momentum True
rmsprop True
adam True
adamw True
lion True
muon True
>>> OPTIMIZERS["adam"] is adam
True
"""

from collections.abc import Callable

import jax
import optax
import optax.contrib

from jaxpg.types import Hyperparams

Optimizer = Callable[[Hyperparams], optax.GradientTransformation]


def sgd(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Plain ascent or descent, after clipping by global norm."""
    return _flat(hyperparams, optax.sgd(hyperparams.learning_rate))


def momentum(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum 0.9 (Polyak, 1964), after clipping by global norm."""
    return _flat(hyperparams, optax.sgd(hyperparams.learning_rate, momentum=0.9))


def rmsprop(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """RMSProp (Hinton, 2012) with decay 0.99 and eps 1e-5, after clipping by global norm."""
    return _flat(hyperparams, optax.rmsprop(hyperparams.learning_rate, decay=0.99, eps=1e-5))


def adam(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with eps 1e-5, after clipping by global norm."""
    return _flat(hyperparams, optax.adam(hyperparams.learning_rate, eps=1e-5))


def adamw(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Adam with decoupled decay of the weight matrices (Loshchilov and Hutter, 2019)."""
    rate, decay = hyperparams.learning_rate, hyperparams.weight_decay
    return _clipped(hyperparams, optax.adamw(rate, eps=1e-5, weight_decay=decay, mask=_matrices))


def lion(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Lion (Chen et al., 2023): steps by sign, so give it a third to a tenth of Adam's learning rate."""
    rate, decay = hyperparams.learning_rate, hyperparams.weight_decay
    return _clipped(hyperparams, optax.lion(rate, weight_decay=decay, mask=_matrices))


def muon(hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024): orthogonalised momentum for weight matrices, Adam for the rest."""
    rate, decay = hyperparams.learning_rate, hyperparams.weight_decay
    orthogonalised = optax.contrib.muon(rate, weight_decay=decay, weight_decay_mask=_matrices)
    return _clipped(hyperparams, orthogonalised)


OPTIMIZERS = {
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "momentum": momentum,
    "muon": muon,
    "rmsprop": rmsprop,
    "sgd": sgd,
}


def _flat(hyperparams, optimizer):
    # What treats all parameters alike treats them as one vector: a few large operations, not many small ones.
    return optax.flatten(_clipped(hyperparams, optimizer))


def _clipped(hyperparams, optimizer):
    return optax.chain(optax.clip_by_global_norm(hyperparams.max_grad_norm), optimizer)


def _matrices(params):
    # Only weights decay; biases, log standard deviations and statistics of observations do not.
    return jax.tree.map(lambda x: x.ndim >= 2, params)
