"""The set criterion: what training minimises, per prediction layer; and what a prediction means.

After ``SetCriterion`` and ``PostProcess`` of hustvl/YOLOS (models/detector.py), which are DETR's.
Everything is a plain sum over the global batch inside a compiled program: no axis names.

The reference runs one process per GPU and averages their gradients, so its losses depend on how the
batch is cut into processes. Here that is two numbers of the configuration:

* Box losses. The reference divides a process' sum by ``max(boxes of the global batch / processes,
  1)`` and averages over processes; that is the global sum over ``max(boxes of the global batch,
  processes)``. ``reference_processes`` is that last number. Boxes are targets, not matched pairs.
* Class loss. The reference takes a weighted mean over a process' images and averages over
  processes. ``class_loss_group`` is a process' images: the batch is cut into groups of so many
  images in order, 0 makes it one group. Groups without a valid image do not count.

Both are computed from the targets of the whole global batch before anything is matched, so the
losses and metrics of the parts of a batch (microbatches) add up to those of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from yolos_jax import boxes
from yolos_jax.batch import Array, Detections, Outputs, Targets


class LossWeights(NamedTuple):
    """How much each loss counts in the total, and the no-object class in the class loss."""

    class_weight: float
    l1_weight: float
    giou_weight: float
    eos_coef: float


class Normalisers(NamedTuple):
    """What sums over images are divided by; a function of the global batch's targets."""

    boxes: Array  # float32 []: of the box losses.
    class_weight: Array  # float32 [..., B]: of each image's class loss.
    matched: Array  # float32 []: matched pairs of one prediction layer, of class_error.
    images: Array  # float32 []: valid images, at least 1.

    def part(self, index: int) -> Normalisers:
        """Those of one microbatch, when computed from targets stacked as [k, B / k, ...]."""
        return self._replace(class_weight=self.class_weight[index])


def normalisers(
    targets: Targets,
    image_valid: Array,
    *,
    num_queries: int,
    eos_coef: float,
    class_loss_group: int,
    reference_processes: int,
) -> Normalisers:
    """What the losses of a global batch are divided by.

    Args:
      targets: of the whole global batch, [B, M, ...], or its microbatches, [k, B / k, M, ...].
      image_valid: bool [B] or [k, B / k].
      num_queries: Q.
      eos_coef: weight of the no-object class.
      class_loss_group: consecutive images per weighted mean of the class loss; 0: all.
      reference_processes: least divisor of the box losses.

    Returns:
      The normalisers; ``class_weight`` is shaped like ``image_valid``.
    """
    valid = image_valid.reshape(-1)
    count = jnp.sum(_real(targets, image_valid), -1, dtype=jnp.float32).reshape(-1)
    matched = jnp.minimum(count, num_queries)
    weight = jnp.where(valid, matched + eos_coef * (num_queries - matched), 0)

    size = class_loss_group or valid.size
    groups = -(-valid.size // size)
    padding = (0, groups * size - valid.size)
    group_weight = jnp.pad(weight, padding).reshape(groups, size).sum(1)
    group_valid = jnp.pad(valid, padding).reshape(groups, size).any(1)
    divisor = jnp.repeat(group_weight * group_valid.sum(), size)[: valid.size]
    return Normalisers(
        boxes=jnp.maximum(count.sum(), reference_processes),
        class_weight=divisor.reshape(image_valid.shape),
        matched=matched.sum(),
        images=jnp.maximum(valid.sum(dtype=jnp.float32), 1),
    )


def set_criterion(
    outputs: Outputs,
    targets: Targets,
    matched_query: Array,
    image_valid: Array,
    weights: LossWeights,
    norms: Normalisers,
) -> tuple[Array, dict[str, Array]]:
    """The total loss of a batch or of one of its microbatches, and what it is made of.

    Images that are not valid contribute nothing, neither value nor gradient, whatever the model
    makes of them. A target without a query (more targets than queries) has no box loss.

    Args:
      outputs: predictions of all layers, [A, B, Q, ...]; every layer's losses are in the total.
      targets: ground truth, [B, M, ...].
      matched_query: int32 [A, B, M], -1 where a target has no query.
      image_valid: bool [B].
      weights: of the losses.
      norms: of the global batch; of this part of it when it is a microbatch.

    Returns:
      total: float32 [], the weighted sum of all losses of all layers.
      metrics: float32 [] each; every one is a sum, so that those of a batch's microbatches are
        added. Of the last layer: ``loss_ce``, ``loss_bbox``, ``loss_giou`` (before weighting),
        ``class_error`` (% of matched queries whose most likely class, no-object included, is
        wrong; 100 when nothing is matched), ``cardinality_error`` (mean difference between the
        number of queries that are not no-object and the number of targets). Of an earlier layer
        i: the same without class_error, named ``loss_ce_0`` and so on, as the reference does.
    """
    layers = outputs.pred_logits.shape[0]
    real = _real(targets, image_valid)

    def one_layer(logits: Array, predicted: Array, query: Array) -> dict[str, Array]:
        # A select, not a product: what an invalid image predicts may not be finite.
        logits = jnp.where(image_valid[:, None, None], logits.astype(jnp.float32), 0)
        query = jnp.where(real, query, -1)
        named = _class_metrics(logits, targets, query, image_valid, weights.eos_coef, norms)
        return named | _box_losses(predicted.astype(jnp.float32), targets, query, norms)

    named = jax.vmap(one_layer)(outputs.pred_logits, outputs.pred_boxes, matched_query)
    total = jnp.sum(
        weights.class_weight * named["loss_ce"]
        + weights.l1_weight * named["loss_bbox"]
        + weights.giou_weight * named["loss_giou"]
    )
    metrics = {name: values[-1] for name, values in named.items()}
    for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
        metrics |= {f"{name}_{layer}": named[name][layer] for layer in range(layers - 1)}
    return total, metrics


def postprocess(outputs: Outputs, original_size: Array) -> Detections:
    """The last layer's answer: best class without no-object, boxes in pixels, every query kept.

    Args:
      outputs: predictions, [A, B, Q, ...].
      original_size: int32 [B, 2], height and width of the pictures in pixels.

    Returns:
      [B, Q] detections in query order: no threshold, no suppression, no clipping to the picture.
    """
    probabilities = jax.nn.softmax(outputs.pred_logits[-1].astype(jnp.float32))[..., :-1]
    size = jnp.asarray(original_size, jnp.float32)
    width_height = jnp.stack([size[:, 1], size[:, 0]] * 2, -1)
    boxes_xyxy = boxes.cxcywh_to_xyxy(outputs.pred_boxes[-1].astype(jnp.float32))
    return Detections(
        scores=probabilities.max(-1),
        labels=probabilities.argmax(-1).astype(jnp.int32),
        boxes_xyxy_px=boxes_xyxy * width_height[:, None],
    )


def _real(targets: Targets, image_valid: Array) -> Array:
    """Which targets are real ones of real images, bool [..., B, M]."""
    return targets.target_valid & image_valid[..., None]


def _class_metrics(
    logits: Array,
    targets: Targets,
    query: Array,
    image_valid: Array,
    eos_coef: float,
    norms: Normalisers,
) -> dict[str, Array]:
    """Of one layer: logits float32 [B, Q, K + 1], query int32 [B, M], -1 where no pair."""
    no_object = logits.shape[-1] - 1
    # Compared, not scattered: [B, Q, M] booleans are small and every accelerator likes them.
    hit = query[:, None, :] == jnp.arange(logits.shape[1])[:, None]
    label = jnp.max(jnp.where(hit, targets.labels[:, None, :], -1), axis=-1, initial=-1)
    matched = label >= 0
    target_class = jnp.where(matched, label, no_object)

    log_probability = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probability, target_class[..., None], axis=-1)[..., 0]
    weighted = jnp.where(matched, nll, eos_coef * nll)
    per_image = jnp.where(image_valid, weighted.sum(-1), 0)

    best = logits.argmax(-1)
    wrong = jnp.sum(matched & (best != target_class), dtype=jnp.float32)
    seen = jnp.sum(image_valid, dtype=jnp.float32)
    # With nothing matched in the whole batch the reference says 100 %: shared among its images.
    error = jnp.where(norms.matched > 0, _divide(wrong, norms.matched), seen / norms.images)

    objects = jnp.sum(best != no_object, axis=-1, dtype=jnp.float32)
    count = jnp.sum(targets.target_valid, axis=-1, dtype=jnp.float32)
    difference = jnp.where(image_valid, jnp.abs(objects - count), 0)
    return {
        "loss_ce": jnp.sum(_divide(per_image, norms.class_weight)),
        "class_error": 100 * error,
        "cardinality_error": difference.sum() / norms.images,
    }


def _box_losses(
    predicted: Array, targets: Targets, query: Array, norms: Normalisers
) -> dict[str, Array]:
    """Of one layer: predicted float32 [B, Q, 4], query int32 [B, M], -1 where no pair."""
    pair_valid = query >= 0
    chosen = jnp.take_along_axis(predicted, jnp.maximum(query, 0)[..., None], axis=1)
    # Where there is no pair both boxes become the same ordinary one, selected before the losses so
    # that nothing but zeros flows back.
    ordinary = jnp.array([0.5, 0.5, 1, 1], jnp.float32)
    chosen = jnp.where(pair_valid[..., None], chosen, ordinary)
    actual = jnp.where(pair_valid[..., None], targets.boxes_cxcywh, ordinary)
    l1 = _absolute(chosen - actual).sum(-1)
    giou = boxes.giou(boxes.cxcywh_to_xyxy(chosen), boxes.cxcywh_to_xyxy(actual))
    return {
        "loss_bbox": jnp.sum(jnp.where(pair_valid, l1, 0)) / norms.boxes,
        "loss_giou": jnp.sum(jnp.where(pair_valid, 1 - giou, 0)) / norms.boxes,
    }


def _absolute(x: Array) -> Array:
    """|x| whose gradient at 0 is 0, as torch's; jnp.abs has 1 there."""
    return x * lax.stop_gradient(jnp.sign(x))


def _divide(part: Array, whole: Array) -> Array:
    """part / whole, and 0 where whole is 0."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
