"""The data of a run: both splits, and the static shapes that they are read in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from yolos_jax.batch import Bucket
from yolos_jax.data import cache, files, shards
from yolos_jax.data import index as index_lib
from yolos_jax.data import plan as plan_lib
from yolos_jax.data import truth as truth_lib
from yolos_jax.evaluation import round_up_batch
from yolos_jax.models.build import layout_of


@dataclasses.dataclass(frozen=True)
class Data:
    """The two splits, and the static shapes that they are read in."""

    train: index_lib.Index
    val: index_lib.Index
    ground_truth: dict  # of val, for pycocotools
    recipe: plan_lib.Recipe
    buckets: tuple[Bucket, ...]
    eval_plan: plan_lib.Plan

    @functools.cached_property
    def validation_set(self) -> str:
        """Sixteen hexadecimal digits that differ when images or boxes of ``val`` do.

        Not when only folders or batches do: the AP of two evaluations compares then.
        """
        val = self.val
        columns = (val.image_ids, val.heights, val.widths, val.box_offsets, val.boxes_xyxy_px)
        digest = hashlib.sha256()
        for column in (*columns, val.labels):
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()[:16]


class Split(NamedTuple):
    """One split as the configuration names it."""

    annotations: str  # COCO file, relative to data.root
    images: str  # folder, relative to data.root
    tfds_split: str  # instead of the folder, when there is a data.tfds_name
    options: dict[str, Any]  # of ``index.from_coco``
    scored: bool  # whether ground truth is wanted


def splits_of(data: ConfigDict) -> tuple[Split, Split]:
    """The training and the validation split of ``config.data``."""
    options = {"labels": data.labels, "on_error": data.on_error, "exif": data.exif}
    train = options | {"keep_empty": data.keep_empty}
    val = options | {"keep_empty": True}
    return (
        Split(data.train_annotations, data.train_images, data.tfds_train, train, False),
        Split(data.val_annotations, data.val_images, data.tfds_val, val, True),
    )


def load_data(
    config: ConfigDict,
    device_mesh: jax.sharding.Mesh,
    cache_dir: str | os.PathLike,
    say: Callable[[str], None] = print,
) -> Data:
    """Reads the annotations of both splits and chooses the shapes of their batches.

    Args:
      config: as configs/common.py.
      device_mesh: of the run.
      cache_dir: folder for what was read, so that it is read once.
      say: prints a line for people.

    Raises:
      ValueError: the data make no sense; see ``index.load_coco`` and ``data.tfds``.
    """
    (train, _), (val, truth) = (
        read_split(config.data, split, cache_dir, say) for split in splits_of(config.data)
    )
    if train.label_map != val.label_map:
        raise ValueError(
            "the categories of the two splits differ:\n"
            f"{train.annotations}: {train.label_map.to_json()}\n"
            f"{val.annotations}: {val.label_map.to_json()}"
        )
    train = train.subset(config.data.train_subset) if config.data.train_subset else train
    val = val.subset(config.data.val_subset) if config.data.val_subset else val
    layout = layout_of(config.model)
    recipe = plan_lib.Recipe.from_config(config, layout.patch_size)
    eval_recipe = plan_lib.EvalRecipe.from_config(config, layout.patch_size)
    shape = (config.buckets.count, config.buckets.multiple)
    return Data(
        train=train,
        val=val,
        ground_truth=truth,
        recipe=recipe,
        buckets=layout.buckets(train, recipe, *shape),
        eval_plan=plan_lib.make_eval_plan(
            val,
            eval_recipe,
            layout.buckets(val, eval_recipe, *shape),
            batch_size=round_up_batch(config.eval.batch_size, device_mesh),
        ),
    )


def read_split(
    data: ConfigDict,
    split: Split,
    cache_dir: str | os.PathLike | None,
    say: Callable[[str], None],
) -> cache.Cached:
    """One split and, where asked for, its ground truth; from the cache when it is there.

    Among several processes the first one reads the annotations, and the others take what it wrote;
    those that do not see it (the folder is on another disk) read the annotations themselves.

    Args:
      data: ``config.data``.
      split: of ``splits_of``.
      cache_dir: folder for what was read; None to read it anew.
      say: prints a line for people.
    """
    if not files.is_folder(data.root):
        raise ValueError(f"data.root: no such folder: {data.root!r}")
    annotations = index_lib.picture_path(data.root, "", split.annotations)
    told = dict(split.options, root=data.root, images=split.images, scored=split.scored)
    if data.tfds_name:
        # It is slow to import, and few have it.
        from yolos_jax.data import tfds

        told |= {"tfds": data.tfds_name, "dir": data.tfds_dir, "split": split.tfds_split}
        builder = tfds.open_builder(data.tfds_name, data.tfds_dir, split.tfds_split)
        store = tfds.TfdsPictures(builder, split.tfds_split)
        sources = [annotations, *tfds.shard_paths(builder, split.tfds_split)]

        def build() -> cache.Cached:
            source, theirs, coco = tfds.open_tfds(builder, split.tfds_split, annotations)
            return _columns(split, source, theirs, coco)
    else:
        folder = index_lib.picture_path(data.root, split.images, "")
        store = shards.find(folder)
        sources = [annotations, f"{folder}/{shards.MANIFEST}"]

        def build() -> cache.Cached:
            source, coco = index_lib.open_coco(data.root, split.annotations, split.images)
            return _columns(split, source, coco, coco)

    if cache_dir is None:
        found = build()
    else:
        path = cache.path_of(cache_dir, annotations, told)
        found = _shared(path, cache.fingerprint(sources, told), build, say)
    return found._replace(index=dataclasses.replace(found.index, store=store))


def _columns(split: Split, source: index_lib.Source, boxes: dict, coco: dict) -> cache.Cached:
    """A split as columns: its pictures and boxes, and the ground truth of the annotation file."""
    index = index_lib.from_coco(source, boxes, **split.options)
    return cache.Cached(index, truth_lib.ground_truth(coco, index) if split.scored else None)


def _shared(
    path: str, mark: str, build: Callable[[], cache.Cached], say: Callable[[str], None]
) -> cache.Cached:
    """Takes what the cache holds, or what the first process puts there, or builds it."""
    found, failure = _look(path, mark, say), None
    if found is None and jax.process_index() == 0:
        try:
            found = _build(path, mark, build, say)
        except Exception as error:
            # The others wait: let them go first. They will find the same, and say so too.
            failure = error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the data have been read")
    if failure is not None:
        raise failure
    return found or _look(path, mark, say) or _build(path, mark, build, say)


def _look(path: str, mark: str, say: Callable[[str], None]) -> cache.Cached | None:
    try:
        return cache.read(path, mark)
    except ValueError as error:
        say(f"{error}; the annotations are read again")
        return None


def _build(
    path: str, mark: str, build: Callable[[], cache.Cached], say: Callable[[str], None]
) -> cache.Cached:
    built = build()
    try:
        cache.write(path, mark, *built)
    except OSError as error:
        say(f"{path}: cannot be written ({files.reason(error)}); the next start reads everything")
    return built
