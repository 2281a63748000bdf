"""Reads from a checkpoint what a detector needs, whatever wrote it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from yolos_jax import checkpoint_files as files
from yolos_jax.data.files import exists, is_folder

FORMAT = 1  # of the layout (checkpoint.py) and of the metadata's keys
FOLDER = "checkpoints"  # of a run's work directory
_OTHERS = "convert_torch_weights.py makes one of another project's weights"


def load_params(path: str | os.PathLike, prefer: str = "best") -> tuple[dict, dict]:
    """Reads what a detector needs; the average of the parameters where there is one.

    Args:
      path: a run's work directory, a folder of step folders, or one step folder.
      prefer: 'best' (highest AP; the newest where none has one) or 'last', among several steps.
        If that step is damaged it is named on stderr and the next in line is read.

    Returns:
      Nested dict of numpy arrays, and the metadata.

    Raises:
      ValueError: if there is no checkpoint, or none that is whole.
    """
    folder = files.absolute(path)
    if not is_folder(folder):
        found = "a file" if exists(folder) else "no such folder"
        raise ValueError(f"{path}: {found}; expected the folder of a checkpoint ({_OTHERS})")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    if (folder / "metadata").is_dir() or (folder / "params").is_dir():
        return _load_step(folder)
    steps = files.steps(folder)
    if not steps:
        raise ValueError(
            f"{path}: not a checkpoint; expected a run's work directory, a folder of checkpoints "
            f"(with step folders 0, 100, ...) or one step folder ({_OTHERS})"
        )
    order = steps[::-1]
    if prefer == "best":
        best = files.best({step: files.read_ap(folder / str(step)) for step in steps}, len(steps))
        order = best + [step for step in order if step not in best]
    damaged: dict[int, str] = {}
    for step in order:
        damage = files.damage(folder / str(step), files.OPTIMIZER)
        if damage is None:
            report_damage(damaged)
            return _load_step(folder / str(step), verified=True)
        damaged[step] = damage
    raise ValueError(f"{path}: every checkpoint there is damaged: {'; '.join(damaged.values())}")


def _load_step(folder: epath.Path, verified: bool = False) -> tuple[dict, dict]:
    damage = None if verified else files.damage(folder, files.OPTIMIZER)
    if damage is not None:
        raise ValueError(f"damaged checkpoint: {damage}")
    metadata = files.read_metadata(folder)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: checkpoint of format {metadata.get('format')}; this program reads {FORMAT}"
        )
    # Older ones have it in the run's configuration only.
    exif = (metadata.get("config") or {}).get("data", {}).get("exif", "ignore")
    metadata["preprocess"].setdefault("exif", exif)
    item = folder / ("ema" if (folder / "ema").is_dir() else "params")
    reader = ocp.PyTreeCheckpointHandler()
    # As numpy arrays, whatever devices the run had that wrote them.
    numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    kinds = jax.tree.map(lambda _: numpy, reader.metadata(item).tree)
    return reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=kinds)), metadata


def report_damage(damaged: Mapping[int, str]) -> None:
    """Says which steps are not used, and why, where there is one that is."""
    for step, damage in damaged.items():
        report(f"checkpoint {step} is damaged, using another: {damage}")


def report(message: str) -> None:
    """Says on stderr what is wrong with a checkpoint, where that is no reason to stop."""
    print(message, file=sys.stderr, flush=True)
