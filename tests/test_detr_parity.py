"""DETR against the original's own numbers, and against transformers on random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_losses, tiny_detr
from yolos_jax import detector, losses, matching
from yolos_jax.batch import Canvas, Targets
from yolos_jax.convert import compare, detr_hf_names, detr_names, reference_detr
from yolos_jax.labels import LabelMap
from yolos_jax.models.build import build_model
from yolos_jax.models.detr import Detr

GOLDEN = np.load(Path(__file__).parent / "goldens" / "detr_prenorm.npz")
CLASSES, STEM = 5, 8


@pytest.mark.parametrize("case", ["cross", pytest.param("pair", marks=pytest.mark.slow)])
def test_pre_norm_after_the_backbone(case, monkeypatch):
    """The original with pre-norm, which transformers does not have; two images of a batch."""
    model = tiny_detr.model_config(
        width=32, heads=4, mlp_width=64, num_queries=25, blocks=(1, 1, 1, 1), stem_width=STEM,
        encoder_depth=2, decoder_depth=3, pre_norm=True,
    )  # fmt: skip
    weights = {
        name: GOLDEN[f"weight.{name}"]
        if f"weight.{name}" in GOLDEN.files
        else np.zeros(place.shape, np.float32)
        for name, place in detr_names.table(model, CLASSES).items()
    }
    params = detr_names.to_params(weights, model, CLASSES, "the golden file")
    feature = jnp.asarray(GOLDEN[f"{case}_feature"].transpose(0, 2, 3, 1))
    monkeypatch.setattr(Detr, "_backbone", lambda self, canvas: feature)
    size = jnp.asarray(GOLDEN[f"{case}_hw"])
    pixels = np.zeros((2, *GOLDEN[f"{case}_canvas"], 3), np.float32)
    apply = jax.jit(build_model(model, CLASSES).apply, static_argnames="capture")
    with jax.default_matmul_precision("highest"):
        outputs, inside = apply(params, Canvas(pixels, size, np.ones(2, bool)), capture=True)

    def same(found, name, atol):
        np.testing.assert_allclose(found, GOLDEN[f"{case}_{name}"], atol=atol, rtol=0)

    for layer, name in enumerate(("aux0_", "aux1_", "")):
        same(outputs.pred_logits[layer], f"{name}logits", 1e-4)
        same(outputs.pred_boxes[layer], f"{name}boxes", 1e-5)
    same(~inside["real"], "fmask", 0)
    same(inside["memory"].transpose(0, 3, 1, 2), "memory", 2e-4)
    same(inside["decoder"], "hs", 1e-4)
    same(inside["attention"], "cross_attn", 5e-5)


@pytest.mark.slow
def test_every_stage_of_what_transformers_has_not():
    """Pre-norm and a dilated stage, beside the forward pass in torch; one picture, one query."""
    pytest.importorskip("torch")
    model = tiny_detr.model_config(
        dilation=True, pre_norm=True, position="learned", encoder_depth=2, num_queries=1
    )
    state = tiny_detr.make_state(model)
    pixels = tiny_detr.make_canvas([(67, 95)], (67, 95)).pixels
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    expected = reference_detr.forward(state, model, images)
    metadata = {
        "model": model,
        "num_classes": tiny_detr.CLASSES,
        "label_map": LabelMap.coco91().to_json(),
        "preprocess": {},
    }
    params = detr_names.to_params(state, model, tiny_detr.CLASSES, "random")
    found = compare.ours(detector.Detector(params, metadata, dtype="float32"))(pixels)
    assert found.keys() == expected.keys() and found["backbone"].shape == (1, 5, 6, 128)
    for name, stage in expected.items():
        np.testing.assert_allclose(found[name], stage, atol=1e-4, rtol=0, err_msg=name)


MODEL = tiny_detr.model_config(
    width=24, heads=4, mlp_width=40, num_queries=6, blocks=(1, 2, 1, 1), stem_width=4,
    encoder_depth=2, decoder_depth=2, position="learned",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    """transformers' detector with random weights and statistics, everything trained."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 1],
        layer_type="bottleneck", out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=24, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=40, decoder_ffn_dim=40, num_queries=6, num_labels=CLASSES,
        position_embedding_type="learned", attn_implementation="eager",
    )  # fmt: skip
    model = transformers.DetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.3 if tensor.ndim < 3 else tensor[0].numel() ** -0.5)
                if name.endswith("norm.weight") or "normalization.weight" in name:
                    tensor += 1
    return model.requires_grad_(True)


def to_ours(tensors):
    expected = {name: place.shape for name, place in detr_names.table(MODEL, CLASSES).items()}
    original = detr_hf_names.to_original(tensors, expected, "transformers")
    return detr_names.to_params(original, MODEL, CLASSES, "transformers")


def labels_of(torch, targets):
    """The same as transformers takes them."""
    return [
        {
            "class_labels": torch.from_numpy(labels[valid].astype(np.int64)),
            "boxes": torch.from_numpy(boxes[valid]),
        }
        for labels, boxes, valid in zip(*targets, strict=True)
    ]


def make_targets(counts):
    """Random classes and boxes, so many for each image."""
    rng = np.random.default_rng(1)
    valid = np.arange(max(counts)) < np.array(counts)[:, None]
    centres, sides = (rng.uniform(*ends, (*valid.shape, 2)) for ends in ((0.3, 0.7), (0.05, 0.5)))
    return Targets(
        np.where(valid, rng.integers(0, CLASSES, valid.shape), 0).astype(np.int32),
        np.concatenate([centres, sides], -1).astype(np.float32) * valid[..., None],
        valid,
    )


def criterion(params, canvas, targets):
    """Loss of the last layer, which is all that transformers' has by default, and its outputs."""
    outputs = build_model(MODEL, CLASSES).apply(params, canvas)
    last = jax.tree.map(lambda x: x[-1:], outputs)
    cost = matching.costs(last, targets, golden_losses.MATCHER_WEIGHTS)
    matched_query, _ = matching.assign_device(cost, targets.target_valid)
    norms = losses.normalisers(
        targets, canvas.image_valid, num_queries=MODEL["num_queries"], eos_coef=0.1,
        class_loss_group=0, reference_processes=1,
    )  # fmt: skip
    loss, _ = losses.set_criterion(
        last, targets, matched_query, canvas.image_valid, golden_losses.LOSS_WEIGHTS, norms
    )
    return loss, jax.tree.map(lambda x: x[0], last)


@pytest.mark.slow
def test_transformers_outputs_loss_and_gradients(theirs):
    """Three padded pictures of odd sizes, one without any box, more boxes than queries."""
    import torch

    sizes = [(75, 101), (96, 43), (33, 77)]
    canvas = tiny_detr.make_canvas(sizes, (96, 101))
    targets = make_targets((2, 0, 8))
    pixels = tiny_detr.zero_outside(canvas).pixels.transpose(0, 3, 1, 2)
    mask = np.zeros((3, 96, 101), np.int64)
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = 1
    expected = theirs(
        torch.from_numpy(pixels.copy()), torch.from_numpy(mask), labels=labels_of(torch, targets)
    )
    expected.loss.backward()
    parameters = dict(theirs.named_parameters())
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    gradients = {
        name: parameters[name].grad.numpy() if name in parameters else np.zeros_like(tensor)
        for name, tensor in state.items()
    }
    with jax.default_matmul_precision("highest"):
        (loss, outputs), found = jax.jit(jax.value_and_grad(criterion, has_aux=True))(
            to_ours(state), canvas, targets
        )
    np.testing.assert_allclose(outputs.pred_logits, expected.logits.detach(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(outputs.pred_boxes, expected.pred_boxes.detach(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, expected.loss.item(), atol=1e-4, rtol=0)
    compared = 0
    for (path, leaf), reference in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(to_ours(gradients)), strict=True
    ):
        if any(entry.key.startswith(("bn", "downsample_bn")) for entry in path):
            continue  # constants; buffers in torch
        error = np.abs(leaf - reference).max() / max(np.abs(reference).max(), 1.0)
        assert error < 1e-4, (jax.tree_util.keystr(path), error)
        compared += 1
    assert compared > 60
