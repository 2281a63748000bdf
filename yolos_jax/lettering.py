"""What Pillow's own font can write: names of classes and files, put into its few letters.

The font is there on every machine, and has ASCII and hardly more: what it lacks becomes an empty
box, and any two Chinese names the same ones.
"""

from __future__ import annotations

import collections
import functools
import unicodedata

from PIL import ImageFont

from yolos_jax.labels import LabelMap

# Latin letters and dashes that Unicode does not take apart.
_TAKEN_APART = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d"}
    | {"ı": "i", "þ": "th", "ð": "d", "‐": "-", "–": "-", "—": "-", "×": "x"}
)
_MISSING = "\uffff"  # no letter of any font: drawn as what is missing is


def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font that everything is written in, in pixels of height."""
    return ImageFont.load_default(size=size)


def class_names(label_map: LabelMap) -> tuple[str, ...]:
    """Returns what pictures call each slot, two names never the same.

    The name; where the font lacks letters of it the name without its accents, and where that does
    not help, or another class is called so, its category id, as 'class 7'.
    """
    plain = [_plain(name) for name in label_map.names]
    times = collections.Counter(plain)
    taken = {*label_map.names, *plain}
    drawn = []
    for name, text, number in zip(label_map.names, plain, label_map.category_ids, strict=True):
        unique = times[text] == 1 and text not in label_map.names
        if _can_write(name):
            drawn.append(name)
        elif unique and _can_write(text):
            drawn.append(text)
        else:
            drawn.append(_number(number, taken))
    return tuple(drawn)


def title(text: str) -> str:
    """Returns a text without accents, and with the code of every letter that the font lacks."""
    text = text if _can_write(text) else _plain(text)
    return "".join(x if _can_write(x) else x.encode("unicode_escape").decode() for x in text)


def _number(category_id: int, taken: set[str]) -> str:
    name = f"class {category_id}"
    while name in taken:  # another class is called so
        name += "*"
    return name


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text.translate(_TAKEN_APART))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _can_write(text: str) -> bool:
    return bool(text.strip()) and all(_has_glyph(letter) for letter in text)


@functools.cache
def _has_glyph(letter: str) -> bool:
    written = font(20)
    mask, missing = written.getmask(letter), written.getmask(_MISSING)
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))
