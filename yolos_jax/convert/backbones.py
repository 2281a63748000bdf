"""A pre-trained vision transformer as the start of a YOLOS.

The transformer is copied and its position table resized to the detector's grid; detection tokens,
mid position tables and heads are new. As the original does, a distilled checkpoint keeps the
distillation token's row of the table for the class token.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from yolos_jax.convert import conversion, from_backbone, names, start, vit_layouts
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.convert.read import Source
from yolos_jax.convert.vit_layouts import Backbone
from yolos_jax.models.build import build_model

Tensors = dict[str, np.ndarray]

_NUM_QUERIES = 100
_NEW = ("backbone/det_tokens", "backbone/position/det", "backbone/mid_position/")
_CLS = ("backbone/cls_token", "backbone/position/cls")


def convert(source: Source, options: Options) -> Converted:
    """A pre-trained transformer -> a YOLOS to train.

    Raises:
      ValueError: parts that a YOLOS lacks, tensors missing, surplus or misshapen, or what the
        checkpoint does not say and no flag does.
    """
    backbone = vit_layouts.backbone_of(source)
    model = _model(backbone, options, source.path)
    num_classes = from_backbone.label_map_of(options).num_classes
    fresh = start.draw(build_model(model, num_classes), jax.random.key(options.seed or 0))
    tensors = names.from_params(fresh, model)
    table, detail, action = _position_table(backbone, tensors, model, source.path)
    tensors |= backbone.tensors | {names.POSITION: table}
    params = names.to_params(tensors, model, num_classes, source.path)
    has_cls = "backbone.cls_token" in backbone.tensors
    starting = _NEW if has_cls else _NEW + _CLS
    new = [
        path
        for path in names.flatten(fresh)
        if path.startswith(starting) or not path.startswith("backbone/")
    ]
    published = conversion.PUBLISHED.get(model["width"])
    size = published.size if published else 800
    resized = {names.POSITION: Row(action, backbone.source_names[names.POSITION], detail)}
    return from_backbone.converted(backbone, params, new, model, size, options, resized)


def _model(backbone: Backbone, options: Options, where: str) -> dict[str, Any]:
    width, _, patch_size, _ = backbone.tensors["backbone.patch_embed.proj.weight"].shape
    if backbone.heads and options.num_heads not in (None, backbone.heads):
        raise ValueError(
            f"{where}: --num_heads {options.num_heads}, but the checkpoint has {backbone.heads}."
        )
    # Published grids are of patches of 16 pixels.
    published = conversion.PUBLISHED.get(width) if patch_size == 16 else None
    return conversion.model_config(
        patch_size=patch_size,
        width=width,
        depth=sum(name.endswith(".norm1.weight") for name in backbone.tensors),
        heads=backbone.heads or conversion.heads_of(width, options),
        mlp_width=backbone.tensors["backbone.blocks.0.mlp.fc1.bias"].shape[0],
        num_queries=_NUM_QUERIES,
        layer_norm_eps=backbone.layer_norm_eps,
        position_grid=conversion.target_grid(
            options.init_pe_size,
            published.position_grid if published else None,
            patch_size,
            "init_pe_size",
        ),
        mid_position_grid=conversion.target_grid(
            options.mid_pe_size,
            published.mid_position_grid if published else None,
            patch_size,
            "mid_pe_size",
        ),
    )


def _position_table(
    backbone: Backbone, fresh: Tensors, model: dict[str, Any], where: str
) -> tuple[np.ndarray, str, str]:
    """The detector's table [1, 1 + R * C + Q, D], what was done, and 'resized' or 'loaded'."""
    stored = np.asarray(backbone.tensors[names.POSITION][0], np.float32)
    prefix, grid = stored_grid(backbone, len(stored), where)
    wanted, width = tuple(model["position_grid"]), model["width"]
    patches = stored[prefix:].reshape(*grid, width)
    action = "loaded"
    if grid != wanted:
        patches, action = start.resize_grid(patches, wanted), "resized"
    det = fresh[names.POSITION][0, -model["num_queries"] :]
    if "backbone.cls_token" not in backbone.tensors:
        cls, row = fresh[names.POSITION][0, :1], "class row new"
    elif prefix == 0:  # the class token was added after the positions
        cls, row = np.zeros((1, width), np.float32), "class row zero"
    else:
        kept = prefix - 1
        cls = stored[kept : kept + 1]
        row = "class row kept" if prefix == 1 else "row of the distillation token kept for class"
    table = np.concatenate([cls, patches.reshape(-1, width), det])[None]
    return table, f"{grid[0]}x{grid[1]} -> {wanted[0]}x{wanted[1]}, {row}", action


def stored_grid(backbone: Backbone, rows: int, where: str) -> tuple[int, tuple[int, int]]:
    """(rows before the patches', grid of the patches) of the checkpoint's table."""
    prefixes = (1, 0, 2) if backbone.prefix_tokens is None else (backbone.prefix_tokens,)
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if backbone.grid is not None and math.prod(backbone.grid) == rows - prefix:
            return prefix, backbone.grid
        if backbone.grid is None and side and side * side == rows - prefix:
            return prefix, (side, side)
    expected = backbone.grid or "a square"
    raise ValueError(
        f"{where}: the position table has {rows} rows, which are not {expected} of patches and "
        f"{' or '.join(map(str, prefixes))} more."
    )
