"""Checkpoints of the original DETR code (facebookresearch/detr)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import conversion, detr_names
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.convert.original import depth_of, shapes_of
from yolos_jax.convert.read import Source
from yolos_jax.labels import LabelMap

_STEM = "backbone.0.body.conv1.weight"
_BODY = "backbone.0.body.layer"
_HEADS = 8  # of every published DETR
SIZE = 800  # shorter side of pictures at evaluation, pixels
_PANOPTIC_CLASSES = 250  # of the original's build for coco_panoptic: things and stuff
COUNTER = ".num_batches_tracked"  # of batch normalisation before it was frozen


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of an original DETR, without a mask head."""
    return _STEM in tensors and "query_embed.weight" in tensors


def has_masks(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a mask head is among the tensors, the original's or transformers'."""
    return any(name.startswith(("mask_head.", "bbox_attention.")) for name in tensors)


def refuse_masks(source: Source, options: Options) -> Converted:
    """Raises ValueError: the detector inside alone would be another model than was asked for."""
    del options
    raise ValueError(
        f"{source.path}: a DETR for segmentation (it has a mask head, mask_head.* and "
        "bbox_attention.*); expected a detector: models here have no masks yet."
    )


def convert(source: Source, options: Options) -> Converted:
    """Original DETR -> ours; strict.

    Raises:
      ValueError: tensors missing, surplus or misshapen; a number of heads that cannot be; flags
        that say otherwise than the checkpoint.
    """
    model, num_classes, notes = infer_model(source, options)
    label_map = conversion.label_map_of(num_classes, options)
    preprocess = conversion.preprocess_of(SIZE, conversion.longest_side(SIZE), options)
    if source.extras:  # written here: what the layout has no place for
        preprocess = conversion.preprocess_over(source.extras["preprocess"], options)
        if options.labels is None:
            label_map = LabelMap.from_json(source.extras["label_map"])
    else:
        refuse_panoptic(num_classes, options, source.path)
    tensors, counters = without_counters(source.tensors)
    return Converted(
        kind="DETR in the original layout",
        params=detr_names.to_params(tensors, model, num_classes, source.path),
        model=model,
        label_map=label_map,
        preprocess=preprocess,
        rows=conversion.loaded_rows(tensors)
        + tuple(Row("unused", name) for name in counters + source.unused),
        notes=notes,
    )


def infer_model(source: Source, options: Options) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    """Reads the keys of ``config.model`` and the number of classes off a checkpoint.

    Returns:
      The keys, K, and what had to be assumed: published files may say neither how many heads
      there are nor whether the last stage is dilated, and no tensor tells.
    """
    shape = shapes_of(source, "backbone.0.body.")
    tensors, args, notes = source.tensors, source.args, []
    stored = source.extras.get("model", {})
    own = stored.get("detr", {})
    width = shape("query_embed.weight")[1]
    heads = stored.get("heads") or args.get("nheads") or options.num_heads
    if not heads:
        heads = _HEADS
        notes.append(f"ASSUMED: {heads} attention heads, for the checkpoint does not say.")
    if heads < 0 or width % heads:
        raise ValueError(f"{source.path}: {heads} heads do not divide the width {width}.")
    dilation = own.get("dilation", args.get("dilation", options.dilation))
    if dilation is None:
        notes.append(
            "ASSUMED: no dilation in the last stage, for the checkpoint does not say; of a DC5 "
            "model give --dilation."
        )
    model = model_config(
        width=width,
        heads=int(heads),
        mlp_width=shape("transformer.encoder.layers.0.linear1.bias")[0],
        num_queries=shape("query_embed.weight")[0],
        layer_norm_eps=stored.get("layer_norm_eps", 1e-5),
        detr={
            "blocks": tuple(depth_of(tensors, f"{_BODY}{stage}.") for stage in range(1, 5)),
            "stem_width": shape(_STEM)[0],
            "dilation": bool(dilation),
            "encoder_depth": depth_of(tensors, "transformer.encoder.layers."),
            "decoder_depth": depth_of(tensors, "transformer.decoder.layers."),
            "pre_norm": "transformer.encoder.norm.weight" in tensors,
            "position": "learned" if "backbone.1.row_embed.weight" in tensors else "sine",
            "dropout": float(own.get("dropout", args.get("dropout", 0.1))),
        },
    )
    refuse_contradictions(model, options, source.path)
    return model, shape("class_embed.bias")[0] - 1, tuple(notes)


def model_config(detr: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """The keys of ``config.model`` that a DETR has: the given ones, the recipes' for the rest."""
    defaults = {
        "name": "detr",
        "layer_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "scan": True,
        "remat": "default",
    }
    return defaults | values | {"detr": dict(detr)}


def refuse_contradictions(model: Mapping[str, Any], options: Options, where: str) -> None:
    """Raises ValueError naming each flag that says otherwise than the checkpoint itself.

    Args:
      model: the keys of ``config.model`` that the checkpoint says.
      options: the flags.
      where: what to call the checkpoint.
    """
    wrong, dilated = [], model["detr"]["dilation"]
    if options.num_heads not in (None, model["heads"]):
        wrong.append(f"--num_heads {options.num_heads}, but the checkpoint has {model['heads']}")
    if options.dilation not in (None, dilated):
        given, has = ("--dilation", "none") if options.dilation else ("--no-dilation", "it")
        wrong.append(f"{given}, but the checkpoint has {has}")
    for flag in ("init_pe_size", "mid_pe_size"):
        if getattr(options, flag) is not None:
            wrong.append(f"--{flag}, but a DETR has no such position table")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}.")


def refuse_panoptic(num_classes: int, options: Options, where: str) -> None:
    """Raises ValueError for the class head of panoptic COCO, unless --labels says what it is."""
    if num_classes == _PANOPTIC_CLASSES and options.labels is None:
        raise ValueError(
            f"{where}: a class head of {num_classes} classes, which are panoptic COCO's things "
            "and stuff; expected a detector's, such as COCO's 91. To take it as a detector of "
            "these, name them: --labels panoptic_val2017.json."
        )


def without_counters(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors without batch normalisation's counters, and the names of these."""
    counters = tuple(name for name in tensors if name.endswith(COUNTER))
    return {name: x for name, x in tensors.items() if name not in counters}, counters


def original_args(converted: Converted) -> dict[str, Any]:
    """What the original's code looks for beside its tensors: its command line."""
    model = converted.model
    detr = model["detr"]
    depth = sum(detr["blocks"]) * 3 + 2  # convolutions, and the classifier that ImageNet had
    return {
        "backbone": f"resnet{depth}",
        "dilation": detr["dilation"],
        "position_embedding": detr["position"],
        "enc_layers": detr["encoder_depth"],
        "dec_layers": detr["decoder_depth"],
        "dim_feedforward": model["mlp_width"],
        "hidden_dim": model["width"],
        "dropout": detr["dropout"],
        "nheads": model["heads"],
        "num_queries": model["num_queries"],
        "pre_norm": detr["pre_norm"],
        "masks": False,
    }
