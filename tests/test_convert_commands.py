"""The command lines that convert and compare: verdicts, flags, and what they say of mistakes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

import convert_torch_weights
from tests import convert_sources as sources
from yolos_jax.convert import command, compare, start

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
FLAGS = ["--num_heads=3", "--size=64"]
START = ["--init_pe_size", "48", "64", "--mid_pe_size", "none"]


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


@pytest.mark.parametrize("flag", ["--size", "--max_size", "--num_heads"])
@pytest.mark.parametrize("value", ["0", "-3", "2.5", "many"])
def test_counts_are_positive_integers(path, tmp_path, capsys, flag, value):
    assert exit_of(convert_torch_weights.main, path, tmp_path / "out", f"{flag}={value}") == 2
    assert f"argument {flag}: '{value}' is no positive integer" in capsys.readouterr().err


def test_flags_may_stand_between_checkpoints_and_pictures(path, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(compare, "compare", lambda args: seen.update(vars(args)) or True)
    words = ["a", "--num_heads=3", "b", "one.png", "--size", "64", "two.png"]
    assert exit_of(compare.main, *words) == 0
    assert (seen["a"], seen["b"], seen["pictures"]) == ("a", "b", ["one.png", "two.png"])
    assert (seen["num_heads"], seen["size"]) == (3, 64)


@pytest.mark.parametrize(
    ("absent", "main", "words"),
    [
        ("torch", convert_torch_weights.main, ("y.pth", "out")),
        ("torch", compare.main, ("y.pth", "y.pth")),
        ("torch", compare.main, ("v.npz", "v.npz", *START)),
        ("safetensors.numpy", convert_torch_weights.main, ("y.pth", "out", "--to=hf")),
        ("huggingface_hub", convert_torch_weights.main, ("someone/something", "out")),
    ],
)
def test_a_package_that_is_missing_is_one_line(path, monkeypatch, absent, main, words):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(start, "draw", sources.numpy_draw)
    arrays = sources.flax(sources.timm(), big_vision=False)
    np.savez("v.npz", **arrays)
    monkeypatch.setitem(sys.modules, absent, None)
    message = exit_of(main, *words, "--num_heads=3")
    assert "\n" not in message
    assert absent in message and "pip install 'yolos_jax[convert]'" in message
