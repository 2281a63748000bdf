"""A run from pictures on the disk to weights, beside its bare steps.

    python -m benchmarks.end_to_end --config configs/yolos_s.py --data /data/coco --out e2e.json

Trains as train.py does (reading, batches to the device, steps, metrics, a checkpoint per epoch),
with all programs compiled before the first step, and takes the images per second from the run's own
metrics.jsonl, its first line left out. Then the same step on a batch that is on the device already,
bucket by bucket, as often as the run had each. Without --data a small set of generated shapes.
"""

from __future__ import annotations

import itertools
import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours, report, timing
from yolos_jax import mesh as mesh_lib
from yolos_jax import startup, trainer
from yolos_jax.batch import Targets
from yolos_jax.claim import Claim
from yolos_jax.data import shapes
from yolos_jax.metrics import Metrics
from yolos_jax.step import StepShape

COLUMNS = {
    "config": "", "steps": "d", "images": "d", "run_images_per_s": ".1f",
    "bare_images_per_s": ".1f", "share": ".1%",
}  # fmt: skip


def configuration(path: str, data: str, epochs: int, every: int, subset: int) -> Any:
    """The configuration of a short run that is evaluated, on few pictures, at its end only.

    Args:
      path: of a file of configs/.
      data: folder in COCO's layout.
      epochs: of the run.
      every: steps between lines of metrics.jsonl.
      subset: training pictures; 0: all.
    """
    config = runpy.run_path(path)["get_config"]()
    config.data.root, config.data.train_subset, config.data.val_subset = data, subset, 8
    config.epochs, config.eval.every_epochs = epochs, 0
    config.log.every_steps, config.log.pictures = every, 0
    config.compile.ahead = True
    return config


def measure(config: Any, workdir: str, seconds: float) -> dict[str, Any]:
    """Runs, and measures the bare step afterwards.

    Args:
      config: of ``configuration``.
      workdir: folder of the run, empty.
      seconds: that the bare step of each bucket is repeated for.

    Raises:
      RuntimeError: the run was too short to tell.
    """
    summary = trainer.train(config, workdir)
    first, last, run_seconds = _timed_steps(Path(summary["metrics"]), config.batch_size)
    with Claim() as claim:
        run, _ = startup.prepare(config, workdir, (), {}, claim)
    plans = [run.train_plan(epoch) for epoch in range(config.epochs)]
    numbers = np.concatenate([plan.bucket for plan in plans])[first:last].tolist()
    each = {}
    for number in sorted(set(numbers)):
        bucket, boxes = plans[0].buckets[number], plans[0].max_boxes
        shape = StepShape(bucket, config.batch_size, boxes, config.microbatches)
        each[number] = _bare_seconds(run.train_step, shape, seconds)
    bare_seconds = sum(each[number] for number in numbers)
    images = len(numbers) * config.batch_size
    return {
        "steps": len(numbers),
        "images": images,
        "run_images_per_s": images / run_seconds,
        "bare_images_per_s": images / bare_seconds,
        "share": bare_seconds / run_seconds,
        "buckets": len(each),
        "device": jax.devices()[0].device_kind,
    }


def _timed_steps(path: Path, batch_size: int) -> tuple[int, int, float]:
    """Steps from the second line of a run's metrics to the last, and the seconds they took."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    if len(lines) < 3:
        raise RuntimeError(f"{path}: {len(lines)} lines of training, at least 3 are needed")
    seconds = 0.0
    for before, line in itertools.pairwise(lines):
        seconds += (line["step"] - before["step"]) * batch_size / line["images_per_s"]
    return lines[0]["step"], lines[-1]["step"], seconds


def _bare_seconds(train_step: Any, shape: StepShape, seconds: float) -> float:
    """Seconds of a step whose batch is on the device; pictures of noise fill the bucket."""
    random = np.random.default_rng(0)
    images, boxes = shape.batch_size // shape.microbatches, shape.max_boxes
    side, bucket = train_step.model.layout.patch_size, shape.bucket
    grid = min(bucket.rows, bucket.patches // bucket.cols), bucket.cols
    batch = bucket.empty(images, side)
    for row in range(images):
        cells = random.integers(0, 256, (grid[0] * grid[1], 3 * side**2), np.uint8)
        batch.put(row, cells, grid)
    valid = np.zeros((images, boxes), bool)
    valid[:, : min(boxes, 7)] = True
    part = (
        batch,
        Targets(
            np.zeros((images, boxes), np.int32),
            np.where(valid[..., None], np.float32([0.5, 0.5, 0.2, 0.2]), np.float32(0)),
            valid,
        ),
    )
    parts = [mesh_lib.put_batch(part, train_step.mesh)] * shape.microbatches
    state = train_step.init_state(jax.random.key(0), ours.draw_params(train_step.model))

    def step() -> Metrics:
        nonlocal state
        state, metrics = train_step(state, parts, bucket, 1e-6)
        return metrics

    return timing.seconds_each(step, at_least=seconds, most=1000)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--config", default="configs/shapes.py")
    parser.add_argument("--data", default="", help="folder in COCO's layout")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--subset", type=int, default=0, help="training pictures; 0: all")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--seconds", type=float, default=5, help="for the bare step of a bucket")
    arguments = parser.parse_args()
    epochs, every, seconds = arguments.epochs, arguments.every, arguments.seconds
    if arguments.quick:
        epochs, every, seconds = 2, 2, 0.1
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        data = arguments.data or f"{folder}/shapes"
        if not arguments.data:
            shapes.write(data, train=96 if arguments.quick else 2000, val=8)
        config = configuration(arguments.config, data, epochs, every, arguments.subset)
        row = measure(config, f"{folder}/run", seconds)
    row = {"config": arguments.config, **row}
    print(report.table([row], COLUMNS))
    report.write(arguments.out, "end_to_end", [row])


if __name__ == "__main__":
    main()
