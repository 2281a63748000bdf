"""LayerNorm beside flax's, values and gradients, and what its backward pass keeps."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yolos_jax.models.norm import LayerNorm


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 0.1])
@pytest.mark.parametrize("offset", [0, 100])
def test_values_and_gradients(epsilon, offset):
    """The offset: a variance by squares would lose four of seven digits."""
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(2, 5, 24), loc=offset), jnp.float32)
    cotangent = jnp.asarray(draw(size=x.shape), jnp.float32)
    params = {"scale": draw(size=24).astype(np.float32), "bias": draw(size=24).astype(np.float32)}
    theirs = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False)

    def values_and_gradients(module):
        out, pullback = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        return jax.tree.leaves((out, pullback(cotangent)))

    for a, b in zip(*map(values_and_gradients, (LayerNorm(epsilon), theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_bfloat16_tokens_are_normalised_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.bfloat16)
    params = LayerNorm(1e-6).init(jax.random.key(0), x)
    out = LayerNorm(1e-6).apply(params, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(out.var(-1), 1, atol=1e-5)


def test_no_array_of_tokens_is_kept_but_the_input():
    x = jnp.zeros((3, 7, 8))
    params = LayerNorm(1e-6).init(jax.random.key(0), x)
    _, pullback = jax.vjp(LayerNorm(1e-6).apply, params, x)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == x.size]
    assert len(kept) == 1
