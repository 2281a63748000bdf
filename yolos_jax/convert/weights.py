"""Any checkpoint that is known here -> our form -> any layout that is known here."""

from __future__ import annotations

from pathlib import Path

from yolos_jax import checkpoint
from yolos_jax.convert import (
    backbones,
    conversion,
    detr,
    detr_huggingface,
    huggingface,
    names,
    original,
    read,
    resnets,
    systems,
    vit_layouts,
)
from yolos_jax.convert.conversion import Converted, Options
from yolos_jax.convert.read import Source
from yolos_jax.labels import LabelMap
from yolos_jax.models.build import layout_of

# In this order: a YOLOS has a vision transformer's tensors too, a segmentation model a detector's.
_LAYOUTS = (
    (detr.has_masks, detr.refuse_masks),
    (original.recognises, original.convert),
    (huggingface.recognises, huggingface.convert),
    (detr.recognises, detr.convert),
    (detr_huggingface.recognises, detr_huggingface.convert),
    (resnets.recognises, resnets.convert),
    (vit_layouts.recognises, backbones.convert),
)
_KNOWN = (
    "the original YOLOS and DETR, transformers' YOLOS and DETR, DeiT, ViT in the layouts of timm, "
    "transformers and google-research (.npz), ResNet in the layouts of torchvision, timm and "
    "transformers, checkpoints of this project"
)


def open_checkpoint(path: str | Path, options: Options) -> tuple[Converted, Source | None]:
    """Reads a checkpoint of any known kind into our form.

    Args:
      path: a file, a folder, or a name on the Hugging Face hub.
      options: what the checkpoint does not say itself.

    Returns:
      The checkpoint in our form, and the source it came from; None for one of our own.

    Raises:
      ValueError: no checkpoint, of no known kind, or one that does not fit; one message names all
        that is wrong.
    """
    source = None
    if is_ours(path):
        converted = from_ours(path, options)
    else:
        source = read.read(path)
        converted = _from_source(source, path, options)
    preprocess, least = converted.preprocess, layout_of(converted.model).patch_size
    shorter, longer = preprocess["size"], preprocess["max_size"]
    if shorter < least:
        raise ValueError(f"{path}: pictures of {shorter} pixels, expected --size {least} or more")
    if 0 < longer < shorter:
        raise ValueError(
            f"{path}: pictures of {shorter} to {longer} pixels, expected --max_size {shorter} or "
            "more"
        )
    return converted, source


def _from_source(source: Source, path: str | Path, options: Options) -> Converted:
    for recognises, convert in _LAYOUTS:
        if recognises(source.tensors):
            return convert(source, options)
    some = ", ".join(list(source.tensors)[:5])
    raise ValueError(
        f"{path}: {len(source.tensors)} tensors in no layout that is known here ({some}, ...). "
        f"Known: {_KNOWN}."
    )


def is_ours(path: str | Path) -> bool:
    """Whether a path is a run, a folder of our checkpoints, or one of them."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    steps = (child for child in folder.iterdir() if child.name.isdigit() and child.is_dir())
    inside = (folder / name for name in (checkpoint.FOLDER, "metadata"))
    return any(child.is_dir() for child in inside) or any(steps)


def from_ours(path: str | Path, options: Options) -> Converted:
    """Reads a checkpoint of our own; flags change its labels and the size of pictures.

    Raises:
      ValueError: flags say otherwise of the model than the checkpoint.
    """
    params, metadata = checkpoint.load_params(path)
    system = systems.system_of(metadata["model"])
    model = system.model_config(**metadata["model"])
    system.refuse_contradictions(model, options, str(path))
    label_map = LabelMap.from_json(metadata["label_map"])
    if options.labels is not None:
        label_map = conversion.label_map_of(label_map.num_classes, options)
    return Converted(
        kind=f"{system.title} of this project",
        params=params,
        model=model,
        label_map=label_map,
        preprocess=conversion.preprocess_over(metadata["preprocess"], options),
        rows=conversion.loaded_rows(names.flatten(params)),
        new=tuple(metadata.get("new", ())),
    )


def count_parameters(params: dict) -> int:
    """How many numbers a nested dict of arrays holds."""
    return sum(array.size for array in names.flatten(params).values())
