"""Keys that somebody set and that say nothing about the run."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import configs
from configs import common
from yolos_jax import unused

DEFAULTS = common.get_config().to_dict()
RECIPES = [name for _, name, _ in pkgutil.iter_modules(configs.__path__) if name != "common"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_set_nothing_in_vain(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert unused.notes(config, DEFAULTS) == []


@pytest.mark.parametrize(
    ("recipe", "changes", "noted"),
    [
        ("yolos_s", {"optimizer.warmup_steps": 500}, ["optimizer.warmup_steps=500"]),
        ("yolos_s", {"optimizer.warmup_steps": 500, "optimizer.schedule": "cosine"}, []),
        ("yolos_s", {"optimizer.min_lr": 1e-5}, []),
        ("detr_r50", {"optimizer.min_lr": 1e-5}, ["optimizer.min_lr=1e-05"]),
        ("detr_r50", {"model.patch_size": 8}, ["model.patch_size=8"]),
        ("yolos_s", {"model.detr.dropout": 0.0}, ["model.detr.dropout=0.0"]),
        ("yolos_s", {"model.detr.dilation": True}, ["model.detr.dilation=True"]),
        ("detr_r50", {"model.detr.dilation": True}, []),
        ("finetune_detr", {"model.detr.dilation": True}, ["model.detr.dilation=True"]),
        ("finetune_detr", {"model.detr.dropout": 0.0}, []),
        ("yolos_s", {"optimizer.warmup_lr": 1e-7}, ["optimizer.warmup_lr=1e-07"]),
        ("yolos_s", {"optimizer.warmup_lr": 1e-7, "optimizer.warmup_epochs": 5}, []),
        ("yolos_s", {"data.tfds_dir": "d"}, ["data.tfds_dir='d'"]),
        (
            "yolos_s",
            {
                "data.tfds_name": "coco",
                "data.train_images": "t",
                # Ids and categories of TFDS's pictures are compared with these.
                "data.train_annotations": "a",
                "data.val_annotations": "b",
            },
            ["data.train_images='t'"],
        ),
        ("yolos_s", {"augment.crop": 0.0, "augment.crop_range": (1, 2)}, ["augment.crop_range"]),
        (
            "yolos_s",
            {"log.watchdog_seconds": 0, "log.watchdog_exit": True},
            ["log.watchdog_exit=True"],
        ),
    ],
)
def test_what_is_noted(recipe, changes, noted):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.update_from_flattened_dict(changes)
    notes = unused.notes(config, DEFAULTS)
    assert len(notes) == len(noted)
    for note, start in zip(notes, noted, strict=True):
        assert note.startswith(f"note: {start}")


def test_the_note_says_why():
    config = common.get_config()
    config.optimizer.lr_drop = 30
    assert unused.notes(config, DEFAULTS) == [
        "note: optimizer.lr_drop=30 is not used with optimizer.schedule='published'"
    ]


def test_without_defaults_nothing_is_known_to_be_set():
    config = common.get_config()
    config.optimizer.lr_drop = 30
    assert unused.notes(config, {}) == []
