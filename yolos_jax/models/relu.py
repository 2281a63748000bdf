"""ReLU as networks of convolutions need it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0), with gradient 0 at 0 as torch has it.

    The backward pass asks the output where the input was positive: the next layer keeps that
    output anyway, so nothing is kept twice. ``jax.nn.relu`` keeps a mask, and zeros besides.
    """
    return jnp.maximum(x, 0)


def _forward(x: Array) -> tuple[Array, Array]:
    out = relu(x)
    return out, out


def _backward(out: Array, cotangent: Array) -> tuple[Array]:
    return (jnp.where(out > 0, cotangent, 0),)


relu.defvjp(_forward, _backward)
