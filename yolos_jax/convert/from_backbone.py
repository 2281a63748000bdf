"""A detector to train, of a pre-trained backbone and of what is drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yolos_jax.convert import conversion, names
from yolos_jax.convert.conversion import Converted, Options, Row
from yolos_jax.labels import LabelMap


def label_map_of(options: Options) -> LabelMap:
    """The classes of a new head: those of --labels, or COCO's."""
    return conversion.labels_of(options.labels) if options.labels else LabelMap.coco91()


def converted(
    backbone: Any,
    params: dict,
    new: Sequence[str],
    model: Mapping[str, Any],
    size: int,
    options: Options,
    changed: Mapping[str, Row] | None = None,
) -> Converted:
    """A start as a conversion.

    Args:
      backbone: ``kind``, ``tensors``, ``source_names``, ``unused``, ``mean``, ``std`` and ``notes``
        of a ``vit_layouts.Backbone`` or a ``resnets.Backbone``.
      params: of the detector.
      new: paths of those that the backbone does not have.
      model: the keys of ``config.model``.
      size: shorter side of pictures, pixels, unless a flag says otherwise.
      options: the flags.
      changed: rows of tensors that were not taken as they are, by the original's name.
    """
    rows = {
        name: Row("loaded", theirs, str(backbone.tensors[name].shape))
        for name, theirs in backbone.source_names.items()
    }
    shapes = {path: str(array.shape) for path, array in names.flatten(params).items()}
    return Converted(
        kind=f"start from {backbone.kind}",
        params=params,
        model=dict(model),
        label_map=label_map_of(options),
        preprocess=conversion.preprocess_of(
            size, conversion.longest_side(size), options, backbone.mean, backbone.std
        ),
        rows=(
            *(rows | dict(changed or {})).values(),
            *(Row("unused", name) for name in backbone.unused),
            *(Row("new", path, shapes[path]) for path in new),
        ),
        new=tuple(new),
        notes=backbone.notes,
    )
