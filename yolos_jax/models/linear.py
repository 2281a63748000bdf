"""Linear layers over tokens, whose products keep activations where a platform's compiler has them.

A TPU's compiler tiles the last two axes of an array: tokens of several images as rows of one
matrix, or queries, keys and values side by side, make it move every activation of a block. On the
CPU rows of one matrix are what its products want.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax.models import precision

Array = jax.Array


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """``x @ kernel``, its gradient as each platform likes it.

    Args:
      x: float [..., D].
      kernel: float [D, F], of the same type.

    Returns:
      [..., F].

    Raises:
      TypeError: for two types; the gradients would have the wrong ones.
    """
    if x.dtype != kernel.dtype:
        raise TypeError(f"a product of {x.dtype} and {kernel.dtype}: cast one of them first")
    return _matmul(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    gradient = jax.lax.platform_dependent(x, cotangent, cpu=_over_rows, default=_over_axes)
    return _matmul(cotangent, kernel.T), gradient


product.defvjp(_forward, _backward)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=precision.of(a.dtype))


def _over_axes(x: Array, cotangent: Array) -> Array:
    axes = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, cotangent, (axes, axes), precision=precision.of(x.dtype))


def _over_rows(x: Array, cotangent: Array) -> Array:
    """Contracting two axes at once is two to four times slower on the CPU.

    So is, by a third, a product with more rows than columns; the barrier keeps XLA from making one
    of its transpose.
    """
    x, cotangent = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
    if x.shape[1] > cotangent.shape[1]:
        return jax.lax.optimization_barrier(_matmul(cotangent.T, x)).T
    return _matmul(x.T, cotangent)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """``x`` [..., F] + ``bias`` float32 [F], in the type of ``x``.

    The bias' gradient is a sum over all tokens of a batch, in float32: in bfloat16, which GPUs add
    as it is, it would stop to grow.
    """
    return x + bias.astype(x.dtype)


def _add_bias_backward(_: None, cotangent: Array) -> tuple[Array, Array]:
    return cotangent, cotangent.sum(tuple(range(cotangent.ndim - 1)), dtype=jnp.float32)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


class Linear(nn.Module):
    """``nn.Dense`` by ``product``: the same parameters, drawn the same."""

    features: int
    dtype: Any  # of the product, and of the result
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float [..., D] -> [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, shape[1:], jnp.float32)
        return add_bias(product(x.astype(self.dtype), kernel.astype(self.dtype)), bias)


class Projections(nn.Module):
    """Several linear layers whose weights lie side by side in one kernel."""

    count: int
    features: int  # of each
    dtype: Any
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, *inputs: Array) -> list[Array]:
        """One input for each, float [..., D] -> [..., features]."""
        width = self.count * self.features
        kernel = self.param("kernel", self.kernel_init, (inputs[0].shape[-1], width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        kernels = jnp.split(kernel.astype(self.dtype), self.count, 1)
        products = map(product, (x.astype(self.dtype) for x in inputs), kernels)
        biases = jnp.split(bias, self.count)
        return [add_bias(x, offset) for x, offset in zip(products, biases, strict=True)]
