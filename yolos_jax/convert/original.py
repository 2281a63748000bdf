"""Checkpoints of the original YOLOS code (hustvl/YOLOS)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from yolos_jax.convert import conversion, names
from yolos_jax.convert.conversion import Converted, Options
from yolos_jax.convert.read import Source
from yolos_jax.labels import LabelMap


def recognises(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of an original YOLOS."""
    return "backbone.det_token" in tensors


def convert(source: Source, options: Options) -> Converted:
    """Original YOLOS -> ours; strict.

    Raises:
      ValueError: tensors missing, surplus or misshapen; heads or grids that cannot be known.
    """
    model, num_classes = infer_model(source, options)
    params = names.to_params(source.tensors, model, num_classes, source.path)
    size = int(source.args.get("eval_size") or _published_size(model["width"]))
    preprocess = conversion.preprocess_of(size, conversion.longest_side(size), options)
    label_map = conversion.label_map_of(num_classes, options)
    if source.extras:  # written here: what the layout has no place for
        preprocess = conversion.preprocess_over(source.extras["preprocess"], options)
        if options.labels is None:
            label_map = LabelMap.from_json(source.extras["label_map"])
    return Converted(
        kind="YOLOS in the original layout",
        params=params,
        model=model,
        label_map=label_map,
        preprocess=preprocess,
        rows=conversion.loaded_rows(source.tensors),
    )


def infer_model(source: Source, options: Options) -> tuple[dict, int]:
    """Reads the keys of ``config.model`` and the number of classes off the tensors."""
    shape = shapes_of(source, "backbone.")
    last = shape("class_embed.layers.2.bias")
    width = shape("backbone.cls_token")[-1]
    patch_size = shape("backbone.patch_embed.proj.weight")[-1]
    queries = shape("backbone.det_token")[-2]
    published = conversion.PUBLISHED.get(width)
    stored = source.extras.get("model", {})
    mid_grid: tuple[int, ...] = ()
    if names.MID_POSITION in source.tensors:
        mid_grid = conversion.table_grid(
            shape(names.MID_POSITION)[-2] - 1 - queries,
            [
                ("flag", options.mid_pe_size),
                ("args", source.args.get("mid_pe_size")),
                ("the published model", _pixels(published, "mid_position_grid", patch_size)),
            ],
            patch_size,
            "mid_pe_size",
        )
    grid = conversion.table_grid(
        shape(names.POSITION)[-2] - 1 - queries,
        [
            ("flag", options.init_pe_size),
            ("args", source.args.get("init_pe_size")),
            ("the published model", _pixels(published, "position_grid", patch_size)),
        ],
        patch_size,
        "init_pe_size",
    )
    model = conversion.model_config(
        patch_size=patch_size,
        width=width,
        depth=depth_of(source.tensors, "backbone.blocks."),
        heads=stored.get("heads") or conversion.heads_of(width, options),
        layer_norm_eps=stored.get("layer_norm_eps", 1e-6),
        mlp_width=shape("backbone.blocks.0.mlp.fc1.bias")[0],
        num_queries=queries,
        position_grid=grid,
        mid_position_grid=mid_grid,
    )
    conversion.refuse_contradictions(model, options, source.path)
    return model, last[0] - 1


def original_args(converted: Converted) -> dict:
    """What the original's code looks for beside its tensors: its command line."""
    model = converted.model
    patch = model["patch_size"]
    mid = [side * patch for side in model["mid_position_grid"]]
    return {
        "init_pe_size": [side * patch for side in model["position_grid"]],
        "mid_pe_size": mid or None,
        "det_token_num": model["num_queries"],
        "eval_size": converted.preprocess["size"],
    }


def shapes_of(source: Source, layout: str):
    """A function from a tensor's name to its shape whose error names the file."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in source.tensors:
            raise ValueError(
                f"{source.path}: {name} is missing, which this layout ({layout}*) needs; "
                f"{len(source.tensors)} tensors are there."
            )
        return tuple(source.tensors[name].shape)

    return shape


def depth_of(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    """The number of blocks: one more than the largest index after ``prefix``."""
    indices = [
        int(name.removeprefix(prefix).split(".")[0])
        for name in tensors
        if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0].isdigit()
    ]
    return 1 + max(indices, default=-1)


def _pixels(published, key: str, patch_size: int) -> tuple[int, ...] | None:
    grid = getattr(published, key) if published else ()
    return tuple(side * patch_size for side in grid) or None


def _published_size(width: int) -> int:
    return conversion.PUBLISHED[width].size if width in conversion.PUBLISHED else 800
