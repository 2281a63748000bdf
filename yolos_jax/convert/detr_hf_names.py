"""The names of transformers' DetrForObjectDetection against the original DETR's.

The same tensors under other names, but for the projections of queries, keys and values, which are
one tensor in the original and three in transformers. transformers has no pre-norm, so the
encoder's last LayerNorm has no name there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from yolos_jax.convert import names

Tensors = dict[str, np.ndarray]


class Dialect(NamedTuple):
    """Which of transformers' names there are."""

    in_memory: bool = False  # a module's of version 5; False: a file's, of any version
    timm: bool = False  # the backbone is timm's; False: transformers' own ResNet
    before_version5: bool = False  # learned positions are a part of the backbone


_REST = {
    "transformer.decoder.norm": "model.decoder.layernorm",
    "class_embed": "class_labels_classifier",
    "query_embed": "model.query_position_embeddings",
    "input_proj": "model.input_projection",
}
_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
_SIDES = {"row": "row_embeddings", "col": "column_embeddings"}
BODY = "backbone.0.body."


def dialect_of(theirs: Iterable[str]) -> Dialect:
    """Which of transformers' names these are."""
    theirs = set(theirs)
    return Dialect(
        in_memory=not any(name.startswith("model.backbone.conv_encoder.") for name in theirs),
        timm=not any(".embedder.embedder." in name for name in theirs),
        before_version5=any(name.startswith("model.backbone.position") for name in theirs),
    )


def their_names(name: str, dialect: Dialect) -> tuple[str, ...]:
    """What transformers calls an original tensor: one name, or three for a third of it each.

    Raises:
      ValueError: transformers' DETR has no such tensor.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _REST:
        return (f"{_REST[stem]}.{kind}",)
    if found := re.fullmatch(r"bbox_embed\.(layers\.\d+)", stem):
        return (f"bbox_predictor.{found[1]}.{kind}",)
    if found := re.fullmatch(r"backbone\.1\.(row|col)_embed", stem):
        model = "model.backbone" if dialect.before_version5 else "model"
        return (f"{model}.position_embedding.{_SIDES[found[1]]}.{kind}",)
    if name.startswith(BODY):
        model = "model.backbone" if dialect.in_memory else "model.backbone.conv_encoder"
        body = stem.removeprefix(BODY)
        body = f"{body}.{kind}"
        return (f"{model}.model.{body if dialect.timm else own_backbone(body)}",)
    if found := re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(.+)", name):
        part, index, inside = found.groups()
        prefix = f"model.{part}.layers.{index}"
        return tuple(f"{prefix}.{theirs}" for theirs in _inside_layer(inside, part, dialect))
    raise ValueError(f"{name}: transformers' DETR has no such tensor.")


def to_original(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], where: str
) -> Tensors:
    """transformers' names -> the original's, in their order.

    Args:
      tensors: a complete state dict of any dialect.
      expected: every name of the original and its shape.
      where: what to call the source in errors.

    Raises:
      ValueError: naming every tensor that is missing, surplus or of another shape, as
        transformers calls it.
    """
    dialect = dialect_of(tensors)
    theirs = {name: their_names(name, dialect) for name in expected}
    shapes = {}
    for name, parts in theirs.items():
        rows, *rest = expected[name]
        shapes |= {part: (rows // len(parts), *rest) for part in parts}
    names.check(tensors, shapes, where)
    return {
        name: np.concatenate([tensors[part] for part in parts]) for name, parts in theirs.items()
    }


def from_original(tensors: Mapping[str, np.ndarray], dialect: Dialect) -> Tensors:
    """The original's names -> transformers'.

    Raises:
      ValueError: transformers' DETR lacks one of the tensors.
    """
    renamed = {}
    for name, tensor in tensors.items():
        parts = their_names(name, dialect)
        renamed |= dict(zip(parts, np.split(tensor, len(parts)), strict=True))
    return renamed


def own_backbone(name: str) -> str:
    """A tensor of torchvision's ResNet as transformers' own ResNet calls it."""
    stem, _, tensor = name.rpartition(".")
    return f"{_own_module(stem)}.{tensor}"


def _own_module(stem: str) -> str:
    kinds = {"conv": "convolution", "bn": "normalization"}
    if found := re.fullmatch(r"(conv|bn)1", stem):
        return f"embedder.embedder.{kinds[found[1]]}"
    stage, block, inside = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", stem).groups()
    prefix = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if found := re.fullmatch(r"downsample\.([01])", inside):
        return f"{prefix}.shortcut.{('convolution', 'normalization')[int(found[1])]}"
    kind, number = re.fullmatch(r"(conv|bn)(\d)", inside).groups()
    return f"{prefix}.layer.{int(number) - 1}.{kinds[kind]}"


def _inside_layer(inside: str, part: str, dialect: Dialect) -> tuple[str, ...]:
    """Names below a layer of the encoder or decoder ('part')."""
    module, _, kind = inside.rpartition(".")
    if found := re.fullmatch(r"(self_attn|multihead_attn)\.in_proj_(weight|bias)", inside):
        attention = "self_attn" if found[1] == "self_attn" else "encoder_attn"
        return tuple(f"{attention}.{each}_proj.{found[2]}" for each in "qkv")
    if found := re.fullmatch(r"(self_attn|multihead_attn)\.out_proj", module):
        attention = "self_attn" if found[1] == "self_attn" else "encoder_attn"
        return (f"{attention}.{'o_proj' if dialect.in_memory else 'out_proj'}.{kind}",)
    if found := re.fullmatch(r"linear([12])", module):
        return (f"{'mlp.' if dialect.in_memory else ''}fc{found[1]}.{kind}",)
    number = int(re.fullmatch(r"norm(\d)", module)[1])
    return (f"{_NORMS[part][number - 1]}.{kind}",)
