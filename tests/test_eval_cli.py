"""eval.py from the command line: numbers, results, settings, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import yolos_jax
from configs import common
from tests import tiny_checkpoint
from yolos_jax import mesh, scoring
from yolos_jax.checkpoint import load_params, save_params
from yolos_jax.data.coco import read_coco
from yolos_jax.data.shapes import write as write_shapes
from yolos_jax.data.truth import ground_truth
from yolos_jax.labels import LabelMap

pytest.importorskip("pycocotools")
pytest.importorskip("tensorflow")
ANNOTATIONS = "annotations/instances_val2017.json"


def load_script():
    path = Path(__file__).parent.parent / "eval.py"
    spec = importlib.util.spec_from_file_location("eval_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


eval_script = load_script()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shapes(root, seed=0, train=1, val=7, size=64)
    return root


@pytest.fixture(scope="module")
def label_map(data):
    return LabelMap.from_categories(read_coco(data / ANNOTATIONS)["categories"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, label_map):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model") / "checkpoint", label_map)


@pytest.fixture
def three_devices(monkeypatch):
    three = Mesh(np.array(jax.devices()[:3]).reshape(3, 1), mesh.ROWS)
    monkeypatch.setattr(mesh, "make_mesh", lambda fsdp: three)


def run(capsys, *arguments):
    """Returns what was printed, and the message that eval.py stopped with (None: it did not)."""
    try:
        eval_script.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return capsys.readouterr().out, stop.code
    return capsys.readouterr().out, None


def test_seven_images_three_devices_batch_four(capsys, data, checkpoint, tmp_path, three_devices):
    file = tmp_path / "deep" / "results.json"
    printed, error = run(
        capsys, "--checkpoint", checkpoint, "--data_root", data, "--batch_size", 4,
        "--results", file, "--set", "data.tfds_val=x",
    )  # fmt: skip
    assert error is None
    assert printed.count("note: data.tfds_val='x' is not used with data.tfds_name=''") == 1
    assert "batches of 6 images instead of 4" in printed
    summary = json.loads(printed.splitlines()[-1])
    results = json.loads(file.read_text())
    assert [p.name for p in file.parent.iterdir()] == ["results.json"]
    truth = ground_truth(read_coco(data / ANNOTATIONS))
    image_ids = [image["id"] for image in truth["images"]]
    per_image = [sum(r["image_id"] == i for r in results) for i in image_ids]
    assert per_image == [8] * 7 and len(results) == 56  # every image, once, with every query
    assert summary["images"] == 7 and summary["unreadable"] == 0

    # The printed numbers are those of the written file, digit by digit.
    metrics = scoring.coco_metrics(truth, results, image_ids)
    assert {key: summary[key] for key, *_ in scoring.SUMMARY} == {
        key: metrics[key] for key, *_ in scoring.SUMMARY
    }
    for line in scoring.format_metrics(metrics).splitlines():
        assert line in printed

    # And the predictions are those of the detector on the same files.
    detector = yolos_jax.load(checkpoint)
    images = {image["id"]: image["file_name"] for image in truth["images"]}
    found = detector.predict([data / "val2017" / images[i] for i in image_ids], threshold=0.0)
    for image_id, prediction in zip(image_ids, found, strict=True):
        mine = sorted((r for r in results if r["image_id"] == image_id), key=lambda r: -r["score"])
        assert [r["category_id"] for r in mine] == prediction.category_ids.tolist()
        np.testing.assert_allclose([r["score"] for r in mine], prediction.scores, atol=0.02)
        xywh = np.array([r["bbox"] for r in mine])
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        np.testing.assert_allclose(xyxy, prediction.boxes_xyxy_px, atol=1.0)


@pytest.mark.slow
def test_reference_padding_changes_nothing_where_all_pictures_have_one_size(
    capsys, data, checkpoint, tmp_path, three_devices
):
    results = []
    for n, padding in enumerate((0, 2)):
        file = tmp_path / f"{n}.json"
        _, error = run(
            capsys, "--checkpoint", checkpoint, "--data_root", data, "--batch_size", 4,
            "--results", file, "--reference_padding", padding,
        )  # fmt: skip
        assert error is None
        results.append(json.loads(file.read_text()))
    key = lambda r: (r["image_id"], r["score"], r["bbox"][0])  # noqa: E731
    for one, two in zip(sorted(results[0], key=key), sorted(results[1], key=key), strict=True):
        assert one["image_id"] == two["image_id"] and one["category_id"] == two["category_id"]
        np.testing.assert_allclose(one["bbox"], two["bbox"], atol=1e-3)


def test_subset_and_names_of_files(capsys, data, checkpoint):
    (data / "other").mkdir(exist_ok=True)
    coco = read_coco(data / ANNOTATIONS)
    for image in coco["images"]:
        image["file_name"] = f"val2017/{image['file_name']}"
    (data / "other" / "list.json").write_text(json.dumps(coco))
    printed, error = run(
        capsys, "--checkpoint", checkpoint, "--data_root", data, "--subset", 3, "--annotations",
        "other/list.json", "--images", ".", "--batch_size", 3, "--set", "model.attention=chunked",
    )  # fmt: skip
    assert error is None
    summary = json.loads(printed.splitlines()[-1])
    assert summary["images"] == 3
    assert summary["annotations"] == "other/list.json" and "split" not in summary


def test_random_heads_are_said(capsys, data, checkpoint, tmp_path):
    params, metadata = load_params(checkpoint)
    start = tmp_path / "start"
    save_params(start, params, metadata | {"new": ["class_head"]})
    printed, error = run(capsys, "--checkpoint", start, "--data_root", data, "--subset", 3)
    assert error is None
    assert printed.splitlines()[0] == f"{start}: its heads are random, it is a start for training"


def test_unreadable_pictures_stop_it_unless_allowed(capsys, data, checkpoint, tmp_path):
    coco = read_coco(data / ANNOTATIONS)
    coco["images"][1]["file_name"] = "gone.png"
    (data / "annotations" / "instances_bad2017.json").write_text(json.dumps(coco))
    command = (
        "--checkpoint", checkpoint, "--data_root", data, "--split", "bad", "--images", "val2017",
        "--results", tmp_path / "results.json",
    )  # fmt: skip
    printed, error = run(capsys, *command)
    assert "gone.png" in error and "data.max_bad_fraction=0.01" in error
    assert not list(tmp_path.iterdir())  # nothing half-written
    printed, error = run(capsys, *command, "--set", "data.max_bad_fraction=0.2")
    assert error is None
    summary = json.loads(printed.splitlines()[-1])
    assert (summary["images"], summary["unreadable"]) == (7, 1)
    assert f"ids [{coco['images'][1]['id']}]" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert coco["images"][1]["id"] not in {r["image_id"] for r in results}


def test_a_dataset_of_other_classes_is_refused(capsys, data, checkpoint):
    coco = read_coco(data / ANNOTATIONS)
    coco["categories"][1]["name"] = "zebra"
    (data / "annotations" / "instances_zebra2017.json").write_text(json.dumps(coco))
    _, error = run(
        capsys, "--checkpoint", checkpoint, "--data_root", data, "--split", "zebra",
        "--images", "val2017",
    )  # fmt: skip
    assert "'zebra'" in error and "checkpoint's classes" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data_root", "/nowhere"], "no such folder"),
        (["--split", "test"], "instances_test2017.json"),
        (["--set", "model.atention=stock"], "is no key; the nearest is model.attention"),
        (["--set", "batch_size=3"], "is no key; the nearest is --batch_size"),
        (["--set", "data.root=/x"], "--set data.root: that is --data_root"),
        (["--set", "size=64"], "the nearest is preprocess.size"),
        (["--set", "model.width=64"], "model.width: is fixed by the checkpoint"),
        (["--set", "preprocess.size=big"], "expected int, as in preprocess.size=64"),
        (["--set", "preprocess.size"], "expected KEY=VALUE"),
        (["--set", "model.attention=fast"], "model.attention is 'fast'"),
        (["--checkpoint", "/nowhere"], "/nowhere: no such folder"),
        (["--results", "gs://bucket/r.json"], "expected a local file"),
        (["--results", "/dev/null/r.json"], "--results /dev/null/r.json: cannot be written"),
        (["--set", "preprocess.size=128"], "expected no more than preprocess.max_size="),
        (["--set", "preprocess.std=(0.2,0,0.2)"], "expected three numbers above 0"),
        (["--set", "preprocess.max_size={[]:1}"], "expected int"),
        (["--set", "mesh.num_processes=2"], "mesh.coordinator is empty"),
    ],
)
def test_what_cannot_work_is_one_message(capsys, data, checkpoint, arguments, message):
    _, error = run(capsys, "--checkpoint", checkpoint, "--data_root", data, *arguments)
    assert message in error and error.startswith("eval.py: ")


def test_results_do_not_take_the_place_of_the_annotations(capsys, data, checkpoint):
    before = (data / ANNOTATIONS).read_bytes()
    results = data / "val2017" / ".." / ANNOTATIONS
    _, error = run(
        capsys, "--checkpoint", checkpoint, "--data_root", data, "--results", str(results)
    )
    assert "is the annotation file" in error and (data / ANNOTATIONS).read_bytes() == before


def test_the_configuration_is_the_checkpoints():
    config = common.get_config()
    config.preprocess.size, config.buckets.multiple, config.mesh.fsdp = 640, 8, 2
    metadata = {
        "model": json.loads(json.dumps(config.model.to_dict())) | {"width": 48},
        "preprocess": json.loads(json.dumps(config.preprocess.to_dict())) | {"exif": "apply"},
        "config": json.loads(json.dumps(config.to_dict())) | {"of_another_version": 1},
    }
    found = eval_script.checkpoint_config(metadata)
    assert (found.model.width, found.preprocess.size) == (48, 640)
    assert (found.data.exif, found.buckets.multiple) == ("apply", 8)
    assert found.preprocess.mean == config.preprocess.mean  # a tuple again
    assert found.mesh == common.get_config().mesh  # the training's devices are not here
    for trained_with, here in (("cudnn", "auto"), ("splash", "auto"), ("stock", "stock")):
        model = metadata["model"] | {"attention": trained_with}
        assert eval_script.checkpoint_config({**metadata, "model": model}).model.attention == here
    converted = eval_script.checkpoint_config({**metadata, "config": None})
    assert converted.data.exif == "apply" and converted.model.width == 48
    eval_script.override(converted, "data.max_bad_fraction=1")
    assert converted.data.max_bad_fraction == 1.0
    eval_script.override(converted, "preprocess.mean=(0.5, 0.5, 0.5)")
    assert converted.preprocess.mean == (0.5, 0.5, 0.5)
    with pytest.raises(SystemExit):
        eval_script.parse(["--checkpoint", "a", "--data_root", "b", "--subset", "-1"])
