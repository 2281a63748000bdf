"""Checkpoints of other projects, read from disk without running anything that is in them.

Understood: PyTorch files (zip and the format before 1.6), safetensors, numpy ``.npz``, folders of
Hugging Face's transformers, and names of its hub when online. torch, safetensors and
huggingface_hub are imported where needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("config.json", "preprocessor_config.json", "*.safetensors*", "pytorch_model*")
# Where files written by export.py say what the original's layout has no place for.
EXTRAS = "yolos_jax"
# Where checkpoints keep their tensors: DeiT, YOLOS and MAE; MoCo v3 and timm; DINO.
_STATE_KEYS = ("model", "state_dict", "teacher")
# Wrappers around a backbone: DataParallel, MoCo v3 and DINO.
_PREFIXES = ("module.", "base_encoder.", "backbone.")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a checkpoint of another project says."""

    path: str
    tensors: dict[str, np.ndarray]  # names as in the file, wrappers' prefixes removed
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json
    preprocessor: dict[str, Any] = dataclasses.field(default_factory=dict)  # its neighbour
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # command line of its training
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)  # of files written here
    unused: tuple[str, ...] = ()  # tensors of the file that belong to other networks


def read(path: str | Path) -> Source:
    """Reads a checkpoint of another project.

    Args:
      path: a .pth/.pt/.bin/.safetensors/.npz file, a folder of transformers, or a hub name.

    Raises:
      ValueError: no such thing, not a checkpoint, truncated, or a pickle that wants to run code.
    """
    file = Path(path)
    if file.is_dir():
        return _read_folder(file)
    if not file.exists():
        return _read_folder(_download(str(path)))
    if not file.stat().st_size:
        raise ValueError(f"{path}: an empty file, expected a checkpoint.")
    if file.suffix == ".npz":
        return Source(str(file), _read_npz(file))
    if file.suffix == ".safetensors":
        return Source(str(file), _read_safetensors(file))
    content = _read_torch(file)
    tensors, unused = _state_dict(content, file)
    args, extras = content.get("args"), content.get(EXTRAS)
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    extras = extras if isinstance(extras, dict) else {}
    return Source(str(file), tensors, args=args, extras=extras, unused=unused)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError naming the file when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object.")
    return content


def missing(error: ImportError) -> str:
    """One line on a package that is not installed or does not load, and how to get it."""
    reason = " ".join(str(error).split())
    return f"{reason}; what conversions need comes with: pip install 'yolos_jax[convert]'"


def _read_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: a folder without config.json. Expected a folder of transformers "
            f"(config.json and {' or '.join(_WEIGHTS)}), or name the checkpoint file itself."
        )
    config = read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    preprocessor = read_json(preprocessor) if preprocessor.is_file() else {}
    tensors: dict[str, np.ndarray] = {}
    for file in _weight_files(folder):
        if file.suffix == ".safetensors":
            tensors |= _read_safetensors(file)
        else:
            tensors |= _state_dict(_read_torch(file), file)[0]
    return Source(str(folder), tensors, config, preprocessor)


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():  # sharded
            shards = sorted(set(read_json(index)["weight_map"].values()))
            return [folder / shard for shard in shards]
    raise ValueError(f"{folder}: neither {' nor '.join(_WEIGHTS)} is there.")


def _download(name: str) -> Path:
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub:
        raise ValueError(f"{name}: no such file or folder.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{name}: no such file or folder; {missing(error)}") from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # offline, unknown name: all end here
        raise ValueError(
            f"{name}: no such file or folder, and the Hugging Face hub does not give it: "
            f"{_reason(error)}"
        ) from error


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: cannot be read as .npz: {error}") from error


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"{file}: {missing(error)}") from error
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}


def _read_torch(file: Path) -> Any:
    """torch.load that never runs what a pickle asks for, in either of torch's two file formats."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{file}: {missing(error)}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch does not write
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: {_refusal(str(error))}") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:  # what truncated and foreign files raise, depending on where they end
        raise ValueError(
            f"{file}: truncated, or no PyTorch checkpoint: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of a library's message; its kind, where that is no word."""
    message = str(error).strip()
    if not any(letter.isalpha() for letter in message):
        return type(error).__name__
    return message.splitlines()[0].split(". ")[0]


def _refusal(message: str) -> str:
    """torch's many lines of advice as one line for people."""
    for line in message.splitlines():
        line = line.strip()
        if "GLOBAL" in line or "Unsupported class" in line:
            return (
                "refused: this pickle asks for code besides tensors and argparse.Namespace, and "
                f"none of it was run. torch says: {line}"
            )
    for line in message.splitlines():
        if "Unsupported operand" in line:  # text, or a pickle that torch did not write
            return f"no PyTorch checkpoint, and nothing of it was run: {line.strip()}"
    reason = message.strip().splitlines()[-1].strip() if message.strip() else "empty"
    return f"truncated, or no PyTorch checkpoint: {reason}"


def _state_dict(content: Any, file: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the tensors of the network, and the names of those that belong to others."""
    import torch

    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict.")
    for key in _STATE_KEYS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {
        str(name): _to_numpy(tensor)
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }
    if not tensors:
        keys = ", ".join(sorted(map(str, content))[:8])
        raise ValueError(f"{file}: no tensors in it; its entries: {keys or 'none'}.")
    return _without_wrappers(tensors)


def _without_wrappers(
    tensors: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Takes the backbone out of DataParallel, MoCo v3 and DINO; a YOLOS keeps its names."""
    others: tuple[str, ...] = ()
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        if "det_token" in inside or not ("cls_token" in inside or (prefix == "module." and inside)):
            continue
        others += tuple(name for name in tensors if not name.startswith(prefix))
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
    return tensors, others


def _to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy; half precision and bfloat16 become float32, which holds them all."""
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.contiguous().numpy()
