"""Vision transformers of google-research: .npz files of vision_transformer and big_vision.

Names are those of the Flax modules. vision_transformer counts submodules through a block
(LayerNorm_2, MlpBlock_3), big_vision per class (LayerNorm_1, MlpBlock_0) and may stack its blocks.
Both use the tanh form of GELU in pre-training where YOLOS has the exact one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from yolos_jax.convert import names

Tensors = dict[str, np.ndarray]

_EMBEDDING = "embedding/kernel"
_PREFIXES = ("", "params/", "params/img/", "opt/target/")
_TABLES = (
    "Transformer/posembed_input/pos_embedding",
    "Transformer/pos_embedding",
    "pos_embedding",
)
_TOP = {
    "backbone.patch_embed.proj.weight": _EMBEDDING,
    "backbone.patch_embed.proj.bias": "embedding/bias",
    "backbone.norm.weight": "Transformer/encoder_norm/scale",
    "backbone.norm.bias": "Transformer/encoder_norm/bias",
}


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the arrays of such a file."""
    return any(prefix + _EMBEDDING in tensors for prefix in _PREFIXES)


def prefix_of(tensors: Mapping[str, np.ndarray]) -> str:
    """What stands before the names of the image transformer."""
    return next(prefix for prefix in _PREFIXES if prefix + _EMBEDDING in tensors)


def to_original(tensors: Tensors, where: str) -> tuple[Tensors, dict[str, str], int]:
    """Renames to the original's layout.

    Args:
      tensors: without prefix and heads.
      where: what to call the file in errors.

    Returns:
      The tensors (without ``backbone.cls_token`` where the file has none), their names in the
      file, and the number of attention heads.

    Raises:
      ValueError: naming every array missing, surplus or of another size.
    """
    tensors = _unstacked(tensors)
    table = next((name for name in _TABLES if name in tensors), None)
    if table is None:
        raise ValueError(
            f"{where}: no position table (one of {', '.join(_TABLES)}). A fixed sine-cosine one "
            "is not stored, and its grid is not known."
        )
    sources = _sources(tensors)
    if "cls" in tensors:
        sources["backbone.cls_token"] = ["cls"]
    shapes = _shapes(tensors)
    used = {table, *(part for parts in sources.values() for part in parts)}
    wrong = [f"missing: {name}" for name in sorted(used - set(tensors))]
    wrong += [f"not part of the model: {name}" for name in tensors if name not in used]
    result: Tensors = {names.POSITION: tensors[table]}
    for name, parts in sources.items():
        if any(part not in tensors for part in parts):
            continue
        shape = shapes[name]
        one = (shape[0] // len(parts), *shape[1:])
        misfits = [part for part in parts if tensors[part].size != np.prod(one)]
        wrong += [f"{part} has shape {tensors[part].shape}, expected {one}" for part in misfits]
        if not misfits:
            result[name] = np.concatenate([_to_torch(tensors[part], one) for part in parts])
    if wrong:
        raise ValueError(f"{where} does not fit the model:\n  " + "\n  ".join(wrong))
    source_names = {name: ", ".join(parts) for name, parts in sources.items()}
    query = next(name for name in tensors if name.endswith("query/bias"))
    return result, source_names | {names.POSITION: table}, int(tensors[query].shape[0])


def _unstacked(tensors: Tensors) -> Tensors:
    """Blocks one by one, where big_vision's scan has stacked them."""
    stacked = "Transformer/encoderblock/"
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(stacked):
            rest = name.removeprefix(stacked)
            result |= {
                f"Transformer/encoderblock_{i}/{rest}": layer for i, layer in enumerate(tensor)
            }
        else:
            result[name] = tensor
    return result


def _depth(tensors: Tensors) -> int:
    found = (re.match(r"Transformer/encoderblock_(\d+)/", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _sources(tensors: Tensors) -> dict[str, list[str]]:
    """Original name -> names in the file."""
    newer = any("/MlpBlock_0/" in name for name in tensors)
    attention, norm2, mlp = (0, 1, 0) if newer else (1, 2, 3)
    sources = {name: [theirs] for name, theirs in _TOP.items()}
    for i in range(_depth(tensors)):
        ours, theirs = f"backbone.blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for kind, linear, norm in (("weight", "kernel", "scale"), ("bias", "bias", "bias")):
            heads = f"{theirs}MultiHeadDotProductAttention_{attention}/"
            qkv = [f"{heads}{part}/{linear}" for part in ("query", "key", "value")]
            sources |= {
                f"{ours}norm1.{kind}": [f"{theirs}LayerNorm_0/{norm}"],
                f"{ours}attn.qkv.{kind}": qkv,
                f"{ours}attn.proj.{kind}": [f"{heads}out/{linear}"],
                f"{ours}norm2.{kind}": [f"{theirs}LayerNorm_{norm2}/{norm}"],
                f"{ours}mlp.fc1.{kind}": [f"{theirs}MlpBlock_{mlp}/Dense_0/{linear}"],
                f"{ours}mlp.fc2.{kind}": [f"{theirs}MlpBlock_{mlp}/Dense_1/{linear}"],
            }
    return sources


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    patch_size, _, _, width = tensors[_EMBEDDING].shape
    hidden = [tensor for name, tensor in tensors.items() if name.endswith("Dense_0/bias")]
    model = {
        "patch_size": patch_size,
        "width": width,
        "depth": _depth(tensors),
        "mlp_width": hidden[0].size if hidden else 4 * width,
        "num_queries": 0,
        "position_grid": (1, 1),
        "mid_position_grid": (),
    }
    return names.expected_shapes(model, num_classes=0)


def _to_torch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A Flax array in torch's layout; per-head axes of the attention are merged."""
    if len(shape) == 4:
        return array.transpose(3, 2, 0, 1)
    return array.reshape(shape[::-1]).T if len(shape) == 2 else array.reshape(shape)
