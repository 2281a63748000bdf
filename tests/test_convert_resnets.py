"""Pre-trained ResNets in all their layouts become the start of a DETR."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import convert_sources as sources
from tests import tiny_detr
from yolos_jax import checkpoint
from yolos_jax.convert import export, names, reference_detr, resnets, start, weights
from yolos_jax.convert.conversion import Options
from yolos_jax.labels import LabelMap

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
BODY = "backbone.0.body."
MODEL = tiny_detr.model_config()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small transformer of numbers drawn in numpy: what they are does not matter."""
    monkeypatch.setattr(start, "draw", tiny_detr.numpy_draw)
    for name, value in {"_WIDTH": 16, "_HEADS": 2, "_MLP": 24, "_QUERIES": 5, "_DEPTH": 1}.items():
        monkeypatch.setattr(resnets, name, value)


def torchvision(blocks=(1, 1, 1, 2), counters=True, seed=0):
    """A ResNet in torchvision's names, which are timm's too, with its classifier."""
    model = tiny_detr.model_config(blocks=blocks)
    state = tiny_detr.make_state(model, seed=seed)
    tensors = {n.removeprefix(BODY): x for n, x in state.items() if n.startswith(BODY)}
    if counters:
        norms = [name for name in tensors if name.endswith("running_mean")]
        tensors |= {
            name.replace("running_mean", "num_batches_tracked"): np.array(7) for name in norms
        }
    draw = sources.numbers()
    return tensors | {"fc.weight": draw(10, 128), "fc.bias": draw(10)}


def save(path, tensors):
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    return path


def opened(path, **options):
    return weights.open_checkpoint(path, Options(**options))[0]


def assert_backbone(found, tensors):
    """Every tensor of torchvision's, statistics too, is in the start as it was."""
    expected = {name: x for name, x in tensors.items() if f"{BODY}{name}" in found}
    assert len(expected) == sum(name.startswith(BODY) for name in found) == 5 * 20
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[f"{BODY}{name}"], tensor, err_msg=name)


def state_of(found):
    return weights.systems.detr_names.from_params(found.params, found.model)


def test_a_resnet_of_torchvision(tmp_path):
    tensors = torchvision()
    found = opened(save(tmp_path / "resnet.pth", tensors))
    assert_backbone(state_of(found), tensors)
    assert found.model["detr"]["blocks"] == (1, 1, 1, 2) and found.model["num_queries"] == 5
    assert found.label_map == LabelMap.coco91()
    actions = {row.name: row.action for row in found.rows}
    assert actions["layer4.1.bn3.running_var"] == "loaded"
    assert actions["fc.weight"] == actions["bn1.num_batches_tracked"] == "unused"
    assert actions["encoder/layers/norm1/scale"] == actions["query_embed"] == "new"
    paths = set(names.flatten(found.params))
    assert set(found.new) == {path for path in paths if not path.startswith("backbone/")}


def test_torch_runs_the_source_with_what_is_new(tmp_path):
    """What --verify lays a start beside."""
    path = save(tmp_path / "resnet.pth", torchvision())
    found, source = weights.open_checkpoint(path, Options())
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 70)).astype(np.float32)
    theirs = reference_detr.run(found, source, images)
    ours = reference_detr.forward(state_of(found), found.model, images)
    assert theirs.keys() == ours.keys() and np.ptp(theirs["logits"]) > 0.1
    for name, stage in theirs.items():
        np.testing.assert_array_equal(ours[name], stage, err_msg=name)


def timm_folder(path, tensors):
    import safetensors.numpy

    path.mkdir()
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    config = {"architecture": "resnet50", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def transformers_folder(path, kind, tensors, **changes):
    transformers = pytest.importorskip("transformers", reason="it writes its own layout")
    values = {"embedding_size": 4, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 2]}
    model = getattr(transformers, kind)(transformers.ResNetConfig(**values | changes))
    prefix = (
        "resnet." if "resnet.embedder.embedder.convolution.weight" in model.state_dict() else ""
    )
    own = {
        prefix + resnets.detr_hf_names.own_backbone(name): torch.from_numpy(x)
        for name, x in tensors.items()
        if not name.startswith("fc.")
    }
    missing, surplus = model.load_state_dict(own, strict=False)
    assert not surplus and all("classifier" in name or "batches" in name for name in missing)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.4, 0.4]}')
    return path


def test_folders_of_timm_and_transformers_are_the_same_start(tmp_path):
    tensors = torchvision(counters=False)
    expected = state_of(opened(save(tmp_path / "resnet.pth", tensors)))
    folders = {"timm": timm_folder(tmp_path / "timm", tensors)}
    for kind in ("ResNetModel", "ResNetForImageClassification"):
        folders[kind] = transformers_folder(tmp_path / kind, kind, tensors)
    for name, path in folders.items():
        found = opened(path)
        state = state_of(found)
        for tensor in expected:
            np.testing.assert_array_equal(state[tensor], expected[tensor], err_msg=tensor)
        mean = 0.5 if name == "timm" else 0.4
        assert list(found.preprocess["mean"]) == [mean] * 3


def test_a_run_starts_from_it(tmp_path):
    """Through our own checkpoint: the backbone stays, what is new is drawn by the run."""
    found = opened(save(tmp_path / "resnet.pth", torchvision()), dilation=True)
    export.write_ours(found, tmp_path / "start", "resnet.pth")
    params, metadata = checkpoint.load_params(tmp_path / "start")
    model = tiny_detr.make_model(num_queries=3, encoder_depth=2)
    fitted, report = start.initial_params(model, params, metadata, tiny_detr.jax.random.key(5))
    old, new = names.flatten(params), names.flatten(fitted)
    same = {path for path in new if path in old and np.array_equal(new[path], old[path])}
    assert same == {path for path in new if path.startswith("backbone/")}
    assert report.startswith("start: start from a ResNet in torchvision's and timm's layout")
    assert "100 of " in report.splitlines()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer1.0.conv2.weight": (4, 1, 3, 3)},
            r"layer1.0.conv2.weight has shape \(4, 1, 3, 3\)",
        ),
        ({"layer1.0.se.fc1.weight": (4, 4)}, "not part of the model: layer1.0.se.fc1.weight"),
        ({"layer1.0.conv3.weight": None}, r"\(1, 1, 1, 2\) basic blocks.*ResNet-50"),
        ({"layer4.0.downsample.1.running_var": None}, "missing: layer4.0.downsample.1.running_var"),
    ],
)
def test_other_resnets_are_refused(tmp_path, change, message):
    tensors = torchvision()
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = sources.numbers()(*shape)
    with pytest.raises(ValueError, match=message):
        opened(save(tmp_path / "resnet.pth", tensors))


def test_a_stride_in_the_first_convolution_is_refused(tmp_path):
    changes = {"downsample_in_bottleneck": True}
    path = transformers_folder(tmp_path / "hf", "ResNetModel", torchvision(), **changes)
    with pytest.raises(ValueError, match="downsample_in_bottleneck is True, DETR's backbone has"):
        opened(path)
