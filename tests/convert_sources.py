"""Random checkpoints in the layouts of other projects, written by hand from their documentation."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from yolos_jax.convert import conversion
from yolos_jax.models.build import Model

DEPTH, WIDTH, HEADS, MLP, PATCH, QUERIES = 2, 24, 3, 40, 16, 5
GRID = (3, 4)  # of the detector's position tables
FLAGS = {"num_heads": HEADS, "init_pe_size": (48, 64), "mid_pe_size": ()}


def numbers(seed: int = 0):
    """A function from a shape to float32 numbers, other ones at each call."""
    random = np.random.default_rng(seed)
    return lambda *shape: random.normal(0, 0.2, shape).astype(np.float32)


def timm(grid: int = 5, prefix: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """A plain vision transformer as DeiT and timm store it.

    Args:
      grid: sides of the position table, patches.
      prefix: rows of the table before the patches': 1 class, 2 class and distillation token, 0 as
        DeiT III.
      seed: of the numbers.
    """
    draw = numbers(seed)
    tensors = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, prefix + grid**2, WIDTH)}
    if prefix == 2:
        tensors["dist_token"] = draw(1, 1, WIDTH)
        tensors |= {"head_dist.weight": draw(10, WIDTH), "head_dist.bias": draw(10)}
    tensors["patch_embed.proj.weight"] = draw(WIDTH, 3, PATCH, PATCH)
    tensors["patch_embed.proj.bias"] = draw(WIDTH)
    for i in range(DEPTH):
        for name, shape in {
            "norm1": (WIDTH,),
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "norm2": (WIDTH,),
            "mlp.fc1": (MLP, WIDTH),
            "mlp.fc2": (WIDTH, MLP),
        }.items():
            tensors[f"blocks.{i}.{name}.weight"] = draw(*shape)
            tensors[f"blocks.{i}.{name}.bias"] = draw(shape[0])
    tensors |= {"norm.weight": draw(WIDTH), "norm.bias": draw(WIDTH)}
    return tensors | {"head.weight": draw(10, WIDTH), "head.bias": draw(10)}


def yolos(num_classes: int = 4, mid: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """An original YOLOS; both tables have GRID."""
    draw = numbers(seed + 1)
    rows = 1 + GRID[0] * GRID[1] + QUERIES
    body = timm(seed=seed)
    tensors = {f"backbone.{k}": v for k, v in body.items() if not k.startswith("head")}
    tensors["backbone.pos_embed"] = draw(1, rows, WIDTH)
    tensors["backbone.det_token"] = draw(1, QUERIES, WIDTH)
    if mid:
        tensors["backbone.mid_pos_embed"] = draw(DEPTH - 1, 1, rows, WIDTH)
    for head, outputs in (("class_embed", num_classes + 1), ("bbox_embed", 4)):
        for i, out in enumerate((WIDTH, WIDTH, outputs)):
            tensors[f"{head}.layers.{i}.weight"] = draw(out, WIDTH)
            tensors[f"{head}.layers.{i}.bias"] = draw(out)
    return tensors


def yolos_model() -> dict:
    """The keys of ``config.model`` of ``yolos``."""
    return conversion.model_config(
        patch_size=PATCH,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        mlp_width=MLP,
        num_queries=QUERIES,
        position_grid=GRID,
        mid_position_grid=GRID,
    )


def yolos_args(mid: bool = True, **changes) -> argparse.Namespace:
    """The command line that the original stores beside its tensors."""
    values = {"eval_size": 512, "init_pe_size": [48, 64], "mid_pe_size": [48, 64] if mid else None}
    return argparse.Namespace(**(values | {"backbone_name": "tiny", "lr": 1e-4} | changes))


def save(path: Path, tensors: dict[str, np.ndarray], legacy: bool = False, **entries) -> Path:
    """Writes a .pth in either of torch's file formats."""
    import torch

    content = {"model": {name: torch.from_numpy(array) for name, array in tensors.items()}}
    torch.save(content | entries, path, _use_new_zipfile_serialization=not legacy)
    return path


def flax(tensors: dict[str, np.ndarray], big_vision: bool) -> dict[str, np.ndarray]:
    """A timm transformer in the names and shapes of google-research's Flax modules.

    Args:
      tensors: as ``timm`` makes them; its table has a class row.
      big_vision: big_vision's names instead of vision_transformer's; its class token is added after
        the positions, so the table has no row for it.
    """
    attention, norm2, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    table = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    arrays = {
        "cls": tensors["cls_token"],
        table: tensors["pos_embed"],
        "embedding/kernel": tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": tensors["norm.weight"],
        "Transformer/encoder_norm/bias": tensors["norm.bias"],
        "head/kernel": tensors["head.weight"].T,
        "head/bias": tensors["head.bias"],
    }
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        heads = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        weights = np.split(tensors[f"{ours}.attn.qkv.weight"], 3)
        biases = np.split(tensors[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{heads}/{part}/kernel"] = weight.T.reshape(WIDTH, HEADS, -1)
            arrays[f"{heads}/{part}/bias"] = bias.reshape(HEADS, -1)
        out = tensors[f"{ours}.attn.proj.weight"].T.reshape(HEADS, -1, WIDTH)
        arrays[f"{heads}/out/kernel"] = out
        arrays[f"{heads}/out/bias"] = tensors[f"{ours}.attn.proj.bias"]
        for theirs_name, ours_name in ((0, "norm1"), (norm2, "norm2")):
            norm = f"{theirs}/LayerNorm_{theirs_name}"
            arrays[f"{norm}/scale"] = tensors[f"{ours}.{ours_name}.weight"]
            arrays[f"{norm}/bias"] = tensors[f"{ours}.{ours_name}.bias"]
        for j in (0, 1):
            dense = f"{theirs}/MlpBlock_{mlp}/Dense_{j}"
            arrays[f"{dense}/kernel"] = tensors[f"{ours}.mlp.fc{j + 1}.weight"].T
            arrays[f"{dense}/bias"] = tensors[f"{ours}.mlp.fc{j + 1}.bias"]
    return arrays


def numpy_draw(model: Model, rng: jax.Array) -> dict:
    """Random parameters of a model without compiling its initialisation."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(rng)))
    shapes = jax.eval_shape(model.init, rng)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
