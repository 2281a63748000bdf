"""Flags against what a checkpoint says itself: they win, or it is said that they cannot."""

from __future__ import annotations

import dataclasses
import json

import pytest

import convert_torch_weights
from tests import convert_sources as sources
from yolos_jax.convert import command, export, start, weights
from yolos_jax.convert.conversion import Options
from yolos_jax.labels import LabelMap

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
FORMS = ("yolos_jax", "hf", "yolos")  # of export.WRITERS
STORED = {"size": 200, "max_size": 300, "mean": [0.5] * 3, "std": [0.25] * 3, "exif": "apply"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same detector in each form that is written here."""
    folder = tmp_path_factory.mktemp("written")
    path = sources.save(folder / "y.pth", sources.yolos(2), args=sources.yolos_args())
    found = weights.open_checkpoint(path, Options(num_heads=sources.HEADS))[0]
    found = dataclasses.replace(found, preprocess=STORED, label_map=LabelMap((4, 9), ("a", "b")))
    for kind in FORMS:
        export.WRITERS[kind](found, folder / kind, "test")
    return folder


KINDS = pytest.mark.parametrize("kind", FORMS)


@KINDS
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {}),
        ({"size": 320}, {"size": 320, "max_size": 533}),
        ({"max_size": 400}, {"max_size": 400}),
        ({"size": 320, "max_size": 400}, {"size": 320, "max_size": 400}),
    ],
)
def test_flags_win_over_stored_sizes_and_leave_the_rest(written, kind, flags, expected):
    found = weights.open_checkpoint(written / kind, Options(**flags))[0]
    assert found.preprocess == STORED | expected


def test_a_run_without_a_limit_of_the_longer_side_opens(written, tmp_path):
    found = weights.open_checkpoint(written / "yolos_jax", Options())[0]
    found = dataclasses.replace(found, preprocess=STORED | {"max_size": 0})
    export.write_ours(found, tmp_path / "a", "test")
    assert weights.open_checkpoint(tmp_path / "a", Options())[0].preprocess["max_size"] == 0


@KINDS
def test_labels_win_over_stored_ones(written, kind, tmp_path):
    labels = tmp_path / "labels.json"
    fruit = [{"id": 7, "name": "apple"}, {"id": 8, "name": "bean"}]
    labels.write_text(json.dumps({"categories": fruit}))
    found = weights.open_checkpoint(written / kind, Options(labels=str(labels)))[0]
    assert found.label_map == LabelMap((7, 8), ("apple", "bean"))


@KINDS
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_heads": 4}, "--num_heads 4, but the checkpoint has 3"),
        ({"mid_pe_size": ()}, "--mid_pe_size none, but the checkpoint has 48 64"),
        ({"dilation": False}, "--no-dilation, but a YOLOS has no stages"),
        ({"size": 8}, "pictures of 8 pixels, expected --size 16 or more"),
        ({"size": 320, "max_size": 200}, "pictures of 320 to 200 pixels, expected --max_size 320"),
    ],
)
def test_flags_that_contradict_are_errors(written, kind, flags, message):
    with pytest.raises(ValueError, match=message):
        weights.open_checkpoint(written / kind, Options(**flags))


@pytest.mark.parametrize("kind", ["hf", "yolos_jax"])
def test_tables_are_of_the_size_that_is_stored(written, kind):
    with pytest.raises(ValueError, match="--init_pe_size 64 48, but the checkpoint has 48 64"):
        weights.open_checkpoint(written / kind, Options(init_pe_size=(64, 48)))
    same = Options(num_heads=3, init_pe_size=(48, 64), mid_pe_size=(48, 64))
    assert weights.open_checkpoint(written / kind, same)[0].preprocess == STORED


def test_a_seed_is_for_starts_only(written, tmp_path, monkeypatch):
    def convert(source, destination, *flags):
        words = [str(source), str(tmp_path / destination), "--seed=3", *flags]
        command.convert(convert_torch_weights.parse(words))

    monkeypatch.setattr(start, "draw", sources.numpy_draw)
    path = sources.save(tmp_path / "vit.pth", sources.timm())
    convert(path, "out", "--num_heads=3", "--init_pe_size", "48", "64", "--mid_pe_size", "none")
    for source in (*(written / kind for kind in FORMS), tmp_path / "out"):
        with pytest.raises(ValueError, match="--seed 3, but nothing"):
            convert(source, "again")
