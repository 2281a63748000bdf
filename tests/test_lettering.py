"""Names that the font cannot write are spelt otherwise, and no two classes alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from yolos_jax import lettering, visualize
from yolos_jax.data.index import load_coco
from yolos_jax.data.shapes import write as write_shapes
from yolos_jax.labels import LabelMap

GREY = np.full((64, 64, 3), 128, np.uint8)


def drawn(*names, ids=None):
    return lettering.class_names(LabelMap(ids or tuple(range(len(names))), names))


def written(text):
    picture = Image.new("L", (200, 40))
    ImageDraw.Draw(picture).text((4, 4), text, font=lettering.font(20), fill=255)
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apple", "apple"),
        ("bean © 2", "bean © 2"),  # not ASCII, and there
        ("Blutplättchen", "Blutplattchen"),
        ("Straße", "Strasse"),
        ("żółw – łódź", "zolw - lodz"),
        ("Ａpple", "Apple"),
        ("血小板", "class 0"),
        ("A 血", "class 0"),
        ("\u0301", "class 0"),
        ("two\nlines", "class 0"),
    ],
)
def test_a_name_in_letters_of_the_font(name, expected):
    assert drawn(name) == (expected,)


def test_no_two_classes_are_drawn_alike():
    assert drawn("血", "板", "N/A", "N/A", ids=(3, 7, 8, 9)) == ("class 3", "class 7", "N/A", "N/A")
    assert drawn("Koln", "Köln", "Kölñ", ids=(1, 2, 3)) == ("Koln", "class 2", "class 3")
    assert drawn("é", "è", ids=(1, 2)) == ("class 1", "class 2")
    assert drawn("class 7", "cläss 7", ids=(1, 7)) == ("class 7", "class 7*")
    assert drawn("class 2", "血", "class 2*", ids=(1, 2, 3)) == ("class 2", "class 2**", "class 2*")


def test_what_is_called_written_is_no_empty_box():
    box = written("\U0001f600")
    assert (written("血") == box).all() and not (written("a") == box).all()
    letters = [chr(code) for code in range(33, 0x250)]
    seen = {letter for letter in letters if not (written(letter) == box).all()}
    assert seen == {letter for letter in letters if drawn(letter) == (letter,)}


def test_titles_keep_what_tells_files_apart():
    assert lettering.title("plate 7©.png") == "plate 7©.png"
    assert lettering.title("Brötchen.png") == "Brotchen.png"
    assert lettering.title("图1.png") == r"\u56fe1.png" != lettering.title("表1.png")


def test_pictures_of_a_split_with_such_names(tmp_path):
    write_shapes(tmp_path, seed=0, train=1, val=2, size=64)
    annotations = tmp_path / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text().replace("rectangle", "Rechteck ä"))

    def sheet():
        return visualize.split_sheet(load_coco(tmp_path, annotations, "val2017"), [], 2).tobytes()

    accented = sheet()
    annotations.write_text(annotations.read_text().replace("Rechteck ä", "Rechteck a"))
    assert sheet() == accented
