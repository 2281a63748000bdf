"""The original YOLOS layout against ours: names, shapes and what happens to each tensor.

The layout of hustvl/YOLOS (its ``state_dict``) is the common tongue of this folder: every other
layout is first renamed to it, and exports start from it. Differences from ours:

* blocks are numbered there and stacked on axis 0 here;
* linear weights are [out, in] there and [in, out] here, the patch convolution is
  [D, 3, p, p] there and [p * p * 3, D] here;
* position tables are one sequence [cls, patches, det] there and three arrays here.

Both directions only move numbers, so a round trip is equal to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.convert.places import Place, gather, scatter

Array = np.ndarray
Tensors = dict[str, Array]

# Names inside a block -> path below backbone/blocks. Weights of linear layers are transposed.
BLOCK = {
    "norm1.weight": "norm1/scale",
    "norm1.bias": "norm1/bias",
    "attn.qkv.weight": "attention/qkv/kernel",
    "attn.qkv.bias": "attention/qkv/bias",
    "attn.proj.weight": "attention/out/kernel",
    "attn.proj.bias": "attention/out/bias",
    "norm2.weight": "norm2/scale",
    "norm2.bias": "norm2/bias",
    "mlp.fc1.weight": "mlp/fc1/kernel",
    "mlp.fc1.bias": "mlp/fc1/bias",
    "mlp.fc2.weight": "mlp/fc2/kernel",
    "mlp.fc2.bias": "mlp/fc2/bias",
}
REST = {
    "backbone.cls_token": "backbone/cls_token",
    "backbone.det_token": "backbone/det_tokens",
    "backbone.patch_embed.proj.weight": "backbone/patch_embed/kernel",
    "backbone.patch_embed.proj.bias": "backbone/patch_embed/bias",
    "backbone.norm.weight": "backbone/norm/scale",
    "backbone.norm.bias": "backbone/norm/bias",
} | {
    f"{theirs}.layers.{i}.{a}": f"{ours}/layers_{i}/{b}"
    for theirs, ours in (("class_embed", "class_head"), ("bbox_embed", "box_head"))
    for i in range(3)
    for a, b in (("weight", "kernel"), ("bias", "bias"))
}
POSITION = "backbone.pos_embed"
MID_POSITION = "backbone.mid_pos_embed"


def expected_shapes(model: Mapping[str, Any], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Every name of an original YOLOS state dict and its shape.

    Args:
      model: the keys of ``config.model``.
      num_classes: K; the class head has one output more.
    """
    width, mlp, patch, queries = (
        model[key] for key in ("width", "mlp_width", "patch_size", "num_queries")
    )
    block = {
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (mlp, width),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (width, mlp),
    }
    shapes = {
        "backbone.cls_token": (1, 1, width),
        POSITION: (1, 1 + math.prod(model["position_grid"]) + queries, width),
        "backbone.det_token": (1, queries, width),
    }
    if tuple(model["mid_position_grid"]):
        rows = 1 + math.prod(model["mid_position_grid"]) + queries
        shapes[MID_POSITION] = (model["depth"] - 1, 1, rows, width)
    shapes["backbone.patch_embed.proj.weight"] = (width, 3, patch, patch)
    shapes["backbone.patch_embed.proj.bias"] = (width,)
    for i in range(model["depth"]):
        shapes |= {f"backbone.blocks.{i}.{name}": block.get(name, (width,)) for name in BLOCK}
    shapes |= {"backbone.norm.weight": (width,), "backbone.norm.bias": (width,)}
    for head, outputs in (("class_embed", num_classes + 1), ("bbox_embed", 4)):
        for i, rows in enumerate((width, width, outputs)):
            shapes[f"{head}.layers.{i}.weight"] = (rows, width)
            shapes[f"{head}.layers.{i}.bias"] = (rows,)
    return shapes


def check(tensors: Mapping[str, Array], expected: Mapping[str, tuple], where: str) -> None:
    """Raises one ValueError that names every missing, surplus and misshapen tensor."""
    wrong = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    wrong += [
        f"not part of the model: {name} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in expected
    ]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    wrong += [
        f"{name} holds {tensor.dtype}, expected floating point numbers"
        for name, tensor in tensors.items()
        if name in expected and not _is_float(tensor)
    ]
    if wrong:
        raise ValueError(f"{where} does not fit the model:\n  " + "\n  ".join(wrong))


def _is_float(tensor: Array) -> bool:
    # bfloat16 is a dtype of ml_dtypes, which numpy does not count among its floats.
    return tensor.dtype.kind == "f" or tensor.dtype.name == "bfloat16"


def to_params(
    tensors: Mapping[str, Array], model: Mapping[str, Any], num_classes: int, where: str
) -> dict:
    """Original layout -> our parameters.

    Args:
      tensors: a complete state dict, as numpy arrays.
      model: the keys of ``config.model``.
      num_classes: K.
      where: what to call the source in errors.

    Returns:
      Nested dict of float32 arrays.

    Raises:
      ValueError: naming every tensor that is missing, surplus or of another shape.
    """
    shapes = expected_shapes(model, num_classes)
    check(tensors, shapes, where)
    flat = gather(tensors, _places(shapes), _to_ours)
    for name, path, key in _tables(model):
        table = np.asarray(tensors[name], np.float32).squeeze(0 if name == POSITION else 1)
        cls, grid, det = np.split(table, [1, table.shape[-2] - model["num_queries"]], axis=-2)
        flat[f"{path}/cls"], flat[f"{path}/det"] = cls, det
        flat[f"{path}/grid"] = grid.reshape(
            *grid.shape[:-2], *(int(side) for side in model[key]), model["width"]
        )
    return unflatten({path: np.ascontiguousarray(array) for path, array in flat.items()})


def from_params(params: Mapping[str, Any], model: Mapping[str, Any]) -> Tensors:
    """Our parameters -> original layout, float32, in the order of the original state dict."""
    flat = {path: np.asarray(array, np.float32) for path, array in flatten(params).items()}
    shapes = expected_shapes(model, flat["class_head/layers_2/bias"].shape[0] - 1)
    turn = functools.partial(_to_theirs, patch_size=model["patch_size"])
    tensors = scatter(flat, _places(shapes), turn)
    for name, path, _ in _tables(model):
        grid = flat[f"{path}/grid"]
        grid = grid.reshape(*grid.shape[:-3], -1, grid.shape[-1])
        table = np.concatenate([flat[f"{path}/cls"], grid, flat[f"{path}/det"]], axis=-2)
        tensors[name] = table[None] if name == POSITION else table[:, None]
    if MID_POSITION in shapes and model["depth"] == 1:
        tensors[MID_POSITION] = np.zeros(shapes[MID_POSITION], np.float32)
    check(tensors, shapes, "the checkpoint")
    return {name: np.ascontiguousarray(tensors[name]) for name in shapes}


def _places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where everything but the position tables goes."""
    places = {}
    for name, shape in shapes.items():
        if name not in (POSITION, MID_POSITION):
            stacked = name.startswith("backbone.blocks.")
            layer = int(name.split(".")[2]) if stacked else None
            places[name] = Place(shape, (our_path(name),), layer)
    return places


def _tables(model: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(their name, our path, the key of the grid's size) of each position table.

    A model of one block has no tables between blocks; there it has an array of none.
    """
    tables = [(POSITION, "backbone/position", "position_grid")]
    if tuple(model["mid_position_grid"]) and model["depth"] > 1:
        tables.append((MID_POSITION, "backbone/mid_position", "mid_position_grid"))
    return tables


def _to_ours(tensor: Array, path: str) -> Array:
    if tensor.ndim == 4:  # [D, 3, y, x] -> [(y, x, 3), D]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    if tensor.ndim == 3:  # tokens: [1, n, D]
        return tensor[0]
    return tensor.T if path.endswith("kernel") else tensor


def _to_theirs(array: Array, path: str, patch_size: int) -> Array:
    if path == "backbone/patch_embed/kernel":
        return array.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1)
    if path in ("backbone/cls_token", "backbone/det_tokens"):
        return array[None]
    return array.T if path.endswith("kernel") else array


def our_path(name: str) -> str:
    """The path of our parameter that an original tensor goes to; a table's is its folder."""
    if name.startswith("backbone.blocks."):
        return "backbone/blocks/" + BLOCK[name.split(".", 3)[3]]
    tables = {POSITION: "backbone/position", MID_POSITION: "backbone/mid_position"}
    return REST.get(name) or tables[name]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{'a/b/c': leaf} -> nested dict."""
    tree: dict = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree
