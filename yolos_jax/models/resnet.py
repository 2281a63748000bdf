"""ResNet of bottlenecks with frozen batch normalisation: DETR's backbone.

He et al., "Deep Residual Learning for Image Recognition" (2015), in torchvision's form: the stride
is in the 3x3 convolution, and with dilation ("DC5") the last stage keeps its resolution; its first
block then keeps dilation 1, as torchvision's does. Paddings are torch's: symmetric and explicit.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax.models import precision
from yolos_jax.models.relu import relu
from yolos_jax.models.vit import Place

Array = jax.Array

STAGES = 4
EXPANSION = 4  # a block's output is this many times as wide as its 3x3 convolution
_EPSILON = 1e-5
# Paths of all that belongs to frozen normalisation, in a model that calls the backbone so.
CONSTANTS = r"backbone/(.*/)?(bn\d|downsample_bn)/.*"


def stride(dilation: bool) -> int:
    """Pixels that the last stage has one cell for."""
    return 16 if dilation else 32


class FrozenBatchNorm(nn.Module):
    """A channel's scale and shift, from statistics that never change.

    All four are parameters so that checkpoints carry them, and never trained. The result is of
    ``dtype``, computed in float32.
    """

    dtype: Any
    weight: float = 1.0  # when not loaded

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float [B, h, w, C] -> the same."""

        def channels(name: str, value: float) -> Array:
            init = nn.initializers.constant(value)
            return self.param(name, init, x.shape[-1:], jnp.float32)

        weight, bias = channels("weight", self.weight), channels("bias", 0.0)
        mean, variance = channels("running_mean", 0.0), channels("running_var", 1.0)
        scale = weight * jax.lax.rsqrt(variance + _EPSILON)
        return (x * scale + (bias - mean * scale)).astype(self.dtype)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions beside a shortcut."""

    width: int
    stride: int
    dilation: int
    new_shortcut: bool  # a convolution, where the shape changes; else the input itself
    last_weight: float  # of the last normalisation, when not loaded
    dtype: Any
    place: Place

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float [B, h, w, C] -> [B, ceil(h / stride), ceil(w / stride), 4 * width]."""
        out_width = EXPANSION * self.width

        def norm(name: str, weight: float = 1.0) -> FrozenBatchNorm:
            return FrozenBatchNorm(self.dtype, weight, name=name)

        out = _convolution(self.width, 1, "conv1", self.dtype)(x)
        out = self.place(relu(norm("bn1")(out)))
        out = _convolution(self.width, 3, "conv2", self.dtype, self.stride, self.dilation)(out)
        out = self.place(relu(norm("bn2")(out)))
        out = self.place(_convolution(out_width, 1, "conv3", self.dtype)(out))
        out = norm("bn3", self.last_weight)(out)
        if self.new_shortcut:
            x = _convolution(out_width, 1, "downsample_conv", self.dtype, self.stride)(x)
            x = norm("downsample_bn")(self.place(x))
        return self.place(relu(out + x))


class Stage(nn.Module):
    """Bottlenecks of one resolution, the first of which reaches it.

    Unrolled, unlike a transformer's blocks: the first one has other shapes than the rest.
    """

    blocks: int
    width: int
    stride: int
    dilation: int  # of all blocks but the first
    last_weight: float
    remat: bool
    dtype: Any
    place: Place

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for index in range(self.blocks):
            x = block(
                self.width,
                stride=1 if index else self.stride,
                dilation=self.dilation if index else 1,
                new_shortcut=index == 0,
                last_weight=self.last_weight,
                dtype=self.dtype,
                place=self.place,
                name=f"block_{index}",
            )(x)
        return x


class ResNet(nn.Module):
    """The backbone: a stem and four stages."""

    blocks: tuple[int, int, int, int]  # bottlenecks per stage
    stem_width: int
    dilation: bool  # the last stage keeps the resolution of the one before
    remat: bool  # the backward pass computes a bottleneck's inside again
    dtype: Any
    place: Place

    @nn.compact
    def __call__(self, pixels: Array) -> list[Array]:
        """Looks at a canvas.

        Args:
          pixels: float [B, H, W, 3], normalised, zeros where there is no image.

        Returns:
          The output of each stage, [B, h, w, C] in ``dtype``: 1/4, 1/8, 1/16 and 1/32 (dilated:
          1/16) of the canvas, rounded up; C = 4, 8, 16, 32 times the stem's width.
        """
        x = _convolution(self.stem_width, 7, "conv1", self.dtype, stride=2)(pixels)
        x = self.place(relu(FrozenBatchNorm(self.dtype, name="bn1")(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pads with -inf
        # Frozen normalisation does not hold back what blocks add up to, so weights that are not
        # loaded start such that all of them together add as much as the stem gives.
        last_weight = sum(self.blocks) ** -0.5
        features = []
        for index, blocks in enumerate(self.blocks):
            dilated = self.dilation and index == STAGES - 1
            x = Stage(
                blocks,
                self.stem_width * 2**index,
                stride=1 if index == 0 or dilated else 2,
                dilation=2 if dilated else 1,
                last_weight=last_weight,
                remat=self.remat,
                dtype=self.dtype,
                place=self.place,
                name=f"layer{index + 1}",
            )(x)
            features.append(x)
        return features


def _convolution(
    width: int, size: int, name: str, dtype: Any, stride: int = 1, dilation: int = 1
) -> nn.Conv:
    """Without a bias, padded such that only the stride shrinks."""
    return nn.Conv(
        width,
        (size, size),
        strides=stride,
        padding=size // 2 * dilation,
        kernel_dilation=dilation,
        use_bias=False,
        dtype=dtype,
        precision=precision.of(dtype),
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )
