"""Which class is which: slot of the model <-> category id of the dataset <-> name.

Slots 0..K-1 are what models predict; slot K is no-object. The map is built once from a dataset's
categories, travels with checkpoints and is printed at start, so that no one ever adds or subtracts
one from a category id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

UNUSED = "N/A"  # name of the slots of 'coco91' that no category has

# The 80 categories of COCO detection with their ids; the ids between them were never used.
COCO_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign",
    14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep",
    21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack",
    28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove",
    41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass",
    47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza",
    60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote",
    76: "keyboard", 77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink",
    82: "refrigerator", 84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear",
    89: "hair drier", 90: "toothbrush",
}  # fmt: skip


@dataclass(frozen=True)
class LabelMap:
    """Slots 0..K-1 of a model: their category ids and names."""

    category_ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self):
        if len(self.category_ids) != len(self.names) or not self.names:
            raise ValueError(
                "a label map has as many category ids as names and at least one: got "
                f"{len(self.category_ids)} ids and {len(self.names)} names"
            )
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError(f"category ids of a label map repeat: {self.category_ids}")

    @property
    def num_classes(self) -> int:
        """K: slots, no-object not counted."""
        return len(self.category_ids)

    @property
    def no_object(self) -> int:
        """The slot that stands for no object: the last one, K."""
        return self.num_classes

    @classmethod
    def from_categories(cls, categories: Sequence[Mapping[str, Any]]) -> LabelMap:
        """Slots in order of category id, one per category.

        Args:
          categories: the ``categories`` of a COCO file: dicts with ``id`` and ``name``.

        Raises:
          ValueError: no category; an id that is not an integer; a name that is not a text; an id
            or a name that occurs twice.
        """
        ids = checked_categories(categories)
        return cls(tuple(sorted(ids)), tuple(ids[i] for i in sorted(ids)))

    @classmethod
    def coco91(cls) -> LabelMap:
        """The 91 slots of published COCO weights: slot = category id, unused ones named 'N/A'."""
        return cls(tuple(range(91)), tuple(COCO_NAMES.get(i, UNUSED) for i in range(91)))

    @classmethod
    def build(cls, labels: str, categories: Sequence[Mapping[str, Any]]) -> LabelMap:
        """The map that the config's ``data.labels`` asks for.

        Args:
          labels: 'dataset' (its categories, by id) or 'coco91' (published COCO weights).
          categories: the ``categories`` of the dataset's COCO file.

        Raises:
          ValueError: another word; categories that make no sense; 'coco91' with a category whose
            id and name are not COCO's.
        """
        if labels == "dataset":
            return cls.from_categories(categories)
        if labels != "coco91":
            raise ValueError(f"data.labels is {labels!r}, expected 'dataset' or 'coco91'")
        coco = cls.coco91()
        foreign = coco.contradictions(categories)
        if foreign:
            raise ValueError(
                f"data.labels is 'coco91', but {len(foreign)} of the dataset's categories are not "
                f"COCO's: {'; '.join(foreign[:10])}{'; ...' if len(foreign) > 10 else ''}. "
                "Use data.labels='dataset'"
            )
        return coco

    def contradictions(self, categories: Sequence[Mapping[str, Any]]) -> list[str]:
        """Categories of a dataset that this map lacks or calls something else, one text each."""
        names = dict(zip(self.category_ids, self.names, strict=True))
        return [
            f"id {i} is {name!r}, here {names.get(i, 'no such id')!r}"
            for i, name in sorted(checked_categories(categories).items())
            if names.get(i) != name
        ]

    def slots(self, category_ids: np.ndarray) -> np.ndarray:
        """Slots of category ids, int [...] -> int32 [...]; -1 where the id has none."""
        category_ids = np.asarray(category_ids, np.int64)
        order = np.argsort(self.category_ids)
        known = np.asarray(self.category_ids, np.int64)[order]
        found = np.minimum(np.searchsorted(known, category_ids), len(known) - 1)
        return np.where(known[found] == category_ids, order[found], -1).astype(np.int32)

    def ids(self, slots: np.ndarray) -> np.ndarray:
        """Category ids of slots, int [...] in 0..K-1 -> int64 [...]."""
        return np.asarray(self.category_ids, np.int64)[slots]

    def to_json(self) -> dict[str, list]:
        """What a checkpoint stores; ``from_json`` reads it back."""
        return {"category_ids": list(self.category_ids), "names": list(self.names)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Sequence]) -> LabelMap:
        """Reads what ``to_json`` wrote. Raises ValueError when it is something else."""
        try:
            ids, names = tuple(stored["category_ids"]), tuple(stored["names"])
        except (KeyError, TypeError):
            raise ValueError(
                f"not a label map: {stored!r}, expected category_ids and names"
            ) from None
        return cls(tuple(int(i) for i in ids), tuple(str(name) for name in names))

    def describe(self) -> str:
        """Several lines for people: every used slot with its category id and name."""
        used = [
            (slot, i, name)
            for slot, (i, name) in enumerate(zip(self.category_ids, self.names, strict=True))
            if name != UNUSED
        ]
        head = (
            f"labels: {len(used)} classes in {self.num_classes} slots, no-object {self.no_object}"
        )
        if all(slot == i for slot, i, _ in used):
            entries = [f"{slot} {name}" for slot, _, name in used]
            head += " (slot = category id)"
        else:
            entries = [f"{slot} {name} (id {i})" for slot, i, name in used]
        lines = [head]
        for entry in entries:
            if len(lines) == 1 or len(lines[-1]) + len(entry) > 98:
                lines.append(f"  {entry}")
            else:
                lines[-1] += f", {entry}"
        return "\n".join(lines)


def checked_categories(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Names by category id, in the file's order; raises ValueError as ``from_categories`` says."""
    if not isinstance(categories, Sequence) or isinstance(categories, str) or not categories:
        raise ValueError(f"expected a list of at least one category, got {categories!r}")
    names: dict[int, str] = {}
    for category in categories:
        if not isinstance(category, Mapping):
            raise ValueError(f"category {category!r}: expected an object with id and name")
        number, name = category.get("id"), category.get("name")
        if isinstance(number, bool) or not isinstance(number, int | float) or number % 1 != 0:
            raise ValueError(f"category {dict(category)!r}: id is {number!r}, expected an integer")
        if abs(number) >= 2**63:
            raise ValueError(f"category {dict(category)!r}: id {number} has more than 64 bits")
        # JSON can spell halves of surrogate pairs, which no file can hold.
        text = isinstance(name, str) and name.encode(errors="ignore").decode() == name
        if not text or not name.strip():
            raise ValueError(f"category {dict(category)!r}: name is {name!r}, expected a text")
        if number in names:
            raise ValueError(f"category id {number} is there twice: {names[number]!r} and {name!r}")
        if name in names.values():
            other = next(i for i, known in names.items() if known == name)
            raise ValueError(
                f"category name {name!r} is there twice, with ids {other} and {number}: rename one "
                "of them, or merge them when they are the same class"
            )
        names[int(number)] = name
    return names
