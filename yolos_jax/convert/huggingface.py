"""YOLOS of Hugging Face's transformers, both ways: tensors, config.json, preprocessor_config.json.

The tensors are those of the original under other names, with query, key and value apart. Folders
written here are read by ``AutoModelForObjectDetection`` and ``AutoImageProcessor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import conversion, hf_folder, names
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.convert.read import Source

Tensors = dict[str, np.ndarray]

# Original name -> transformers' name; the same for weight and bias.
_REST = {
    "backbone.cls_token": "vit.embeddings.cls_token",
    "backbone.det_token": "vit.embeddings.detection_tokens",
    names.POSITION: "vit.embeddings.position_embeddings",
    names.MID_POSITION: "vit.encoder.mid_position_embeddings",
}
_PREFIXES = {
    "backbone.patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
    "backbone.norm.": "vit.layernorm.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of transformers' YOLOS."""
    return "vit.embeddings.detection_tokens" in tensors


def their_names(name: str) -> list[str]:
    """transformers' name of an original tensor; three for a fused query, key and value."""
    if name in _REST:
        return [_REST[name]]
    for theirs, hf in _PREFIXES.items():
        if name.startswith(theirs):
            return [hf + name.removeprefix(theirs)]
    index, rest = name.removeprefix("backbone.blocks.").split(".", 1)
    layer, kind = rest.rsplit(".", 1)
    if layer == "attn.qkv":
        return [f"vit.encoder.layer.{index}.attention.attention.{part}.{kind}" for part in _QKV]
    return [f"vit.encoder.layer.{index}.{_BLOCK[layer]}.{kind}"]


def to_original(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], where: str) -> Tensors:
    """Renames to the original layout, after checking every tensor against ``shapes``.

    Args:
      tensors: in transformers' names.
      shapes: the original names and shapes to come out.
      where: what to call the source in errors.

    Raises:
      ValueError: naming every tensor missing, surplus or misshapen, in transformers' names.
    """
    expected = {}
    for name, shape in shapes.items():
        parts = their_names(name)
        shape = (shape[0] // len(parts), *shape[1:])
        expected |= dict.fromkeys(parts, shape)
    names.check(tensors, expected, where)
    return {
        name: np.concatenate([tensors[part] for part in parts])
        if len(parts) > 1
        else tensors[parts[0]]
        for name, parts in ((name, their_names(name)) for name in shapes)
    }


def from_original(tensors: Tensors) -> Tensors:
    """Renames to transformers' layout."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        parts = their_names(name)
        for part, array in zip(parts, np.split(tensor, len(parts)), strict=True):
            renamed[part] = np.ascontiguousarray(array)
    return renamed


def convert(source: Source, options: Options) -> Converted:
    """A folder of transformers' YOLOS -> ours; strict.

    Raises:
      ValueError: tensors missing, surplus or misshapen; settings that YOLOS here does not have.
    """
    config = hf_folder.config_of(source)
    model = model_from_config(config, options, source.path)
    label_map, notes = hf_folder.label_map_of_config(config, options)
    shapes = names.expected_shapes(model, label_map.num_classes)
    tensors, rows = with_qkv_bias(source.tensors, config, shapes)
    tensors = to_original(tensors, shapes, source.path)
    preprocess = hf_folder.preprocess(source, options, published_size(model["width"]))
    return Converted(
        kind="YOLOS of transformers",
        params=names.to_params(tensors, model, label_map.num_classes, source.path),
        model=model,
        label_map=label_map,
        preprocess=preprocess,
        rows=conversion.loaded_rows(source.tensors) + rows,
        notes=notes + hf_folder.assumed(source, options, preprocess),
    )


def with_qkv_bias(
    tensors: Tensors, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensors, tuple[Row, ...]]:
    """Adds zeros where the model was configured without these biases, which is the same model."""
    if config.get("qkv_bias", True):
        return tensors, ()
    added = {
        part: np.zeros(shape[0] // 3, np.float32)
        for name, shape in shapes.items()
        if name.endswith("attn.qkv.bias")
        for part in their_names(name)
    }
    return tensors | added, tuple(Row("new", part, "zeros: qkv_bias is false") for part in added)


def model_from_config(config: Mapping[str, Any], options: Options, where: str) -> dict[str, Any]:
    """config.json -> the keys of ``config.model``."""
    refuse_other(config, where)
    patch = pair(config.get("patch_size", 16))
    grid = tuple(side // patch[0] for side in pair(config["image_size"]))
    mid = config.get("use_mid_position_embeddings", True)
    model = conversion.model_config(
        patch_size=patch[0],
        width=int(config["hidden_size"]),
        depth=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        mlp_width=int(config["intermediate_size"]),
        num_queries=int(config.get("num_detection_tokens", 100)),
        position_grid=grid,
        mid_position_grid=grid if mid else (),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )
    conversion.refuse_contradictions(model, options, where)
    return model


def refuse_other(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where config.json asks for what no model here has."""
    needed = ("num_attention_heads", "image_size", "hidden_size", "num_hidden_layers")
    wrong = [f"{key} is missing" for key in (*needed, "intermediate_size") if key not in config]
    if config.get("hidden_act", "gelu") != "gelu":
        wrong.append(f"hidden_act is {config['hidden_act']!r}, here it is 'gelu' (exact)")
    if config.get("num_channels", 3) != 3:
        wrong.append(f"num_channels is {config['num_channels']}, here it is 3")
    patch = pair(config.get("patch_size", 16))
    if patch[0] != patch[1]:
        wrong.append(f"patch_size is {list(patch)}, here patches are square")
    if wrong:
        raise ValueError(f"{where}/config.json: {'; '.join(wrong)}.")


def published_size(width: int) -> int:
    """Shorter side of pictures, pixels, of the published YOLOS of a width, or of most."""
    published = conversion.PUBLISHED.get(width)
    return published.size if published else 800


def to_folder(converted: Converted) -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and preprocessor_config.json of transformers; warns of odd sizes.

    Raises:
      ValueError: two position tables of different grids, which transformers cannot say.
    """
    model, preprocess_config = converted.model, converted.preprocess
    config = config_of(model) | hf_folder.labels_of_map(converted.label_map)
    longest, patch = preprocess_config["max_size"], model["patch_size"]
    if longest and longest % patch == 0:
        print(
            f"WARNING: max_size {longest} is a multiple of the patch size {patch}. The processor "
            "of transformers rounds sizes differently: about half of the pictures that it binds "
            f"come out one patch apart. --max_size {longest + patch // 2} avoids it."
        )
    tensors = from_original(names.from_params(converted.params, model))
    return tensors, config, hf_folder.preprocessor_of(preprocess_config, "YolosImageProcessor")


def config_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``config.model`` -> config.json without the labels.

    Raises:
      ValueError: two position tables of different grids, which transformers cannot say.
    """
    grid, mid = tuple(model["position_grid"]), tuple(model["mid_position_grid"])
    if mid not in ((), grid):
        raise ValueError(
            f"transformers' YOLOS has one size for all position tables; these have grids {grid} "
            f"and {mid}. --to=yolos keeps both."
        )
    return {
        "architectures": ["YolosForObjectDetection"],
        "model_type": "yolos",
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["heads"],
        "intermediate_size": model["mlp_width"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model["layer_norm_eps"],
        "image_size": [side * model["patch_size"] for side in grid],
        "patch_size": model["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
        "num_detection_tokens": model["num_queries"],
        "use_mid_position_embeddings": bool(mid),
    }


def pair(size: Any) -> tuple[int, int]:
    """A size of config.json, one number or two, as (height, width)."""
    return (
        (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[0]), int(size[1]))
    )
