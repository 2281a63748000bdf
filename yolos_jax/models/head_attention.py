"""Attention one head and some queries at a time, for the CPU, whose caches hold little.

Forward and backward pass as in FlashAttention-2 (arxiv.org/abs/2307.08691), with all keys in one
block: of the softmax only its logarithmic sum is kept, the map is computed again.

The forward pass looks for no maximum. A softmax stays the same when the mean of the keys is taken
from each of them; then the mean of a query's logits is 0, so the largest is not below it, and their
powers cannot all vanish. They can overflow, if one is far above the mean: the sum tells, and such
queries are computed again with the maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

_CHUNK = 640  # queries
# The products' kernels work on tiles: sizes that leave no part of one are up to a tenth faster.
_QUERIES, _KEYS = 16, 64
_MASKED = np.float32(-1e30)  # a logit whose softmax is 0; finite, so that no gradient is NaN
_LOG2_E = np.float32(np.log2(np.e))
_SHIFT = np.float32(-60)  # of logits, as powers of two: from here to 2 ** 60 is a long way up
_LARGEST = np.float32(2.0**60)  # sum of a query's powers
# 2 ** x is 1 + c[0] x + c[1] x ** 2 + ... from -0.5 to 0.5, relative error 9e-8 (a minimax fit).
_POWER = (0.69314698, 0.24022242, 0.055507337, 0.0096715127, 0.0013264727)


def make(saved: str):
    """Returns ``attend(q, k, v, lengths)``, see ``attention.attention``, of [B, T, H, d].

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


def exp2(x: Array) -> Array:
    """2 ** x of float32, relative error 2e-7; 0 below 2 ** -127, infinite from 2 ** 128 on.

    Half the work of XLA's, which is ``exp`` of a product and less exact, and made of operations
    that XLA compiles in one loop with those around.
    """
    x = jnp.clip(x, -127, 128)
    whole = jnp.round(x)
    rest, power = x - whole, np.float32(_POWER[-1])
    for coefficient in (*_POWER[-2::-1], 1):
        power = power * rest + np.float32(coefficient)
    exponent = (whole.astype(jnp.int32) + 127) << 23
    return power * jax.lax.bitcast_convert_type(exponent, jnp.float32)


def _forward(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, Array]:
    """The output, and float32 [B, T, H]: log2 of the sum of the powers of centred logits."""
    batch, tokens, heads, _ = q.shape
    count, size = _chunks(tokens)
    q = _padded(q, count * size)
    k, v = (_padded(x, _rounded(tokens, _KEYS)) for x in (_centred(k, lengths), v))
    masked = _mask(k.shape[1], lengths)

    def one_head(index, found):
        image, head = index // heads, index % heads
        keys, values = _rows(k, image, head).T, _rows(v, image, head)

        def some_queries(chunk, found):
            place = image, head, chunk * size
            attended = _attend(_scaled(_rows(q, *place, size)), keys, values, masked[image])
            return tuple(
                _with_rows(x, rows, *place) for x, rows in zip(found, attended, strict=True)
            )

        return jax.lax.fori_loop(0, count, some_queries, found)

    found = jnp.zeros_like(q), jnp.zeros((*q.shape[:3], 1), jnp.float32)
    out, total = jax.lax.fori_loop(0, batch * heads, one_head, found)
    return out[:, :tokens], total[:, :tokens, :, 0]


def _attend(q: Array, keys: Array, v: Array, masked: Array) -> tuple[Array, Array]:
    """[t, d], [d, T], [T, d], [T] -> [t, d] and log2 of the sums [t, 1]."""

    def weigh(logits):
        weights = exp2(logits)
        total = weights.sum(axis=-1, keepdims=True)
        return (_product(weights.astype(v.dtype), v) / total).astype(v.dtype), total

    out, total = weigh(_product(q, keys) + (masked + _SHIFT))
    fits = total < _LARGEST
    found = out, jnp.log2(total) - _SHIFT

    def again():
        logits = _product(q, keys) + masked
        most = logits.max(axis=-1, keepdims=True)
        out, total = weigh(logits - most)
        # Of the others nothing changes, not even the last bit, whatever is beside them.
        return tuple(
            jnp.where(fits, *x) for x in zip(found, (out, most + jnp.log2(total)), strict=True)
        )

    return jax.lax.cond(fits.all(), lambda: found, again)


def _backward(q, k, v, lengths, out, total, gradient):
    """Gradients of q, k and v [B, T, H, d].

    Maps are [key, query] and the product for q gives its transpose: so no map is transposed.
    """
    batch, tokens, heads, width = q.shape
    count, size = _chunks(tokens)
    through = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    rows = q, gradient, total[..., None], through[..., None]
    q, gradient, total, through = (_padded(x, count * size) for x in rows)
    k, v = (_padded(x, _rounded(tokens, _KEYS)) for x in (_centred(k, lengths), v))
    masked = _mask(k.shape[1], lengths)[..., None]

    def one_head(index, found):
        image, head = index // heads, index % heads
        keys, values = _rows(k, image, head), _rows(v, image, head)
        keys_t = keys.T

        def some_queries(chunk, found):
            of_q, of_k, of_v = found
            place = image, head, chunk * size, size
            queries, wanted = _scaled(_rows(q, *place)), _rows(gradient, *place)
            logits = _product(keys, queries.T) + masked[image]
            weights = exp2(logits - _rows(total, *place).T)
            inner = _product(values, wanted.T) - _rows(through, *place).T
            inner = (weights * inner).astype(v.dtype)
            of_k += _product(inner, queries)
            of_v += _product(weights.astype(v.dtype), wanted)
            of_chunk = _product(keys_t, inner)[None, None]
            of_q = jax.lax.dynamic_update_slice(of_q, of_chunk, (image, head, 0, chunk * size))
            return of_q, of_k, of_v

        zeros = jnp.zeros(keys.shape, jnp.float32)
        of_q, of_k, of_v = found
        of_q, *of_head = jax.lax.fori_loop(0, count, some_queries, (of_q, zeros, zeros))
        of_k, of_v = map(lambda x, y: _with_rows(x, y, image, head), (of_k, of_v), of_head)
        return of_q, of_k, of_v

    shapes = (batch, heads, width, count * size), k.shape, v.shape
    found = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    of_q, of_k, of_v = jax.lax.fori_loop(0, batch * heads, one_head, found)
    gradients = of_q.transpose(0, 3, 1, 2) * width**-0.5, of_k / _LOG2_E, of_v
    return tuple(x[:, :tokens].astype(q.dtype) for x in gradients)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _centred(k: Array, lengths: Array) -> Array:
    """Keys less their mean over the valid tokens."""
    valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
    wide = k.astype(jnp.float32)
    mean = jnp.where(valid, wide, 0).sum(axis=1, keepdims=True) / lengths[:, None, None, None]
    return (wide - mean).astype(k.dtype)


def _mask(keys: int, lengths: Array) -> Array:
    """float32 [B, keys] to be added to logits."""
    return jnp.where(jnp.arange(keys) < lengths[:, None], 0, _MASKED)


def _scaled(q: Array) -> Array:
    return (q.astype(jnp.float32) * (_LOG2_E * q.shape[-1] ** -0.5)).astype(q.dtype)


def _rows(x: Array, image: Array, head: Array, start: Array | int = 0, size: int = 0) -> Array:
    """Of [B, T, H, d] one image's and head's [T, d], or ``size`` of its rows."""
    shape = (1, size or x.shape[1], 1, x.shape[3])
    return jax.lax.dynamic_slice(x, (image, start, head, 0), shape)[0, :, 0]


def _with_rows(x: Array, rows: Array, image: Array, head: Array, start: Array | int = 0) -> Array:
    """Puts them there."""
    return jax.lax.dynamic_update_slice(x, rows[None, :, None], (image, start, head, 0))


def _chunks(tokens: int) -> tuple[int, int]:
    """How many equal chunks of queries, and of how many each."""
    count = -(-tokens // _CHUNK)
    return count, _rounded(-(-tokens // count), _QUERIES)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: Array, tokens: int) -> Array:
    """[B, T, ...] with zeros up to so many tokens."""
    return jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
