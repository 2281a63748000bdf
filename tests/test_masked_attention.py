"""Attention with a mask over keys, against its definition in float64."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from yolos_jax.models import masked_attention


def make(queries, keys, seed=0, batch=2, heads=2, width=4):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.normal(size=(batch, tokens, heads, width)).astype(np.float32)
        for tokens in (queries, keys, keys)
    )
    return q, k, v, rng.random((batch, keys)) < 0.6


@functools.partial(jax.jit, static_argnums=4)
def attention(q, k, v, real, dropout=0.0, rng=None):
    return masked_attention.attention(q, k, v, real, dropout, rng)


def definition(q, k, v, real):
    logits = np.einsum("bqhd,bkhd->bhqk", q.astype(float), k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits) * real[:, None, None]
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("queries", [7, 300], ids=("whole", "in chunks"))
def test_keys_that_are_not_real_have_no_weight(queries):
    q, k, v, real = make(queries, 9)
    out = attention(q, k, v, real)
    assert out.shape == q.shape
    np.testing.assert_allclose(out, definition(q, k, v, real), atol=1e-6, rtol=0)
    garbage = np.where(real[..., None, None], 0, 1e4).astype(np.float32)
    np.testing.assert_array_equal(out, attention(q, k + garbage, v, real))


def test_chunks_have_the_gradient_of_the_whole(monkeypatch):
    q, k, v, real = make(8, 6)
    cotangent = np.random.default_rng(1).normal(size=q.shape)

    def gradient():
        def score(q, k, v):
            return (masked_attention.attention(q, k, v, real) * cotangent).sum()

        return jax.jit(jax.grad(score, argnums=(0, 1, 2)))(q, k, v)

    whole = gradient()
    monkeypatch.setattr(masked_attention, "_CHUNK", 3)
    for a, b in zip(gradient(), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


def test_an_image_without_anything_real_stays_finite():
    q, k, v, real = make(3, 4)
    real[0] = False

    def score(q):
        return masked_attention.attention(q, k, v, real).sum()

    total, gradient = jax.jit(jax.value_and_grad(score))(q)
    assert np.isfinite(total) and np.isfinite(gradient).all()


@pytest.mark.parametrize("queries", [200, 400], ids=("whole", "in chunks"))
def test_dropout_drops_weights_and_keeps_their_mean(queries):
    zeros = np.zeros((1, queries, 1, 2), np.float32)
    k, v = np.zeros((1, 100, 1, 2), np.float32), np.ones((1, 100, 1, 2), np.float32)
    real = np.ones((1, 100), bool)
    rng = jax.random.key(0)
    out = np.asarray(attention(zeros, k, v, real, 0.25, rng))
    # Of 100 equal weights a binomial number is kept, each 1 / 0.75 as large as it was.
    kept = out[0, :, 0, 0] * 75
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert abs(kept.mean() - 75) < 1.5 and 3 < kept.std() < 6
    assert len(np.unique(kept[:100])) > 5
    np.testing.assert_allclose(attention(zeros, k, v, real, 0.25, None), 1, atol=1e-5)
