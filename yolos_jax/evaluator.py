"""Evaluates a checkpoint on a split, as eval.py asks: the order of things, and what is printed."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from yolos_jax import agreement, answers, datasets, evaluation, reference_padding, scoring
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import HostBatch
from yolos_jax.data import pipeline
from yolos_jax.data.index import Index
from yolos_jax.data.layout import Canvases
from yolos_jax.data.plan import EvalRecipe, Plan, make_eval_plan
from yolos_jax.labels import LabelMap
from yolos_jax.models import build
from yolos_jax.predict_step import PredictStep

SHOWN = 10  # pictures that could not be read, named in one error


class Split(NamedTuple):
    """Where the pictures are."""

    root: str  # folder or gs:// path that the next two are relative to
    annotations: str  # COCO file
    images: str  # folder
    subset: int  # the first n images only; 0: all


def check_request(config: ConfigDict, settings: Sequence[str], padding: int) -> None:
    """Refuses what means nothing for the model, before anything is read of the data.

    Args:
      config: of the evaluation.
      settings: keys that were set for it.
      padding: as of ``evaluate_checkpoint``.

    Raises:
      ValueError: naming the setting; or the configuration makes no model.
    """
    layout = build.layout_of(config.model)
    if padding:
        reference_padding.check(layout)
    if "buckets.multiple" in settings and isinstance(layout, Canvases):
        raise ValueError(
            "--set buckets.multiple: means nothing for this model: the canvases of an evaluation "
            "have the very sizes of its pictures; only buckets.count limits how many there are"
        )


def evaluate_checkpoint(
    params: dict,
    metadata: dict,
    config: ConfigDict,
    split: Split,
    *,
    padding: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[evaluation.Evaluation, dict]:
    """Evaluates a detector and prints what was found.

    Args:
      params, metadata: of ``checkpoint.load_params``.
      config: as configs/common.py; of it model, preprocess, buckets, mesh, eval.batch_size and
        of data what says how pictures are read, not where (TFDS and the cache apart).
      split: the data.
      padding: pictures that share a canvas, as the reference evaluates Ti; 0: none do.
      say: what prints; only the first process does.

    Returns:
      The evaluation, and what ``summarise`` says of it with the checkpoint's step.

    Raises:
      ValueError: the data or the configuration make no sense, processes have read other
        parameters, the dataset's categories are not the checkpoint's, or more than
        data.max_bad_fraction of the pictures cannot be read.
    """
    if jax.process_index():
        say = _say_nothing
    agreement.check_checkpoint("the checkpoint", params, metadata)
    trained = LabelMap.from_json(metadata["label_map"])
    mesh = mesh_lib.make_mesh(config.mesh.fsdp)
    index, truth, category_ids = load_split(split, config, trained, say)
    say(f"{index.describe()}\n{index.dropped}")
    asked = config.eval.batch_size
    batch_size = evaluation.round_up_batch(asked, mesh, max(padding, 1))
    if batch_size != asked:
        say(f"batches of {batch_size} images instead of {asked}: {mesh.size} devices share them")
    plan, batches = plan_batches(index, config, mesh, batch_size, padding)
    step = str(metadata["step"])
    agreement.check_data({"pictures": plan.fingerprint(), "step of the checkpoint": step})
    say(plan.describe())

    model = build.build_model(config.model, trained.num_classes, mesh)
    params = jax.tree.map(mesh_lib.put_whole, params, mesh_lib.shardings(params, mesh))
    started = time.monotonic()
    found = evaluation.evaluate(
        _predict_step(model, config, mesh, padding),
        params,
        index,
        plan,
        watched(batches, plan.steps),
        mesh,
        truth,
        category_ids=category_ids,
        judge=functools.partial(judge, len(index), config.data.max_bad_fraction),
    )
    summary = summarise(found, len(index), time.monotonic() - started) | {"step": metadata["step"]}
    say_findings(found, summary, say)
    return found, summary


def _predict_step(
    model: build.Model, config: ConfigDict, mesh: jax.sharding.Mesh, padding: int
) -> Callable:
    if padding:
        return reference_padding.make_predict_step(model, mesh)
    return PredictStep(model, mesh, config.preprocess)


def load_split(
    split: Split, config: ConfigDict, trained: LabelMap, say: Callable[[str], None]
) -> tuple[Index, dict, np.ndarray]:
    """The split, its ground truth, and for every slot of the detector the category id, or -1."""
    data = config.data.copy_and_resolve_references()
    data.root, data.labels = split.root, "dataset"
    data.val_annotations, data.val_images = split.annotations, split.images
    wanted = datasets.splits_of(data)[1]
    index, truth = datasets.read_split(data, wanted, data.cache_dir or None, say)
    category_ids = scoring.match_categories(trained, index.label_map)
    return index.subset(split.subset), truth, category_ids


def summarise(found: evaluation.Evaluation, images: int, seconds: float) -> dict:
    """The numbers of an evaluation that fit on one line of JSON."""
    return {key: found.metrics[key] for key, *_ in scoring.SUMMARY} | {
        "images": images,
        "unreadable": len(found.unreadable),
        "nonfinite": found.nonfinite,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 2),
    }


def plan_batches(
    index: Index, config: ConfigDict, mesh: jax.sharding.Mesh, batch_size: int, padding: int
) -> tuple[Plan, Iterator[HostBatch]]:
    """Returns the plan of an evaluation and this host's batches of it."""
    layout = build.layout_of(config.model)
    recipe = EvalRecipe.from_config(config, layout.patch_size)
    host_rows = mesh_lib.host_rows(mesh, batch_size, 1)
    if padding:
        reference_padding.check(layout)
        plan, canvas = reference_padding.make_canvas_plan(
            index,
            recipe,
            group=padding,
            batch_size=batch_size,
            bucket_count=config.buckets.count,
            multiple=config.buckets.multiple,
            layout=layout,
        )
    else:
        buckets = layout.buckets(index, recipe, config.buckets.count, config.buckets.multiple)
        plan = make_eval_plan(index, recipe, buckets, batch_size=batch_size)
    batches = pipeline.host_batches(
        index,
        plan,
        host_rows=host_rows,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )
    if padding:
        mean, std = config.preprocess.mean, config.preprocess.std
        batches = reference_padding.on_canvases(batches, canvas, host_rows, mean, std)
    return plan, batches


def watched(batches: Iterator[HostBatch], steps: int) -> Iterator[HostBatch]:
    """Passes batches on, shows progress, names pictures that cannot be read."""
    quiet = True if jax.process_index() else None  # None: also where there is no terminal
    bar = tqdm(total=steps, desc="evaluating", unit="batch", disable=quiet)
    with bar, contextlib.closing(batches):
        for batch in batches:
            for message in batch.unreadable:
                bar.write(f"cannot be read, scored as without detections: {message}")
            yield batch
            bar.update()


def judge(images: int, max_bad_fraction: float, unreadable: int, messages: Sequence[str]) -> None:
    """Stops at too many pictures that cannot be read; every process must call it.

    Args:
      images: of the split.
      max_bad_fraction: of them may be unreadable.
      unreadable: so far, of all processes.
      messages: why, of this process.

    Raises:
      ValueError: there are more; the same on every process, however many there are.
    """
    if unreadable > max_bad_fraction * images:
        said = sorted(mesh_lib.gather_texts(messages))
        raise ValueError(
            f"{unreadable} or more of {images} pictures cannot be read, over "
            f"data.max_bad_fraction={max_bad_fraction:g} (--set changes it):\n  "
            + "\n  ".join(said[:SHOWN])
        )


def say_findings(found: evaluation.Evaluation, summary: dict, say: Callable[[str], None]) -> None:
    """Prints the tables, and what a reader of the numbers must know."""
    say(scoring.format_metrics(found.metrics))
    if found.unreadable:
        say(
            f"could not be read, scored as without detections: {len(found.unreadable)} of "
            f"{summary['images']} pictures, ids {list(found.unreadable[:SHOWN])}"
        )
    for note in answers.notes(found.metrics):
        say(note)
    if found.nonfinite:
        say(f"{found.nonfinite} detections were left out: not finite")
    say(
        f"{summary['images']} images, each once, in {summary['seconds']:.1f} s "
        f"({summary['images_per_second']:.1f} images/s, compiling and scoring included)"
    )


def _say_nothing(text: str) -> None:
    del text
