"""A pre-trained ResNet as the start of a DETR.

The backbone is copied, statistics of batch normalisation included, which stay as they are; queries,
transformer and heads are new. Known are the layouts of torchvision and timm, whose names are those
of the original DETR's backbone, and of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from yolos_jax.convert import (
    conversion,
    detr,
    detr_hf_names,
    detr_names,
    from_backbone,
    names,
    start,
)
from yolos_jax.convert.conversion import Converted, Options
from yolos_jax.convert.detr_huggingface import refuse_other_resnet
from yolos_jax.convert.original import depth_of
from yolos_jax.convert.read import Source
from yolos_jax.models.build import build_model

Tensors = dict[str, np.ndarray]

_BODY = detr_hf_names.BODY
_CLASSIFIER = ("fc.", "classifier.")  # of pre-training
# What every published DETR has beside its backbone.
_WIDTH, _HEADS, _MLP, _QUERIES, _DEPTH = 256, 8, 2048, 100, 6


class Backbone(NamedTuple):
    """A ResNet in the original DETR's names."""

    kind: str
    tensors: Tensors  # backbone.0.body.*
    source_names: dict[str, str]  # of these tensors, in the checkpoint
    unused: tuple[str, ...]  # names in the checkpoint
    blocks: tuple[int, ...]  # bottlenecks per stage
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()


class _Layout(NamedTuple):
    """Names of a ResNet."""

    kind: str
    stem: str  # the first convolution
    stage: str  # what the blocks' numbers of a stage stand behind; {} is its number
    first: int  # number of the first stage
    name: Callable[[str], str]  # of a tensor of torchvision's


def _own(prefix: str) -> _Layout:
    stem, stage = f"{prefix}embedder.embedder.convolution.weight", prefix + "encoder.stages.{}."
    kind = "a ResNet of transformers"
    return _Layout(
        kind, stem, f"{stage}layers.", 0, lambda name: prefix + detr_hf_names.own_backbone(name)
    )


_LAYOUTS = (
    _Layout(
        "a ResNet in torchvision's and timm's layout", "conv1.weight", "layer{}.", 1, lambda n: n
    ),
    _own(""),
    _own("resnet."),
)


def _layout_of(tensors: Mapping[str, np.ndarray]) -> _Layout | None:
    def fits(layout: _Layout) -> bool:
        stage = layout.stage.format(layout.first)
        return layout.stem in tensors and any(name.startswith(stage) for name in tensors)

    return next((layout for layout in _LAYOUTS if fits(layout)), None)


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of a ResNet in a known layout."""
    return _layout_of(tensors) is not None


def convert(source: Source, options: Options) -> Converted:
    """A pre-trained ResNet -> a DETR to train.

    Raises:
      ValueError: another kind of ResNet than DETR's, or tensors missing, surplus or misshapen.
    """
    backbone = backbone_of(source)
    model = detr.model_config(
        width=_WIDTH,
        heads=options.num_heads or _HEADS,
        mlp_width=_MLP,
        num_queries=_QUERIES,
        detr={
            "blocks": backbone.blocks,
            "stem_width": len(backbone.tensors[f"{_BODY}conv1.weight"]),
            "dilation": bool(options.dilation),
            "encoder_depth": _DEPTH,
            "decoder_depth": _DEPTH,
            "pre_norm": False,
            "position": "sine",
            "dropout": 0.1,
        },
    )
    detr.refuse_contradictions(model, options, source.path)
    num_classes = from_backbone.label_map_of(options).num_classes
    tensors = _rest(model, num_classes, options.seed or 0) | backbone.tensors
    params = detr_names.to_params(tensors, model, num_classes, source.path)
    new = [path for path in names.flatten(params) if not path.startswith("backbone/")]
    return from_backbone.converted(backbone, params, new, model, detr.SIZE, options)


def _rest(model: Mapping[str, Any], num_classes: int, seed: int) -> Tensors:
    """Random tensors of everything but the backbone, in the original's names.

    Drawn with a backbone of one block per stage: those of a ResNet-101 take long to compile, and
    what is drawn for a parameter does not depend on the others.
    """
    small = {**model, "detr": {**model["detr"], "blocks": (1, 1, 1, 1)}}
    fresh = start.draw(build_model(small, num_classes), jax.random.key(seed))
    tensors = detr_names.from_params(fresh, small)
    return {name: x for name, x in tensors.items() if not name.startswith(_BODY)}


def backbone_of(source: Source) -> Backbone:
    """Renames a ResNet, after checking that it is one of DETR's kind and nothing else.

    Raises:
      ValueError: basic blocks; parts that DETR's backbone lacks; tensors missing or misshapen.
    """
    tensors, counters = detr.without_counters(source.tensors)
    unused = tuple(name for name in tensors if name.startswith(_CLASSIFIER))
    wanted = {name: tensor for name, tensor in tensors.items() if name not in unused}
    layout = _layout_of(wanted)
    _refuse_other_config(source)
    stages = (layout.stage.format(layout.first + i) for i in range(4))
    blocks = tuple(depth_of(wanted, stage) for stage in stages)
    if layout.name("layer1.0.conv3.weight") not in wanted:
        raise ValueError(
            f"{source.path}: a ResNet of {blocks} basic blocks of two convolutions (ResNet-18 and "
            "-34); DETR's backbone has bottlenecks of three, as ResNet-50 and -101 have."
        )
    stem_width = len(wanted[layout.stem])
    places = detr_names.backbone_table({"blocks": blocks, "stem_width": stem_width})
    theirs = {name: layout.name(name.removeprefix(_BODY)) for name in places}
    names.check(wanted, {theirs[name]: place.shape for name, place in places.items()}, source.path)
    # A folder of timm's hub; the file alone does not say. Older ones have these keys outermost.
    stored = source.config.get("pretrained_cfg", source.config)
    mean = source.preprocessor.get("image_mean") or stored.get("mean") or conversion.IMAGENET_MEAN
    std = source.preprocessor.get("image_std") or stored.get("std") or conversion.IMAGENET_STD
    return Backbone(
        kind=layout.kind,
        tensors={name: wanted[their_name] for name, their_name in theirs.items()},
        source_names=theirs,
        unused=unused + counters + source.unused,
        blocks=blocks,
        mean=tuple(mean),
        std=tuple(std),
    )


def _refuse_other_config(source: Source) -> None:
    """Raises ValueError naming what config.json of transformers asks for and DETR's lacks."""
    wrong = []

    def expect(key: str, default: Any, allowed: Any, place: Mapping[str, Any]) -> None:
        found = place.get(key, default)
        if found not in allowed:
            wrong.append(f"{key} is {found!r}, DETR's backbone has {allowed[0]!r}")

    refuse_other_resnet(source.config, expect)
    if wrong:
        raise ValueError(f"{source.path}/config.json: {'; '.join(wrong)}.")
