"""Checkpoints of DETR run in torch: by transformers, or by a forward pass as short as that.

Nothing of our models is used here. A picture is the whole canvas, so there is no mask.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert import detr, detr_hf_names, detr_huggingface, detr_names, resnets
from yolos_jax.convert.conversion import Converted
from yolos_jax.convert.read import Source
from yolos_jax.convert.torch_layers import TorchLayers

Stages = dict[str, np.ndarray]


def run(converted: Converted, source: Source, images: np.ndarray) -> Stages:
    """Runs a DETR of another project, or a start from its ResNet with the start's new parameters.

    Args:
      converted: what it was converted to.
      source: the checkpoint.
      images: float32 [B, 3, H, W], normalised.

    Returns:
      ``backbone`` [B, h, w, C]; ``encoder`` [B, h, w, D]; ``decoder 0`` ... [B, Q, D], after the
      LayerNorm that the layers share; ``logits`` [B, Q, K + 1]; ``boxes`` [B, Q, 4].
    """
    tensors, _ = detr.without_counters(source.tensors)
    if detr_huggingface.recognises(tensors):
        needed = ["transformers", *["timm"] * detr_hf_names.dialect_of(tensors).timm]
        if all(importlib.util.find_spec(name) is not None for name in needed):
            return _run_transformers(source, images)
        classes = converted.label_map.num_classes
        tensors = detr_huggingface.to_original(tensors, converted.model, classes, source.path)
    elif resnets.recognises(tensors):
        fresh = detr_names.from_params(converted.params, converted.model)
        tensors = fresh | resnets.backbone_of(source).tensors
    return forward(tensors, converted.model, images)


def forward(
    tensors: Mapping[str, np.ndarray], model: Mapping[str, Any], images: np.ndarray
) -> Stages:
    """DETR in torch on tensors of the original's layout.

    Args:
      tensors: names and shapes of the original.
      model: the keys of ``config.model``.
      images: float32 [B, 3, H, W].

    Returns:
      As ``run``.
    """
    import torch

    with torch.no_grad():
        stages = _TorchDetr(tensors, model).run(torch.from_numpy(images))
    return {name: stage.numpy() for name, stage in stages.items()}


class _TorchDetr(TorchLayers):
    """The forward pass."""

    def run(self, images: Any) -> dict[str, Any]:
        t, own = self.tensors, self.model["detr"]
        feature = self.backbone(images)
        batch, _, height, width = feature.shape
        x = self.functional.conv2d(feature, t["input_proj.weight"], t["input_proj.bias"])
        x, position = x.flatten(2).transpose(1, 2), self.position(height, width)
        for i in range(own["encoder_depth"]):
            x = self.layer(x, f"transformer.encoder.layers.{i}", position)
        memory = self.norm(x, "transformer.encoder.norm") if own["pre_norm"] else x
        queries = t["query_embed.weight"]
        answers = self.torch.zeros(batch, *queries.shape)
        stages = {
            "backbone": feature.permute(0, 2, 3, 1),
            "encoder": memory.reshape(batch, height, width, -1),
        }
        for i in range(own["decoder_depth"]):
            name = f"transformer.decoder.layers.{i}"
            answers = self.layer(answers, name, queries, (memory + position, memory))
            stages[f"decoder {i}"] = self.norm(answers, "transformer.decoder.norm")
        last = stages[f"decoder {own['decoder_depth'] - 1}"]
        boxes = self.head(last, "bbox_embed").sigmoid()
        return stages | {"logits": self.linear(last, "class_embed"), "boxes": boxes}

    def backbone(self, images: Any) -> Any:
        """The last stage's features [B, C, h, w]."""
        x = self.convolution(images, "conv1", "bn1", stride=2).relu()
        x = self.functional.max_pool2d(x, 3, 2, 1)
        own = self.model["detr"]
        for stage, blocks in enumerate(own["blocks"], start=1):
            dilated = own["dilation"] and stage == 4
            for block in range(blocks):
                name = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 and not dilated else 1
                dilation = 2 if dilated and block else 1
                y = self.convolution(x, f"{name}.conv1", f"{name}.bn1").relu()
                y = self.convolution(y, f"{name}.conv2", f"{name}.bn2", stride, dilation).relu()
                y = self.convolution(y, f"{name}.conv3", f"{name}.bn3")
                if block == 0:
                    downsample = f"{name}.downsample.0", f"{name}.downsample.1"
                    x = self.convolution(x, *downsample, stride)
                x = (x + y).relu()
        return x

    def convolution(self, x: Any, name: str, norm: str, stride: int = 1, dilation: int = 1) -> Any:
        """A convolution that only its stride shrinks, and its frozen normalisation."""
        body = "backbone.0.body."
        kernel = self.tensors[f"{body}{name}.weight"]
        padding = kernel.shape[-1] // 2 * dilation
        x = self.functional.conv2d(x, kernel, None, stride, padding, dilation)
        parts = ("running_mean", "running_var", "weight", "bias")
        return self.functional.batch_norm(
            x, *(self.tensors[f"{body}{norm}.{part}"] for part in parts), eps=1e-5
        )

    def position(self, height: int, width: int) -> Any:
        """Encodings [h * w, D]."""
        half, torch = self.model["width"] // 2, self.torch

        def along(cells: int) -> Any:
            steps = torch.arange(1, cells + 1) / (cells + 1e-6) * 2 * math.pi
            periods = 10000.0 ** (2 * (torch.arange(half) // 2) / half)
            angles = steps[:, None] / periods
            return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)

        if self.model["detr"]["position"] == "learned":  # columns first
            first = self.tensors["backbone.1.col_embed.weight"][:width].expand(height, -1, -1)
            second = self.tensors["backbone.1.row_embed.weight"][:height, None]
            second = second.expand(-1, width, -1)
        else:
            first = along(height)[:, None].expand(-1, width, -1)
            second = along(width).expand(height, -1, -1)
        return torch.cat([first, second], 2).flatten(0, 1)

    def layer(self, x: Any, name: str, position: Any, memory: tuple[Any, Any] | None = None) -> Any:
        """A layer of the encoder, or with (keys, values) of the memory one of the decoder."""
        inside = [lambda y: self.attention(y + position, y + position, y, f"{name}.self_attn")]
        if memory is not None:
            cross = f"{name}.multihead_attn"
            inside.append(lambda y: self.attention(y + position, *memory, cross))
        inside.append(
            lambda y: self.linear(self.linear(y, f"{name}.linear1").relu(), f"{name}.linear2")
        )
        for i, sublayer in enumerate(inside, start=1):
            norm = f"{name}.norm{i}"
            if self.model["detr"]["pre_norm"]:
                x = x + sublayer(self.norm(x, norm))
            else:
                x = self.norm(x + sublayer(x), norm)
        return x

    def attention(self, queries: Any, keys: Any, values: Any, name: str) -> Any:
        heads, width = self.model["heads"], self.model["width"]
        weights = self.tensors[f"{name}.in_proj_weight"].chunk(3)
        biases = self.tensors[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (
            self.functional.linear(x, weight, bias).unflatten(2, (heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        scores = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1)
        return self.linear((scores @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")


def _run_transformers(source: Source, images: np.ndarray) -> Stages:
    import torch
    import transformers

    model = transformers.DetrForObjectDetection.from_pretrained(source.path).eval().float()
    seen: dict[str, Any] = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.update({name: output})

    inside = model.model
    inside.backbone.register_forward_hook(keep("backbone"))
    inside.encoder.register_forward_hook(keep("encoder"))
    for i, layer in enumerate(inside.decoder.layers):
        layer.register_forward_hook(keep(f"decoder {i}"))
    with torch.no_grad():
        outputs = model(torch.from_numpy(images))
        feature = seen["backbone"][-1][0].permute(0, 2, 3, 1)
        memory = seen["encoder"][0].reshape(*feature.shape[:3], -1)
        layers = {
            f"decoder {i}": inside.decoder.layernorm(_first(seen[f"decoder {i}"]))
            for i in range(len(inside.decoder.layers))
        }
    stages = {"backbone": feature, "encoder": memory, **layers}
    stages |= {"logits": outputs.logits, "boxes": outputs.pred_boxes}
    return {name: stage.numpy() for name, stage in stages.items()}


def _first(output: Any) -> Any:
    """What a layer returns, which was a tuple before version 5."""
    return output[0] if isinstance(output, tuple) else output
