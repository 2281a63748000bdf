"""Where tensors of the originals go: what the tables of names of both models are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]
Turn = Callable[[Array, str], Array]  # a piece of a tensor and our path -> in the other layout


class Place(NamedTuple):
    """Where a tensor of the original goes."""

    shape: tuple[int, ...]  # of the original
    paths: tuple[str, ...]  # of ours: several share it equally on axis 0
    layer: int | None = None  # ours are stacked, and this is one of them


def gather(tensors: Mapping[str, Array], places: Mapping[str, Place], turn: Turn) -> Tensors:
    """The original's tensors, of the shapes of their places -> ours by path, float32.

    Args:
      tensors: by the original's names; all that have a place, which count layers upwards.
      places: by the same names.
      turn: a piece of the original's -> ours.
    """
    flat: Tensors = {}
    stacked: dict[str, list[Array]] = {}
    for name, place in places.items():
        pieces = np.split(np.asarray(tensors[name], np.float32), len(place.paths))
        for path, piece in zip(place.paths, pieces, strict=True):
            if place.layer is None:
                flat[path] = turn(piece, path)
            else:
                stacked.setdefault(path, []).append(turn(piece, path))
    flat |= {path: np.stack(layers) for path, layers in stacked.items()}
    return {path: np.ascontiguousarray(array) for path, array in flat.items()}


def scatter(flat: Mapping[str, Array], places: Mapping[str, Place], turn: Turn) -> Tensors:
    """What ``gather`` undoes: ours by path -> the original's tensors.

    Args:
      flat: ours, all that the places name.
      places: by the original's names.
      turn: ours -> a piece of the original's.

    Raises:
      ValueError: parameters of other numbers of layers than there are places for.
    """
    layers: dict[str, int] = {}
    for place in places.values():
        if place.layer is not None:
            layers |= dict.fromkeys(place.paths, place.layer + 1)
    wrong = [
        f"{path} has {len(flat[path])} layers, the model {count}"
        for path, count in layers.items()
        if len(flat[path]) != count
    ]
    if wrong:
        raise ValueError("the parameters do not fit the model:\n  " + "\n  ".join(wrong))

    def piece(place: Place, path: str) -> Array:
        return turn(flat[path] if place.layer is None else flat[path][place.layer], path)

    return {
        name: np.concatenate([piece(place, path) for path in place.paths])
        for name, place in places.items()
    }
