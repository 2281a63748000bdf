"""DETR: a ResNet's features through a transformer, object queries answered by two shared heads.

Carion et al., "End-to-End Object Detection with Transformers" (2020); facebookresearch/detr,
models/detr.py. What lies outside of the images is zero and masked as a key; convolutions see it, as
the original's do.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax.batch import Canvas, Outputs
from yolos_jax.models import detr_position, heads, masked_attention, vit
from yolos_jax.models.detr_transformer import Decoder, Encoder, Layer
from yolos_jax.models.repeat import repeat
from yolos_jax.models.resnet import ResNet

Array = jax.Array


class Detr(nn.Module):
    """The detector for one static shape of canvases."""

    config: Any
    num_classes: int
    place: vit.Place
    training: bool
    capture: bool

    @nn.compact
    def __call__(self, canvas: Canvas) -> tuple[Outputs, dict[str, Array]]:
        """Outputs, and what ``DetrModel.apply`` says of captures."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        feature = self._backbone(canvas)
        batch, *cells, _ = feature.shape
        real = detr_position.real_cells(canvas.size, canvas.pixels.shape[1:3], tuple(cells))
        position = self._position(real)

        def tokens(x: Array) -> Array:
            return x.reshape(batch, -1, *x.shape[3:])

        project = heads.linear(config.width, feature.shape[-1], dtype, "input_proj")
        projected = self.place(project(tokens(feature)).astype(jnp.float32))
        layer = self._layer()
        depths = (config.encoder_depth, config.decoder_depth)
        encoder, decoder = (
            kind(layer, depth, config.scan, config.remat, name=name)
            for kind, depth, name in zip(
                (Encoder, Decoder), depths, ("encoder", "decoder"), strict=True
            )
        )
        memory = encoder(projected, tokens(position), tokens(real))
        queries = self.param(
            "query_embed",
            nn.initializers.normal(1.0),
            (config.num_queries, config.width),
            jnp.float32,
        )
        queries = repeat(queries, batch)
        answers, attended = decoder(queries, memory, tokens(position), tokens(real))
        classes = heads.linear(self.num_classes + 1, config.width, jnp.float32, "class_head")
        # Images first, so that those of a device stay together, and none travels.
        rows = self.place(answers.swapaxes(0, 1))
        found = classes(rows), nn.sigmoid(heads.Mlp(4, name="box_head")(rows))
        outputs = Outputs(*(self.place(x).swapaxes(0, 1) for x in found))
        if not self.capture:
            return outputs, {}
        q, k = attended
        return outputs, {
            "feature": feature,
            "real": real,
            "position": position,
            "memory": memory.reshape(position.shape),
            "decoder": answers,
            "attention": masked_attention.attention_map(q[-1], k[-1], tokens(real)),
        }

    def _backbone(self, canvas: Canvas) -> Array:
        """The last stage's features [B, h, w, C]."""
        config = self.config
        shape = canvas.pixels.shape[1:3]
        real = detr_position.real_cells(canvas.size, shape, shape)
        real &= canvas.image_valid[:, None, None]
        # Outside of images there may be anything, NaN included: nothing of it may reach a result.
        pixels = jnp.where(real[..., None], canvas.pixels, 0)
        backbone = ResNet(
            config.blocks,
            config.stem_width,
            dilation=config.dilation,
            remat=config.remat == "full",
            dtype=jnp.dtype(config.dtype),
            place=self.place,
            name="backbone",
        )
        return backbone(pixels)[-1]

    def _position(self, real: Array) -> Array:
        if self.config.position == "sine":
            return detr_position.sine(real, self.config.width)
        return detr_position.LearnedPosition(self.config.width, name="position")(real)

    def _layer(self) -> Layer:
        config = self.config
        return Layer(
            heads=config.heads,
            mlp_width=config.mlp_width,
            layer_norm_eps=config.layer_norm_eps,
            pre_norm=config.pre_norm,
            dropout=config.dropout,
            training=self.training,
            dtype=jnp.dtype(config.dtype),
            place=self.place,
            capture=self.capture,
        )
