"""Checkpoints run by the code they were made for, or by a forward pass in torch as short as that.

What conversions are compared with. Nothing of our models is used here. Position tables are resized
to a picture's grid whenever that differs from the table's, as transformers does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import backbones, huggingface, names, original, reference_detr, vit_layouts
from yolos_jax.convert.conversion import Converted
from yolos_jax.convert.read import Source
from yolos_jax.convert.torch_layers import TorchLayers

Stages = dict[str, np.ndarray]


def run(converted: Converted, source: Source, pixels: np.ndarray) -> Stages:
    """Runs a checkpoint of another project in torch.

    Args:
      converted: what it was converted to. Only its configuration is used, and for a start its new
        parameters, which the source does not have.
      source: the checkpoint.
      pixels: float32 [B, H, W, 3], normalised.

    Returns:
      Of a YOLOS ``embed``, ``block 0`` ... and ``norm`` [B, T, D] with tokens in the order class,
      detection, patches; of a DETR what ``reference_detr.run`` says; of both ``logits``
      [B, Q, K + 1] and ``boxes`` [B, Q, 4].
    """
    images = np.ascontiguousarray(np.asarray(pixels, np.float32).transpose(0, 3, 1, 2))
    return _RUNNERS[converted.model["name"]](converted, source, images)


def _run_yolos(converted: Converted, source: Source, images: np.ndarray) -> Stages:
    if huggingface.recognises(source.tensors):
        if importlib.util.find_spec("transformers") is not None:
            return _run_transformers(source, images)
        shapes = names.expected_shapes(converted.model, converted.label_map.num_classes)
        tensors, _ = huggingface.with_qkv_bias(source.tensors, source.config, shapes)
        tensors = huggingface.to_original(tensors, shapes, source.path)
    elif original.recognises(source.tensors):
        tensors = source.tensors
    else:
        tensors = _start(converted, source)
    return forward(tensors, converted.model, images)


_RUNNERS = {"yolos": _run_yolos, "detr": reference_detr.run}


def forward(
    tensors: Mapping[str, np.ndarray], model: Mapping[str, Any], images: np.ndarray
) -> Stages:
    """YOLOS in torch; everything as of ``reference_detr.forward``, the stages as of ``run``."""
    import torch

    with torch.no_grad():
        stages, logits, boxes = _TorchYolos(tensors, model).run(torch.from_numpy(images))
    heads = {"logits": logits.numpy(), "boxes": boxes.numpy()}
    return _named(stages, model["num_queries"]) | heads


class _TorchYolos(TorchLayers):
    """The forward pass, tokens in the original's order: class, patches, detection."""

    def run(self, images: Any) -> tuple[dict[str, Any], Any, Any]:
        t, model = self.tensors, self.model
        projection = "backbone.patch_embed.proj"
        weights = t[f"{projection}.weight"], t[f"{projection}.bias"]
        patches = self.functional.conv2d(images, *weights, stride=model["patch_size"])
        grid = tuple(patches.shape[2:])
        ends = t["backbone.cls_token"], t["backbone.det_token"]
        cls, det = (tokens.expand(len(images), -1, -1) for tokens in ends)
        x = self.torch.cat([cls, patches.flatten(2).transpose(1, 2), det], 1)
        x = x + self.table(t[names.POSITION], tuple(model["position_grid"]), grid)
        stages = {"embed": x}
        for i in range(model["depth"]):
            stages[f"block {i}"] = x = self.block(x, f"backbone.blocks.{i}")
            if names.MID_POSITION in t and i < model["depth"] - 1:
                mid = t[names.MID_POSITION][i], tuple(model["mid_position_grid"])
                x = x + self.table(*mid, grid)
        stages["norm"] = x = self.norm(x, "backbone.norm")
        tokens = x[:, -model["num_queries"] :]
        return stages, self.head(tokens, "class_embed"), self.head(tokens, "bbox_embed").sigmoid()

    def table(self, rows: Any, grid: tuple[int, int], new_grid: tuple[int, int]) -> Any:
        queries = self.model["num_queries"]
        patches = rows[:, 1:-queries].transpose(1, 2).reshape(1, -1, *grid)
        patches = self.functional.interpolate(
            patches, new_grid, mode="bicubic", align_corners=False
        )
        patches = patches.flatten(2).transpose(1, 2)
        return self.torch.cat([rows[:, :1], patches, rows[:, -queries:]], 1)

    def block(self, x: Any, name: str) -> Any:
        heads, width = self.model["heads"], self.model["width"]
        qkv = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
        x = x + self.linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        return x + self.linear(self.functional.gelu(hidden), f"{name}.mlp.fc2")


def _run_transformers(source: Source, images: np.ndarray) -> Stages:
    import torch
    import transformers

    model = transformers.YolosForObjectDetection.from_pretrained(source.path).eval().float()
    with torch.no_grad():
        outputs = model(torch.from_numpy(images), output_hidden_states=True)
    embed, *blocks = outputs.hidden_states
    stages = {"embed": embed} | {f"block {i}": tokens for i, tokens in enumerate(blocks)}
    stages["norm"] = outputs.last_hidden_state
    heads = {"logits": outputs.logits.numpy(), "boxes": outputs.pred_boxes.numpy()}
    return _named(stages, model.config.num_detection_tokens) | heads


def _start(converted: Converted, source: Source) -> dict[str, np.ndarray]:
    """The source's own tensors with its table resized by torch, and the new ones of the start."""
    import torch
    from torch.nn import functional

    backbone = vit_layouts.backbone_of(source)
    fresh = names.from_params(converted.params, converted.model)
    table, queries = backbone.tensors[names.POSITION], converted.model["num_queries"]
    prefix, grid = backbones.stored_grid(backbone, table.shape[1], source.path)
    patches = torch.from_numpy(np.array(table[:, prefix:], np.float32))
    patches = patches.transpose(1, 2).reshape(1, -1, *grid)
    wanted = tuple(converted.model["position_grid"])
    resized = functional.interpolate(patches, wanted, mode="bicubic", align_corners=False)
    cls = table[:, prefix - 1 : prefix] if prefix else fresh[names.POSITION][:, :1]
    rows = [cls, resized.flatten(2).transpose(1, 2).numpy(), fresh[names.POSITION][:, -queries:]]
    return fresh | backbone.tensors | {names.POSITION: np.concatenate(rows, axis=1)}


def _named(stages: Mapping[str, Any], queries: int) -> Stages:
    """torch tensors [cls, patches, det] as numpy arrays [cls, det, patches]."""
    arrays = {name: tokens.numpy() for name, tokens in stages.items()}
    return {
        name: np.concatenate([x[:, :1], x[:, -queries:], x[:, 1:-queries]], axis=1)
        for name, x in arrays.items()
    }
