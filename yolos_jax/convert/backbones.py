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

from yolos_jax.convert import conversion, names, start, vit_layouts
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.convert.read import Source
from yolos_jax.convert.vit_layouts import Backbone
from yolos_jax.labels import LabelMap
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
    label_map = conversion.labels_of(options.labels) if options.labels else LabelMap.coco91()
    network = build_model(model, label_map.num_classes)
    fresh = start.draw(network, jax.random.key(options.seed or 0))
    tensors = names.from_params(fresh, model)
    table, detail, action = _position_table(backbone, tensors, model, source.path)
    tensors |= backbone.tensors | {names.POSITION: table}
    has_cls = "backbone.cls_token" in backbone.tensors
    starts = _NEW if has_cls else _NEW + _CLS
    new = tuple(
        path
        for path in names.flatten(fresh)
        if path.startswith(starts) or not path.startswith("backbone/")
    )
    rows = [
        Row("loaded", theirs, str(backbone.tensors[name].shape))
        for name, theirs in backbone.source_names.items()
        if name != names.POSITION
    ]
    rows.append(Row(action, backbone.source_names[names.POSITION], detail))
    rows += [Row("unused", name) for name in backbone.unused]
    rows += [Row("new", path, str(names.flatten(fresh)[path].shape)) for path in new]
    published = conversion.PUBLISHED.get(model["width"])
    size = published.size if published else 800
    return Converted(
        kind=f"start from {backbone.kind}",
        params=names.to_params(tensors, model, label_map.num_classes, source.path),
        model=model,
        label_map=label_map,
        preprocess=conversion.preprocess_of(
            size, conversion.longest_side(size), options, backbone.mean, backbone.std
        ),
        rows=tuple(rows),
        new=new,
        notes=backbone.notes,
    )


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
