"""The original DETR layout against ours: names, shapes and what happens to each tensor.

The layout is that of facebookresearch/detr (its ``state_dict``). Differences from ours:

* a transformer's layers are numbered there and stacked on axis 0 here;
* linear weights are [out, in] there and [in, out] here, convolutions [out, in, y, x] there and
  [y, x, in, out] here, the 1x1 ``input_proj`` [D, C, 1, 1] there and [C, D] here;
* projections of queries, keys and values are one tensor there and three here;
* the backbone's bottlenecks have other names.

Both directions only move numbers, so a round trip is equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import names
from yolos_jax.convert.places import Place, gather, scatter
from yolos_jax.models.detr_position import LEARNED_SIDE
from yolos_jax.models.resnet import EXPANSION

Array = np.ndarray
Tensors = dict[str, Array]


_NORM = ("weight", "bias", "running_mean", "running_var")
_QKV = ("query", "key", "value")
_LINEAR = (("weight", "kernel"), ("bias", "bias"))


def table(model: Mapping[str, Any], num_classes: int) -> dict[str, Place]:
    """Every name of an original DETR state dict, in its order, and where it goes.

    Args:
      model: the keys of ``config.model``.
      num_classes: K; the class head has one output more.
    """
    detr, width = model["detr"], model["width"]
    places = _layers("encoder", detr["encoder_depth"], (("self_attn", "self_attention"),), model)
    if detr["pre_norm"]:
        places |= _layer_norm("transformer.encoder.norm", "encoder/norm", width)
    attentions = (("self_attn", "self_attention"), ("multihead_attn", "cross_attention"))
    places |= _layers("decoder", detr["decoder_depth"], attentions, model)
    places |= _layer_norm("transformer.decoder.norm", "decoder/norm", width)
    places |= _linear("class_embed", "class_head", num_classes + 1, width)
    for i, rows in enumerate((width, width, 4)):
        places |= _linear(f"bbox_embed.layers.{i}", f"box_head/layers_{i}", rows, width)
    places["query_embed.weight"] = Place((model["num_queries"], width), ("query_embed",))
    channels = detr["stem_width"] * 2**3 * EXPANSION
    places["input_proj.weight"] = Place((width, channels, 1, 1), ("input_proj/kernel",))
    places["input_proj.bias"] = Place((width,), ("input_proj/bias",))
    places |= backbone_table(detr)
    if detr["position"] == "learned":
        for side in ("row", "col"):
            name, shape = f"backbone.1.{side}_embed.weight", (LEARNED_SIDE, width // 2)
            places[name] = Place(shape, (f"position/{side}",))
    return places


def to_params(
    tensors: Mapping[str, Array], model: Mapping[str, Any], num_classes: int, where: str
) -> dict:
    """Original layout -> our parameters; everything as of ``names.to_params``."""
    places = table(model, num_classes)
    names.check(tensors, {name: place.shape for name, place in places.items()}, where)
    return names.unflatten(gather(tensors, places, _to_ours))


def from_params(params: Mapping[str, Any], model: Mapping[str, Any]) -> Tensors:
    """Our parameters -> original layout, float32, in the order of the original state dict.

    Raises:
      ValueError: naming every parameter that is missing, surplus or of another shape.
    """
    flat = {path: np.asarray(array, np.float32) for path, array in names.flatten(params).items()}
    bias = flat.get("class_head/bias", np.zeros(1))
    places = table(model, len(bias) - 1)
    ours = {path for place in places.values() for path in place.paths}
    wrong = [f"missing: {path}" for path in sorted(ours - flat.keys())]
    wrong += [f"not part of the model: {path}" for path in sorted(flat.keys() - ours)]
    if wrong:
        raise ValueError("the parameters do not fit the model:\n  " + "\n  ".join(wrong))
    tensors = scatter(flat, places, _to_theirs)
    names.check(tensors, {name: place.shape for name, place in places.items()}, "the checkpoint")
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _to_ours(tensor: Array, path: str) -> Array:
    if not path.endswith("kernel"):
        return tensor
    if path == "input_proj/kernel":
        return tensor[:, :, 0, 0].T
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_theirs(array: Array, path: str) -> Array:
    if not path.endswith("kernel"):
        return array
    if path == "input_proj/kernel":
        return array.T[:, :, None, None]
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _linear(
    theirs: str, ours: str, rows: int, columns: int, layer: int | None = None
) -> dict[str, Place]:
    return {
        f"{theirs}.weight": Place((rows, columns), (f"{ours}/kernel",), layer),
        f"{theirs}.bias": Place((rows,), (f"{ours}/bias",), layer),
    }


def _layer_norm(theirs: str, ours: str, width: int, layer: int | None = None) -> dict[str, Place]:
    return {
        f"{theirs}.{a}": Place((width,), (f"{ours}/{b}",), layer)
        for a, b in (("weight", "scale"), ("bias", "bias"))
    }


def _layers(
    part: str, depth: int, attentions: tuple[tuple[str, str], ...], model: Mapping[str, Any]
) -> dict[str, Place]:
    """The layers of the encoder or of the decoder, with (their, our) names of attentions."""
    width, mlp = model["width"], model["mlp_width"]
    ours = f"{part}/layers"
    places: dict[str, Place] = {}
    for i in range(depth):
        theirs = f"transformer.{part}.layers.{i}"
        for their_name, our_name in attentions:
            for a, b in _LINEAR:
                shape = (3 * width, width) if b == "kernel" else (3 * width,)
                paths = tuple(f"{ours}/{our_name}/{kind}/{b}" for kind in _QKV)
                places[f"{theirs}.{their_name}.in_proj_{a}"] = Place(shape, paths, i)
            out = (f"{theirs}.{their_name}.out_proj", f"{ours}/{our_name}/out")
            places |= _linear(*out, width, width, i)
        places |= _linear(f"{theirs}.linear1", f"{ours}/mlp/linear1", mlp, width, i)
        places |= _linear(f"{theirs}.linear2", f"{ours}/mlp/linear2", width, mlp, i)
        for j in range(1, len(attentions) + 2):
            places |= _layer_norm(f"{theirs}.norm{j}", f"{ours}/norm{j}", width, i)
    return places


def backbone_table(detr: Mapping[str, Any]) -> dict[str, Place]:
    """The part of ``table`` that is the backbone's.

    Args:
      detr: ``blocks`` and ``stem_width`` of ``config.model.detr``.
    """
    body, channels = "backbone.0.body", detr["stem_width"]

    def convolution(theirs: str, ours: str, *shape: int) -> dict[str, Place]:
        return {f"{body}.{theirs}.weight": Place(shape, (f"backbone/{ours}/kernel",))}

    def norm(theirs: str, ours: str, width: int) -> dict[str, Place]:
        return {
            f"{body}.{theirs}.{part}": Place((width,), (f"backbone/{ours}/{part}",))
            for part in _NORM
        }

    places = convolution("conv1", "conv1", channels, 3, 7, 7) | norm("bn1", "bn1", channels)
    for stage, blocks in enumerate(detr["blocks"]):
        width = detr["stem_width"] * 2**stage
        out = EXPANSION * width
        for block in range(blocks):
            theirs = f"layer{stage + 1}.{block}."
            ours = f"layer{stage + 1}/block_{block}/"
            sizes = ((width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1))
            for j, shape in enumerate(sizes, start=1):
                places |= convolution(f"{theirs}conv{j}", f"{ours}conv{j}", *shape)
                places |= norm(f"{theirs}bn{j}", f"{ours}bn{j}", shape[0])
            if block == 0:
                shape = (out, channels, 1, 1)
                places |= convolution(f"{theirs}downsample.0", f"{ours}downsample_conv", *shape)
                places |= norm(f"{theirs}downsample.1", f"{ours}downsample_bn", out)
            channels = out
    return places
