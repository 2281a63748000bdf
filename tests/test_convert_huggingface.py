"""YOLOS of transformers, in and out, beside transformers itself."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests import convert_sources as sources
from yolos_jax.convert import compare, export, huggingface, names, reference, weights
from yolos_jax.convert.conversion import Options
from yolos_jax.convert.read import read
from yolos_jax.detector import Detector
from yolos_jax.labels import LabelMap

torch = pytest.importorskip("torch", reason="transformers' models need torch")
transformers = pytest.importorskip("transformers", reason="the second, live reference")


def random_folder(folder, seed=0, **changes):
    """A YOLOS of transformers with random weights, saved as it saves itself."""
    values = {
        "hidden_size": sources.WIDTH,
        "num_hidden_layers": sources.DEPTH,
        "num_attention_heads": sources.HEADS,
        "intermediate_size": sources.MLP,
        "image_size": [48, 64],
        "num_detection_tokens": sources.QUERIES,
        "id2label": {0: "apple", 1: "bean", 2: "carrot"},
    }
    model = transformers.YolosForObjectDetection(transformers.YolosConfig(**values | changes))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Small: so that it matters which epsilon a LayerNorm has.
        torch.nn.init.normal_(parameter, 0, 0.02, generator=generator)
    model.save_pretrained(folder)
    return folder


def run_theirs(folder, pixels):
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    return outputs.logits.numpy(), outputs.pred_boxes.numpy()


def opened(folder, options=None):
    return weights.open_checkpoint(folder, options or Options())[0]


ALL_SIZES = ((48, 64), (64, 96), (80, 48), (53, 71))


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, ALL_SIZES[-1:]),
        pytest.param({}, ALL_SIZES[:-1], marks=pytest.mark.slow),
        pytest.param({"use_mid_position_embeddings": False}, ALL_SIZES, marks=pytest.mark.slow),
        pytest.param({"qkv_bias": False}, ALL_SIZES[:1], marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_of_transformers(tmp_path, changes, sizes):
    folder = random_folder(tmp_path / "hf", **changes)
    converted = opened(folder)
    detector = Detector(converted.params, converted.metadata("test"))
    random = np.random.default_rng(0)
    for size in sizes:
        pixels = random.normal(size=(2, *size, 3)).astype(np.float32)
        logits, boxes = run_theirs(folder, pixels)
        ours = detector.outputs(pixels)
        np.testing.assert_allclose(ours.pred_logits, logits, atol=1e-4)
        np.testing.assert_allclose(ours.pred_boxes, boxes, atol=1e-4)


def test_epsilon_of_the_layer_norms_is_read(tmp_path):
    model = opened(random_folder(tmp_path / "hf")).model
    assert model["layer_norm_eps"] == 1e-12  # transformers' default


def test_out_again_is_what_transformers_reads(tmp_path):
    folder = random_folder(tmp_path / "hf")
    found = opened(folder)
    export.write_hf(found, tmp_path / "out", "test")
    pixels = np.random.default_rng(0).normal(size=(1, 64, 80, 3)).astype(np.float32)
    for theirs, again in zip(
        run_theirs(folder, pixels), run_theirs(tmp_path / "out", pixels), strict=True
    ):
        np.testing.assert_array_equal(theirs, again)
    first, second = read(folder).tensors, read(tmp_path / "out").tensors
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "apple", 1: "bean", 2: "carrot"}


def test_a_run_of_ours_goes_out_with_names_and_ids(tmp_path):
    path = sources.save(tmp_path / "y.pth", sources.yolos(3), args=sources.yolos_args())
    labels = tmp_path / "labels.json"
    fruit = [{"id": i, "name": n} for i, n in ((7, "apple"), (9, "bean"), (30, "ça et là"))]
    labels.write_text(json.dumps({"categories": fruit}))
    found = opened(path, Options(num_heads=3, labels=str(labels)))
    export.write_hf(found, tmp_path / "hf", "test")
    again = opened(tmp_path / "hf")
    assert again.label_map == LabelMap((7, 9, 30), ("apple", "bean", "ça et là"))
    assert again.preprocess == found.preprocess
    assert {**again.model, "dtype": ""} == {**found.model, "dtype": ""}
    for path_, array in names.flatten(found.params).items():
        np.testing.assert_array_equal(names.flatten(again.params)[path_], array, err_msg=path_)
    pixels = np.random.default_rng(0).normal(size=(1, 64, 48, 3)).astype(np.float32)
    logits, boxes = run_theirs(tmp_path / "hf", pixels)
    tensors = names.from_params(found.params, found.model)
    ours = reference.forward(tensors, found.model, pixels.transpose(0, 3, 1, 2).copy())
    np.testing.assert_allclose(ours["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(ours["boxes"], boxes, atol=1e-4)


def test_ids_of_other_classes_are_not_taken_for_theirs(tmp_path):
    """What transformers' fine-tuning leaves: names of its own beside the ids of an export."""
    path = sources.save(tmp_path / "y.pth", sources.yolos(3), args=sources.yolos_args())
    found = opened(path, Options(num_heads=3))
    fruit = LabelMap((7, 9, 30), ("apple", "bean", "carrot"))
    export.write_hf(dataclasses.replace(found, label_map=fruit), tmp_path / "hf", "test")
    config = json.loads((tmp_path / "hf/config.json").read_text())

    def again(*names):
        config["id2label"] = {str(slot): name for slot, name in enumerate(names)}
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
        return opened(tmp_path / "hf")

    assert again("carrot", "bean", "apple").label_map.category_ids == (30, 9, 7)
    other = again("cat", "bean", "dog")
    assert other.label_map == LabelMap((0, 1, 2), ("cat", "bean", "dog"))
    assert other.notes == (
        "config.json: category_ids is of other classes than id2label; ids are slots",
    )
    config["category_ids"] = [7, 9, 30]  # no proof of whose they are
    assert again("apple", "bean", "carrot").label_map.category_ids == (0, 1, 2)


@pytest.mark.parametrize("size", [(120, 200), (333, 150), (96, 96)])
def test_the_processor_of_an_export_prepares_pictures_as_we_do(tmp_path, size):
    path = sources.save(tmp_path / "y.pth", sources.yolos(), args=sources.yolos_args())
    found = opened(path, Options(num_heads=3, size=128, max_size=220))
    # Of a key that it does not know, transformers says nothing.
    found = dataclasses.replace(found, preprocess=found.preprocess | {"exif": "apply"})
    export.write_hf(found, tmp_path / "hf", "test")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    picture = compare.generated_picture(*size)
    theirs = processor(images=picture, return_tensors="np")["pixel_values"]
    ours = compare.pixels_of(picture, found.preprocess, 16)
    np.testing.assert_allclose(ours[0].transpose(2, 0, 1), theirs[0], atol=1e-5)


def test_no_limit_of_the_longer_side_stays_none(tmp_path):
    path = sources.save(tmp_path / "y.pth", sources.yolos(), args=sources.yolos_args())
    found = opened(path, Options(num_heads=3, size=64))
    found = dataclasses.replace(found, preprocess=found.preprocess | {"max_size": 0})
    export.write_hf(found, tmp_path / "hf", "test")
    assert opened(tmp_path / "hf").preprocess["max_size"] == 0
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    picture = compare.generated_picture(60, 400)
    theirs = processor(images=picture, return_tensors="np")["pixel_values"]
    assert theirs.shape[2:] == compare.pixels_of(picture, found.preprocess, 16).shape[1:3]


@pytest.mark.parametrize(("max_size", "warned"), [(224, True), (220, False)])
def test_sizes_that_transformers_rounds_otherwise_are_warned_of(tmp_path, capsys, max_size, warned):
    path = sources.save(tmp_path / "y.pth", sources.yolos(), args=sources.yolos_args())
    found = opened(path, Options(num_heads=3, size=128, max_size=max_size))
    export.write_hf(found, tmp_path / "hf", "test")
    assert ("WARNING: max_size 224 is a multiple" in capsys.readouterr().out) == warned
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    picture = compare.generated_picture(300, 588)
    theirs = processor(images=picture, return_tensors="np")["pixel_values"].shape[2:]
    ours = compare.pixels_of(picture, found.preprocess, 16).shape[1:3]
    assert (theirs != ours) == warned


def test_preprocessor_config_is_read(tmp_path):
    folder = random_folder(tmp_path / "hf")
    converted = opened(folder)
    found = converted.preprocess
    assert (found["size"], found["max_size"]) == (800, 1333)  # none: what most have
    assert "ASSUMED: pictures of 800 pixels on the shorter side" in converted.describe()
    for size, expected in (
        ({"shortest_edge": 512, "longest_edge": 864}, (512, 864)),
        (600, (600, 1000)),  # as it was written before 2022
        ({"shortest_edge": 600}, (600, 1000)),
    ):
        content = {"size": size, "max_size": 1000, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
        found = opened(folder).preprocess
        assert (found["size"], found["max_size"]) == expected
        assert (found["mean"], found["std"]) == ([0.5] * 3, [0.25] * 3)
        assert "ASSUMED" not in opened(folder).describe()
    for size in (1400, {"shortest_edge": 1400}):  # and no other key
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        found = opened(folder).preprocess
        assert (found["size"], found["max_size"]) == (1400, 1400)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 3, "width": 4}}')
    with pytest.raises(ValueError, match=r"preprocessor_config.json.*--size"):
        opened(folder)
    assert opened(folder, Options(size=300)).preprocess["size"] == 300


def test_labels(tmp_path):
    def labels(**config):
        return opened(random_folder(tmp_path / "hf", **config)).label_map

    assert labels(id2label=None, num_labels=91) == LabelMap.coco91()
    assert labels(id2label=None, num_labels=2).names == ("class_0", "class_1")
    coco = dict(enumerate(LabelMap.coco91().names))  # as the weights on the hub have them
    assert labels(id2label=coco) == LabelMap.coco91()


def test_a_pytorch_bin_and_shards_are_read(tmp_path):
    folder = random_folder(tmp_path / "hf")
    expected = read(folder).tensors
    state = {name: torch.from_numpy(array.copy()) for name, array in expected.items()}
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(folder / "config.json", old)
    torch.save(state, old / "pytorch_model.bin")
    shards = tmp_path / "shards"
    model = transformers.YolosForObjectDetection.from_pretrained(folder)
    model.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    for other in (old, shards):
        found = read(other).tensors
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_without_qkv_biases(tmp_path):
    found = opened(random_folder(tmp_path / "hf", qkv_bias=False))
    assert not found.params["backbone"]["blocks"]["attention"]["qkv"]["bias"].any()
    added = [row for row in found.rows if row.action == "new"]
    assert len(added) == 3 * sources.DEPTH and "qkv_bias is false" in added[0].detail


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_channels": 4}, "num_channels is 4"),
    ],
)
def test_what_no_yolos_here_has_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        opened(random_folder(tmp_path / "hf", **config))


def test_wrong_tensors_are_named_as_transformers_names_them(tmp_path):
    folder = random_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError) as caught:
        opened(folder)
    message = str(caught.value)
    assert "missing: vit.encoder.layer.2.attention.attention.key.bias (24,)" in message
    assert "vit.encoder.mid_position_embeddings has shape" in message
    with pytest.raises(ValueError, match=r"--num_heads 4, but the checkpoint has 3"):
        opened(folder, Options(num_heads=4))


def test_tables_of_two_sizes_cannot_go_out(tmp_path):
    path = sources.save(tmp_path / "y.pth", sources.yolos())
    found = opened(path, Options(num_heads=3, init_pe_size=(48, 64), mid_pe_size=(96, 32)))
    with pytest.raises(ValueError, match="one size for all position tables"):
        export.write_hf(found, tmp_path / "hf", "test")
    assert not (tmp_path / "hf").exists()


def test_names_are_one_to_one():
    model = {
        "width": 4, "depth": 3, "mlp_width": 8, "patch_size": 2, "num_queries": 2,
        "position_grid": (2, 2), "mid_position_grid": (2, 2),
    }  # fmt: skip
    theirs = [n for name in names.expected_shapes(model, 3) for n in huggingface.their_names(name)]
    assert len(set(theirs)) == len(theirs)


@pytest.mark.slow
def test_compare_runs_transformers(tmp_path, capsys):
    folder = random_folder(tmp_path / "hf")
    export.write_ours(opened(folder), tmp_path / "ours", "test")
    with pytest.raises(SystemExit) as stop:
        compare.main([str(folder), str(tmp_path / "ours"), "--size=64"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0, printed
    assert "YOLOS of transformers, torch" in printed and "YOLOS of this project, JAX" in printed
    assert [line.split()[0] for line in printed.splitlines()].count("block") == sources.DEPTH
