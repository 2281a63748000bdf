"""What timm says of pictures beside its weights, and what is assumed where it says nothing."""

from __future__ import annotations

import json

import pytest

from tests import convert_sources as sources
from yolos_jax.convert import conversion, start, weights
from yolos_jax.convert.conversion import Options

torch = pytest.importorskip("torch", reason="writing weights needs torch")


@pytest.fixture(autouse=True)
def quick_draws(monkeypatch):
    """Random parameters without compiling anything: what they are does not matter."""
    monkeypatch.setattr(start, "draw", sources.numpy_draw)


def opened(path):
    return weights.open_checkpoint(path, Options(**sources.FLAGS))[0]


def timm_folder(folder, config):
    """A model of timm's hub: weights, and a config.json that transformers cannot read."""
    folder.mkdir()
    state = {name: torch.from_numpy(array) for name, array in sources.timm().items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny"} | config))
    return folder


def test_normalisation_of_timm(tmp_path):
    trained = {"mean": [0.5] * 3, "std": [0.25] * 3}
    for name, config in {"new": {"pretrained_cfg": trained}, "old": trained}.items():
        found = opened(timm_folder(tmp_path / name, config))
        assert {key: found.preprocess[key] for key in trained} == trained
        assert "ASSUMED" not in found.describe()
    for path in (
        timm_folder(tmp_path / "silent", {"pretrained_cfg": {}}),
        sources.save(tmp_path / "vit.pth", sources.timm()),
    ):
        found = opened(path)
        assert found.preprocess["mean"] == list(conversion.IMAGENET_MEAN)
        assert found.preprocess["std"] == list(conversion.IMAGENET_STD)
        assert "ASSUMED: pictures are normalised with ImageNet's" in found.describe()
