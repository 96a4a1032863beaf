"""Meshes of the eight devices, comparisons of trees of arrays, and the operations of a function."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.sharding import MESH_AXES


def mesh_of(*sizes):
    """Returns the mesh of eight devices whose axes `MESH_AXES` have these sizes."""
    return Mesh(np.reshape(jax.devices(), sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


class Device(SimpleNamespace):
    """An imitated device with `platform`, `device_kind` and `compute_capability`."""

    __hash__ = object.__hash__


def normal(seed, shape, dtype=float):
    """Normally distributed numbers; `float` means float64 if it is enabled in JAX, else float32."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_close(got, want, tolerance):
    """Compares two trees, with a tolerance relative to the largest entry of each array or 1."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b, float)
        atol = tolerance * max(1.0, float(np.abs(b).max(initial=0)))
        assert_allclose(np.asarray(a, float), b, rtol=0, atol=atol)


def assert_equal(got, want):
    """Compares two trees bit for bit."""
    jax.tree.map(assert_array_equal, got, want)


def assert_finite(tree):
    """Checks that all numbers are finite."""
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(tree))


def operations(function, *args):
    """Lists the equations of a function's jaxpr, including those of inner jaxprs."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))
