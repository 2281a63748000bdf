"""DETR of Hugging Face's transformers, both ways: config.json, preprocessor_config.json, tensors.

Folders written here are read by ``AutoModelForObjectDetection`` and ``AutoImageProcessor``, without
timm unless the last stage is dilated: transformers' own ResNet has no dilation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import conversion, detr, detr_hf_names, detr_names, hf_folder
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.convert.original import depth_of
from yolos_jax.convert.read import Source

Tensors = dict[str, np.ndarray]

# Backbones of timm by their bottlenecks and the width of their stem.
TIMM = {
    ((3, 4, 6, 3), 64): "resnet50",
    ((3, 4, 23, 3), 64): "resnet101",
    ((3, 8, 36, 3), 64): "resnet152",
}


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of transformers' DETR, or of one of its relatives."""
    return "model.query_position_embeddings.weight" in tensors


def convert(source: Source, options: Options) -> Converted:
    """A folder of transformers' DETR -> ours; strict.

    Raises:
      ValueError: tensors missing, surplus or misshapen; settings that DETR here does not have.
    """
    config = hf_folder.config_of(source)
    tensors, counters = detr.without_counters(source.tensors)
    model, notes = model_from_config(config, tensors, options, source.path)
    label_map, more = hf_folder.label_map_of_config(config, options)
    if label_map == conversion.generic_labels(label_map.num_classes):
        detr.refuse_panoptic(label_map.num_classes, options, source.path)
    original = to_original(tensors, model, label_map.num_classes, source.path)
    preprocess = hf_folder.preprocess(source, options, detr.SIZE)
    return Converted(
        kind="DETR of transformers",
        params=detr_names.to_params(original, model, label_map.num_classes, source.path),
        model=model,
        label_map=label_map,
        preprocess=preprocess,
        rows=conversion.loaded_rows(tensors)
        + tuple(Row("unused", name) for name in counters + source.unused),
        notes=notes + more + hf_folder.assumed(source, options, preprocess),
    )


def to_original(
    tensors: Tensors, model: Mapping[str, Any], num_classes: int, where: str
) -> Tensors:
    """transformers' tensors in the original's names; see ``detr_hf_names.to_original``."""
    places = detr_names.table(model, num_classes)
    shapes = {name: place.shape for name, place in places.items()}
    return detr_hf_names.to_original(tensors, shapes, where)


def model_from_config(
    config: Mapping[str, Any], tensors: Tensors, options: Options, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json -> the keys of ``config.model``, and notes.

    What the file leaves out has transformers' default. How many bottlenecks there are the tensors
    say: config.json has no numbers but a name where the backbone is timm's.
    """
    refuse_other(config, where)
    timm = detr_hf_names.dialect_of(tensors).timm
    backbone = config.get("backbone_config") or {}
    dilation, notes = bool(config.get("dilation", False)), ()
    if timm:
        dilation |= backbone.get("output_stride") == 16
    elif dilation:
        dilation = bool(options.dilation)
        if options.dilation is None:
            notes = (
                "NOTE: config.json asks for dilation, which transformers' own ResNet leaves out, "
                "and so does the result; --dilation has it.",
            )
    model = detr.model_config(
        width=int(config.get("d_model", 256)),
        heads=int(config.get("encoder_attention_heads", 8)),
        mlp_width=int(config.get("encoder_ffn_dim", 2048)),
        num_queries=int(config.get("num_queries", 100)),
        detr={
            **_backbone(tensors, timm, where),
            "dilation": dilation,
            "encoder_depth": int(config.get("encoder_layers", 6)),
            "decoder_depth": int(config.get("decoder_layers", 6)),
            "pre_norm": False,
            "position": config.get("position_embedding_type", "sine"),
            "dropout": float(config.get("dropout", 0.1)),
        },
    )
    detr.refuse_contradictions(model, options, where)
    return model, notes


def _backbone(tensors: Tensors, timm: bool, where: str) -> dict[str, Any]:
    """Bottlenecks per stage and the width of the stem."""
    stage, stem = ("layer{}.", "model.conv1.weight") if timm else (
        "encoder.stages.{}.layers.", "model.embedder.embedder.convolution.weight"
    )  # fmt: skip
    stems = [name for name in tensors if name.endswith(stem)]
    if not stems:
        raise ValueError(
            f"{where}: no backbone known here: *{stem} is missing; expected a ResNet, "
            "transformers' own or timm's."
        )
    prefix = stems[0].removesuffix(stem) + "model."
    first = 1 if timm else 0
    stages = (prefix + stage.format(first + i) for i in range(4))
    return {
        "blocks": tuple(depth_of(tensors, stage) for stage in stages),
        "stem_width": tensors[stems[0]].shape[0],
    }


def refuse_other(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where config.json asks for what no DETR here has."""
    wrong = []

    def expect(key: str, default: Any, allowed: Any, place: Mapping[str, Any] = config) -> None:
        found = place.get(key, default)
        if found not in allowed:
            wrong.append(f"{key} is {found!r}, here it is {' or '.join(map(repr, allowed))}")

    expect("model_type", "detr", ("detr",))
    expect("activation_function", "relu", ("relu",))
    expect("num_channels", 3, (3,))
    expect("position_embedding_type", "sine", ("sine", "learned"))
    expect("decoder_attention_heads", 8, (config.get("encoder_attention_heads", 8),))
    expect("decoder_ffn_dim", 2048, (config.get("encoder_ffn_dim", 2048),))
    backbone = config.get("backbone_config") or {}
    if backbone.get("model_type", "resnet") == "resnet":
        refuse_other_resnet(backbone, expect)
    else:
        expect("model_type", "", ("resnet", "timm_backbone"), backbone)
        expect("output_stride", 32, (32, 16), backbone)
    name = backbone.get("backbone") or config.get("backbone") or "resnet"
    if not re.fullmatch(r"resnet\d*(\..*)?", name):
        wrong.append(f"backbone is {name!r}, here it is a ResNet such as 'resnet50'")
    if config.get("auxiliary_loss"):
        wrong.append(
            "auxiliary_loss is true, with which transformers normalises what decoder layers pass "
            "on: another network than DETR's. Where these weights were trained without it, set it "
            "to false"
        )
    if wrong:
        raise ValueError(f"{where}/config.json: {'; '.join(wrong)}.")


def refuse_other_resnet(config: Mapping[str, Any], expect: Any) -> None:
    """What transformers' own ResNet may be configured to that DETR's backbone is not.

    Args:
      config: of the ResNet.
      expect: called with a key, its default, what is allowed, and the config.
    """
    expect("layer_type", "bottleneck", ("bottleneck",), config)
    expect("hidden_act", "relu", ("relu",), config)
    expect("downsample_in_bottleneck", False, (False,), config)
    expect("downsample_in_first_stage", False, (False,), config)


def to_folder(converted: Converted) -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and preprocessor_config.json of transformers.

    Raises:
      ValueError: a pre-norm, another LayerNorm epsilon than torch's, or a dilated backbone that
        timm has no name for.
    """
    model = converted.model
    if model["detr"]["pre_norm"]:
        raise ValueError(
            "transformers' DETR has no pre-norm (its encoder has no last LayerNorm); --to=detr "
            "keeps it."
        )
    if model["layer_norm_eps"] != 1e-5:
        raise ValueError(
            "LayerNorms of transformers' DETR have epsilon 1e-05, these "
            f"{model['layer_norm_eps']:g}; --to=detr keeps it."
        )
    config = config_of(model) | hf_folder.labels_of_map(converted.label_map)
    tensors = detr_names.from_params(converted.params, model)
    dialect = detr_hf_names.Dialect(timm=model["detr"]["dilation"])
    preprocessor = hf_folder.preprocessor_of(converted.preprocess, "DetrImageProcessor")
    return detr_hf_names.from_original(tensors, dialect), config, preprocessor


def config_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``config.model`` -> config.json without the labels."""
    own, layer = model["detr"], {}
    for part in ("encoder", "decoder"):
        layer |= {
            f"{part}_layers": own[f"{part}_depth"],
            f"{part}_attention_heads": model["heads"],
            f"{part}_ffn_dim": model["mlp_width"],
        }
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "d_model": model["width"],
        **layer,
        "num_queries": model["num_queries"],
        "num_channels": 3,
        "activation_function": "relu",
        "position_embedding_type": own["position"],
        "dropout": own["dropout"],
        "attention_dropout": own["dropout"],
        "activation_dropout": own["dropout"],
        "auxiliary_loss": False,
        "dilation": own["dilation"],
        "use_pretrained_backbone": False,
        **(_timm_backbone(own) if own["dilation"] else _own_backbone(own)),
    }


def _own_backbone(own: Mapping[str, Any]) -> dict[str, Any]:
    stem = own["stem_width"]
    resnet = {
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": stem,
        "hidden_sizes": [4 * stem * 2**stage for stage in range(4)],
        "depths": list(own["blocks"]),
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": ["stage4"],
    }
    return {"use_timm_backbone": False, "backbone": None, "backbone_config": resnet}


def _timm_backbone(own: Mapping[str, Any]) -> dict[str, Any]:
    blocks, stem = tuple(own["blocks"]), own["stem_width"]
    if (blocks, stem) not in TIMM:
        raise ValueError(
            f"transformers takes dilated backbones from timm only, which has none with {blocks} "
            f"bottlenecks and a stem of {stem} channels; --to=detr keeps it."
        )
    return {"use_timm_backbone": True, "backbone": TIMM[blocks, stem], "backbone_config": None}
