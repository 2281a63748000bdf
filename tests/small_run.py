"""A run of twelve steps that takes seconds, and what there is to compare of two of them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from yolos_jax import checkpoint, checkpoint_files
from yolos_jax.data import shapes

STEPS = 12
PATIENCE = 1200  # seconds for a run, on a machine that does other things too


def write_pictures(root: Path) -> Path:
    """Writes what the run trains on: three steps an epoch."""
    shapes.write(root, seed=3, train=48, val=10, size=32)
    return root


def flags(pictures: Path, workdir: Path, config: str = "shapes", **changes) -> list[str]:
    """Of ``train.py``: four epochs, evaluated after each, saved every two steps besides."""
    values = {
        "data.root": pictures, "epochs": 4, "batch_size": 16,
        "model.width": 32, "model.depth": 2, "model.heads": 2, "model.mlp_width": 64,
        "model.position_grid": (4, 4),
        "preprocess.size": 32, "preprocess.max_size": 32,
        "augment.scales": (32,), "augment.max_size": 32,
        "optimizer.warmup_steps": 2, "optimizer.ema_decay": 0.9,
        "checkpoint.every_steps": 2, "eval.every_epochs": 1, "eval.batch_size": 8,
        "log.every_steps": 1, "log.pictures": 0,
    } | changes  # fmt: skip
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config=configs/{config}.py", f"--workdir={workdir}", *given]


def metrics(workdir: Path) -> list[dict]:
    """The metrics file, without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("images_per_s", None)
        line.pop("seconds", None)
    return found


def losses(workdir: Path) -> dict[int, float]:
    """Loss by the number of steps done."""
    return {line["step"]: line["loss"] for line in metrics(workdir) if line["kind"] == "train"}


def batches(folder: Path) -> dict[int, set[tuple[int, ...]]]:
    """By step, the images of its batch over all processes; several sets if it varied.

    Args:
      folder: with a folder per attempt at the run, with a file per process of it.
    """
    found: dict[int, set] = {}
    for attempt in folder.iterdir():
        of_attempt: dict[int, list[int]] = {}
        for text in "".join(path.read_text() for path in attempt.glob("*.jsonl")).splitlines():
            line = json.loads(text)
            of_attempt.setdefault(line["step"], []).extend(line["image_ids"])
        for step, ids in of_attempt.items():
            found.setdefault(step, set()).add(tuple(sorted(ids)))
    return found


def arrays(workdir: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Every array of the newest checkpoint by path."""
    folder = checkpoint_files.absolute(workdir / checkpoint.FOLDER)
    folder /= str(checkpoint_files.steps(folder)[-1])
    reader, as_numpy = ocp.PyTreeCheckpointHandler(), ocp.RestoreArgs(restore_type=np.ndarray)
    found = {}
    for item, tree in checkpoint_files.stored(folder).items():
        wanted = ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: as_numpy, tree))
        restored = checkpoint_files.named_leaves(reader.restore(folder / item, args=wanted))
        found |= {(item, *path): array for path, array in restored.items()}
    return found
