"""Vision transformers of google-research (.npz) become the start of a detector."""

from __future__ import annotations

import numpy as np
import pytest

from tests import convert_sources as sources
from yolos_jax.convert import names, npz, start, weights
from yolos_jax.convert.conversion import Options

torch = pytest.importorskip("torch", reason="what the files are compared with is a .pth")


@pytest.fixture(autouse=True)
def quick_draws(monkeypatch):
    """Random parameters without compiling anything: what they are does not matter."""
    monkeypatch.setattr(start, "draw", sources.numpy_draw)


def opened(path, **changes):
    return weights.open_checkpoint(path, Options(**(sources.FLAGS | changes)))[0]


def assert_same_start(found, expected):
    ours, theirs = names.flatten(found.params), names.flatten(expected.params)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert (found.model, found.new) == (expected.model, expected.new)


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_vision_transformer_npz(tmp_path, prefix):
    plain = opened(sources.save(tmp_path / "v.pth", sources.timm()))
    arrays = sources.flax(sources.timm(), big_vision=False)
    np.savez(tmp_path / "v.npz", **{prefix + name: array for name, array in arrays.items()})
    found = opened(tmp_path / "v.npz", num_heads=None)  # the file tells the heads
    assert_same_start(found, plain)
    assert found.preprocess["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("stacked", [False, True])
def test_big_vision_npz(tmp_path, stacked):
    tensors = sources.timm(prefix=0)
    arrays = sources.flax(tensors, big_vision=True)
    if stacked:
        first = "Transformer/encoderblock_0/"
        blocks = [name.removeprefix(first) for name in arrays if name.startswith(first)]
        for name in blocks:
            layers = [arrays.pop(f"Transformer/encoderblock_{i}/{name}") for i in range(2)]
            arrays[f"Transformer/encoderblock/{name}"] = np.stack(layers)
    content = {f"params/img/{name}": array for name, array in arrays.items()}
    np.savez(tmp_path / "v.npz", **content, **{"params/txt/head/bias": np.zeros(3)})
    found = opened(tmp_path / "v.npz")
    assert_same_start(found, opened(sources.save(tmp_path / "v.pth", tensors)))
    assert [r.name for r in found.rows if r.action == "unused"] == [
        "params/img/head/kernel", "params/img/head/bias", "params/txt/head/bias"
    ]  # fmt: skip


def test_npz_without_a_class_token(tmp_path):
    arrays = sources.flax(sources.timm(prefix=0), big_vision=True)
    del arrays["cls"]
    np.savez(tmp_path / "v.npz", **arrays)
    found = opened(tmp_path / "v.npz")
    assert {"backbone/cls_token", "backbone/position/cls"} <= set(found.new)


def test_npz_that_does_not_fit(tmp_path):
    arrays = sources.flax(sources.timm(prefix=0), big_vision=True)
    del arrays["Transformer/encoderblock_1/LayerNorm_0/scale"]
    arrays["Transformer/extra"] = np.zeros(2, np.float32)
    arrays["embedding/bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as caught:
        npz.to_original({k: v for k, v in arrays.items() if "head/" not in k}, "v.npz")
    for part in ("missing: Transformer/encoderblock_1/LayerNorm_0/scale", "Transformer/extra",
                 "embedding/bias has shape (3,), expected (24,)"):  # fmt: skip
        assert part in str(caught.value)
    arrays.pop("pos_embedding")
    with pytest.raises(ValueError, match="no position table"):
        npz.to_original(arrays, "v.npz")
