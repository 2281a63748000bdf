"""A step of training on the CPU against transformers' YOLOS with torch's fused attention.

    python -m benchmarks.train_step --threads 1,2 --out train_step.json

Forward pass, matching by scipy, losses, backward pass, clipping and AdamW on both sides; same
weights, pictures and objects, float32, same number of cores, taking turns in one process. Above 1
ours is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import checks, isolated, pictures, report, timing

CASE = {"model": "ti", "height": 512, "width": 688, "images": 2}
QUICK = {"model": "ti", "height": 64, "width": 96, "images": 2}
COLUMNS = {
    "model": "", "size": "", "images": "d", "threads": "d", "speedup": ".2f", "low": ".2f",
    "high": ".2f", "ours_s": ".3f", "theirs_s": ".3f", "loss": ".4f", "difference": ".1e",
}  # fmt: skip
STEPS = 2  # whose losses are compared
MOST = 1e-3  # relative difference of a loss or of a gradient's norm


def measure(
    model: str, height: int, width: int, images: int, threads: int, rounds: int, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Compares one model on this process' cores; yields one row."""
    import jax
    import torch

    from benchmarks import ours, theirs
    from yolos_jax import mesh as mesh_lib

    torch.set_num_threads(threads)
    config = ours.recipe(model, tiny=tiny, dtype="float32")
    config.buckets.multiple = 8
    random = np.random.default_rng(0)
    photographs = [pictures.photograph(random, height, width) for _ in range(images)]
    ground_truth = pictures.targets(random, images, ours.NUM_CLASSES)
    patch_size = config.model.patch_size
    bucket = ours.bucket_of(config, height // patch_size, width // patch_size)
    batch = pictures.as_sequences(photographs, patch_size, bucket)
    canvas = pictures.as_canvas(photographs, config.preprocess.mean, config.preprocess.std)

    train_step = ours.make_train_step(config)
    params = ours.draw_params(train_step.model)
    part = [mesh_lib.put_batch((batch, ground_truth), train_step.mesh)]
    state = train_step.init_state(jax.random.key(0), params)
    peer = theirs.Step(theirs.build(config.model, params), config.optimizer, autocast=False)
    pixels = torch.from_numpy(canvas)
    labels = theirs.on_device(pictures.as_labels(ground_truth), "cpu")

    def our_step() -> Any:
        nonlocal state
        state, metrics = train_step(state, part, bucket, config.optimizer.lr)
        return jax.block_until_ready(metrics)

    difference = 0.0
    for number in range(STEPS):
        metrics, (loss, norm) = our_step(), peer(pixels, labels)
        for what, mine, other in (
            ("loss", metrics["loss"], loss),
            ("norm", metrics["grad_norm"], norm),
        ):
            ratio = mine / float(other)
            difference = max(difference, checks.same(f"{what} {number}", ratio, 1.0, most=MOST))
    seconds = timing.interleaved(
        {"ours": our_step, "theirs": lambda: peer(pixels, labels)}, rounds, pause=timing.PAUSE
    )
    yield {
        "model": model,
        "size": f"{height}x{width}",
        "images": images,
        "threads": threads,
        **timing.speedup(seconds["ours"], seconds["theirs"]),
        "loss": float(loss),
        "difference": difference,
        "rounds": rounds,
    }


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--threads", default="1,2", help="numbers of cores, with commas")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    case = QUICK if arguments.quick else CASE
    rounds = 2 if arguments.quick else arguments.rounds
    rows = []
    for threads in map(int, arguments.threads.split(",")):
        if threads > isolated.available_cores():
            print(f"left out: {threads} threads, there are {isolated.available_cores()} cores")
            continue
        rows += isolated.rows_of(
            "benchmarks.train_step:measure",
            {**case, "threads": threads, "rounds": rounds, "tiny": arguments.quick},
            cores=threads,
            environment={"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "train_step", rows)


if __name__ == "__main__":
    main()
