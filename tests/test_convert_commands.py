"""The command lines that convert and compare: verdicts, flags, and what they say of mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import convert_torch_weights
from tests import convert_sources as sources
from yolos_jax.convert import command, compare

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
FLAGS = ["--num_heads=3", "--size=64"]


@pytest.fixture
def path(tmp_path):
    return sources.save(tmp_path / "y.pth", sources.yolos(), args=sources.yolos_args())


def arguments(*words):
    return convert_torch_weights.parse([str(word) for word in words])


def exit_of(main, *words):
    """Runs a command line that ends in sys.exit; what it exits with."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def test_outputs_that_are_no_numbers_never_pass(tmp_path, capsys):
    tensors = sources.yolos()
    tensors["bbox_embed.layers.2.bias"][0] = np.nan
    path = sources.save(tmp_path / "nan.pth", tensors, args=sources.yolos_args())
    with pytest.raises(ValueError, match="differ by nan"):
        command.convert(arguments(path, tmp_path / "out", *FLAGS, "--verify"))
    assert not (tmp_path / "out").exists()
    assert exit_of(compare.main, path, path, *FLAGS) == 1
    assert "nan, MORE THAN" in capsys.readouterr().out


def test_pictures_of_like_names_are_columns_of_their_own(path, tmp_path, monkeypatch, capsys):
    pictures = [tmp_path / folder / "a_long_name_of_a_picture.png" for folder in ("one", "two")]
    for picture in pictures:
        picture.parent.mkdir()
        Image.fromarray(compare.generated_picture(64, 80)).save(picture)
    found = iter((1.0, 0.0))  # the second must not hide that the first differs
    monkeypatch.setattr(
        compare, "differences", lambda *_: dict.fromkeys(("logits", "boxes"), next(found))
    )
    assert exit_of(compare.main, path, path, *pictures, *FLAGS) == 1
    assert capsys.readouterr().out.count(pictures[0].name[-22:]) == 2
