"""A DETR through the same train.py, eval.py and predict as a YOLOS, of the recipe for shapes."""

from __future__ import annotations

import json
import re
import signal

import jax
import numpy as np
import pytest

from configs import detr_shapes
from tests import dying_train, small_run, tiny
from tests.processes import Processes, free_address
from tests.test_eval_cli import eval_script
from tests.test_kills import assert_equal_runs
from yolos_jax import checkpoint, detector, mesh, optimizer, trainer
from yolos_jax.data import shapes

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.usefixtures("quick_to_compile")
SMALL = {
    "model.width": 16, "model.heads": 2, "model.mlp_width": 16, "model.num_queries": 5,
    "model.detr.stem_width": 4, "model.detr.encoder_depth": 1, "model.detr.decoder_depth": 2,
    "model.detr.dropout": 0.1,
    "preprocess.size": 32, "preprocess.max_size": 32,
    "augment.scales": (32,), "augment.max_size": 32,
    "optimizer.backbone_lr": 1e-4, "optimizer.warmup_steps": 1,
    "eval.every_epochs": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """configs/detr_shapes.py with fewer channels, its pictures of 32 pixels and their folder."""
    folder = tmp_path_factory.mktemp("detr")
    shapes.write(folder / "data", seed=3, train=16, val=7, size=32)
    config = detr_shapes.get_config()
    config.update_from_flattened_dict(
        {
            "data.root": str(folder / "data"), "epochs": 2, "batch_size": 8, "microbatches": 2,
            "eval.batch_size": 4, "log.every_steps": 1, "log.pictures": 2,
        }
        | SMALL
    )  # fmt: skip
    return config, folder


@pytest.fixture(scope="module")
def run(recipe, quick_to_compile):
    """Four steps of it."""
    config, folder = recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda fsdp: tiny.mesh_of(2))
        return config, folder, trainer.train(config, str(folder / "run"))


def test_it_trains_evaluates_and_draws(run):
    _, folder, summary = run
    assert summary["finished"] and summary["step"] == 4 and summary["pictures"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 4
    for line in steps:
        assert line["finite"] and np.isfinite(line["loss"]) and line["images"] == 8
        assert {"loss_ce", "loss_ce_0", "loss_giou_0"} <= line.keys()
    assert 0 <= summary["AP"] <= 1


def test_constants_stay_and_all_else_moves(run):
    _, folder, _ = run
    before, after = (
        checkpoint.load_params(folder / "run" / "checkpoints" / str(step))[0] for step in (2, 4)
    )
    arrays = (before, after)
    for path, *values in zip(optimizer.paths(before), *map(jax.tree.leaves, arrays), strict=True):
        constant = re.search(r"/(bn\d|downsample_bn)/", path) is not None
        assert np.array_equal(*values) == constant, path


def test_every_image_is_evaluated_once(run, monkeypatch, capsys):
    """Seven on three devices, of which a batch of four cannot be: six are taken."""
    _, folder, summary = run
    monkeypatch.setattr(mesh, "make_mesh", lambda fsdp: tiny.mesh_of(3))
    eval_script.main(
        ["--checkpoint", str(folder / "run"), "--data_root", str(folder / "data")]
        + ["--batch_size", "4"]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["images"] == 7 and found["nonfinite"] == 0
    np.testing.assert_allclose(found["AP"], summary["AP"], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference_padding", "2"], "--reference_padding is for a YOLOS"),
        (["--set", "buckets.multiple=8"], "--set buckets.multiple: means nothing for this model"),
    ],
)
def test_what_is_for_sequences_is_refused_before_data_are_read(run, arguments, message):
    _, folder, _ = run
    command = ["--checkpoint", str(folder / "run"), "--data_root", "/nowhere"]
    with pytest.raises(SystemExit, match=message):
        eval_script.main([*command, *arguments])


def test_pictures_beyond_learned_positions_are_refused_before_anything_is_compiled(
    recipe, tmp_path
):
    config = recipe[0].copy_and_resolve_references()
    config.batch_size, config.model.detr.position = 16, "learned"
    config.preprocess.size = config.preprocess.max_size = 801  # 50 cells of 16 pixels, and a pixel
    with pytest.raises(ValueError, match="801x801 pixels: learned positions reach 800 pixels"):
        trainer.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_predictions_depend_on_no_neighbour(run):
    _, folder, _ = run
    loaded = detector.load(folder / "run")
    pictures = sorted((folder / "data" / "val2017").iterdir())
    together = loaded.predict(pictures, threshold=0)
    alone = loaded.predict(pictures[3], threshold=0)[0]
    assert len(together) == 7
    np.testing.assert_allclose(together[3].scores, alone.scores, atol=1e-5)
    np.testing.assert_allclose(together[3].boxes_xyxy_px, alone.boxes_xyxy_px, atol=1e-3)


PODS = SMALL | {"epochs": 2, "checkpoint.every_steps": 0, "mesh.fsdp": 2}  # six steps


def on_two_processes(folder, name, *plans):
    """Trains with parameters in two parts, one on each; returns what they printed."""
    flags = small_run.flags(folder / "shapes", folder / name, "detr_shapes", **PODS)
    with dying_train.Group(folder / "printed", flags, plans or ({}, {})) as group:
        assert group.wait(small_run.PATIENCE) == [0, 0], group.printed()
        return group.output(0)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    small_run.write_pictures(folder / "shapes")
    return folder, json.loads(on_two_processes(folder, "unbroken").splitlines()[-1])


@pytest.mark.slow
def test_two_processes_asked_to_stop_go_on_as_if_nobody_had(unbroken):
    """With dropout, which is drawn by the number of the step."""
    folder, _ = unbroken
    slowly = {"prolong": ("reading", 1)}  # jax looks for a signal once a second
    stop = {"place": "stepping", "number": 2, "seconds": 0, "signal": int(signal.SIGTERM)}
    printed = on_two_processes(folder, "stopped", slowly, slowly | stop)
    (step,) = re.findall(r"stopped at step (\d) of 6 as asked and saved", printed)
    assert 2 <= int(step) < 6
    assert f"resumed at step {step} of 6" in on_two_processes(folder, "stopped")
    assert_equal_runs(folder / "unbroken", folder / "stopped")


@pytest.mark.slow
def test_two_processes_evaluate_as_one(unbroken, monkeypatch, capsys):
    folder, summary = unbroken
    results = [folder / f"{count}.json" for count in (1, 2)]
    command = ["--checkpoint", str(folder / "unbroken"), "--data_root", str(folder / "shapes")]
    meet = ["--set", f"mesh.coordinator={free_address()}", "mesh.num_processes=2"]
    both = [
        ["eval.py", *command, "--results", str(results[1]), *meet, f"mesh.process_id={number}"]
        for number in range(2)
    ]
    with Processes(both, folder / "evaluated") as group:
        monkeypatch.setattr(mesh, "make_mesh", lambda fsdp: tiny.mesh_of(1))
        eval_script.main([*command, "--results", str(results[0])])
        assert group.wait(small_run.PATIENCE) == [0, 0], group.printed()
        printed = capsys.readouterr().out, group.output(0)
    for text in printed:
        assert json.loads(text.splitlines()[-1])["AP"] == pytest.approx(summary["AP"], abs=1e-6)
    one, two = (json.loads(path.read_text()) for path in results)
    assert len(one) == len(two) == 10 * PODS["model.num_queries"]
    for left, right in zip(one, two, strict=True):
        assert left["image_id"] == right["image_id"]
        assert left["score"] == pytest.approx(right["score"], abs=1e-5)
        np.testing.assert_allclose(left["bbox"], right["bbox"], atol=1e-3)
