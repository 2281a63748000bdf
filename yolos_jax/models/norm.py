"""LayerNorm in float32, with a backward pass that needs no more than its input and statistics."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax.models import platforms

Array = jax.Array


class LayerNorm(nn.Module):
    """As ``nn.LayerNorm``: float32 statistics and result, whatever the type of the tokens."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float [..., D] -> float32 [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return layer_norm(self.epsilon, x.astype(jnp.float32), scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(epsilon: float, x: Array, scale: Array, bias: Array) -> Array:
    """Normalises the last axis, then scales and shifts it.

    Args:
      epsilon: added to the variance.
      x: float32 [..., D].
      scale, bias: float32 [D].
    """
    return _forward(epsilon, x, scale, bias)[0]


def _forward(epsilon, x, scale, bias):
    mean = x.mean(axis=-1, keepdims=True)
    # Not the mean of squares less the square of the mean, which cancels.
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * (inverse * scale) + bias, (x, scale, mean, inverse)


def _backward(epsilon, residuals, cotangent):
    del epsilon
    x, scale, *statistics = residuals
    # GPUs: two numbers per token in memory, else the compiler writes ``normal`` there, to read it.
    mean, inverse = platforms.on_gpus(jax.lax.optimization_barrier, lambda x: x, statistics)
    normal = (x - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    of_normal = cotangent * scale
    along = (of_normal * normal).mean(axis=-1, keepdims=True)
    of_x = inverse * (of_normal - of_normal.mean(axis=-1, keepdims=True) - normal * along)
    return of_x, (cotangent * normal).sum(rows), cotangent.sum(rows)


layer_norm.defvjp(_forward, _backward)
