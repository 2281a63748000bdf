"""How much arithmetic a model needs for a picture: without padding, without recomputation.

A multiplication and an addition are two operations. Only matrix products count; LayerNorm, softmax,
GELU, the resize of position tables and the matcher do not. The backward pass is taken as twice the
forward pass, as everybody does. The last block counts for the tokens that the heads read, and for
the keys and values of all: of the others nobody needs what it would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Dense bfloat16 operations per second; NVIDIA's data sheet of the H200 (SXM), without sparsity.
H200_PEAK = 989e12


def forward_flops(model: Mapping[str, Any], num_classes: int, patches: Any) -> Any:
    """Operations of the forward pass.

    Args:
      model: the keys of ``config.model``.
      num_classes: K; the class head has one output more.
      patches: int, or an array of them: patches of a picture, padding left out.

    Returns:
      float, or an array of the shape of ``patches``.
    """
    width, queries = model["width"], model["num_queries"]
    patches = np.asarray(patches, np.float64)
    tokens = 1 + queries + patches
    embed = 2 * patches * 3 * model["patch_size"] ** 2 * width

    def block(wanted):
        keys_and_values = 2 * tokens * width * 2 * width
        others = 2 * wanted * width * (2 * width + 2 * model["mlp_width"])
        attention = 2 * 2 * wanted * tokens * width  # all heads: queries x keys, weights x values
        return keys_and_values + others + attention

    heads = 2 * queries * width * (4 * width + num_classes + 1 + 4)
    total = embed + (model["depth"] - 1) * block(tokens) + block(1 + queries) + heads
    return total if total.ndim else float(total)


def training_flops(model: Mapping[str, Any], num_classes: int, patches: Any) -> Any:
    """Operations of a training step, forward and backward; arguments of ``forward_flops``."""
    return 3 * forward_flops(model, num_classes, patches)
