"""The forward pass on the CPU against transformers' YOLOS with torch's fused attention.

    python -m benchmarks.forward --threads 1,2 --out forward.json

Same weights, same picture, float32, same number of cores; both sides take turns in one process.
Above 1 ours is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import checks, isolated, pictures, report, timing

CASES = (("ti", 512, 864), ("s", 512, 864))  # recipe, height, width in pixels
COLUMNS = {
    "model": "", "size": "", "threads": "d", "speedup": ".2f", "low": ".2f", "high": ".2f",
    "ours_s": ".3f", "theirs_s": ".3f", "difference": ".1e",
}  # fmt: skip
MOST = 1e-3  # difference of logits and boxes; their size is about one


def measure(
    model: str, height: int, width: int, threads: int, rounds: int, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Compares one model on this process' cores; yields one row."""
    import jax
    import torch

    from benchmarks import ours, theirs
    from yolos_jax.models.build import build_model

    torch.set_num_threads(threads)
    config = ours.recipe(model, tiny=tiny, dtype="float32")
    config.buckets.multiple = 8
    random = np.random.default_rng(0)
    # Two pictures to compare outputs, the first alone to compare times.
    images = [pictures.photograph(random, height, width) for _ in range(2)]
    patch_size = config.model.patch_size
    bucket = ours.bucket_of(config, height // patch_size, width // patch_size)
    built = build_model(config.model, ours.NUM_CLASSES)
    params = ours.draw_params(built)
    forward = ours.make_forward(built, config, bucket)
    on_device = jax.device_put(params)
    peer = theirs.build(config.model, params).eval()
    peer_forward = theirs.forward_of(peer, compiled=False)
    mean, std = config.preprocess.mean, config.preprocess.std
    batches = [pictures.as_sequences([image], patch_size, bucket) for image in images]
    pixels = [torch.from_numpy(pictures.as_canvas([image], mean, std)) for image in images]

    with torch.inference_mode():
        mine = [jax.device_get(forward(on_device, batch)) for batch in batches]
        other = [[x.numpy() for x in peer_forward(x)] for x in pixels]
        difference = max(
            checks.same(
                "logits", [x.pred_logits[0] for x in mine], [x[0] for x in other], most=MOST
            ),
            checks.same("boxes", [x.pred_boxes[0] for x in mine], [x[1] for x in other], most=MOST),
        )
        checks.picture_shows([x.pred_logits for x in mine], least=10 * MOST)
        first = jax.device_put(batches[0])
        seconds = timing.interleaved(
            {
                "ours": lambda: jax.block_until_ready(forward(on_device, first)),
                "theirs": lambda: peer_forward(pixels[0]),
            },
            rounds,
            pause=timing.PAUSE,
        )
    yield {
        "model": model,
        "size": f"{height}x{width}",
        "threads": threads,
        **timing.speedup(seconds["ours"], seconds["theirs"]),
        "difference": difference,
        "rounds": rounds,
    }


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--threads", default="1,2", help="numbers of cores, with commas")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    cases = [("ti", 64, 96), ("s", 64, 96)] if arguments.quick else CASES
    rounds = 2 if arguments.quick else arguments.rounds
    rows = []
    for threads in map(int, arguments.threads.split(",")):
        if threads > isolated.available_cores():
            print(f"left out: {threads} threads, there are {isolated.available_cores()} cores")
            continue
        for model, height, width in cases:
            case = {"model": model, "height": height, "width": width, "threads": threads}
            case |= {"rounds": rounds, "tiny": arguments.quick}
            environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            rows += isolated.rows_of(
                "benchmarks.forward:measure", case, cores=threads, environment=environment
            )
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "forward", rows)


if __name__ == "__main__":
    main()
