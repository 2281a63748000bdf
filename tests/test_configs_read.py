"""Every key of the configuration is read, where it is used: reads are recorded, not guessed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs.common import CHANGEABLE_ON_RESUME, get_config
from tests import tiny_detr
from tests.test_trainer import tiny
from train import leaves
from yolos_jax import datasets, schedules, trainer
from yolos_jax.data import shapes
from yolos_jax.models import build, detr_model

PACKAGE = Path(build.__file__).resolve().parent.parent
# They look at keys that they are given, to complete or refuse them: no use is made of a value.
CHECKS = {"settings.py", "checks.py", "unused.py"}
CHECKING = {"_checked", "_check", "config_of"}  # likewise, of models


def sections(config: ConfigDict, prefix: str = "") -> dict[frozenset, str]:
    """The name of a section by its keys, which no two have in common: copies are known, too."""
    found = {frozenset(config.keys()): prefix}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found |= sections(value, f"{prefix}{key}.")
    return found


def used_by_the_package() -> bool:
    """Whether the caller's caller is code of ours that makes use of what it reads."""
    code = sys._getframe(2).f_code
    path = Path(code.co_filename)
    ours = path.is_relative_to(PACKAGE) and path.name not in CHECKS
    return ours and code.co_name not in CHECKING


@pytest.fixture
def read(monkeypatch) -> set[str]:
    """The keys that the package has read; filled while a test runs."""
    found: set[str] = set()
    names = sections(get_config())
    get_attribute, get_item = ConfigDict.__getattr__, ConfigDict.__getitem__

    def attribute(self, key):
        if used_by_the_package():
            found.add(names.get(frozenset(self.keys()), "?") + key)
        return get_attribute(self, key)

    def item(self, key):
        if used_by_the_package():
            found.add(names.get(frozenset(self.keys()), "?") + key)
        return get_item(self, key)

    monkeypatch.setattr(ConfigDict, "__getattr__", attribute)
    monkeypatch.setattr(ConfigDict, "__getitem__", item)
    record_fields(monkeypatch, build, "YolosConfig", found)
    record_fields(monkeypatch, detr_model, "DetrConfig", found)
    return found


def record_fields(monkeypatch, module, name: str, found: set[str]) -> None:
    """Models take the keys of their sections over into a NamedTuple, all of them, and read that."""
    plain = getattr(module, name)
    keys = {key.split(".")[-1]: key for key in leaves(get_config()) if key.startswith("model.")}

    def get(self, field):
        if field in plain._fields and used_by_the_package():
            found.add(keys[field])
        return plain.__getattribute__(self, field)

    monkeypatch.setattr(module, name, type(name, (plain,), {"__getattribute__": get}))


@pytest.mark.slow
def test_every_key_is_read(read, tmp_path, quick_to_compile):
    shapes.write(tmp_path / "data", seed=3, train=48, val=10, size=32)
    config = tiny(tmp_path / "data", **{"epochs": 1, "model.attention": "stock"})
    trainer.train(config, str(tmp_path / "run"), changeable_on_resume=CHANGEABLE_ON_RESUME)

    model = build.build_model(tiny_detr.model_config(), tiny_detr.CLASSES)
    params = jax.eval_shape(model.init, jax.random.key(0))
    canvas = tiny_detr.make_canvas([(32, 32)], (32, 32))
    jax.eval_shape(lambda p: model.apply(p, canvas, rng=jax.random.key(0)), params)

    for name in ("published", "published_step"):
        config.optimizer.schedule = name
        config.optimizer.warmup_epochs = 1
        lengths = {"steps_per_epoch": 3, "total_steps": 30, "epochs": 10}
        schedules.make_schedule(config.optimizer, **lengths)(0)
    config.data.tfds_name = "no/such"
    with contextlib.suppress(ValueError, ImportError):
        datasets.read_split(config.data, datasets.splits_of(config.data)[0], None, print)

    # model.name chooses, by its value alone, where a dict of the section is read; train.py itself,
    # and processes among several, end with mesh.stopped_code.
    elsewhere = {"model.name", "mesh.stopped_code"}
    assert sorted(leaves(get_config()).keys() - read - elsewhere) == []


def test_a_key_that_nobody_reads_is_found(read):
    config = get_config()
    assert config.data.root == "" and "data.root" not in read  # a test's own reads do not count
    datasets.splits_of(config.data)
    assert {"data.val_images", "data.labels"} <= read
    assert not {"data.root", "preprocess.size", "buckets.count"} & read
