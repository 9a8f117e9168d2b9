"""Weight initialisers."""

import jax
import jax.numpy as jnp


def orthogonal(scale: float = 1.0):
    """Random matrices with orthonormal rows or columns, times scale (Saxe et al., 2014)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding  # newer flax passes it; placement is the caller's business
        num_rows, num_columns = shape[-2], shape[-1]
        tall = (max(num_rows, num_columns), min(num_rows, num_columns))
        matrix = _orthonormal(jax.random.normal(key, tall, dtype))
        return scale * (matrix if num_rows >= num_columns else matrix.T)

    return init


# jit, because linen traces an initialiser whenever a module is applied, to compare the shapes.
@jax.jit
def _orthonormal(matrix):
    """The columns, no more than rows, made orthonormal by Gram-Schmidt in plain array operations.

    The usual QR goes through LAPACK, which hangs for ever under vmap on few-core machines with jaxlib
    0.10.0 to 0.11.0.
    """
    columns = jnp.arange(matrix.shape[1])

    def orthonormalise(j, basis):
        column = basis[:, j]
        earlier = jnp.where(columns[None, :] < j, basis, 0)
        # Projecting twice leaves the columns orthogonal to rounding (Giraud et al., 2005).
        for _ in range(2):
            overlap = jnp.dot(column, earlier, precision="highest")
            column = column - jnp.dot(earlier, overlap, precision="highest")
        return basis.at[:, j].set(column / jnp.linalg.norm(column))

    return jax.lax.fori_loop(0, columns.size, orthonormalise, matrix)
