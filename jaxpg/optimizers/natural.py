"""The natural gradient as optax transformations that know the policy whose parameters they move.

What the gradient does not tell them is passed by name, as extra arguments of `update`:

    loss(params) -> []                 what is minimised
    kl(params) -> []                   mean KL(pi_old || pi_params) per step; its Hessian at the old
                                       parameters is the Fisher matrix per step
    fisher_kl(params) -> []            the same on part of the batch; by default kl
    episode_log_probs(params) -> [B]   log pi(tau_i), up to terms that do not depend on the parameters
    average(x) -> x                    mean over the devices that share the batch, weighted like kl; by
                                       default one has all of it

The loss and the KL that a search compares are of the whole batch; fisher_kl is of a device's own part, and
what is derived from it is averaged.

They chain with any others: `optax.chain(precondition_by_fisher(0.1), scale_to_kl(0.01, 0.1), ...)`.

>>> def kl(p):
...     return 2.0 * (p - 1.0) @ (p - 1.0)  # the Fisher matrix is 4 I
>>> facts = {"kl": kl, "loss": lambda p: p.sum(), "episode_log_probs": lambda p: p}
>>> params, gradient = jnp.ones(2), jnp.array([2.0, 0.0])
>>> for make in (precondition_by_fisher, npg, trpo, enac):
...     step = make(0.0 if make is precondition_by_fisher else Hyperparams(max_kl=0.02))
...     update, _ = step.update(gradient, step.init(params), params, **facts)
...     print(make.__name__, np.round(update, 2) + 0.0)
precondition_by_fisher [0.5 0. ]
npg [-0.09999999  0.        ]
trpo [-0.09999999  0.        ]
enac [-0.08 -0.06]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxpg.devices import backend
from jaxpg.types import Array, Hyperparams

Scalar = Any  # a number, or a traced array []
Average = Callable[[Array], Array]
CG_ITERATIONS = 10

# Where a search stops at the first step that it accepts. On a GPU every attempt would be a round trip to the
# host, so all are made: on an H100 each costs 0.18 of the 14 ms of trpo's update on 1024x128 CartPoles.
STOPS = ("cpu", "tpu")


def conjugate_gradients(product: Callable[[Array], Array], target: Array, iterations: int) -> Array:
    """Solve product(x) ~ target [P] for x, starting at 0, for a positive definite product.

    The number of iterations is fixed, so under vmap every replica costs the same. Exact in exact
    arithmetic once it reaches the number of distinct eigenvalues (Hestenes and Stiefel, 1952).
    """

    # A residual below this is rounding, which further iterations would amplify where the product is
    # singular, as a softmax policy's Fisher matrix is.
    rounding = (10 * jnp.finfo(target.dtype).eps) ** 2 * (target @ target)

    def step(state, _):
        x, residual, direction, square = state
        moved = product(direction)
        curvature = direction @ moved
        going = (square > rounding) & (curvature > 0.0)
        length = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        x, residual = x + length * direction, residual - length * moved
        new = residual @ residual
        ratio = jnp.where(going, new / jnp.where(going, square, 1.0), 0.0)
        return (x, residual, residual + ratio * direction, new), None

    start = (jnp.zeros_like(target), target, target, target @ target)
    return jax.lax.scan(step, start, length=iterations)[0][0]


def precondition_by_fisher(
    damping: Scalar, iterations: int = CG_ITERATIONS
) -> optax.GradientTransformationExtraArgs:
    """g -> (F + damping I)^-1 g, F the Fisher matrix per step (Kakade, 2001; Rajeswaran et al., 2017).

    F v is the derivative of grad kl along v: no matrix is formed. Needs kl, or fisher_kl.
    """

    def update(updates, state, params, *, kl, fisher_kl=None, average=_alone, **extra):
        del extra
        product = _fisher_product(fisher_kl or kl, params, damping, average)
        flat, unravel = ravel_pytree(updates)
        return unravel(conjugate_gradients(product, flat, iterations)), state

    return _stateless(update)


def precondition_by_scores(
    damping: Scalar, iterations: int = CG_ITERATIONS
) -> optax.GradientTransformationExtraArgs:
    """g -> (C + damping I)^-1 g with C the covariance of the episodes' scores U_i = grad log pi(tau_i).

    For the gradient of the total return minus its mean this is the episodic natural actor-critic: the
    slope w of the regression R_i = U_i . w + const (Peters and Schaal, 2008). Needs episode_log_probs.
    """

    def update(updates, state, params, *, episode_log_probs, **extra):
        del extra
        flat, unravel = ravel_pytree(params)
        log_probs, along = jax.linearize(lambda theta: episode_log_probs(unravel(theta)), flat)
        back = jax.linear_transpose(along, flat)

        def product(vector):
            change = along(vector)
            return back((change - change.mean()) / log_probs.size)[0] + damping * vector

        gradient, unravel_updates = ravel_pytree(updates)
        return unravel_updates(conjugate_gradients(product, gradient, iterations)), state

    return _stateless(update)


def scale_to_kl(max_kl: Scalar, damping: Scalar = 0.0) -> optax.GradientTransformationExtraArgs:
    """x -> sqrt(2 max_kl / x.(F + damping I) x) x: to second order, a step of KL max_kl at most.

    Equal to max_kl without damping. Needs kl, or fisher_kl.
    """

    def update(updates, state, params, *, kl, fisher_kl=None, average=_alone, **extra):
        del extra
        flat, unravel = ravel_pytree(updates)
        curvature = flat @ _fisher_product(fisher_kl or kl, params, damping, average)(flat)
        positive = curvature > 0.0
        length = jnp.sqrt(2.0 * max_kl / jnp.where(positive, curvature, 1.0))
        return unravel(jnp.where(positive, length, 0.0) * flat), state

    return _stateless(update)


def backtrack(
    max_kl: Scalar, decay: float = 0.5, attempts: int = 10
) -> optax.GradientTransformationExtraArgs:
    """The longest of x, decay x, decay^2 x, ... that lowers the loss with a KL of max_kl at most; else 0.

    (Schulman et al., 2015.) Never accepts a higher loss, a larger KL or a NaN. Needs loss and kl.
    """

    def update(updates, state, params, *, loss, kl, **extra):
        del extra
        before = loss(params)

        def scaled(length):
            return jax.tree.map(lambda x: (length * x).astype(x.dtype), updates)

        def attempt(search):
            tries, length, accepted = search
            new = optax.apply_updates(params, scaled(length))
            accepted |= (loss(new) < before) & (kl(new) <= max_kl)
            return tries + 1, jnp.where(accepted, length, decay * length), accepted

        def more(search):
            left = search[0] < attempts
            return left & ~search[2] if backend() in STOPS else left

        start = (jnp.int32(0), jnp.ones_like(before), jnp.bool_(False))
        _, length, accepted = jax.lax.while_loop(more, attempt, start)
        # where, not a product: an infinite step times 0 would be NaN.
        chosen = scaled(length)
        return jax.tree.map(lambda x: jnp.where(accepted, x, jnp.zeros_like(x)), chosen), state

    return _stateless(update)


def npg(hyperparams: Hyperparams) -> optax.GradientTransformationExtraArgs:
    """The natural gradient, in a step of KL max_kl (Kakade, 2001; Peters and Schaal, 2008)."""
    return optax.chain(
        precondition_by_fisher(hyperparams.damping),
        scale_to_kl(hyperparams.max_kl, hyperparams.damping),
        optax.scale(-1.0),
    )


def trpo(hyperparams: Hyperparams) -> optax.GradientTransformationExtraArgs:
    """The natural gradient's step of KL max_kl, shortened until the loss falls (Schulman et al., 2015)."""
    return optax.chain(npg(hyperparams), backtrack(hyperparams.max_kl))


def enac(hyperparams: Hyperparams) -> optax.GradientTransformationExtraArgs:
    """The natural gradient by regression on episodes' scores, in a step of KL max_kl."""
    return optax.chain(
        precondition_by_scores(hyperparams.damping),
        scale_to_kl(hyperparams.max_kl, hyperparams.damping),
        optax.scale(-1.0),
    )


NATURAL_OPTIMIZERS = (npg, trpo, enac)
AVERAGING = (npg, trpo)  # with `average`, so that devices may share a batch


def _stateless(update: Any) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _alone(x):
    return x


def _fisher_product(kl, params, damping, average: Average):
    flat, unravel = ravel_pytree(params)
    # Linearise once, so that what all products share is computed once.
    _, along = jax.linearize(jax.grad(lambda theta: kl(unravel(theta))), flat)
    return lambda vector: average(along(vector)) + damping * vector
