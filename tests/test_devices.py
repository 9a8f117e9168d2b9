"""Replicas in groups are the same replicas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.devices import in_groups


def work(params, key, common):
    """Of a tree, a key and something that all share; the shape says how many share an operation."""
    noise = jax.random.randint(key, (3,), 0, 1000)
    return {"sum": params["w"] * common["scale"] + noise, "key": jax.random.split(key)}


@pytest.mark.parametrize(
    ("total", "loop"), [(12, [3]), (4, []), (3, []), (13, [13]), (6, [2]), (1, [])]
)
def test_groups_change_nothing_but_the_order(total, loop):
    arguments = (
        {"w": jnp.arange(3.0 * total).reshape(total, 3), "none": ()},
        jax.random.split(jax.random.key(0), total),
        {"scale": jnp.array([2.0, 3.0, 5.0])},
    )
    axes = (0, 0, None)
    grouped = jax.vmap(in_groups(work, 4), axes)
    loops = [
        e.params["length"]
        for e in jax.make_jaxpr(grouped)(*arguments).eqns
        if e.primitive.name == "scan"
    ]
    assert loops == loop
    found, expected = grouped(*arguments), jax.vmap(work, axes)(*arguments)
    np.testing.assert_array_equal(found["sum"], expected["sum"])
    np.testing.assert_array_equal(*(jax.random.key_data(x["key"]) for x in (found, expected)))
    # The negative control: replicas differ.
    assert len(np.unique(np.asarray(expected["sum"])[:, 0])) == total


def test_one_alone_is_the_function():
    arguments = {"w": jnp.ones(3)}, jax.random.key(0), {"scale": 2.0}
    found, expected = in_groups(work, 4)(*arguments), work(*arguments)
    np.testing.assert_array_equal(found["sum"], expected["sum"])
