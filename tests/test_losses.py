from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_losses
from yolos_jax import losses, matching
from yolos_jax.batch import Outputs, Targets

WEIGHTS = golden_losses.LOSS_WEIGHTS


def criterion(outputs, targets, matched_query, image_valid, norms):
    return losses.set_criterion(outputs, targets, matched_query, image_valid, WEIGHTS, norms)


criterion_and_gradient = jax.jit(jax.value_and_grad(criterion, has_aux=True))
find_norms = jax.jit(
    partial(losses.normalisers, eos_coef=WEIGHTS.eos_coef),
    static_argnames=("num_queries", "class_loss_group", "reference_processes"),
)


def close(result, expected, atol):
    np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", golden_losses.NAMES)
def test_one_process_is_the_original(name):
    case = golden_losses.load(name)
    layers, images, queries, _ = case.outputs.pred_logits.shape
    valid = np.ones(images, bool)
    norms = find_norms(
        case.targets, valid, num_queries=queries, class_loss_group=0, reference_processes=1
    )
    assert float(norms.boxes) == case.arrays["num_boxes"]
    (total, metrics), gradient = criterion_and_gradient(
        case.outputs, case.targets, case.matched_query, valid, norms
    )
    close(total, case.arrays["total"].item(), 5e-5 if layers == 1 else 2e-4)
    for loss in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
        atol = 1e-4 if loss == "cardinality_error" else 5e-5
        expected = case.arrays[loss].reshape(layers)
        close(metrics[loss], expected[-1], atol)
        for layer in range(layers - 1):
            close(metrics[f"{loss}_{layer}"], expected[layer], atol)
    close(metrics["class_error"], case.arrays["class_error"].item(), 1e-4)
    assert len(metrics) == 4 * layers + 1
    shape = case.outputs.pred_logits.shape, case.outputs.pred_boxes.shape
    close(gradient.pred_logits, case.arrays["grad_logits"].reshape(shape[0]), 1e-6)
    close(gradient.pred_boxes, case.arrays["grad_boxes"].reshape(shape[1]), 5e-5)


@pytest.mark.parametrize("name", golden_losses.SINGLE_LAYER)
def test_one_process_per_image_is_the_original(name):
    case = golden_losses.load(name)
    _, images, queries, _ = case.outputs.pred_logits.shape
    valid = np.ones(images, bool)
    norms = find_norms(
        case.targets, valid, num_queries=queries, class_loss_group=1, reference_processes=images
    )
    # The reference divides each process' sum by this and averages over the processes.
    close(norms.boxes / images, case.arrays["ddp_num_boxes"], 1e-5)
    (total, metrics), gradient = criterion_and_gradient(
        case.outputs, case.targets, case.matched_query, valid, norms
    )
    close(total, case.arrays["ddp_total"].mean(), 5e-5)
    for loss in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
        close(metrics[loss], case.arrays[f"ddp_{loss}"].mean(), 5e-5)
    close(gradient.pred_logits[0], case.arrays["ddp_grad_logits"], 1e-6)
    close(gradient.pred_boxes[0], case.arrays["ddp_grad_boxes"], 5e-5)


def random_batch(images=6, queries=5, slots=8, layers=2, classes=3, seed=0):
    """Images with 0, 1, ... 5, ... targets, so that one has more than queries."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(layers, images, queries, classes + 1)).astype(np.float32)
    predicted = rng.uniform(0.1, 0.9, (layers, images, queries, 4)).astype(np.float32)
    targets = Targets(
        labels=rng.integers(0, classes, (images, slots)).astype(np.int32),
        boxes_cxcywh=rng.uniform(0.1, 0.9, (images, slots, 4)).astype(np.float32),
        target_valid=np.arange(slots) < np.array([0, 1, 3, 8, 2, 6])[:images, None],
    )
    outputs = Outputs(logits, predicted)
    cost = matching.costs(outputs, targets, golden_losses.MATCHER_WEIGHTS)
    matched_query, _ = matching.assign_host(np.asarray(cost), targets.target_valid)
    return outputs, targets, matched_query


def run(outputs, targets, matched_query, image_valid, **settings):
    settings = {"class_loss_group": 0, "reference_processes": 1} | settings
    queries = outputs.pred_logits.shape[2]
    norms = find_norms(targets, image_valid, num_queries=queries, **settings)
    (total, metrics), gradient = criterion_and_gradient(
        outputs, targets, matched_query, image_valid, norms
    )
    return total, metrics, gradient


def rows(tree, index, axis):
    return jax.tree.map(lambda x: np.take(x, index, axis), tree)


@pytest.mark.parametrize("group,processes", [(0, 1), (1, 8), (2, 100), (4, 1)])
@pytest.mark.parametrize("all_valid", [True, False])
def test_microbatches_add_up(group, processes, all_valid):
    outputs, targets, matched_query = random_batch()
    valid = np.array([True, True, all_valid, True, True, all_valid])
    settings = {"class_loss_group": group, "reference_processes": processes}
    total, metrics, gradient = run(outputs, targets, matched_query, valid, **settings)

    stacked = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), (targets, valid))
    norms = find_norms(*stacked, num_queries=5, **settings)
    added, summed = 0, dict.fromkeys(metrics, 0)
    for part in range(3):
        index = np.arange(2 * part, 2 * part + 2)
        (some, few), slope = criterion_and_gradient(
            rows(outputs, index, 1),
            rows(targets, index, 0),
            matched_query[:, index],
            valid[index],
            norms.part(part),
        )
        added += some
        summed = {name: summed[name] + few[name] for name in metrics}
        close(slope.pred_logits, gradient.pred_logits[:, index], 1e-6)
        close(slope.pred_boxes, gradient.pred_boxes[:, index], 1e-6)
    np.testing.assert_allclose(added, total, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(summed[name], value, rtol=2e-6, err_msg=name)


def test_images_that_are_not_valid_are_not_there():
    outputs, targets, matched_query = random_batch()
    real = np.array([1, 3, 4])
    valid = np.isin(np.arange(6), real)
    without = run(
        rows(outputs, real, 1), rows(targets, real, 0), matched_query[:, real], np.ones(3, bool)
    )
    for logits in (0.0, np.nan):
        spoilt = outputs.pred_logits.copy(), outputs.pred_boxes.copy()
        spoilt[0][:, ~valid] = logits
        spoilt[1][:, ~valid] = logits
        total, metrics, gradient = run(Outputs(*spoilt), targets, matched_query, valid)
        np.testing.assert_allclose(total, without[0], rtol=1e-6)
        for name in metrics:
            np.testing.assert_allclose(metrics[name], without[1][name], rtol=1e-6, err_msg=name)
        for part, expected in zip(gradient, without[2], strict=True):
            close(part[:, valid], expected, 1e-7)
            assert (np.asarray(part[:, ~valid]) == 0).all()


def test_a_batch_without_any_valid_image_has_no_loss():
    outputs, targets, matched_query = random_batch()
    for group in (0, 1, 2):
        total, metrics, gradient = run(
            outputs, targets, matched_query, np.zeros(6, bool), class_loss_group=group
        )
        assert total == 0
        assert all(value == 0 for value in metrics.values())
        assert all((np.asarray(part) == 0).all() for part in gradient)


def test_class_loss_by_hand():
    """Two groups of two images: means weighted inside a group, plain between groups."""
    probability = np.float32([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    outputs = Outputs(
        np.tile(np.log(probability), (1, 4, 1, 1)), np.full((1, 4, 2, 4), 0.5, np.float32)
    )
    targets = Targets(
        labels=np.int32([[1], [0], [0], [0]]),
        boxes_cxcywh=np.full((4, 1, 4), 0.5, np.float32),
        target_valid=np.array([[True], [False], [False], [True]]),
    )
    matched_query = np.int32([[[0], [-1], [-1], [1]]])
    valid = np.array([True, True, True, False])
    found = [0.25, 0.5]  # first image: probability of class 1, then of no-object
    nothing = [0.25, 0.5]
    first = -(np.log(found[0]) + 0.1 * np.log(found[1]) + 0.1 * np.log(nothing).sum()) / 1.3
    second = -(0.1 * np.log(nothing).sum()) / 0.2  # its other image does not count
    _, metrics, _ = run(outputs, targets, matched_query, valid, class_loss_group=2)
    np.testing.assert_allclose(metrics["loss_ce"], (first + second) / 2, rtol=1e-6)
    assert metrics["loss_bbox"] == 0  # both boxes are exactly right
    assert abs(metrics["loss_giou"]) < 1e-6
    assert metrics["class_error"] == 100  # query 0 says class 0
    # Query 0 is an object and query 1 is not: one object per image, where 1, 0, 0 are.
    np.testing.assert_allclose(metrics["cardinality_error"], 2 / 3, rtol=1e-6)
    _, metrics, _ = run(outputs, targets, matched_query, valid, class_loss_group=0)
    numerator = -(np.log(0.25) + 0.1 * np.log(0.5) + 0.2 * np.log(nothing).sum())
    np.testing.assert_allclose(metrics["loss_ce"], numerator / 1.5, rtol=1e-6)


def test_box_losses_count_targets_not_pairs():
    _, targets, matched_query = random_batch()
    norms = find_norms(
        targets, np.ones(6, bool), num_queries=5, class_loss_group=1, reference_processes=1
    )
    assert norms.boxes == 0 + 1 + 3 + 8 + 2 + 6
    assert norms.matched == 0 + 1 + 3 + 5 + 2 + 5
    assert (matched_query[0] >= 0).sum() == norms.matched


def test_no_targets_and_no_columns():
    outputs, targets, matched_query = random_batch()
    empty = targets._replace(target_valid=np.zeros_like(targets.target_valid))
    nobody = np.full_like(matched_query, -1)
    total, metrics, _ = run(outputs, empty, nobody, np.ones(6, bool))
    assert metrics["class_error"] == 100 and metrics["loss_bbox"] == 0
    narrow = jax.tree.map(lambda x: x[:, :0], targets)
    same, *_ = run(outputs, narrow, nobody[..., :0], np.ones(6, bool))
    np.testing.assert_allclose(same, total, rtol=1e-6)


def test_what_is_not_finite_reaches_the_loss():
    outputs, targets, matched_query = random_batch()
    outputs.pred_logits[0, 2, 0, 0] = np.nan
    total, *_ = run(outputs, targets, matched_query, np.ones(6, bool))
    assert np.isnan(total)


def test_bfloat16_predictions_are_measured_in_float32():
    outputs, targets, matched_query = random_batch()
    valid = np.ones(6, bool)
    norms = find_norms(targets, valid, num_queries=5, class_loss_group=0, reference_processes=1)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), outputs)
    total, metrics = jax.jit(criterion)(rounded, targets, matched_query, valid, norms)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert total == jax.jit(criterion)(exact, targets, matched_query, valid, norms)[0]
    assert metrics["loss_ce"].dtype == jnp.float32


@pytest.mark.parametrize("case", [0, 1, 2])
def test_postprocess_is_the_original_s(case):
    with np.load(golden_losses.GOLDENS / "postprocess.npz") as stored:
        arrays = {key[3:]: stored[key] for key in stored if key.startswith(f"p{case}_")}
    earlier = jax.tree.map(np.zeros_like, Outputs(arrays["logits"], arrays["pred_boxes"]))
    outputs = Outputs(
        np.stack([earlier.pred_logits, arrays["logits"]]),
        np.stack([earlier.pred_boxes, arrays["pred_boxes"]]),
    )
    result = losses.postprocess(outputs, arrays["orig_size_hw"].astype(np.int32))
    close(result.scores, arrays["scores"], 2e-6)
    close(result.boxes_xyxy_px, arrays["boxes"], 2e-3)
    np.testing.assert_array_equal(result.labels, arrays["labels"])
    assert result.labels.dtype == np.int32 and result.scores.dtype == np.float32
