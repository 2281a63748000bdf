"""The data of a run: both splits, and the static shapes that they are read in."""

from __future__ import annotations

import dataclasses

import jax
from ml_collections import ConfigDict

from yolos_jax.batch import Bucket
from yolos_jax.data import index as index_lib
from yolos_jax.data import plan as plan_lib
from yolos_jax.evaluation import round_up_batch


@dataclasses.dataclass(frozen=True)
class Data:
    """The two splits, and the static shapes that they are read in."""

    train: index_lib.Index
    val: index_lib.Index
    ground_truth: dict  # of val, for pycocotools
    recipe: plan_lib.Recipe
    buckets: tuple[Bucket, ...]
    eval_plan: plan_lib.Plan


def load_data(config: ConfigDict, device_mesh: jax.sharding.Mesh) -> Data:
    """Reads the annotations of both splits and chooses the shapes of their batches."""
    options = {"labels": config.data.labels, "on_error": config.data.on_error}
    options["exif"] = config.data.exif
    train = index_lib.load_coco(
        config.data.root,
        config.data.train_annotations,
        config.data.train_images,
        keep_empty=config.data.keep_empty,
        **options,
    )
    val = index_lib.load_coco(
        config.data.root, config.data.val_annotations, config.data.val_images, **options
    )
    if train.label_map != val.label_map:
        raise ValueError(
            "the categories of the two splits differ:\n"
            f"{train.annotations}: {train.label_map.to_json()}\n"
            f"{val.annotations}: {val.label_map.to_json()}"
        )
    train = train.subset(config.data.train_subset) if config.data.train_subset else train
    val = val.subset(config.data.val_subset) if config.data.val_subset else val
    recipe = plan_lib.Recipe.from_config(config)
    eval_recipe = plan_lib.EvalRecipe.from_config(config)
    shape = (config.buckets.count, config.buckets.multiple, 1 + config.model.num_queries)
    return Data(
        train=train,
        val=val,
        ground_truth=index_lib.ground_truth(index_lib.read_coco(val.annotations), val),
        recipe=recipe,
        buckets=plan_lib.choose_buckets(train, recipe, *shape),
        eval_plan=plan_lib.make_eval_plan(
            val,
            eval_recipe,
            plan_lib.choose_buckets(val, eval_recipe, *shape),
            batch_size=round_up_batch(config.eval.batch_size, device_mesh),
        ),
    )
