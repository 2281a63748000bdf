"""What a run starts from: the parameters of any checkpoint of ours, made to fit its model.

A pre-trained transformer gets new detection tokens and heads, a pre-trained ResNet all that a DETR
has beside it; a detector keeps everything, except that its class head is made anew when the classes
differ. Whatever changes is said; whatever does not fit is an error.
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

# The last layer is what belongs to the classes; the two before it, of a YOLOS, serve any.
_CLASS_LAYER = ("class_head/layers_2/", "class_head/kernel", "class_head/bias")
_PER_QUERY = (
    "backbone/det_tokens",
    "backbone/position/det",
    "backbone/mid_position/det",
    "query_embed",
)
# Keys of config.model by the name of the model, and the parameters that mean something else, or are
# others, under another value.
_FIXED = {
    "yolos": {"heads": "backbone/blocks/", "patch_size": "backbone/patch_embed/"},
    "detr": {
        "heads": "encoder/",
        "blocks": "backbone/",
        "pre_norm": "encoder/",
        "position": "encoder/",
    },
}
# Likewise, but the parameters serve.
_NOTED = {
    "yolos": {"layer_norm_eps": "backbone/blocks/"},
    "detr": {"layer_norm_eps": "encoder/", "dilation": "encoder/"},
}
_GRIDS = ("backbone/position/grid", "backbone/mid_position/grid")
_MID = "backbone/mid_position/"


def initial_params(
    model: Model,
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    rng: jax.Array,
    label_map: Mapping[str, Any] | None = None,
    source: str = "the checkpoint",
) -> tuple[dict, str]:
    """Fits a checkpoint's parameters to a run's model.

    Args:
      model: what the run trains.
      params: nested dict of arrays, as ``checkpoint.load_params`` returns.
      metadata: likewise.
      rng: for what is new.
      label_map: the run's, as ``LabelMap.to_json`` gives it. Where it differs from the
        checkpoint's, the class head is made anew even if the number of classes is the same.
      source: what to call the checkpoint in errors.

    Returns:
      Nested dict of float32 arrays, and a report of several lines for people.

    Raises:
      ValueError: a checkpoint of another model, or of other settings that no shape tells; or naming
        every parameter that is missing, surplus or of another shape.
    """
    given = flatten(params)
    notes = _differences(model, metadata, given, source)
    fresh = flatten(draw(model, rng))
    reason = _other_classes(model, metadata, label_map)
    never_trained = set(metadata.get("new", ()))
    fitted, wrong = {}, []
    for path, new in fresh.items():
        array, note = _fit(path, new, given, never_trained, reason)
        if array is None:
            wrong.append(note)
        else:
            fitted[path] = array
            notes += [note] if note else []
    surplus = given.keys() - fresh.keys() - never_trained
    wrong += [f"not in the run's model: {path}" for path in sorted(surplus)]
    if wrong:
        raise ValueError(
            f"{source} does not fit the run's model (config.model):\n  " + "\n  ".join(wrong)
        )
    kept = len(fresh) - sum(note.startswith(("new", "NEW", "resized")) for note in notes)
    head = f"start: {metadata.get('source', 'a checkpoint')}: {kept} of {len(fresh)} kept as is"
    return unflatten(fitted), "\n  ".join([head, *notes])


def _fit(
    path: str, new: np.ndarray, given: Mapping[str, Any], never_trained: set[str], reason: str
) -> tuple[np.ndarray | None, str]:
    """One parameter of the run's model.

    Args:
      path: its path.
      new: drawn at random.
      given: the checkpoint's, by path.
      never_trained: paths of those that are random in the checkpoint too.
      reason: why the class head is to be new; '' if it is not.

    Returns:
      The parameter and what to say of it ('': kept as it is), or None and what is wrong.
    """
    old, shape = given.get(path), _shape(new)
    if path in never_trained:
        return new, f"new: {path}: {shape} (the checkpoint's is random too)"
    if reason and path.startswith(_CLASS_LAYER):
        return new, f"NEW CLASS HEAD: {path} {shape}: {reason}"
    if old is None and path.startswith(_MID):
        return new, f"new: {path} {shape}: the checkpoint has no mid position tables"
    if old is None and never_trained:
        part = path.split("/")[0] + "/"
        if not any(other.startswith(part) for other in given.keys() - never_trained):
            return new, f"new: {path} {shape}: nothing of {part} is trained in the checkpoint"
    if old is None:
        return None, f"missing: {path} {shape}"
    if np.shape(old) == new.shape:
        return np.asarray(old, np.float32), ""
    if path in _GRIDS and _same_but_grid(old, new):
        resized = resize_grid(old, new.shape[-3:-1])
        return resized, f"resized: {path} {_shape(old)} -> {shape}, bicubic"
    if path in _PER_QUERY and np.shape(old)[-1] == new.shape[-1]:
        return new, f"new: {path} {shape}: the checkpoint has {_shape(old)}"
    return None, f"{path} has shape {_shape(old)}, the run's model {shape}"


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


def _differences(
    model: Model, metadata: Mapping[str, Any], given: Mapping[str, Any], source: str
) -> list[str]:
    """What no shape tells, or too many: the settings in which a model of like parameters differs.

    Raises:
      ValueError: naming both values of each that does not fit.
    """
    stored = metadata.get("model", {})
    name = stored.get("name", model.name)
    if name != model.name:
        raise ValueError(
            f"{source} does not fit the run's model: model.name is {model.name!r}, the "
            f"checkpoint's is {name!r}"
        )
    trained = given.keys() - set(metadata.get("new", ()))

    def differing(keys: Mapping[str, str]) -> list[str]:
        lines = []
        for key, prefix in keys.items():
            theirs = stored if key in stored else stored.get(name, {})
            path, ours = f"{'' if key in stored else f'{name}.'}{key}", getattr(model.config, key)
            value = theirs.get(key, ours)
            value = tuple(value) if isinstance(value, list) else value
            if value != ours and any(parameter.startswith(prefix) for parameter in trained):
                both = (f"{x}{_resnet(x) if key == 'blocks' else ''}" for x in (ours, value))
                lines.append("model.{} is {}, the checkpoint's is {}".format(path, *both))
        return lines

    wrong = differing(_FIXED[name])
    if wrong:
        raise ValueError(f"{source} does not fit the run's model: {'; '.join(wrong)}")
    return differing(_NOTED[name])


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


def _resnet(blocks: tuple[int, ...]) -> str:
    """What a ResNet of so many bottlenecks is called, by its layers."""
    return f" (ResNet-{3 * sum(blocks) + 2})"


def _same_but_grid(old: Any, new: np.ndarray) -> bool:
    shape = np.shape(old)
    same = len(shape) == new.ndim and shape[:-3] == new.shape[:-3]
    return same and shape[-1] == new.shape[-1]


def _shape(array: Any) -> str:
    return str(tuple(np.shape(array)))
