"""Checkpoints of the original DETR code (facebookresearch/detr)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import conversion, detr_names
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.convert.original import depth_of, shapes_of
from yolos_jax.convert.read import Source

_STEM = "backbone.0.body.conv1.weight"
_BODY = "backbone.0.body.layer"
_HEADS = 8  # of every published DETR
_SIZE = 800  # shorter side of pictures at evaluation, pixels
_COUNTER = ".num_batches_tracked"  # of batch normalisation before it was frozen


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of an original DETR, without a mask head."""
    return _STEM in tensors and "query_embed.weight" in tensors


def convert(source: Source, options: Options) -> Converted:
    """Original DETR -> ours; strict.

    Raises:
      ValueError: tensors missing, surplus or misshapen; a number of heads that cannot be.
    """
    model, num_classes, notes = infer_model(source, options)
    counters = tuple(name for name in source.tensors if name.endswith(_COUNTER))
    tensors = {name: x for name, x in source.tensors.items() if name not in counters}
    params = detr_names.to_params(tensors, model, num_classes, source.path)
    rows = conversion.loaded_rows(tensors)
    return Converted(
        kind="DETR in the original layout",
        params=params,
        model=model,
        label_map=conversion.label_map_of(num_classes, options),
        preprocess=conversion.preprocess_of(_SIZE, conversion.longest_side(_SIZE), options),
        rows=rows + tuple(Row("unused", name) for name in counters + source.unused),
        notes=notes,
    )


def infer_model(source: Source, options: Options) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    """Reads the keys of ``config.model`` and the number of classes off a checkpoint.

    Returns:
      The keys, K, and what had to be assumed: published files may say neither how many heads
      there are nor whether the last stage is dilated, and no tensor tells.
    """
    shape = shapes_of(source, "backbone.0.body.")
    width = shape("query_embed.weight")[1]
    heads = options.num_heads or source.args.get("nheads")
    notes = []
    if not heads:
        heads = _HEADS
        notes.append(f"ASSUMED: {heads} attention heads, for the checkpoint does not say.")
    if heads < 0 or width % heads:
        raise ValueError(f"{source.path}: {heads} heads do not divide the width {width}.")
    if "dilation" not in source.args:
        notes.append("ASSUMED: no dilation in the last stage, for the checkpoint does not say.")
    tensors = source.tensors
    detr = {
        "blocks": tuple(depth_of(tensors, f"{_BODY}{stage}.") for stage in range(1, 5)),
        "stem_width": shape(_STEM)[0],
        "dilation": bool(source.args.get("dilation", False)),
        "encoder_depth": depth_of(tensors, "transformer.encoder.layers."),
        "decoder_depth": depth_of(tensors, "transformer.decoder.layers."),
        "pre_norm": "transformer.encoder.norm.weight" in tensors,
        "position": "learned" if "backbone.1.row_embed.weight" in tensors else "sine",
        "dropout": float(source.args.get("dropout", 0.1)),
    }
    model = {
        "name": "detr",
        "width": width,
        "heads": heads,
        "mlp_width": shape("transformer.encoder.layers.0.linear1.bias")[0],
        "num_queries": shape("query_embed.weight")[0],
        "layer_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "scan": True,
        "remat": "default",
        "detr": detr,
    }
    return model, shape("class_embed.bias")[0] - 1, tuple(notes)
