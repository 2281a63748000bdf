"""The detector against PyTorch: the original's stored numbers, and transformers' live ones.

yolos_mid.npz holds the weights of a reduced hustvl/YOLOS and what the original makes of one
portrait picture that its position tables are resized for; tolerances are those of its README.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests.torch_weights import params_from_yolos, to_patches, yolos_from_huggingface
from yolos_jax.batch import Batch
from yolos_jax.models.build import build_model

GOLDEN = Path(__file__).parent / "goldens" / "yolos_mid.npz"


def make_model(num_classes, **changes):
    values = {**dict(common.get_config().model.items()), "dtype": "float32", **changes}
    return build_model(values, num_classes)


def batch_of(pixels, num_patches):
    patches, grid = to_patches(np.asarray(pixels), 16)
    patches = np.pad(patches, ((0, 0), (0, num_patches - patches.shape[1]), (0, 0)))
    count = len(patches)
    return Batch(patches, np.tile(np.array(grid, np.int32), (count, 1)), np.ones(count, bool))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def run_golden(golden, **changes):
    """Outputs without and with captures, these, and the tokens' places in the original's order.

    The original's order is class, patches, detection tokens.
    """
    state = {n.removeprefix("state/"): golden[n] for n in golden.files if n.startswith("state/")}
    grid = (8, 14)
    model = make_model(
        91, width=48, depth=4, heads=4, mlp_width=192, position_grid=grid,
        mid_position_grid=grid, **changes,
    )  # fmt: skip
    params = params_from_yolos(state, depth=4, num_queries=100, grid=grid, mid_grid=grid)
    batch = batch_of(golden["x"], 99)
    assert tuple(batch.grid[0]) == (11, 8)

    @functools.partial(jax.jit, static_argnums=2)
    def apply(params, batch, capture):
        return model.apply(params, batch, bounds=(12, 12), capture=capture)

    with jax.default_matmul_precision("highest"):
        plain = apply(params, batch, False)
        outputs, captured = apply(params, batch, True)
    return (plain, outputs), captured, np.r_[0, 101 : 101 + 11 * 8, 1:101]


@pytest.mark.parametrize("scan", (True, False))
def test_the_originals_numbers(golden, scan):
    outputs, captured, order = run_golden(golden, scan=scan)

    def close(ours, name, atol):
        np.testing.assert_allclose(ours, golden[name], atol=atol, rtol=0, err_msg=name)

    for either in outputs:
        close(either.pred_logits[0], "logits", 5e-5)
        close(either.pred_boxes[0], "boxes", 5e-6)
    attention = np.asarray(captured["attention"])[:, :, order][..., order]
    close(attention[:, :, golden["attn_rows"]], "attn", 1e-5)
    close(captured["embed"][:, order], "hid_embed", 5e-5)
    close(captured["blocks"][0][:, order], "hid_block0", 5e-5)
    close(captured["blocks"][3][:, order], "hid_block3", 5e-5)
    close(captured["norm"][:, order], "hid_norm", 5e-5)


def test_bfloat16_products_move_boxes_by_less_than_a_hundredth(golden):
    (outputs, _), _, _ = run_golden(golden, dtype="bfloat16")
    assert outputs.pred_logits.dtype == outputs.pred_boxes.dtype == jnp.float32
    moved = np.abs(outputs.pred_boxes[0] - golden["boxes"]).max()
    assert 1e-4 < moved < 0.01


SIZES = ((64, 96), (96, 144), (128, 48), (96, 64))  # the tables', larger, portrait, transposed


@pytest.fixture(scope="module", params=(True, False), ids=("mid", "no mid"))
def pair(request):
    """transformers' detector with random weights, ours, and ours compiled for one bucket."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=44, num_hidden_layers=3, num_attention_heads=4, intermediate_size=88,
        image_size=[64, 96], num_detection_tokens=7, num_labels=5,
        use_mid_position_embeddings=request.param, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    mid_grid = (4, 6) if request.param else ()
    ours = make_model(
        5, width=44, depth=3, heads=4, mlp_width=88, num_queries=7,
        layer_norm_eps=config.layer_norm_eps, position_grid=(4, 6), mid_position_grid=mid_grid,
    )  # fmt: skip
    return theirs, ours, jax.jit(lambda params, batch: ours.apply(params, batch, bounds=(9, 9)))


def params_of(torch_model, model, pick=lambda parameter: parameter.detach().numpy()):
    state = {name: pick(parameter) for name, parameter in torch_model.named_parameters()}
    config = model.config
    return params_from_yolos(
        yolos_from_huggingface(state),
        depth=config.depth,
        num_queries=config.num_queries,
        grid=config.position_grid,
        mid_grid=config.mid_position_grid,
    )


@pytest.mark.parametrize("size", SIZES)
def test_transformers_outputs(pair, size):
    import torch

    theirs, ours, apply = pair
    pixels = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels))
    with jax.default_matmul_precision("highest"):
        outputs = apply(params_of(theirs, ours), batch_of(pixels, 56))
    np.testing.assert_allclose(outputs.pred_logits[0], expected.logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(outputs.pred_boxes[0], expected.pred_boxes, atol=1e-4, rtol=0)


def test_transformers_gradients(pair):
    import torch

    theirs, ours, _ = pair
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 3, 80, 112)).astype(np.float32)
    logits_cotangent = rng.normal(size=(2, 7, 6)).astype(np.float32)
    boxes_cotangent = rng.normal(size=(2, 7, 4)).astype(np.float32)

    expected = theirs(torch.from_numpy(pixels))
    score = (expected.logits * torch.from_numpy(logits_cotangent)).sum()
    score += (expected.pred_boxes * torch.from_numpy(boxes_cotangent)).sum()
    theirs.zero_grad()
    score.backward()
    expected = params_of(theirs, ours, lambda parameter: parameter.grad.numpy())

    def ours_score(params, batch):
        outputs = ours.apply(params, batch, bounds=(7, 7))
        boxes = (outputs.pred_boxes[0] * boxes_cotangent).sum()
        return (outputs.pred_logits[0] * jnp.asarray(logits_cotangent)).sum() + boxes

    with jax.default_matmul_precision("highest"):
        batch = batch_of(pixels, 40)
        gradients = jax.jit(jax.grad(ours_score))(params_of(theirs, ours), batch)
    for (path, leaf), reference in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        error = np.abs(leaf - reference).max() / max(np.abs(reference).max(), 1.0)
        assert error < 1e-4, (jax.tree_util.keystr(path), error)
