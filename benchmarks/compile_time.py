"""How long the programs of a bucket take to compile, and to read again after a restart.

    python -m benchmarks.compile_time --out compile_time.json

The two programs of a training step of YOLOS-S, blocks scanned and unrolled, for short and long
sequences of its recipe. Each case is compiled in a process of its own with an empty cache, then
made again in a new process with the cache that the first has left.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import isolated, report

GRIDS = {"short": (30, 40), "long": (50, 83)}  # rows and columns of patches
COLUMNS = {
    "blocks": "", "patches": "d", "start": "", "forward_s": ".1f", "update_s": ".1f",
    "both_s": ".1f", "files_read": "d",
}  # fmt: skip


def measure(
    scan: bool, rows: int, cols: int, images: int, dtype: str, tiny: bool, start: str
) -> Iterator[dict[str, Any]]:
    """Makes the programs of one bucket; yields one row."""
    import jax

    from benchmarks import ours, pictures
    from yolos_jax.step import StepShape

    read = 0

    def count(event: str, **unused: Any) -> None:
        nonlocal read
        read += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(count)
    config = ours.recipe("s", tiny=tiny, scan=scan, dtype=dtype)
    train_step = ours.make_train_step(config)
    bucket = ours.bucket_of(config, rows, cols)
    read = 0
    started = time.perf_counter()
    programs = train_step.compile(StepShape(bucket, images, pictures.MOST_BOXES))
    both = time.perf_counter() - started
    yield {
        "blocks": "scanned" if scan else "unrolled",
        "patches": bucket.patches,
        "start": start,
        "forward_s": programs["forward"].seconds,
        "update_s": programs["update"].seconds,
        "both_s": both,
        "files_read": read,
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=8, help="of a step")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    grids = {"short": (4, 6)} if arguments.quick else GRIDS
    rows = []
    for scan in (True, False):
        for grid in grids.values():
            with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
                environment = {
                    "JAX_COMPILATION_CACHE_DIR": cache,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
                }
                for start in ("first", "again"):
                    case = {"scan": scan, "rows": grid[0], "cols": grid[1], "start": start}
                    case |= {"images": arguments.images, "dtype": arguments.dtype}
                    rows += isolated.rows_of(
                        "benchmarks.compile_time:measure",
                        {**case, "tiny": arguments.quick},
                        environment=environment,
                    )
                if not rows[-1]["files_read"]:
                    raise RuntimeError(f"the programs were not read from the cache: {rows[-1]}")
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "compile_time", rows)


if __name__ == "__main__":
    main()
