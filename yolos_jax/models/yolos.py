"""YOLOS: detection tokens beside the patches of a plain vision transformer, two heads on top.

Fang et al., "You Only Look at One Sequence: Rethinking Transformer in Vision through Object
Detection" (2021); hustvl/YOLOS. Different from it: position tables are resized to each image's own
grid whenever the grid differs (the reference: when the number of patches does), and padding is
masked.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax.batch import Batch, Outputs
from yolos_jax.models import attention, heads, position, vit
from yolos_jax.models.norm import LayerNorm
from yolos_jax.models.repeat import repeat

Array = jax.Array


def sincos_init(rng: Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """2-D sine-cosine positions of a table [rows, cols, width]; nothing is random.

    The first half of the width encodes the row, the second the column, sines before cosines,
    frequencies from 1 to 1/10000 (as MAE's tables do, which put the column first).
    """
    del rng
    rows, cols, width = shape
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))

    def encode(count):
        angles = np.arange(count)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, col = np.broadcast_arrays(encode(rows)[:, None], encode(cols)[None])
    return jnp.asarray(np.concatenate([row, col], axis=-1), dtype)


class PositionTable(nn.Module):
    """A table per block (``stack`` = (L - 1,)) or one for the input (``stack`` = ())."""

    grid: tuple[int, int]
    num_queries: int
    width: int
    grid_init: nn.initializers.Initializer
    stack: tuple[int, ...] = ()

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """``cls`` [..., 1, D], ``det`` [..., Q, D], ``grid`` [..., h, w, D]."""

        def table(name, init, *shape):
            return self.param(name, init, (*self.stack, *shape, self.width), jnp.float32)

        return {
            "cls": table("cls", vit.weight_init, 1),
            "det": table("det", vit.weight_init, self.num_queries),
            "grid": table("grid", self.grid_init, *self.grid),
        }


class Backbone(nn.Module):
    """Patches, class and detection tokens through the transformer."""

    config: Any
    attend: vit.Attend
    place: vit.Place
    bounds: tuple[int, int]
    capture: bool

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Returns normalised tokens, float32 [B, 1 + Q (all T when capturing), D], and captures."""
        config = self.config
        prefix = 1 + config.num_queries
        placement = position.place(batch.grid, batch.patches.shape[1], self._cells, prefix)
        lengths = prefix + jnp.prod(batch.grid, axis=1)
        # The residual stream is float32 whatever the type of the products, as under torch's
        # autocast: in bfloat16 boxes move half as much again.
        tokens = self._embed(batch, placement)
        captured = {"embed": tokens}

        blocks = self._blocks()
        params = self.param("blocks", blocks.init, config.width)
        mid = self._mid(batch.grid, placement)
        wanted = tokens.shape[1] if self.capture else prefix
        tokens, inside = blocks.apply(
            params, tokens, lengths, mid, wanted=wanted, capture=self.capture
        )
        tokens = LayerNorm(config.layer_norm_eps, name="norm")(tokens)
        if inside is not None:
            captured["blocks"] = inside.blocks
            captured["norm"] = tokens
            captured["attention"] = attention.attention_map(inside.queries, inside.keys, lengths)
        return tokens, captured

    @property
    def _cells(self) -> tuple[int, int]:
        """The common grid of the batch's images, its rows whole tiles of a TPU."""
        rows, cols = self.bounds
        return rows, -(-cols // 8) * 8

    def _blocks(self) -> vit.Blocks:
        config = self.config
        block = vit.Block(
            heads=config.heads,
            mlp_width=config.mlp_width,
            layer_norm_eps=config.layer_norm_eps,
            dtype=jnp.dtype(config.dtype),
            attend=self.attend,
            place=self.place,
            parent=None,
        )
        return vit.Blocks(block, config.depth, config.scan, config.remat)

    def _embed(self, batch: Batch, placement: position.Placement) -> Array:
        """float32 [B, 1 + Q + N, D]: what the first block sees."""
        config = self.config
        grid_init = sincos_init if config.position_init == "sincos" else vit.weight_init
        table = PositionTable(
            config.position_grid, config.num_queries, config.width, grid_init, name="position"
        )()
        det_init = nn.initializers.normal(config.det_token_std)
        cls = self.param("cls_token", vit.weight_init, (1, config.width), jnp.float32)
        det = self.param("det_tokens", det_init, (config.num_queries, config.width), jnp.float32)
        # What is not real may hold anything, NaN included: nothing of it may reach a gradient.
        real = placement.cell_of_valid[:, 1 + config.num_queries :] & batch.image_valid[:, None]
        patches = jnp.where(real[..., None], batch.patches, 0)
        embed = heads.linear(
            config.width, patches.shape[-1], jnp.dtype(config.dtype), "patch_embed"
        )
        patches = self.place(embed(patches))
        first = repeat(jnp.concatenate([cls, det]), patches.shape[0])
        tokens = jnp.concatenate([first, patches], axis=1)
        resizer = position.make_resizer(config.position_grid, batch.grid, placement, self._cells)
        return tokens + position.token_positions(table, resizer, self.place)

    def _mid(self, grid: Array, placement: position.Placement) -> vit.Mid | None:
        config = self.config
        if not config.mid_position_grid or config.depth == 1:
            return None
        tables = PositionTable(
            config.mid_position_grid,
            config.num_queries,
            config.width,
            vit.weight_init,
            stack=(config.depth - 1,),
            name="mid_position",
        )()
        size = config.mid_position_grid
        return vit.Mid(tables, position.make_resizer(size, grid, placement, self._cells))


class Yolos(nn.Module):
    """The detector for one static shape of batches."""

    config: Any
    num_classes: int
    attend: vit.Attend
    place: vit.Place
    bounds: tuple[int, int]
    capture: bool

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Outputs, dict[str, Array]]:
        backbone = Backbone(
            self.config, self.attend, self.place, self.bounds, self.capture, name="backbone"
        )
        tokens, captured = backbone(batch)
        det = tokens[:, 1 : 1 + self.config.num_queries]
        logits = heads.Mlp(self.num_classes + 1, name="class_head")(det)
        boxes = nn.sigmoid(heads.Mlp(4, name="box_head")(det))
        return Outputs(pred_logits=logits[None], pred_boxes=boxes[None]), captured
