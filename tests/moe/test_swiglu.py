"""SwiGLU's own derivative on each platform."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.moe import swiglu


@pytest.mark.parametrize(("platform", "error"), [("tpu", 0.004), ("gpu", 0.006)])
def test_derivative_in_bfloat16(monkeypatch, platform, error):
    """Errors against float64, relative to the root mean square; rounding the results gives 0.2%."""
    monkeypatch.setattr(swiglu, "target_device", lambda: types.SimpleNamespace(platform=platform))
    keys = jax.random.split(jax.random.key(0), 4)
    gate, up, g = (2 * jax.random.normal(key, (256, 64), jnp.bfloat16) for key in keys[:3])
    weight = jax.random.uniform(keys[3], (256,))
    got = jax.vjp(swiglu.weighted_product, gate, up, weight)[1](g)

    def plain(gate, up, weight):
        return weight[:, None] * gate * up / (1 + jnp.exp(-gate))

    with jax.enable_x64(True):
        arguments = [jnp.asarray(np.asarray(a, np.float64)) for a in (gate, up, weight, g)]
        want = jax.vjp(plain, *arguments[:3])[1](arguments[3])
    for a, b in zip(got, want, strict=True):
        difference = np.asarray(a, np.float64) - np.asarray(b)
        assert np.sqrt(np.mean(difference**2) / np.mean(np.square(b))) < error
