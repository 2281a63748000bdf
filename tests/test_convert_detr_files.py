"""DETR's checkpoints as files and folders: in, out, back, and what is refused."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest

import convert_torch_weights
from tests import convert_sources as sources
from tests import tiny_detr
from yolos_jax.convert import (
    command,
    compare,
    detr_hf_names,
    export,
    names,
    reference_detr,
    weights,
)
from yolos_jax.convert.conversion import Options
from yolos_jax.convert.detr_hf_names import Dialect
from yolos_jax.convert.read import Source, read
from yolos_jax.labels import LabelMap

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
MODEL = tiny_detr.model_config()
ARGS = argparse.Namespace(nheads=2, dilation=False, dropout=0.1, backbone="resnet50", lr=1e-4)
OWN = Dialect()
FRUIT = LabelMap((7, 9, 30, 31), ("apple", "bean", "N/A", "date"))


def opened(path, options=None):
    return weights.open_checkpoint(path, options or Options())[0]


def original(tmp_path, model=MODEL, classes=4, **changes):
    state = tiny_detr.make_state(model, classes)
    args = argparse.Namespace(**(vars(ARGS) | changes))
    return sources.save(tmp_path / "detr.pth", state, args=args), state


def folder(path, config, state, dialect=OWN):
    """A folder of transformers, written by hand."""
    import safetensors.numpy

    path.mkdir()
    theirs = detr_hf_names.from_original(state, dialect)
    theirs = {name: np.ascontiguousarray(tensor) for name, tensor in theirs.items()}
    safetensors.numpy.save_file(theirs, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


TIMM = {  # what config.json of facebook/detr-resnet-50 says, as far as it matters
    "model_type": "detr", "d_model": 16, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "num_queries": 5, "dropout": 0.1, "auxiliary_loss": False,
    "use_timm_backbone": True, "backbone": "resnet50", "backbone_config": None, "dilation": False,
    "position_embedding_type": "sine", "activation_function": "relu", "num_channels": 3,
    "id2label": {"0": "N/A", "1": "apple", "2": "bean", "3": "N/A"},
}  # fmt: skip


def equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor, err_msg=name)


def test_the_original_out_and_back_is_equal_to_the_last_bit(tmp_path):
    model = tiny_detr.model_config(pre_norm=True, position="learned", dilation=True)
    path, state = original(tmp_path, model, dilation=True)
    labels = tmp_path / "labels.json"
    pairs = zip(FRUIT.category_ids, FRUIT.names, strict=True)
    labels.write_text(json.dumps({"categories": [{"id": i, "name": n} for i, n in pairs]}))
    found = opened(path, Options(labels=str(labels), size=320))
    export.write_ours(found, tmp_path / "ours", "test")
    export.write_detr(opened(tmp_path / "ours"), tmp_path / "out.pth", "test")
    equal(read(tmp_path / "out.pth").tensors, state)
    # Nothing is to be told again: heads, dilation, labels and sizes are in the file.
    again = opened(tmp_path / "out.pth")
    assert not again.notes
    for key in ("model", "label_map", "preprocess"):
        assert getattr(again, key) == getattr(found, key)
    assert again.label_map == FRUIT and again.preprocess["max_size"] == 533
    stored = torch.load(tmp_path / "out.pth", weights_only=False)
    assert (stored["args"].nheads, stored["args"].pre_norm, stored["epoch"]) == (2, True, 0)


@pytest.mark.parametrize(
    "dialect", [Dialect(), Dialect(timm=True), Dialect(timm=True, before_version5=True)],
    ids=["own", "timm", "older timm"],
)  # fmt: skip
def test_folders_in_and_out_are_equal_to_the_last_bit(tmp_path, dialect):
    position = "learned" if dialect.before_version5 else "sine"
    state = tiny_detr.make_state(tiny_detr.model_config(position=position))
    config = TIMM | {"position_embedding_type": position}
    path = folder(tmp_path / "hf", config, state, dialect)
    processor = {"size": 640, "max_size": 1000, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = opened(path)
    wanted = tiny_detr.model_config(position=position)
    assert found.model["detr"] == wanted["detr"]
    assert found.label_map == LabelMap((0, 1, 2, 3), ("N/A", "apple", "bean", "N/A"))
    assert found.preprocess == {
        "size": 640, "max_size": 1000, "mean": [0.5] * 3, "std": [0.25] * 3, "exif": "ignore"
    }  # fmt: skip
    export.write_hf(found, tmp_path / "out", "test")
    again = opened(tmp_path / "out")
    for key in ("model", "label_map", "preprocess"):
        assert getattr(again, key) == getattr(found, key)
    written = read(tmp_path / "out").tensors
    equal(written, detr_hf_names.from_original(state, Dialect()))
    export.write_detr(again, tmp_path / "out.pth", "test")
    equal(read(tmp_path / "out.pth").tensors, state)


def test_a_dilated_folder_needs_timm_and_says_which(tmp_path, monkeypatch):
    path, state = original(tmp_path, dilation=True)
    found = opened(path)
    with pytest.raises(ValueError, match=r"test: .*timm only, which has none with \(1, 1, 1, 2\)"):
        export.write_hf(found, tmp_path / "out", "test")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(export.systems.detr_huggingface.TIMM, ((1, 1, 1, 2), 4), "resnet17")
    export.write_hf(found, tmp_path / "out", "test")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["use_timm_backbone"], config["backbone"], config["dilation"]) == (
        True, "resnet17", True
    )  # fmt: skip
    equal(read(tmp_path / "out").tensors, detr_hf_names.from_original(state, Dialect(timm=True)))
    assert opened(tmp_path / "out").model["detr"]["dilation"]


def live_folder(path, **changes):
    """A DETR of transformers with random weights, saved as it saves itself."""
    transformers = pytest.importorskip("transformers", reason="the second, live reference")
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 2],
        layer_type="bottleneck", out_features=["stage4"],
    )  # fmt: skip
    values = {key: value for key, value in TIMM.items() if not key.endswith("backbone")}
    values |= {"use_timm_backbone": False, "backbone_config": backbone}
    values["id2label"] = {int(slot): name for slot, name in TIMM["id2label"].items()}
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(**values | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, max(tensor[0].numel(), 4) ** -0.5, generator=generator)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("position", ["sine", "learned"])
def test_what_transformers_saves_goes_out_as_it_came(tmp_path, position):
    path = live_folder(tmp_path / "hf", position_embedding_type=position)
    found, source = weights.open_checkpoint(path, Options())
    export.write_hf(found, tmp_path / "out", "test")
    again, out = weights.open_checkpoint(tmp_path / "out", Options())
    equal(source.tensors, out.tensors)
    images = np.random.default_rng(0).normal(size=(2, 3, 70, 101)).astype(np.float32)
    theirs = reference_detr.run(found, source, images)
    equal(theirs, reference_detr.run(again, out, images))
    tensors = reference_detr.detr_huggingface.to_original(source.tensors, found.model, 4, "x")
    ours = reference_detr.forward(tensors, found.model, images)
    assert list(ours) == ["backbone", "encoder", "decoder 0", "decoder 1", "logits", "boxes"]
    for name, stage in theirs.items():
        np.testing.assert_allclose(ours[name], stage, atol=1e-4, err_msg=name)


def test_the_processor_of_an_export_prepares_pictures_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers", reason="it has the processor")
    found = opened(original(tmp_path)[0], Options(size=128, max_size=220))
    export.write_hf(found, tmp_path / "hf", "test")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    for size in ((120, 200), (150, 233), (96, 96), (90, 100)):
        picture = compare.generated_picture(*size)
        theirs = processor(images=picture, return_tensors="np")["pixel_values"]
        ours = compare.pixels_of(picture, found.preprocess, compare.unit_of(found))
        np.testing.assert_allclose(ours[0].transpose(2, 0, 1), theirs[0], atol=1e-5)


@pytest.mark.slow
def test_compare_runs_transformers(tmp_path, capsys):
    path = live_folder(tmp_path / "hf")
    export.write_ours(opened(path), tmp_path / "ours", "test")
    with pytest.raises(SystemExit) as stop:
        compare.main([str(path), str(tmp_path / "ours"), "--size=96"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0, printed
    assert "DETR of transformers, torch" in printed and "DETR of this project, JAX" in printed
    stages = [line.split()[0] for line in printed.splitlines()]
    assert (stages.count("backbone"), stages.count("encoder"), stages.count("decoder")) == (1, 1, 2)


def arguments(*words):
    return convert_torch_weights.parse([str(word) for word in words])


def test_the_command_converts_verifies_and_predicts(tmp_path, capsys):
    path, state = original(tmp_path)
    command.convert(arguments(path, tmp_path / "out", "--size=64", "--verify"))
    printed = capsys.readouterr().out
    assert "loaded  backbone.0.body.layer4.0.downsample.1.running_var" in printed
    assert re.search(r"decoder 1 +\d.*\n.*verified: logits", printed, re.DOTALL)
    assert f"{sum(array.size for array in state.values()):,} parameters" in printed
    for kind in ("hf", "detr"):
        command.convert(arguments(tmp_path / "out", tmp_path / kind, f"--to={kind}"))
        again = opened(tmp_path / kind)
        equal(names.flatten(again.params), names.flatten(opened(path).params))
    with pytest.raises(ValueError, match="a DETR, which --to=yolos has no place for; --to=detr"):
        command.convert(arguments(tmp_path / "out", tmp_path / "y.pth", "--to=yolos"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_heads": 4}, "--num_heads 4, but the checkpoint has 2"),
        ({"dilation": True}, "--dilation, but the checkpoint has none"),
        ({"mid_pe_size": ()}, "--mid_pe_size, but a DETR has no such position table"),
    ],
)
def test_flags_that_contradict_are_errors(tmp_path, flags, message):
    path, state = original(tmp_path)
    export.write_ours(opened(path), tmp_path / "ours", "test")
    for source in (path, tmp_path / "ours", folder(tmp_path / "hf", TIMM, state)):
        with pytest.raises(ValueError, match=message):
            opened(source, Options(**flags))


def test_a_checkpoint_that_does_not_say_takes_flags(tmp_path):
    path = sources.save(tmp_path / "detr.pth", tiny_detr.make_state(MODEL))
    found = opened(path, Options(num_heads=4, dilation=True))
    assert found.model["heads"] == 4 and found.model["detr"]["dilation"] and not found.notes


def test_masks_and_panoptic_classes_are_refused(tmp_path):
    """In one line each, whatever else is wrong."""
    path, state = original(tmp_path)
    masks = {"mask_head.lay1.weight": np.zeros((8, 8, 3, 3), np.float32)}
    inside = {f"detr.{name}": tensor for name, tensor in state.items()}
    for tensors in (inside | masks, {"detr.model.x": np.zeros(1, np.float32)} | masks):
        with pytest.raises(ValueError, match=r"a DETR for segmentation .* no masks yet") as caught:
            opened(sources.save(path, tensors))
        assert "\n" not in str(caught.value)
    path, state = original(tmp_path, classes=250)
    # Without names, and with those that transformers makes up.
    generic = {str(slot): f"LABEL_{slot}" for slot in range(250)}
    for id2label in (None, generic):
        config = TIMM | {"id2label": id2label, "num_labels": 250}
        place = folder(tmp_path / f"hf_{id2label is None}", config, state)
        with pytest.raises(ValueError, match="250 classes, which are panoptic COCO's"):
            opened(place)
    with pytest.raises(ValueError, match=r"250 classes, which are panoptic COCO's .* COCO's 91"):
        opened(path)
    labels = tmp_path / "panoptic.json"
    labels.write_text(json.dumps({"categories": [{"id": 200, "name": "rug"}]}))
    assert opened(path, Options(labels=str(labels))).label_map.names[200] == "rug"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "conditional_detr"}, "model_type is 'conditional_detr', here it is 'detr'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"decoder_ffn_dim": 48}, "decoder_ffn_dim is 48, here it is 24"),
        ({"auxiliary_loss": True}, "auxiliary_loss is true, with which transformers normalises"),
        ({"backbone": "efficientnet_b0"}, "backbone is 'efficientnet_b0', here it is a ResNet"),
        ({"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}},
         "downsample_in_bottleneck is True, here it is False"),
        ({"encoder_layers": 2}, r"missing: model.encoder.layers.1.self_attn.q_proj.weight \(16,"),
    ],
)  # fmt: skip
def test_what_no_detr_here_has_is_refused(tmp_path, config, message):
    path = folder(tmp_path / "hf", TIMM | config, tiny_detr.make_state(MODEL))
    with pytest.raises(ValueError, match=message):
        opened(path)


def test_two_models_are_not_compared(tmp_path, capsys):
    path, _ = original(tmp_path)
    yolos = sources.save(tmp_path / "yolos.pth", sources.yolos(), args=sources.yolos_args())
    export.write_yolos(opened(yolos, Options(num_heads=3)), tmp_path / "y.pth", "test")
    with pytest.raises(SystemExit) as stop:
        compare.main([str(path), str(tmp_path / "y.pth")])
    assert "detr.pth is a DETR" in str(stop.value.code) and "y.pth a YOLOS" in str(stop.value.code)


def test_tensors_without_a_backbone_are_one_line():
    state = detr_hf_names.from_original(tiny_detr.make_state(MODEL), Dialect())
    state = {name: x for name, x in state.items() if "conv_encoder" not in name}
    with pytest.raises(ValueError, match=r"no backbone known here.*own or timm's\.$"):
        weights.detr_huggingface.convert(Source("hf", state, TIMM), Options())
