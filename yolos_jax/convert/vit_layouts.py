"""Plain vision transformers in the layouts they are published in, renamed to the original's.

timm's (DeiT plain and distilled, DeiT III, AugReg, MAE, DINO, MoCo v3) and transformers' ViT, DeiT
and MAE are here; the .npz files of google-research are in npz.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from yolos_jax.convert import conversion, huggingface, names, npz, original
from yolos_jax.convert.read import Source

Tensors = dict[str, np.ndarray]

# What a YOLOS does not have, and dropping would leave another function.
_LACKS = {
    r"\.ls[12]\.|\.gamma_[12]$|layer_scale|\.lambda1$": "layer scale",
    r"reg_token|register": "register tokens",
    r"rel_pos|relative_position": "relative positions",
    r"\.[qk]_norm\.": "normalised queries and keys",
    r"fc_norm\.": "a norm after pooling instead of one before it (fc_norm)",
    r"norm_pre\.": "a norm before the blocks (norm_pre)",
    r"mlp\.w\d+\.|mlp\.fc1_[gx]\.|weights_in": "a gated MLP (SwiGLU)",
    r"patch_embed\.backbone|conv_root|(^|/)block\d+/unit": "a convolutional stem",
    r"\.(q|v)_bias$": "query and value biases apart (BEiT)",
}
# What pre-training needed and no detector does.
_IGNORED = (
    r"^(head|head_dist|pre_logits|fc|predictor|projector)[._/]",
    r"^(dist_token|mask_token)$",
    r"^decoder",
    r"^(classifier|cls_classifier|distillation_classifier|lm_head)\.",
    r"^vit\.(pooler\.|embeddings\.(distillation_token|mask_token)$)",
    r"^MAPHead_0/",
)
_ASSUMED = (
    "ASSUMED: pictures are normalised with ImageNet's mean and std, for the checkpoint does not "
    "say. Where it was trained otherwise (AugReg: 0.5), set config.preprocess.mean and .std."
)
_VIT_TABLE = "vit.embeddings.position_embeddings"


class Backbone(NamedTuple):
    """A transformer in the original's names, before it becomes a detector."""

    kind: str
    tensors: Tensors  # backbone.*; the position table is [1, rows, D] as it was
    source_names: dict[str, str]  # of these tensors, in the checkpoint
    unused: tuple[str, ...]  # names in the checkpoint
    heads: int | None  # where the checkpoint says
    grid: tuple[int, int] | None  # of the position table, where the checkpoint says
    prefix_tokens: int | None  # rows of the table before the patches', where it is certain
    mean: tuple[float, ...] = conversion.IMAGENET_MEAN
    std: tuple[float, ...] = conversion.IMAGENET_STD
    notes: tuple[str, ...] = ()  # what had to be assumed
    layer_norm_eps: float = 1e-6  # of DeiT, timm and google-research


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of a plain vision transformer in a known layout."""
    return any(known(tensors) for known in (_is_timm, _is_transformers, npz.recognises))


def backbone_of(source: Source) -> Backbone:
    """Renames a transformer, after checking that it is nothing but one.

    Raises:
      ValueError: parts that a YOLOS lacks; tensors missing, surplus or misshapen.
    """
    refuse_foreign_parts(source)
    if npz.recognises(source.tensors):
        return _from_npz(source)
    if _is_timm(source.tensors):
        return _from_timm(source)
    return _from_transformers(source)


def refuse_foreign_parts(source: Source) -> None:
    """Raises ValueError naming each part that YOLOS lacks, with an example tensor."""
    found = []
    for pattern, part in _LACKS.items():
        matches = [name for name in source.tensors if re.search(pattern, name)]
        if matches:
            found.append(f"{part} ({matches[0]}{', ...' if len(matches) > 1 else ''})")
    if found:
        raise ValueError(
            f"{source.path}: this transformer has parts that YOLOS lacks, and without them it "
            f"would be another network: {'; '.join(found)}."
        )


def _is_timm(tensors: Mapping[str, np.ndarray]) -> bool:
    return "patch_embed.proj.weight" in tensors


def _is_transformers(tensors: Mapping[str, np.ndarray]) -> bool:
    return any(name.endswith("patch_embeddings.projection.weight") for name in tensors)


def _from_timm(source: Source) -> Backbone:
    wanted, unused = _without_ignored(source.tensors)
    tensors = {f"backbone.{name}": tensor for name, tensor in wanted.items()}
    width, _, _, patch_size = tensors["backbone.patch_embed.proj.weight"].shape
    hidden = tensors.get("backbone.blocks.0.mlp.fc1.weight", np.zeros((4 * width, 0)))
    shapes = _shapes(
        width,
        original.depth_of(tensors, "backbone.blocks."),
        hidden.shape[0],
        patch_size,
        tensors.get(names.POSITION),
    )
    without_bias = not any(name.endswith("attn.qkv.bias") for name in wanted)
    if without_bias:  # zeros are the same network
        tensors |= {
            name: np.zeros(shape, np.float32)
            for name, shape in shapes.items()
            if name.endswith("attn.qkv.bias")
        }
    short = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    expected = {name.removeprefix("backbone."): shape for name, shape in shapes.items()}
    names.check(short, expected, source.path)
    # A folder of timm's hub; the file alone does not say. Older ones have these keys outermost.
    stored = source.config.get("pretrained_cfg", source.config)
    told = "mean" in stored and "std" in stored
    return Backbone(
        kind="a vision transformer in the layout of DeiT and timm",
        tensors=tensors,
        source_names={
            f"backbone.{name}": name if name in wanted else f"{name} (absent: zeros)"
            for name in short
        },
        unused=unused + source.unused,
        heads=None,
        grid=None,
        prefix_tokens=2 if "dist_token" in source.tensors else None,
        mean=tuple(stored["mean"]) if told else conversion.IMAGENET_MEAN,
        std=tuple(stored["std"]) if told else conversion.IMAGENET_STD,
        notes=() if told else (_ASSUMED,),
    )


def _from_transformers(source: Source) -> Backbone:
    config = source.config
    if not config:
        raise ValueError(
            f"{source.path}: config.json is needed beside these weights; name the folder of both."
        )
    huggingface.refuse_other(config, source.path)
    renamed = {_vit_name(name): name for name in source.tensors}
    wanted, unused = _without_ignored({new: source.tensors[old] for new, old in renamed.items()})
    patch_size = huggingface.pair(config.get("patch_size", 16))[0]
    shapes = _shapes(
        int(config["hidden_size"]),
        int(config["num_hidden_layers"]),
        int(config["intermediate_size"]),
        patch_size,
        wanted.get(_VIT_TABLE),
    )
    wanted, zeros = huggingface.with_qkv_bias(wanted, config, shapes)
    tensors = huggingface.to_original(wanted, shapes, source.path)
    renamed |= {row.name: f"{row.name} (absent: zeros)" for row in zeros}
    return Backbone(
        kind=f"{config.get('model_type', 'a vision transformer')} of transformers",
        tensors=tensors,
        source_names={
            name: ", ".join(renamed[part] for part in huggingface.their_names(name))
            for name in tensors
        },
        unused=tuple(renamed[name] for name in unused),
        heads=int(config["num_attention_heads"]),
        grid=tuple(side // patch_size for side in huggingface.pair(config["image_size"])),
        prefix_tokens=2 if "vit.embeddings.distillation_token" in renamed else 1,
        mean=tuple(source.preprocessor.get("image_mean", conversion.IMAGENET_MEAN)),
        std=tuple(source.preprocessor.get("image_std", conversion.IMAGENET_STD)),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )


def _from_npz(source: Source) -> Backbone:
    prefix = npz.prefix_of(source.tensors)
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }
    wanted, unused = _without_ignored(inside)
    tensors, source_names, heads = npz.to_original(wanted, source.path)
    return Backbone(
        kind="a vision transformer of google-research (.npz)",
        tensors=tensors,
        source_names=source_names,
        unused=tuple(prefix + name for name in unused)
        + tuple(name for name in source.tensors if not name.startswith(prefix)),
        heads=heads,
        grid=None,
        prefix_tokens=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def _without_ignored(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    unused = tuple(n for n in tensors if any(re.search(pattern, n) for pattern in _IGNORED))
    return {name: tensor for name, tensor in tensors.items() if name not in unused}, unused


def _vit_name(name: str) -> str:
    """transformers' names with the model's own prefix (vit., deit., none) as 'vit.'."""
    if name.startswith("deit."):
        return f"vit.{name.removeprefix('deit.')}"
    bare = name.startswith(("embeddings.", "encoder.", "layernorm.", "pooler."))
    return f"vit.{name}" if bare else name


def _shapes(
    width: int, depth: int, mlp_width: int, patch_size: int, table: np.ndarray | None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer in the original's layout; the table as it is."""
    model = conversion.model_config(
        patch_size=patch_size,
        width=width,
        depth=depth,
        mlp_width=mlp_width,
        num_queries=0,
        position_grid=(1, 1),
        mid_position_grid=(),
    )
    shapes = names.expected_shapes(model, num_classes=0)
    rows = table.shape[1] if table is not None and table.ndim == 3 else 1
    return {
        name: (1, rows, width) if name == names.POSITION else shape
        for name, shape in shapes.items()
        if name.startswith("backbone.") and name != "backbone.det_token"
    }
