"""Attention one head and some queries at a time, for the CPU, whose caches hold little.

Forward and backward pass as in FlashAttention-2 (arxiv.org/abs/2307.08691), with all keys in one
block: of the softmax only its logarithmic sum is kept, the map is computed again.

The forward pass looks for no maximum. A query's logits less their mean, which is its product with
the mean of the keys, have the mean 0: the largest is not far below, so their powers do not all
vanish. They overflow where one is far above. The sum tells of both, and such queries are computed
again with the maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from yolos_jax.models import precision, registers

Array = jax.Array

_CHUNK = 960  # queries
_AT_ONCE = 2  # chunks that do not wait for each other: one fills what the other leaves of the cores
# The products' kernels work on tiles of columns, two registers of them: sizes that leave no part of
# one are up to a tenth faster. Rows may be any number. Columns of a map are keys, in the backward
# pass queries.
_COLUMNS = 16 if registers.are_avx2() else 32
_MASKED = np.float32(-1e30)  # a logit whose softmax is 0; finite, so that no gradient is NaN
_SHIFT = 60  # binary places, by which powers are made smaller: it is a long way up to ...
_LARGEST = np.float32(2.0**_SHIFT)  # ... this sum of a query's powers, 83 above the mean
_SMALLEST = np.float32(2.0**-90)  # below, what is less than 2 ** -126 would be missed in it
# 2 ** x is 1 + c[0] x + c[1] x ** 2 + ... from -0.5 to 0.5, relative error 9e-8 (a minimax fit).
_POWER = (0.69314698, 0.24022242, 0.055507337, 0.0096715127, 0.0013264727)


def make(saved: str):
    """Returns ``attend(q, k, v, lengths)``, see ``attention.attention``.

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


def exp2(x: Array, shift: int = 0) -> Array:
    """2 ** (x - shift) of float32, relative error 2e-7.

    Two thirds of the time of XLA's, which is ``exp`` of a product and less exact, and made of
    operations that XLA compiles in one loop with those around. 0 below 2 ** -126, infinite from
    2 ** 127.5 on.
    """
    x = jnp.clip(x, shift - 127, shift + 128)
    whole = jnp.round(x)
    rest, power = x - whole, np.float32(_POWER[-1])
    for coefficient in (*_POWER[-2::-1], 1):
        power = power * rest + np.float32(coefficient)
    exponent = (whole.astype(jnp.int32) + (127 - shift)) << 23
    return power * jax.lax.bitcast_convert_type(exponent, jnp.float32)


def _forward(q: Array, k: Array, v: Array, lengths: Array) -> tuple[Array, Array]:
    """The output, and float32 [B, T, H]: log2 of the sum of the logits' powers."""
    batch, tokens, heads, width = q.shape
    count = _chunks(tokens)
    size = -(-tokens // count)  # what is too much is cut off the last one's start: computed twice
    mean = _mean(k, lengths)
    k, v = (_padded(x, _rounded(k.shape[1], _COLUMNS)) for x in (k, v))
    masked = _mask(k.shape[1], lengths)

    def one_head(index, found):
        image, head = index // heads, index % heads
        keys, values = _rows(k, image, head).T, _rows(v, image, head)
        centre = _rows(mean, image, head)

        def some_queries(chunk, found):
            place = image, head, chunk * size
            queries = _rows(q, *place, size)
            middle = (queries * centre).sum(axis=-1, keepdims=True)
            attended = _attend(queries, keys, values, masked[image], middle * _scale(width))
            return tuple(
                _with_rows(x, rows, *place) for x, rows in zip(found, attended, strict=True)
            )

        return jax.lax.fori_loop(0, count, some_queries, found, unroll=min(_AT_ONCE, count))

    found = jnp.zeros_like(q), jnp.zeros((*q.shape[:3], 1), jnp.float32)
    out, total = jax.lax.fori_loop(0, batch * heads, one_head, found)
    return out, total[..., 0]


def _attend(q: Array, keys: Array, v: Array, masked: Array, middle: Array) -> tuple[Array, Array]:
    """[t, d], [d, T], [T, d], [T], [t, 1] -> [t, d] and log2 of the sums [t, 1].

    Args:
      middle: float32, the mean of each query's logits.
    """

    def logits():
        return _product(q, keys) * _scale(q.shape[-1]) + masked

    def weigh(logits, shift):
        weights = exp2(logits, shift)
        total = weights.sum(axis=-1, keepdims=True)
        return (_product(weights.astype(v.dtype), v) / total).astype(v.dtype), total

    out, total = weigh(logits() - middle, _SHIFT)
    fits = (total > _SMALLEST) & (total < _LARGEST)
    found = out, middle + jnp.log2(total * _LARGEST)

    def again():
        most = logits().max(axis=-1, keepdims=True)
        out, total = weigh(logits() - most, 0)
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
    count = _chunks(tokens)
    at_once = count if count <= _AT_ONCE else 1  # longer maps push each other out of the cache
    size = _rounded(-(-tokens // count), _COLUMNS)
    delta = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    q, gradient, total, delta = (_padded(x, count * size) for x in (q, gradient, total, delta))
    # A head's numbers side by side: read with a stride, they would take half of the powers' time.
    total, delta = (x.transpose(0, 2, 1) for x in (total, delta))
    masked = _mask(k.shape[1], lengths)[..., None]

    def one_head(index, found):
        image, head = index // heads, index % heads
        keys, values = _rows(k, image, head), _rows(v, image, head)

        def some_queries(chunk, found):
            of_q, of_k, of_v = found
            place = image, head, chunk * size
            queries, wanted = _rows(q, *place, size), _rows(gradient, *place, size)
            totals, deltas = (
                jax.lax.dynamic_slice(x, place, (1, 1, size))[0] for x in (total, delta)
            )
            logits = _product(keys, queries.T) * _scale(width) + masked[image]
            weights = exp2(logits - totals)
            inner = (weights * (_product(values, wanted.T) - deltas)).astype(v.dtype)
            of_k += _product(inner, queries)
            of_v += _product(weights.astype(v.dtype), wanted)
            of_chunk = _product(keys.T, inner)[None, None]
            of_q = jax.lax.dynamic_update_slice(of_q, of_chunk, (image, head, 0, chunk * size))
            return of_q, of_k, of_v

        zeros = jnp.zeros(keys.shape, jnp.float32)
        of_q, of_k, of_v = found
        of_q, *of_head = jax.lax.fori_loop(
            0, count, some_queries, (of_q, zeros, zeros), unroll=at_once
        )
        of_k, of_v = map(lambda x, y: _with_rows(x, y, image, head), (of_k, of_v), of_head)
        return of_q, of_k, of_v

    shapes = (batch, heads, width, count * size), k.shape, v.shape
    found = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    of_q, of_k, of_v = jax.lax.fori_loop(0, batch * heads, one_head, found)
    scale = np.float32(width**-0.5)
    gradients = of_q.transpose(0, 3, 1, 2)[:, :tokens] * scale, of_k * scale, of_v
    return tuple(x.astype(y.dtype) for x, y in zip(gradients, (q, k, v), strict=True))


def _product(a: Array, b: Array) -> Array:
    """In float32, which holds bfloat16's products exactly: XLA has no kernel for all of those."""
    exact = precision.of(a.dtype)
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=exact)


def _mean(k: Array, lengths: Array) -> Array:
    """float32 [B, 1, H, d], of the valid keys."""
    valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
    total = jnp.where(valid, k, 0).sum(axis=1, keepdims=True, dtype=jnp.float32)
    return total / lengths[:, None, None, None]


def _mask(keys: int, lengths: Array) -> Array:
    """float32 [B, keys] to be added to logits."""
    return jnp.where(jnp.arange(keys) < lengths[:, None], 0, _MASKED)


def _scale(width: int) -> np.float32:
    """Makes logits of products, as powers of two."""
    return np.float32(np.log2(np.e) * width**-0.5)


def _rows(x: Array, image: Array, head: Array, start: Array | int = 0, size: int = 0) -> Array:
    """Of [B, T, H, d] one image's and head's [T, d], or ``size`` of its rows."""
    shape = (1, size or x.shape[1], 1, x.shape[3])
    return jax.lax.dynamic_slice(x, (image, start, head, 0), shape)[0, :, 0]


def _with_rows(x: Array, rows: Array, image: Array, head: Array, start: Array | int = 0) -> Array:
    """Puts them there."""
    return jax.lax.dynamic_update_slice(x, rows[None, :, None], (image, start, head, 0))


def _chunks(tokens: int) -> int:
    """Into how many chunks queries are cut: one or a multiple of _AT_ONCE."""
    return 1 if tokens <= _CHUNK else _AT_ONCE * -(-tokens // (_AT_ONCE * _CHUNK))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: Array, tokens: int) -> Array:
    """[B, T, ...] with zeros up to so many tokens."""
    return jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
