"""What folders of Hugging Face's transformers say of classes and pictures, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from yolos_jax.convert import conversion
from yolos_jax.convert.conversion import Options
from yolos_jax.convert.read import Source
from yolos_jax.labels import LabelMap

# What a checkpoint of our own adds to config.json: ids by name, of categories that are not their
# slots. By name, because whoever fine-tunes it for other classes leaves the key as it is.
_CATEGORY_IDS = "category_ids"
_EXIF = "exif"  # ... and to preprocessor_config.json, where pictures are turned as their tags say
_NO_LIMIT = 1 << 20  # pixels of a longer side: transformers cannot say that there is no most


def config_of(source: Source) -> dict[str, Any]:
    """config.json; ValueError where the checkpoint is a file without one beside it."""
    if not source.config:
        raise ValueError(
            f"{source.path}: config.json is needed beside these weights; name the folder of both."
        )
    return source.config


def preprocess(source: Source, options: Options, published: int) -> dict[str, Any]:
    """preprocessor_config.json -> the keys of ``config.preprocess``.

    Args:
      source: the folder.
      options: the flags, which win.
      published: shorter side of pictures, pixels, where the folder does not say.
    """
    found = source.preprocessor
    size = found.get("size")
    if isinstance(size, int):  # before transformers 4.26
        size = {"shortest_edge": size}
    if size is None:
        size = {"shortest_edge": published, "longest_edge": conversion.longest_side(published)}
    if not isinstance(size, dict) or "shortest_edge" not in size:
        if not options.size:
            raise ValueError(
                f"{source.path}/preprocessor_config.json: size is {size}, expected shortest_edge "
                "and longest_edge; give --size and --max_size."
            )
        size = {"shortest_edge": options.size}
    shorter = int(size["shortest_edge"])
    longer = int(size.get("longest_edge") or found.get("max_size") or max(1333, shorter))
    normal = found.get("do_normalize", True)
    return conversion.preprocess_of(
        shorter,
        0 if longer == _NO_LIMIT else longer,
        options,
        found.get("image_mean", conversion.IMAGENET_MEAN) if normal else (0.0, 0.0, 0.0),
        found.get("image_std", conversion.IMAGENET_STD) if normal else (1.0, 1.0, 1.0),
        "apply" if found.get(_EXIF) == "apply" else "ignore",
    )


def assumed(source: Source, options: Options, found: Mapping[str, Any]) -> tuple[str, ...]:
    """What ``preprocess`` found where neither folder nor flags say it, in words."""
    if "size" in source.preprocessor or options.size:
        return ()
    return (
        f"ASSUMED: pictures of {found['size']} pixels on the shorter side, for no "
        "preprocessor_config.json says it; --size says otherwise.",
    )


def label_map_of_config(
    config: Mapping[str, Any], options: Options
) -> tuple[LabelMap, tuple[str, ...]]:
    """id2label of config.json -> names and ids of the classes, and notes; --labels wins."""
    by_slot = {int(slot): str(name) for slot, name in (config.get("id2label") or {}).items()}
    # transformers leaves id2label out where it is LABEL_0, LABEL_1: its default of two classes.
    num_classes = len(by_slot) or int(config.get("num_labels", 2))
    if sorted(by_slot) != list(range(len(by_slot))):
        raise ValueError(
            f"config.json: id2label has the slots {sorted(by_slot)}, expected 0, 1, ..."
        )
    generic = all(re.fullmatch(r"LABEL_\d+", name) for name in by_slot.values())
    if options.labels is not None or generic:
        return conversion.label_map_of(num_classes, options), ()
    names = tuple(by_slot[slot] for slot in range(num_classes))
    ids = config.get(_CATEGORY_IDS) or {}
    if isinstance(ids, dict) and set(names) <= set(ids):
        return LabelMap(tuple(int(ids[name]) for name in names), names), ()
    note = f"config.json: {_CATEGORY_IDS} is of other classes than id2label; ids are slots"
    return LabelMap(tuple(range(num_classes)), names), (note,) if ids else ()


def labels_of_map(label_map: LabelMap) -> dict[str, Any]:
    """Names and ids of the classes as config.json has them."""
    config: dict[str, Any] = {
        "id2label": {str(slot): name for slot, name in enumerate(label_map.names)},
        "label2id": {name: slot for slot, name in enumerate(label_map.names)},
    }
    if label_map.category_ids != tuple(range(label_map.num_classes)):
        config[_CATEGORY_IDS] = dict(zip(label_map.names, label_map.category_ids, strict=True))
    return config


def preprocessor_of(preprocess_config: Mapping[str, Any], processor: str) -> dict[str, Any]:
    """The keys of ``config.preprocess`` and transformers' class -> preprocessor_config.json."""
    turned = {_EXIF: "apply"} if preprocess_config.get(_EXIF) == "apply" else {}
    return turned | {
        "image_processor_type": processor,
        "do_resize": True,
        "size": {
            "shortest_edge": preprocess_config["size"],
            "longest_edge": preprocess_config["max_size"] or _NO_LIMIT,
        },
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_config["mean"]),
        "image_std": list(preprocess_config["std"]),
        "do_pad": True,
        "format": "coco_detection",
    }
