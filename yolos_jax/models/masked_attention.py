"""Attention from any tokens to any others of which some are not real, with dropout.

What ``attention`` cannot do: there the real keys are a prefix, which fused kernels ask for; the
cells of a picture on a canvas are none. Long queries go in chunks that the backward pass computes
again, so that no more than a chunk's rows of the map are alive.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from yolos_jax.models import precision

Array = jax.Array

SAVED = "masked_attention_out"  # the result's name for rematerialisation policies
_CHUNK = 256  # queries
_MASKED = np.float32(-1e30)  # a logit whose softmax is 0; finite, so that no gradient is NaN


def attention(
    q: Array, k: Array, v: Array, real: Array, dropout: float = 0.0, rng: Array | None = None
) -> Array:
    """Softmax attention, scaled by ``d ** -0.5``, over the keys that are real.

    Args:
      q: float [B, T, H, d].
      k, v: float [B, S, H, d].
      real: bool [B, S]; where none of an image's is, its result is finite and means nothing.
      dropout: probability that a weight is dropped, when there is an ``rng``.
      rng: key.

    Returns:
      [B, T, H, d] in the type of ``v``.
    """
    tokens = q.shape[1]
    count = -(-tokens // _CHUNK)
    if count == 1:
        return checkpoint_name(_attend(q, k, v, real, dropout, rng), SAVED)
    size = -(-tokens // count)  # equal chunks: the last is not nearly empty
    q = jnp.pad(q, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
    chunks = q.reshape(q.shape[0], count, size, *q.shape[2:]).swapaxes(0, 1)
    rngs = None if rng is None else jax.random.split(rng, count)

    @jax.checkpoint
    def attend(chunk: tuple[Array, Array | None]) -> Array:
        return _attend(chunk[0], k, v, real, dropout, chunk[1])

    out = jax.lax.map(attend, (chunks, rngs)).swapaxes(0, 1)
    out = out.reshape(q.shape[0], count * size, *out.shape[3:])[:, :tokens]
    return checkpoint_name(out, SAVED)


def attention_map(q: Array, k: Array, real: Array) -> Array:
    """The softmax itself, float32 [B, H, T, S]; arguments as of ``attention``."""
    exact = precision.of(q.dtype)
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", q, k, precision=exact, preferred_element_type=jnp.float32
    )
    logits = jnp.where(real[:, None, None], logits * q.shape[-1] ** -0.5, _MASKED)
    return jax.nn.softmax(logits, axis=-1)


def _attend(q: Array, k: Array, v: Array, real: Array, dropout: float, rng: Array | None) -> Array:
    weights = attention_map(q, k, real)
    if rng is not None and dropout:
        kept = jax.random.bernoulli(rng, 1 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    weights, exact = weights.astype(v.dtype), precision.of(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=exact).astype(v.dtype)
