"""What reads classes and boxes off tokens, and the linear layer it is made of."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax.models.linear import Linear
from yolos_jax.models.relu import relu

Array = jax.Array


def torch_linear_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for the weight and the bias of a layer with ``fan_in`` inputs."""
    bound = fan_in**-0.5

    def init(rng, shape, dtype=jnp.float32):
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


def linear(features: int, fan_in: int, dtype: Any, name: str) -> Linear:
    """A linear layer that starts as PyTorch's does."""
    init = torch_linear_init(fan_in)
    return Linear(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


class Mlp(nn.Module):
    """Three linear layers with ReLU between, float32."""

    features: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        width = tokens.shape[-1]
        for index, features in enumerate((width, width, self.features)):
            tokens = linear(features, width, jnp.float32, f"layers_{index}")(tokens)
            if index < 2:
                # Not nn.relu, which leaves the backward pass zeros as large as the whole batch's
                # tokens, on every device; nor a product with 0, which XLA makes lose NaNs.
                tokens = relu(tokens)
        return tokens
