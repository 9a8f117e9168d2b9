"""Random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.types import Array, Key


def orthogonal(key: Key, gains: Any) -> Any:
    """The tree `gains` with each matrix multiplied by a random one with orthonormal rows or columns.

    W = gain * Q, with Q Q^T = I or Q^T Q = I, whichever the shape allows (Saxe et al., 2014). Arrays of other
    dimensions are returned unchanged. All matrices are drawn at once, because each draw takes equally long to
    compile, whatever its size.

    >>> q = orthogonal(jax.random.key(0), jnp.full((2, 5), 3.0))
    >>> bool(jnp.allclose(q @ q.T, 9 * jnp.eye(2), atol=1e-5))
    True
    """
    leaves, tree = jax.tree.flatten(gains)
    places = [i for i, leaf in enumerate(leaves) if leaf.ndim == 2]
    if not places:
        return gains
    tall = np.array([sorted(leaves[i].shape, reverse=True) for i in places], np.int32)
    largest = tall.max(axis=0)
    draws = jax.random.normal(key, (len(tall), *largest), leaves[places[0]].dtype)
    row, column = jnp.arange(largest[0])[:, None], jnp.arange(largest[1])[None]

    def matrix_of(draw, size):
        within = (row < size[0]) & (column < size[1])
        return _orthonormal(jnp.where(within, draw, 0))

    matrices = jax.vmap(matrix_of)(draws, tall)
    for i, (num_rows, num_columns), matrix in zip(places, tall, matrices, strict=True):
        matrix = matrix[:num_rows, :num_columns]
        leaves[i] *= matrix if leaves[i].shape == matrix.shape else matrix.T
    return jax.tree.unflatten(tree, leaves)


def _orthonormal(matrix: Array) -> Array:
    """Orthonormalise the columns, at most as many as rows, by Gram-Schmidt in plain array operations.

    Columns of zeros stay zero. The usual QR goes through LAPACK, which hangs for ever under vmap on few-core
    machines with jaxlib 0.10.0 to 0.11.0.
    """
    columns = jnp.arange(matrix.shape[1])

    def orthonormalise(j, basis):
        column = basis[:, j]
        earlier = jnp.where(columns[None, :] < j, basis, 0)
        # Projecting twice leaves the columns orthogonal to rounding (Giraud et al., 2005).
        for _ in range(2):
            overlap = jnp.dot(column, earlier, precision="highest")
            column = column - jnp.dot(earlier, overlap, precision="highest")
        norm = jnp.linalg.norm(column)
        return basis.at[:, j].set(column / jnp.where(norm > 0, norm, 1))

    return jax.lax.fori_loop(0, columns.size, orthonormalise, matrix)
