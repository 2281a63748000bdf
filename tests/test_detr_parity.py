"""DETR against the original's own numbers, and against transformers on random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_detr
from yolos_jax.batch import Canvas
from yolos_jax.convert import detr_hf_names, detr_names
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


MODEL = tiny_detr.model_config(
    width=24, heads=4, mlp_width=40, num_queries=6, blocks=(1, 2, 1, 1), stem_width=4,
    encoder_depth=2, decoder_depth=2,
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
        attn_implementation="eager",
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


@pytest.mark.slow
def test_transformers_outputs_and_gradients(theirs):
    """A padded batch: what every parameter does to logits and boxes, masks and padding included."""
    import torch

    canvas = tiny_detr.make_canvas([(75, 100), (96, 43)], (96, 100))
    rng = np.random.default_rng(1)
    cotangents = rng.normal(size=(2, 6, CLASSES + 1)), rng.normal(size=(2, 6, 4))
    pixels = tiny_detr.zero_outside(canvas).pixels.transpose(0, 3, 1, 2)
    mask = np.zeros((2, 96, 100), np.int64)
    mask[0, :75], mask[1, :, :43] = 1, 1
    expected = theirs(torch.from_numpy(pixels.copy()), torch.from_numpy(mask))
    score = sum(
        (output * torch.from_numpy(cotangent)).sum()
        for output, cotangent in zip(
            (expected.logits, expected.pred_boxes), cotangents, strict=True
        )
    )
    score.backward()
    parameters = dict(theirs.named_parameters())
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    gradients = {
        name: parameters[name].grad.numpy() if name in parameters else np.zeros_like(tensor)
        for name, tensor in state.items()
    }

    def ours(params, canvas):
        outputs = build_model(MODEL, CLASSES).apply(params, canvas)
        last = outputs.pred_logits[-1], outputs.pred_boxes[-1]
        return sum((x * y).sum() for x, y in zip(last, cotangents, strict=True)), last

    with jax.default_matmul_precision("highest"):
        found, (logits, boxes) = jax.jit(jax.grad(ours, has_aux=True))(to_ours(state), canvas)
    np.testing.assert_allclose(logits, expected.logits.detach(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(boxes, expected.pred_boxes.detach(), atol=1e-4, rtol=0)
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
