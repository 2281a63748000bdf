"""A mistyped key, or another trainer's name of it, is told what it may have meant."""

from __future__ import annotations

import pytest

import train
from configs import common
from yolos_jax import other_names

KNOWN = train.leaves(common.get_config())


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("batchsize", "; the nearest is --config.batch_size"),
        ("optimizer.lrr", "; the nearest is --config.optimizer.lr"),
        ("lr", "; the nearest is --config.optimizer.lr"),
        ("learning_rate", "; the nearest is --config.optimizer.lr"),
        ("optimizer.learning_rate", "; the nearest is --config.optimizer.lr"),
        ("max_norm", "; the nearest is --config.optimizer.clip_norm"),
        ("model.pretrained", "; the nearest is --config.init"),
        ("size", "; the nearest is --config.preprocess.size"),
        ("model.num_classes", "; classes are the categories of the annotations"),
        ("output_dir", "; the run's folder is --workdir"),
        ("zzz", ""),
    ],
)
def test_what_a_key_may_have_meant(key, expected):
    assert other_names.hint(key, {path: f"--config.{path}" for path in KNOWN}) == expected


def test_only_keys_that_can_be_given_are_named():
    settable = {"model.dtype": "model.dtype", "data.root": "--data_root"}
    assert other_names.hint("fp16", settable) == "; the nearest is model.dtype"
    assert other_names.hint("coco_path", settable) == "; the nearest is --data_root"
    assert other_names.hint("learning_rate", settable) == ""
    assert other_names.hint("resume", settable, {}) == ""


def test_the_names_elsewhere_lead_to_keys_and_are_none():
    tails = {key.split(".")[-1] for key in KNOWN}
    assert set(other_names.CALLED_ELSEWHERE) <= set(KNOWN)
    lists = [*other_names.CALLED_ELSEWHERE.values(), *other_names.NO_KEY.values()]
    names = " ".join(lists).split()
    assert not tails & set(names)
    assert len(names) == len(set(names))
