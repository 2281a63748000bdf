"""A run refuses a checkpoint of another model: one line that names it, and nothing is touched."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from configs import detr_shapes, shapes
from tests import convert_sources as sources
from tests import tiny_detr
from yolos_jax import checkpoint, claim, trainer
from yolos_jax.convert import detr_names
from yolos_jax.data import shapes as pictures
from yolos_jax.labels import LabelMap

LABELS = LabelMap((1, 2, 3), ("rectangle", "ellipse", "triangle"))
DEEPER = (1, 1, 2, 1)


def save(folder, model, params):
    metadata = {
        "format": checkpoint.FORMAT, "model": model, "num_classes": 3, "config": None,
        "label_map": LABELS.to_json(), "source": "test",
        "preprocess": {"size": 32, "max_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    }  # fmt: skip
    checkpoint.save_params(folder, params, metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pictures.write(folder / "data", seed=0, train=8, val=2, size=32)
    save(folder / "a_yolos", sources.yolos_model(), {"bias": np.zeros(2, np.float32)})
    own = detr_shapes.get_config().model.to_dict()
    own["detr"]["blocks"] = DEEPER
    params = detr_names.to_params(tiny_detr.make_state(own, 3), own, 3, "test")
    save(folder / "a_detr", own, params)
    (folder / "detr.pth").write_bytes(b"PK")
    return folder


def refused(recipe, folder, workdir, init=""):
    """The one line that a run ends with."""
    config = recipe.get_config()
    config.data.root, config.data.cache_dir = str(folder / "data"), str(folder / "cache")
    config.init = init and str(folder / init)
    config.batch_size = 8
    config.preprocess.size = config.preprocess.max_size = config.augment.max_size = 32
    config.augment.scales = (32,)
    with pytest.raises(ValueError) as caught:
        trainer.train(config, str(workdir))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "init", "message"),
    [
        (detr_shapes, "a_yolos", "model.name is 'detr', but {} is a 'yolos'"),
        (shapes, "a_detr", "model.name is 'yolos', but {} is a 'detr'"),
        (
            detr_shapes,
            "a_detr",
            "{} does not fit the run's model: model.detr.blocks is (1, 1, 1, 1) (ResNet-14), the "
            "checkpoint's is (1, 1, 2, 1) (ResNet-17)",
        ),
        (detr_shapes, "detr.pth", "{}: a file; expected the folder of a checkpoint"),
    ],
    ids=["yolos", "detr", "another depth", "torch's"],
)
def test_as_a_start(folder, tmp_path, recipe, init, message):
    found = refused(recipe, folder, tmp_path / "run", init)
    assert found.startswith(message.format(folder / init))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("recipe", "run"), [(detr_shapes, "a_yolos"), (shapes, "a_detr")])
def test_as_a_run_that_was_begun(folder, tmp_path, recipe, run):
    workdir = tmp_path / "run"
    shutil.copytree(folder / run, workdir / checkpoint.FOLDER)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    found = refused(recipe, folder, workdir)
    assert found.startswith("model.name is ") and f"but {workdir} is a '{run[2:]}'" in found
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    after.pop(workdir / claim.FILE)  # says who was here
    assert after == before
