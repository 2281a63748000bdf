"""Attention one head and some queries at a time, for the CPU, whose caches hold little.

Forward and backward pass as in FlashAttention-2 (arxiv.org/abs/2307.08691), with all keys in one
block: of the softmax only its logarithmic sum is kept, the map is computed again. Powers of two
cost half of what ``exp`` does, and the softmax is a third of the work here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

_CHUNK = 512  # queries
_MASKED = np.float32(-1e30)  # a logit whose softmax is 0; finite, so that no gradient is NaN
_LOG2_E = np.float32(np.log2(np.e))


def make(saved: str):
    """Returns ``attend(q, k, v, lengths)``, see ``attention.attention``, of [B, H, T, d].

    Args:
      saved: the name under which a rematerialisation policy finds what the backward pass needs.
    """

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, lengths: Array) -> Array:
        return _forward(q, k, v, lengths)[0]

    def forward(q, k, v, lengths):
        out, total = (checkpoint_name(x, saved) for x in _forward(q, k, v, lengths))
        return out, (q, k, v, lengths, out, total)

    def backward(kept, gradient):
        return *_backward(*kept, gradient), None

    attend.defvjp(forward, backward)
    return attend


def _forward(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, Array]:
    """The output [B, H, T, d], and float32 [B, H, T]: log2 of the sum of the powers."""
    tokens = q.shape[2]
    masked = _mask(tokens, lengths)[:, None]

    def one_head(head):
        chunks, k, v = head
        keys = k.swapaxes(1, 2)

        def some_queries(chunk):  # [B, t, d]
            logits = _product(chunk, keys) + masked
            most = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp2(logits - most)
            total = weights.sum(axis=-1, keepdims=True)
            out = (_product(weights.astype(v.dtype), v) / total).astype(v.dtype)
            return out, (most + jnp.log2(total))[..., 0]

        return jax.lax.map(some_queries, chunks)

    heads = (_split(_scaled(q)), _heads_first(k), _heads_first(v))
    out, total = jax.lax.map(one_head, heads)
    return _join(out, tokens), _join(total[..., None], tokens)[..., 0]


def _backward(q, k, v, lengths, out, total, gradient):
    """Gradients of q, k and v. Maps are [B, key, query], for fewer products of transposed ones."""
    tokens, width = q.shape[2:]
    masked = _mask(tokens, lengths)[:, :, None]
    through = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def one_head(head):
        chunks, k, v = head

        def some_queries(sums, chunk):
            q, gradient, total, through = chunk  # [B, t, d] or [B, 1, t]
            weights = jnp.exp2(_product(k, q.swapaxes(1, 2)) + masked - total)
            inner = weights * (_product(v, gradient.swapaxes(1, 2)) - through)
            weights, inner = weights.astype(v.dtype), inner.astype(v.dtype)
            sums = (sums[0] + _product(inner, q), sums[1] + _product(weights, gradient))
            return sums, _product(inner.swapaxes(1, 2), k)

        zeros = jnp.zeros(k.shape, jnp.float32)
        return jax.lax.scan(some_queries, (zeros, zeros), chunks)

    rows = [_split(x[..., None]).swapaxes(-1, -2) for x in (total, through)]
    heads = ((_split(_scaled(q)), _split(gradient), *rows), _heads_first(k), _heads_first(v))
    (for_k, for_v), for_q = jax.lax.map(one_head, heads)
    for_q = _join(for_q, tokens) * width**-0.5
    for_k, for_v = for_k.swapaxes(0, 1) / _LOG2_E, for_v.swapaxes(0, 1)
    return for_q.astype(q.dtype), for_k.astype(k.dtype), for_v.astype(v.dtype)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _mask(tokens: int, lengths: Array) -> Array:
    """float32 [B, T] to be added to logits."""
    return jnp.where(jnp.arange(tokens) < lengths[:, None], 0, _MASKED)


def _scaled(q: Array) -> Array:
    return (q.astype(jnp.float32) * (_LOG2_E * q.shape[-1] ** -0.5)).astype(q.dtype)


def _heads_first(x: Array) -> Array:
    return x.swapaxes(0, 1)  # the batch stays whole: it may be spread over devices


def _split(x: Array) -> Array:
    """[B, H, T, d] to [H, chunks, B, t, d], padded to equal chunks."""
    batch, heads, tokens, width = x.shape
    count = -(-tokens // _CHUNK)
    size = -(-tokens // count)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - tokens), (0, 0)))
    return x.reshape(batch, heads, count, size, width).transpose(1, 2, 0, 3, 4)


def _join(x: Array, tokens: int) -> Array:
    """Undoes ``_split``."""
    heads, count, batch, size, width = x.shape
    return x.transpose(2, 0, 1, 3, 4).reshape(batch, heads, count * size, width)[:, :, :tokens]
