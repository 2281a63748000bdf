"""A trained detector as its users call it: pictures in, boxes out.

    detector = yolos_jax.load("runs/demo")
    for found in detector.predict(["street.jpg"], threshold=0.7):
        print(found.names, found.boxes_xyxy_px)

Needs neither tensorflow nor pycocotools nor torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from yolos_jax import checkpoint, given, losses
from yolos_jax.batch import Batch, Bucket, Canvas, Detections
from yolos_jax.data import image as image_lib
from yolos_jax.labels import LabelMap
from yolos_jax.models import attention as attention_lib
from yolos_jax.models.build import build_model
from yolos_jax.programs import jit

Array = np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What was found on one picture, best first."""

    boxes_xyxy_px: Array  # float32 [n, 4], in pixels of the picture; may reach beyond its border
    scores: Array  # float32 [n], 0..1
    category_ids: Array  # int64 [n], of the dataset the detector was trained on
    names: tuple[str, ...]  # n names of classes

    def to_dict(self) -> dict[str, list]:
        """Plain lists, for JSON."""
        return {
            "boxes_xyxy_px": self.boxes_xyxy_px.tolist(),
            "scores": self.scores.tolist(),
            "category_ids": self.category_ids.tolist(),
            "names": list(self.names),
        }


@dataclass(frozen=True)
class RawOutputs:
    """What the network itself returns, numpy float32; T = 1 + Q + N tokens, h * w cells."""

    pred_logits: Array  # [B, Q, K + 1]; the last is no-object
    pred_boxes: Array  # [B, Q, 4], cxcywh relative to the picture, 0..1
    # [B, H, T, T], last block; tokens: class, detection, patches. Of a DETR [B, H, Q, h * w], last
    # decoder layer to the encoder's cells.
    attention: Array | None = None
    blocks: Array | None = None  # [L, B, T, D], after each block and before its position table
    embed: Array | None = None  # [B, T, D], before the first block
    norm: Array | None = None  # [B, T, D], after the last LayerNorm
    # Of a DETR:
    feature: Array | None = None  # [B, h, w, C], the backbone's
    real: Array | None = None  # bool [B, h, w]: cells that look at the picture
    position: Array | None = None  # [B, h, w, D], encodings
    memory: Array | None = None  # [B, h, w, D], the encoder's
    decoder: Array | None = None  # [A, B, Q, D], after the LayerNorm that its layers share


class Detector:
    """A model with its parameters, its classes and the way it wants pictures."""

    def __init__(
        self,
        params: Mapping[str, Any],
        metadata: Mapping[str, Any],
        *,
        dtype: str | None = None,
        attention: str | None = None,
    ):
        """Makes a detector of a checkpoint's content.

        Args:
          params: nested dict of float32 arrays.
          metadata: what ``checkpoint.load_params`` returns beside them.
          dtype: of matrix products, 'float32' or 'bfloat16', for predictions and outputs. None:
            outputs in float32; predictions in float32 on the CPU, where bfloat16 is slow, and in
            the type the model was trained with elsewhere.
          attention: a backend of models/attention.py. None: the checkpoint's; 'auto' where that is
            a kernel of the platform it was trained on.
        """
        config = dict(metadata["model"])
        if "attention" in config:  # a DETR's has one form
            config["attention"] = attention_lib.portable(config["attention"])
        if attention is not None:
            config["attention"] = attention
        on_cpu = jax.default_backend() == "cpu"
        predict_dtype = dtype or ("float32" if on_cpu else config["dtype"])
        num_classes = metadata["num_classes"]
        self.model = build_model({**config, "dtype": predict_dtype}, num_classes)
        self._outputs_model = build_model({**config, "dtype": dtype or "float32"}, num_classes)
        self.params = jax.device_put(dict(params))
        self.metadata = dict(metadata)
        self.label_map = LabelMap.from_json(metadata["label_map"])
        self.preprocess = dict(metadata["preprocess"])
        self.exif = self.preprocess.get("exif", "ignore")  # as training saw its pictures
        # Padding to few lengths: programs are compiled once for each.
        self._multiple, self._batch_size = (64, 1) if on_cpu else (128, 8)

    def predict(self, pictures: Any, threshold: float = 0.5, top_k: int = 0) -> list[Prediction]:
        """Finds objects on pictures.

        A picture's predictions depend neither on the others nor on how many there are.

        Args:
          pictures: a picture or a sequence of them: paths, PIL pictures, or uint8 arrays
            [height, width, 3]. Where training turned pictures as their EXIF tags say (``exif`` is
            'apply'), paths are, and PIL pictures that have the tag still: ImageOps.exif_transpose
            takes it off, rotate() does not. Arrays are taken as they are.
          threshold: least score of a box.
          top_k: boxes per picture at most; 0: as many as there are detection tokens.

        Returns:
          One Prediction per picture, in their order.

        Raises:
          ValueError: no such picture, not a picture, not one of the three kinds, by its path or
            as 'picture N', counted from 0; a threshold that is no score; a negative ``top_k``.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a score, 0 to 1")
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}, expected 0 or more")
        images = [
            given.to_array(picture, self.exif, given.name_of(i, picture))
            for i, picture in enumerate(given.as_list(pictures))
        ]
        layout = self.model.layout
        prepared = [
            image_lib.preprocess(image, self.preprocess, layout.patch_size) for image in images
        ]
        groups: dict[Bucket, list[int]] = {}
        for i, (_, grid) in enumerate(prepared):
            groups.setdefault(layout.bucket_of(grid, self._multiple), []).append(i)
        results: dict[int, Prediction] = {}
        for bucket, members in groups.items():
            for start in range(0, len(members), self._batch_size):
                chunk = members[start : start + self._batch_size]
                sizes = [images[i].shape[:2] for i in chunk]
                found = self._detect([prepared[i] for i in chunk], sizes, bucket)
                for row, i in enumerate(chunk):
                    results[i] = self._choose(found, row, threshold, top_k)
        return [results[i] for i in range(len(images))]

    def outputs(self, pixels: Any, capture: bool = False) -> RawOutputs:
        """The network's outputs for pictures that are already normalised, as PyTorch's on them.

        The whole canvas is the picture: padding in it is seen as pixels. Sides are cut to
        multiples of a YOLOS's patch size, as a convolution with that stride does.

        Args:
          pixels: float32 [B, H, W, 3].
          capture: also return what happened inside.

        Raises:
          ValueError: another shape, or a side smaller than a patch.
        """
        layout = self.model.layout
        patch_size = layout.patch_size
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or min(pixels.shape[1:3]) < patch_size:
            raise ValueError(
                f"pixels have shape {pixels.shape}, expected [B, H, W, 3] with sides of at least "
                f"{patch_size}"
            )
        if pixels.dtype.kind != "f":
            raise ValueError(f"pixels are {pixels.dtype}, expected normalised float32")
        batch, bucket = layout.whole(pixels)
        bounds = (bucket.rows, bucket.cols)
        forward = jit(_forward, static_argnums=(0, 3, 4))
        outputs, captured = forward(self._outputs_model, self.params, batch, bounds, capture)
        outputs, captured = jax.device_get((outputs, captured))
        return RawOutputs(outputs.pred_logits[-1], outputs.pred_boxes[-1], **captured)

    def _detect(
        self,
        prepared: Sequence[tuple[Array, tuple[int, int]]],
        sizes: Sequence[tuple[int, int]],
        bucket: Bucket,
    ) -> Detections:
        """Runs pictures of one static shape; rows beyond theirs are padding."""
        mean, std = (tuple(self.preprocess[key]) for key in ("mean", "std"))
        rows = 1 << (len(prepared) - 1).bit_length()  # few batch sizes too
        batch = bucket.empty(rows, self.model.layout.patch_size)
        original_size = np.ones((rows, 2), np.int32)
        original_size[: len(prepared)] = sizes
        for row, (cells, grid) in enumerate(prepared):
            batch.put(row, cells, grid)
        arrays = self.params, batch, original_size
        detect = jit(_detections, static_argnums=(0, 4, 5, 6))
        return jax.device_get(detect(self.model, *arrays, bucket, mean, std))

    def _choose(self, found: Detections, row: int, threshold: float, top_k: int) -> Prediction:
        scores = found.scores[row]
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold][: top_k or None]
        slots = found.labels[row][order]
        return Prediction(
            boxes_xyxy_px=found.boxes_xyxy_px[row][order],
            scores=scores[order],
            category_ids=self.label_map.ids(slots),
            names=tuple(self.label_map.names[slot] for slot in slots),
        )


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    size: int | None = None,
    max_size: int | None = None,
) -> Detector:
    """Loads a detector from a run's work directory, or from a converted checkpoint.

    Args:
      path: of a run (its best checkpoint by AP, else its last), a folder of checkpoints, or one.
      dtype: see ``Detector``.
      attention: see ``Detector``.
      size: shorter side that pictures are resized to, pixels, instead of the checkpoint's.
      max_size: longer side at most, likewise.

    Raises:
      ValueError: no checkpoint there, one that is damaged, or sizes that no picture can have.
    """
    params, metadata = checkpoint.load_params(path)
    given = {"size": size, "max_size": max_size}
    given = {key: value for key, value in given.items() if value is not None}
    preprocess = {**metadata["preprocess"], **given}
    shorter, longer = preprocess["size"], preprocess["max_size"]
    least = metadata["model"].get("patch_size", 1)
    if given and (shorter < least or not (longer == 0 or shorter <= longer)):
        raise ValueError(
            f"size is {shorter} and max_size {longer}; expected {least} or more pixels, and a "
            "max_size that is no less (0: no limit)"
        )
    metadata = {**metadata, "preprocess": preprocess}
    if metadata.get("new"):
        warnings.warn(
            f"{path}: its heads are random, it is a start for training and no detector yet "
            f"({metadata['source']})",
            stacklevel=2,
        )
    return Detector(params, metadata, dtype=dtype, attention=attention)


def _forward(
    model: Any, params: dict, batch: Batch | Canvas, bounds: tuple[int, int], capture: bool
):
    outputs = model.apply(params, batch, bounds=bounds, capture=capture)
    return outputs if capture else (outputs, {})


def _detections(
    model: Any,
    params: dict,
    batch: Batch | Canvas,
    original_size: Array,
    bucket: Bucket,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Detections:
    outputs = model.apply(params, batch.normalised(mean, std), bounds=(bucket.rows, bucket.cols))
    return losses.postprocess(outputs, original_size)
