"""A DETR through the same train.py, eval.py and predict as a YOLOS, of the recipe for shapes."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from configs import detr_shapes
from tests import tiny
from tests.test_eval_cli import eval_script
from yolos_jax import checkpoint, detector, mesh, optimizer, trainer
from yolos_jax.data import shapes

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_to_compile):
    """Four steps of configs/detr_shapes.py with fewer channels, pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("detr")
    shapes.write(folder / "data", seed=3, train=16, val=7, size=32)
    config = detr_shapes.get_config()
    config.update_from_flattened_dict(
        {
            "data.root": str(folder / "data"), "epochs": 2, "batch_size": 8, "microbatches": 2,
            "model.width": 16, "model.heads": 2, "model.mlp_width": 16, "model.num_queries": 5,
            "model.detr.stem_width": 4, "model.detr.encoder_depth": 1,
            "model.detr.decoder_depth": 2, "model.detr.dropout": 0.1,
            "preprocess.size": 32, "preprocess.max_size": 32,
            "augment.scales": (32,), "augment.max_size": 32,
            "optimizer.backbone_lr": 1e-4, "optimizer.warmup_steps": 1,
            "eval.every_epochs": 0, "eval.batch_size": 4, "log.every_steps": 1, "log.pictures": 2,
        }
    )  # fmt: skip
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


def test_padding_of_pairs_is_for_sequences(run):
    _, folder, _ = run
    command = ["--checkpoint", str(folder / "run"), "--data_root", str(folder / "data")]
    with pytest.raises(SystemExit, match="--reference_padding is for a YOLOS"):
        eval_script.main([*command, "--reference_padding", "2", "--batch_size", "8"])


def test_predictions_depend_on_no_neighbour(run):
    _, folder, _ = run
    loaded = detector.load(folder / "run")
    pictures = sorted((folder / "data" / "val2017").iterdir())
    together = loaded.predict(pictures, threshold=0)
    alone = loaded.predict(pictures[3], threshold=0)[0]
    assert len(together) == 7
    np.testing.assert_allclose(together[3].scores, alone.scores, atol=1e-5)
    np.testing.assert_allclose(together[3].boxes_xyxy_px, alone.boxes_xyxy_px, atol=1e-3)
