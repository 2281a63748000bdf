"""The backbone against torch's own convolutions, put together as torchvision's source has them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from yolos_jax.models.relu import relu
from yolos_jax.models.resnet import ResNet

STEM = 4


def make(blocks, dilation):
    module = ResNet(blocks, STEM, dilation, False, np.float32, lambda x: x)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "running_var":
            return rng.uniform(0.2, 2, leaf.shape).astype(np.float32)
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim == 4 else 1
        return (rng.normal(size=leaf.shape) * scale).astype(np.float32)

    return module, jax.tree_util.tree_map_with_path(draw, shapes["params"])


def in_torch(params, pixels, blocks, dilation):
    """Every stage's output [B, h, w, C] by torch."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def tensor(x):
        return torch.from_numpy(np.array(x))

    def convolution(x, module, **options):
        return functional.conv2d(x, tensor(module["kernel"]).permute(3, 2, 0, 1), **options)

    def norm(x, module):
        four = (tensor(module[name]) for name in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *four, training=False, eps=1e-5)

    x = tensor(pixels).permute(0, 3, 1, 2)
    x = functional.relu(norm(convolution(x, params["conv1"], stride=2, padding=3), params["bn1"]))
    x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    features = []
    for stage, count in enumerate(blocks, start=1):
        for index in range(count):
            block = params[f"layer{stage}"][f"block_{index}"]
            dilated = dilation and stage == 4
            stride = 2 if index == 0 and stage > 1 and not dilated else 1
            spread = 2 if dilated and index > 0 else 1
            out = functional.relu(norm(convolution(x, block["conv1"]), block["bn1"]))
            out = convolution(out, block["conv2"], stride=stride, padding=spread, dilation=spread)
            out = functional.relu(norm(out, block["bn2"]))
            out = norm(convolution(out, block["conv3"]), block["bn3"])
            if index == 0:
                shortcut = convolution(x, block["downsample_conv"], stride=stride)
                x = norm(shortcut, block["downsample_bn"])
            x = functional.relu(out + x)
        features.append(x.permute(0, 2, 3, 1).numpy())
    return features


@pytest.mark.parametrize(
    ("blocks", "dilation", "canvas", "last"),
    [((2, 1, 1, 2), False, (67, 90), (3, 3)), ((1, 1, 1, 3), True, (70, 97), (5, 7))],
    ids=("strided", "dilated"),
)
def test_stages_are_those_of_torch(blocks, dilation, canvas, last):
    module, params = make(blocks, dilation)
    pixels = np.random.default_rng(1).normal(size=(2, *canvas, 3)).astype(np.float32)
    expected = in_torch(params, pixels, blocks, dilation)
    found = jax.jit(lambda params, pixels: module.apply({"params": params}, pixels))(params, pixels)
    assert found[-1].shape == (2, *last, 32 * STEM)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


def test_relu_has_torchs_gradient_at_zero_and_keeps_nothing_else():
    x = np.array([-1.0, 0.0, 2.0], np.float32)
    out, backward = jax.vjp(relu, x)
    np.testing.assert_array_equal(out, [0, 0, 2])
    np.testing.assert_array_equal(backward(np.full(3, 5, np.float32))[0], [0, 0, 5])
    assert [leaf.shape for leaf in jax.tree.leaves(backward)] == [(3,)]
