"""What the forward passes in torch, which conversions are compared with, have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class TorchLayers:
    """Layers by the name of their tensors in the original's state dict; x is [B, T, D]."""

    def __init__(self, tensors: Mapping[str, np.ndarray], model: Mapping[str, Any]):
        """Copies the tensors.

        Args:
          tensors: names and shapes of the original.
          model: the keys of ``config.model``.
        """
        import torch

        self.torch, self.functional = torch, torch.nn.functional
        self.model = model
        self.tensors = {
            name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in tensors.items()
        }

    def linear(self, x: Any, name: str) -> Any:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return self.functional.linear(x, weight, bias)

    def norm(self, x: Any, name: str) -> Any:
        """LayerNorm."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        eps = self.model["layer_norm_eps"]
        return self.functional.layer_norm(x, weight.shape, weight, bias, eps)

    def head(self, x: Any, name: str) -> Any:
        """Three linear layers, of boxes and of a YOLOS's classes."""
        for i in range(2):
            x = self.linear(x, f"{name}.layers.{i}").relu()
        return self.linear(x, f"{name}.layers.2")
