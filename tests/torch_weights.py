"""State dicts of the original YOLOS as parameters of ours, for the tests of the models alone.

Independent of the product's conversion, which is tested against the same arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def to_patches(pixels: np.ndarray, patch_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """[B, 3, H, W] -> ([B, rows * cols, P], (rows, cols)); the remainder is ignored."""
    rows, cols = pixels.shape[2] // patch_size, pixels.shape[3] // patch_size
    x = pixels[:, :, : rows * patch_size, : cols * patch_size]
    x = x.reshape(len(x), 3, rows, patch_size, cols, patch_size).transpose(0, 2, 4, 3, 5, 1)
    return np.ascontiguousarray(x.reshape(len(x), rows * cols, -1)), (rows, cols)


def params_from_yolos(
    state: Mapping[str, np.ndarray],
    *,
    depth: int,
    num_queries: int,
    grid: tuple[int, int],
    mid_grid: tuple[int, ...],
) -> dict[str, Any]:
    """Names and layouts of hustvl/YOLOS: position rows are class, patches, detection tokens."""
    state = {name: np.asarray(value, np.float32) for name, value in state.items()}

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def table(rows: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        cut = rows.shape[-2] - num_queries
        patches = rows[..., 1:cut, :]
        return {
            "cls": rows[..., :1, :],
            "det": rows[..., cut:, :],
            "grid": patches.reshape(*rows.shape[:-2], *shape, rows.shape[-1]),
        }

    def block(index: int) -> dict[str, Any]:
        prefix = f"backbone.blocks.{index}"
        return {
            "norm1": norm(f"{prefix}.norm1"),
            "norm2": norm(f"{prefix}.norm2"),
            "attention": {
                "qkv": linear(f"{prefix}.attn.qkv"),
                "out": linear(f"{prefix}.attn.proj"),
            },
            "mlp": {"fc1": linear(f"{prefix}.mlp.fc1"), "fc2": linear(f"{prefix}.mlp.fc2")},
        }

    conv = state["backbone.patch_embed.proj.weight"]
    backbone = {
        "cls_token": state["backbone.cls_token"][0],
        "det_tokens": state["backbone.det_token"][0],
        "patch_embed": {
            "kernel": conv.transpose(2, 3, 1, 0).reshape(-1, conv.shape[0]),
            "bias": state["backbone.patch_embed.proj.bias"],
        },
        "position": table(state["backbone.pos_embed"][0], grid),
        "blocks": _stack([block(index) for index in range(depth)]),
        "norm": norm("backbone.norm"),
    }
    if mid_grid:
        backbone["mid_position"] = table(state["backbone.mid_pos_embed"][:, 0], mid_grid)
    heads = {
        name: {f"layers_{i}": linear(f"{theirs}.layers.{i}") for i in range(3)}
        for name, theirs in (("class_head", "class_embed"), ("box_head", "bbox_embed"))
    }
    return {"backbone": backbone, **heads}


def yolos_from_huggingface(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames transformers' YolosForObjectDetection to the original's, where q, k, v are fused."""
    parts = (
        ("vit.embeddings.cls_token", "backbone.cls_token"),
        ("vit.embeddings.detection_tokens", "backbone.det_token"),
        ("vit.embeddings.position_embeddings", "backbone.pos_embed"),
        ("vit.encoder.interpolation.", "vit.encoder."),  # in newer versions only
        ("vit.encoder.mid_position_embeddings", "backbone.mid_pos_embed"),
        ("vit.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
        ("vit.encoder.layer.", "backbone.blocks."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("vit.layernorm", "backbone.norm"),
        ("class_labels_classifier", "class_embed"),
        ("bbox_predictor", "bbox_embed"),
    )
    result = {}
    for name, value in state.items():
        for theirs, ours in parts:
            name = name.replace(theirs, ours)
        result[name] = np.asarray(value)
    for query in [name for name in result if "attention.attention.query" in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        fused = np.concatenate([result.pop(name) for name in names])
        result[query.replace("attention.attention.query", "attn.qkv")] = fused
    return result


def _stack(trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)
