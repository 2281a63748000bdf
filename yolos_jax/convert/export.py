"""Writing checkpoints: ours, a folder of transformers, or a file of the original.

Whatever is written appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax import checkpoint
from yolos_jax.convert import read, systems
from yolos_jax.convert.conversion import Converted
from yolos_jax.data import files

_HF_FILES = {"config.json", "preprocessor_config.json", "model.safetensors"}


def write_ours(converted: Converted, destination: Path, source: str) -> None:
    """Writes an orbax checkpoint that predicts by itself."""
    checkpoint.save_params(destination, converted.params, converted.metadata(source))


def write_hf(converted: Converted, destination: Path, source: str) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors."""
    import safetensors.numpy

    try:
        tensors, config, preprocessor = systems.system_of(converted.model).to_folder(converted)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    destination.mkdir(parents=True)
    safetensors.numpy.save_file(
        tensors, destination / "model.safetensors", metadata={"format": "pt"}
    )
    for name, content in (
        ("config.json", config),
        ("preprocessor_config.json", preprocessor),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (destination / name).write_text(text, encoding="utf-8")


def write_yolos(converted: Converted, destination: Path, source: str) -> None:
    """Writes a .pth as the original YOLOS's main.py saves and resumes it."""
    _write_original("yolos", converted, destination, source)


def write_detr(converted: Converted, destination: Path, source: str) -> None:
    """Writes a .pth as the original DETR's main.py saves and resumes it."""
    _write_original("detr", converted, destination, source)


def _write_original(name: str, converted: Converted, destination: Path, source: str) -> None:
    import torch

    model = converted.model
    system = systems.system_of(model)
    if model["name"] != name:
        raise ValueError(
            f"{source}: a {system.title}, which --to={name} has no place for; --to={model['name']}."
        )
    tensors = system.from_params(converted.params, model)
    content = {
        "model": {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()},
        "epoch": 0,
        "args": argparse.Namespace(**system.original_args(converted)),
        read.EXTRAS: {  # which the original's code does not look at
            "model": _plain(model),
            "label_map": converted.label_map.to_json(),
            "preprocess": _plain(converted.preprocess),
        },
    }
    torch.save(content, destination)


WRITERS: dict[str, Callable[[Converted, Path, str], None]] = {
    "yolos_jax": write_ours,
    "hf": write_hf,
    "yolos": write_yolos,
    "detr": write_detr,
}


def check_destination(source: str | Path, destination: str | Path, overwrite: bool) -> None:
    """Raises ValueError where writing would destroy what nobody asked to destroy."""
    if files.is_remote(destination):
        raise ValueError(f"{destination}: expected a local path.")
    target = Path(destination)
    here, there = Path(source).resolve(), target.resolve()
    if here == there:
        raise ValueError(f"{destination}: source and destination are the same.")
    if here.exists() and there in here.parents:
        raise ValueError(f"{destination}: the source, {source}, lies in it.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{destination}: is there already; --overwrite replaces it.")
    if target.is_dir() and not _holds_a_checkpoint(target):
        raise ValueError(
            f"{destination}: a folder with something else than a checkpoint in it; it will not be "
            "replaced."
        )


def _holds_a_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what is written here, and nothing else."""
    inside = list(folder.iterdir())
    names = {path.name for path in inside}
    # Steps of a run have more: what they would go on from.
    step = folder / "0"
    ours = names == {step.name} and (step / "params").is_dir()
    return names <= _HF_FILES or (ours and not (step / "optimizer").exists())


def _plain(value: Any) -> Any:
    """Tuples as lists: all that a pickle opened with weights_only may hold."""
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    return [_plain(inside) for inside in value] if isinstance(value, list | tuple) else value
