"""What a run starts from: the parameters of any checkpoint of ours, made to fit its model.

A pre-trained transformer gets new detection tokens and heads; a detector keeps everything, except
that its class head is made anew when the classes differ. Whatever changes is said; whatever does
not fit is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax.convert.names import flatten, unflatten
from yolos_jax.models import position
from yolos_jax.models.build import Model

# The last layer is what belongs to the classes; the two before it serve any.
_CLASS_LAYER = "class_head/layers_2/"
_PER_QUERY = (
    "backbone/det_tokens",
    "backbone/position/det",
    "backbone/mid_position/det",
)
_GRIDS = ("backbone/position/grid", "backbone/mid_position/grid")
_MID = "backbone/mid_position/"


def initial_params(
    model: Model,
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    rng: jax.Array,
    label_map: Mapping[str, Any] | None = None,
) -> tuple[dict, str]:
    """Fits a checkpoint's parameters to a run's model.

    Args:
      model: what the run trains.
      params: nested dict of arrays, as ``checkpoint.load_params`` returns.
      metadata: likewise.
      rng: for what is new.
      label_map: the run's, as ``LabelMap.to_json`` gives it. Where it differs from the
        checkpoint's, the class head is made anew even if the number of classes is the same.

    Returns:
      Nested dict of float32 arrays, and a report of several lines for people.

    Raises:
      ValueError: naming every parameter that is missing, surplus or of another shape.
    """
    fresh = flatten(draw(model, rng))
    given = flatten(params)
    notes = _differences(model, metadata)
    reason = _other_classes(model, metadata, label_map)
    never_trained = set(metadata.get("new", ()))
    fitted, wrong = {}, []
    for path, new in fresh.items():
        old = given.get(path)
        if path in never_trained:
            fitted[path] = new
            notes.append(f"new: {path}: {_shape(new)} (the checkpoint's is random too)")
        elif reason and path.startswith(_CLASS_LAYER):
            fitted[path] = new
            notes.append(f"NEW CLASS HEAD: {path} {_shape(new)}: {reason}")
        elif old is None and path.startswith(_MID):
            fitted[path] = new
            notes.append(f"new: {path} {_shape(new)}: the checkpoint has no mid position tables")
        elif old is None:
            wrong.append(f"missing: {path} {_shape(new)}")
        elif np.shape(old) == new.shape:
            fitted[path] = np.asarray(old, np.float32)
        elif path in _GRIDS and _same_but_grid(old, new):
            fitted[path] = resize_grid(old, new.shape[-3:-1])
            notes.append(f"resized: {path} {_shape(old)} -> {_shape(new)}, bicubic")
        elif path in _PER_QUERY and np.shape(old)[-1] == new.shape[-1]:
            fitted[path] = new
            notes.append(f"new: {path} {_shape(new)}: the checkpoint has {_shape(old)}")
        else:
            wrong.append(f"{path} has shape {_shape(old)}, the run's model {_shape(new)}")
    surplus = given.keys() - fresh.keys() - never_trained
    wrong += [f"not in the run's model: {path}" for path in sorted(surplus)]
    if wrong:
        raise ValueError(
            "the checkpoint does not fit the run's model (config.model):\n  " + "\n  ".join(wrong)
        )
    kept = len(fresh) - sum(note.startswith(("new", "NEW", "resized")) for note in notes)
    head = f"start: {metadata.get('source', 'a checkpoint')}: {kept} of {len(fresh)} kept as is"
    return unflatten(fitted), "\n  ".join([head, *notes])


def draw(model: Model, rng: jax.Array) -> dict:
    """Random parameters of a model: nested dict of numpy arrays."""
    return jax.tree.map(np.asarray, _init(model, rng))


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, rng: jax.Array) -> dict:
    return model.init(rng)


def resize_grid(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bicubic resize of position tables, as the reference resizes them when it starts.

    Args:
      table: float32 [..., h, w, D].
      grid: rows and columns wanted.

    Returns:
      float32 [..., rows, cols, D].
    """
    grid = tuple(int(side) for side in grid)
    table = np.asarray(table, np.float32)
    resized = _resize(table.reshape(-1, *table.shape[-3:]), grid)
    return np.asarray(resized).reshape(*table.shape[:-3], *grid, table.shape[-1])


@functools.partial(jax.jit, static_argnums=1)
def _resize(tables: jax.Array, grid: tuple[int, int]) -> jax.Array:
    row_weights, col_weights = (
        position.cubic_weights(old, jnp.asarray([new]), new)
        for old, new in zip(tables.shape[1:3], grid, strict=True)
    )
    return jax.vmap(lambda table: position.resize(table, row_weights, col_weights))(tables)


def _differences(model: Model, metadata: Mapping[str, Any]) -> list[str]:
    """What no shape tells: the settings in which a model of the same parameters differs."""
    stored, notes, wrong = metadata.get("model", {}), [], []
    for key in ("name", "heads", "patch_size", "layer_norm_eps"):
        ours = "yolos" if key == "name" else getattr(model.config, key)
        theirs = stored.get(key, ours)
        if theirs == ours:
            continue
        line = f"model.{key} is {ours}, the checkpoint's is {theirs}"
        (notes if key == "layer_norm_eps" else wrong).append(line)
    if wrong:
        raise ValueError("the checkpoint does not fit the run's model: " + "; ".join(wrong))
    return notes


def _other_classes(
    model: Model, metadata: Mapping[str, Any], label_map: Mapping[str, Any] | None
) -> str:
    """Why the class head cannot be kept; '' if it can."""
    stored = metadata.get("label_map")
    num_classes = metadata.get("num_classes", model.num_classes)
    if num_classes != model.num_classes:
        return f"{num_classes} classes in the checkpoint, {model.num_classes} in this run"
    if stored is None or label_map is None:
        return ""
    pairs = zip(stored["names"], label_map["names"], strict=True)
    others = [f"slot {slot} {a!r} -> {b!r}" for slot, (a, b) in enumerate(pairs) if a != b]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"other classes: {', '.join(others[:3])}{more}" if others else ""


def _same_but_grid(old: Any, new: np.ndarray) -> bool:
    shape = np.shape(old)
    same = len(shape) == new.ndim and shape[:-3] == new.shape[:-3]
    return same and shape[-1] == new.shape[-1]


def _shape(array: Any) -> str:
    return str(tuple(np.shape(array)))
