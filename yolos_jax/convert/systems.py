"""What conversions need to know of each model of models/build.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from yolos_jax.convert import (
    conversion,
    detr,
    detr_huggingface,
    detr_names,
    huggingface,
    names,
    original,
)
from yolos_jax.convert.conversion import Converted, Options

Tensors = dict[str, np.ndarray]


class System(NamedTuple):
    """One of the models, as the projects see it that it came from."""

    title: str
    model_config: Callable[..., dict[str, Any]]  # keys of config.model -> the same, completed
    # Raises ValueError where flags say otherwise than the model's keys, naming the checkpoint.
    refuse_contradictions: Callable[[Mapping[str, Any], Options, str], None]
    from_params: Callable[[Mapping[str, Any], Mapping[str, Any]], Tensors]  # params, model's keys
    original_args: Callable[
        [Converted], dict[str, Any]
    ]  # beside the tensors in the original's file
    # Tensors, config.json and preprocessor_config.json of transformers.
    to_folder: Callable[[Converted], tuple[Tensors, dict[str, Any], dict[str, Any]]]


SYSTEMS = {
    "yolos": System(
        "YOLOS",
        conversion.model_config,
        conversion.refuse_contradictions,
        names.from_params,
        original.original_args,
        huggingface.to_folder,
    ),
    "detr": System(
        "DETR",
        detr.model_config,
        detr.refuse_contradictions,
        detr_names.from_params,
        detr.original_args,
        detr_huggingface.to_folder,
    ),
}


def system_of(model: Mapping[str, Any]) -> System:
    """The system of a model.

    Args:
      model: the keys of ``config.model``.

    Raises:
      ValueError: none of that name.
    """
    if model["name"] not in SYSTEMS:
        raise ValueError(f"model.name is {model['name']!r}; expected one of {sorted(SYSTEMS)}.")
    return SYSTEMS[model["name"]]
