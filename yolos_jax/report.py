"""What a person should know about a run before its first step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from yolos_jax import mesh
from yolos_jax.data.plan import Plan

# The demo's eight thousand easy pictures are just enough; of photographs, maintainers of such
# detectors advise more than ten thousand.
FEW_IMAGES = 8000


def describe_run(run: Any, first_plan: Plan, groups: str) -> str:
    """Returns several lines: classes, data, parameters, devices, batch, steps, buckets.

    Args:
      run: a ``run.Run``.
      first_plan: of its first epoch.
      groups: of ``optimizer.describe_groups``.
    """
    config, data = run.config, run.data
    parts = f" in {config.microbatches} microbatches" if config.microbatches > 1 else ""
    programs = len(data.buckets) * 2 + (2 if config.microbatches > 1 else 0)
    state = run.train_step.abstract_state
    lines = [
        data.train.label_map.describe(),
        f"training:   {data.train.describe()}",
        f"validation: {data.val.describe()}",
        *(str(index.dropped) for index in (data.train, data.val) if index.dropped.counts),
        f"parameters, {sum(x.size for x in jax.tree.leaves(state.params)):,}:",
        *(f"  {line}" for line in groups.splitlines()),
        f"devices: {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
        *describe_memory(state, run.mesh),
        f"batch: {config.batch_size} images over all devices{parts}; learning rate "
        f"{config.optimizer.lr:g} for it, schedule {config.optimizer.schedule!r}",
        f"steps: {run.steps_per_epoch} per epoch, {run.total_steps} in {config.epochs} epochs",
        f"buckets, for which at most {programs} programs are compiled to train and "
        f"{len(data.eval_plan.buckets)} to evaluate:",
        *(f"  {line}" for line in first_plan.describe().splitlines()),
    ]
    least, most = min(config.augment.scales), max(config.augment.scales)
    if not least <= config.preprocess.size <= most:
        lines.append(
            f"note: trained on shorter sides of {least}..{most} pixels (augment.scales), evaluated "
            f"at {config.preprocess.size} (preprocess.size)"
        )
    if len(data.train) < FEW_IMAGES and not config.init:
        lines.append(
            f"note: {len(data.train)} training pictures and no --config.init: set prediction "
            f"trained from nothing wants {FEW_IMAGES} or more; start from a detector"
        )
    lines += box_notes(data.train, config.model.num_queries)
    lines += box_notes(data.val, config.model.num_queries)
    return "\n".join(lines)


def box_notes(index: Any, queries: int) -> list[str]:
    """Lines about boxes that no detector of so many queries can find, or that are none.

    Args:
      index: a ``data.index.Index``.
      queries: of the model, Q.
    """
    notes = []
    counts = np.diff(index.box_offsets)
    more = counts > queries
    if more.any():
        notes.append(
            f"note: {more.sum()} of {len(index)} pictures of {index.annotations} have more boxes "
            f"than model.num_queries={queries}: {(counts[more] - queries).sum()} boxes too many to "
            "be found or learnt"
        )
    sides = index.boxes_xyxy_px[:, 2:] - index.boxes_xyxy_px[:, :2]
    small = (sides < 1).any(axis=1)
    if 2 * small.sum() > len(small):
        notes.append(
            f"note: {small.sum()} of {len(small)} boxes of {index.annotations} are less than a "
            "pixel wide or high: COCO's bbox is x, y, width, height in pixels, not in shares of "
            "the picture"
        )
    outside = index.dropped.counts.get("outside", 0) + index.dropped.counts.get("no area", 0)
    if 2 * outside > len(sides):
        notes.append(
            f"note: {outside} boxes of {index.annotations} reach out of their pictures or lie "
            "outside: COCO's bbox is x, y, width, height, not two corners"
        )
    return notes


def describe_memory(state: Any, device_mesh: jax.sharding.Mesh) -> list[str]:
    """Lines about what a state takes on each device, and how well it is spread.

    Args:
      state: a ``TrainState`` of arrays or their shapes.
      device_mesh: that it is spread over by rule.
    """
    parts = {"parameters": state.params, "optimiser": state.opt_state, "average": state.ema}
    sizes = {name: mesh.bytes_per_device(tree, device_mesh) / 2**20 for name, tree in parts.items()}
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 2**20
    each, fsdp = sum(sizes.values()), device_mesh.shape["fsdp"]
    split = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size)
    lines = [
        f"state on each device: {each:.1f} MiB ({split}), {each / whole:.1%} of the whole "
        f"(mesh.fsdp={fsdp})"
    ]
    if each / whole > 1 / fsdp + 0.05:
        lines.append(
            f"note: mesh.fsdp={fsdp} would leave {1 / fsdp:.1%} of the state on each device, if "
            "every array had an axis that it divides; a divisor of model.width does better"
        )
    return lines


def preprocess_notes(config: Any, start: Any) -> list[str]:
    """Lines about a run that sees pictures otherwise than the checkpoint it starts from.

    Args:
      config: the run's.
      start: ``preprocess`` of the checkpoint's metadata.
    """
    notes = [
        f"note: preprocess.{key} is {tuple(config.preprocess[key])}, the start was trained with "
        f"{tuple(start[key])}"
        for key in ("mean", "std")
        if tuple(config.preprocess[key]) != tuple(start[key])
    ]
    if start.get("exif") == "apply" and config.data.exif != "apply":
        notes.append(
            f"note: data.exif is {config.data.exif!r}, the start was trained on pictures that were "
            "turned as their tags say ('apply')"
        )
    return notes
