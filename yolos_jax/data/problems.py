"""What is wrong with a dataset: kinds of problems, counted and listed.

Three severities: an *error* makes no sense (for entries of the annotation file, ``data.on_error``
decides whether it stops the run), a *warning* is repaired or dropped, a *note* is how things are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# kind: (severity, what it is, what is done about it)
KINDS = {
    # Found by validate, which opens the pictures.
    "file": ("error", "annotation files that cannot be used", "nothing else is checked"),
    "picture": ("error", "pictures that cannot be read", "no loss, counted"),
    "size": ("error", "pictures of another size than stated", "no loss, counted"),
    "leak": ("error", "pictures that another split has too", "kept: scores are too good"),
    "orientation": (
        "warning",
        "pictures that their EXIF tag turns",
        "not turned, unless data.exif='apply'",
    ),
    "same picture": ("warning", "pictures that another file holds too", "kept"),
    "same file": ("warning", "files that several images name", "kept"),
    # Found while loading, too.
    "image entry": ("error", "images without a usable id, file name or size", "left out"),
    "image id twice": ("error", "image ids that several entries have", "left out"),
    "annotation entry": ("error", "annotations without a usable box", "left out"),
    "unknown image": ("error", "annotations of images that are not listed", "left out"),
    "unknown category": ("error", "annotations of categories that are not listed", "left out"),
    "annotation id twice": (
        "error",
        "annotations whose id another one has",
        "the same box once, other boxes kept",
    ),
    "same box": ("warning", "boxes that their image has twice, of one category", "kept"),
    "area": ("warning", "areas that are no number or disagree with their box", "kept as stated"),
    "tiny": ("warning", "boxes less than a pixel wide or high", "kept"),
    "no area": ("warning", "boxes without any area inside their picture", "dropped"),
    "outside": ("warning", "boxes that reach out of their picture", "cut at its border"),
    "left out with image": ("note", "annotations of images that were left out", "left out"),
    "crowd": ("note", "crowd annotations", "out of training, ignored regions in evaluation"),
    "empty image": ("note", "images without a box", "kept"),
    "turned": ("note", "pictures that their EXIF tag turns", "turned, as data.exif='apply'"),
    "mode": ("note", "pictures that are not RGB of 8 bits", "converted"),
    "default": (
        "note",
        "annotations without id, area, iscrowd or segmentation",
        "not needed; the area is taken for width times height",
    ),
    "unused category": ("note", "categories without a box", "kept"),
    "unlisted": ("note", "files in the picture folder that no image names", "not used"),
    "same name": ("note", "file names of two splits with different pictures", "fine"),
}


class Problem(NamedTuple):
    """One entry that is not as it should be."""

    kind: str
    image: str  # id and file name, as far as known
    annotation: Any  # id, or None
    value: str
    expected: str

    def __str__(self) -> str:
        places = [self.image] if self.image else []
        places += [f"annotation {self.annotation!r}"] if self.annotation is not None else []
        expected = f"; expected {self.expected}" if self.expected else ""
        place = f"{', '.join(places)}: " if places else ""
        return f"{place}{self.value}{expected}"


@dataclass
class Problems:
    """Counts per kind, and the first ``limit`` of each kind (None: all of them)."""

    file: str
    limit: int | None = 10
    counts: dict[str, int] = field(default_factory=dict)
    listed: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, kind: str, image: Any, annotation: Any, value: Any, expected: str = "") -> None:
        """Counts one; ``image`` is an image entry, an image id or None."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        listed = self.listed.setdefault(kind, [])
        if self.limit is None or len(listed) < self.limit:
            listed.append(Problem(kind, _image_text(image), annotation, str(value), expected))

    @property
    def errors(self) -> int:
        """How many entries make no sense."""
        return sum(n for kind, n in self.counts.items() if KINDS[kind][0] == "error")

    def describe(self, severities: tuple[str, ...] = ("error", "warning", "note")) -> str:
        """Several lines: every kind with its count and its listed entries."""
        lines = []
        for kind, (severity, what, done) in KINDS.items():
            if severity in severities and kind in self.counts:
                lines.append(f"  {severity}: {self.counts[kind]} {what} ({done})")
                if severity != "note":
                    lines += [f"    {problem}" for problem in self.listed[kind]]
                    left = self.counts[kind] - len(self.listed[kind])
                    lines += [f"    ... and {left} more"] if left else []
        return "\n".join([f"{self.file}:", *lines]) if lines else f"{self.file}: clean"

    def __str__(self) -> str:
        return self.describe()


def _image_text(image: Any) -> str:
    if isinstance(image, Mapping):
        name = image.get("file_name")
        return f"image {image.get('id')!r}" + (f" ({name})" if isinstance(name, str) else "")
    return "" if image is None else f"image {image!r}"
