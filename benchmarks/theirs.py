"""PyTorch's side of a comparison: YOLOS of transformers with our weights, and a step of training.

Attention is torch's scaled_dot_product_attention, the optimiser the fused AdamW, losses and matcher
(scipy, on the host) are those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import YolosConfig, YolosForObjectDetection
from transformers.loss import loss_for_object_detection

from yolos_jax.convert import hf_folder, huggingface, names
from yolos_jax.labels import LabelMap

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def build(model: Mapping[str, Any], params: Mapping[str, Any]) -> YolosForObjectDetection:
    """Their model with our weights, float32, on the CPU.

    Args:
      model: the keys of ``config.model``; K is 91.
      params: ours, numpy.
    """
    found = huggingface.config_of(model) | hf_folder.labels_of_map(LabelMap.coco91())
    config = YolosConfig(**found, attn_implementation="sdpa")
    theirs = YolosForObjectDetection(config)
    known = theirs.state_dict()
    tensors = huggingface.from_original(names.from_params(params, model))
    # Files have the older name; transformers renames when it reads them.
    renamed = {
        name if name in known else name.replace("encoder.mid", "encoder.interpolation.mid"): tensor
        for name, tensor in tensors.items()
    }
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in renamed.items()})
    if theirs.config._attn_implementation != "sdpa":
        raise RuntimeError(f"attention is {theirs.config._attn_implementation!r}, asked for 'sdpa'")
    return theirs


def forward_of(model: torch.nn.Module, *, compiled: bool, dynamic: bool = False) -> Forward:
    """``forward(pixels)`` -> logits, boxes.

    Args:
      model: of ``build``.
      compiled: by torch.compile, when first called.
      dynamic: one program for pictures of all sizes.
    """

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(pixel_values=pixels)
        return outputs.logits, outputs.pred_boxes

    return torch.compile(forward, dynamic=dynamic) if compiled else forward


class Step:
    """``loss, norm = step(pixels, labels)``: forward, match, losses, backward, clip, AdamW."""

    def __init__(
        self,
        model: YolosForObjectDetection,
        optimizer: Mapping[str, Any],
        *,
        autocast: bool,
        checkpointing: bool = False,
    ) -> None:
        """Prepares the model for training.

        Args:
          model: of ``build``, on its device.
          optimizer: ``config.optimizer``; every parameter decays.
          autocast: products in bfloat16.
          checkpointing: recompute every block in the backward pass.
        """
        _provide_corners()
        self.model = model.train()
        self.device = next(model.parameters()).device
        self.forward = forward_of(model, compiled=False)
        self.autocast, self.clip_norm = autocast, optimizer["clip_norm"]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optimizer["lr"],
            betas=(optimizer["b1"], optimizer["b2"]),
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            fused=True,
        )

    def __call__(
        self, pixels: torch.Tensor, labels: Sequence[Mapping[str, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one step.

        Args:
          pixels: float32 [B, 3, height, width], normalised.
          labels: of ``on_device(as_labels(...))``.

        Returns:
          The loss, and the norm of the gradients before clipping: [] on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            logits, boxes = self.forward(pixels)
        loss, _, _ = self.model.loss_function(
            logits.float(), labels, self.device, boxes.float(), self.model.config, None, None
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.detach(), norm

    def precision(self) -> torch.autocast:
        """The context of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


def on_device(labels: Sequence[Mapping[str, np.ndarray]], device: Any) -> list[dict]:
    """Labels of numpy as tensors."""
    return [
        {name: torch.from_numpy(np.array(array)).to(device) for name, array in label.items()}
        for label in labels
    ]


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _provide_corners() -> None:
    """Their losses take this function from a module that is only imported where Pillow is."""

    def center_to_corners_format(boxes: torch.Tensor) -> torch.Tensor:
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    if not hasattr(loss_for_object_detection, "center_to_corners_format"):
        loss_for_object_detection.center_to_corners_format = center_to_corners_format
