"""Pictures per second from files to batches, against a PyTorch DataLoader with Pillow transforms.

    python -m benchmarks.input --data /data/coco --out input.json

The same files, the same drawn flips, crops and sizes, the same batches, the same number of workers;
neither trains. Beside it decoding and resizing alone, in as many threads. Without --data pictures
of 640x480 pixels are generated. Files should be in the page cache: give a folder that fits.
"""

from __future__ import annotations

import importlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import isolated, jpegs, reference_loader, report, timing
from yolos_jax.data import augment, pipeline, rows
from yolos_jax.data import plan as plan_lib
from yolos_jax.data.index import Index, load_coco
from yolos_jax.data.patches import patchify, unpatchify
from yolos_jax.data.tensorflow_import import tf

RECIPES = {"800": "yolos_s", "ti": "yolos_ti"}
# Grey levels from the reference's pictures, at most. Of a crop we resize once and the reference
# twice, which blurs: there the means of patches are compared, which a shift would change.
WHOLE_DIFFERENCE, PATCH_DIFFERENCE = 2, 3
COLUMNS = {
    "recipe": "", "reader": "", "workers": "d", "images_per_s": ".1f", "per_core": ".1f",
    "per_cpu_second": ".1f", "against_torch": ".2f", "of_decode_and_resize": ".0%",
}  # fmt: skip


def measure(index: Index, recipe: str, batch_size: int, workers: int, rounds: int) -> list[dict]:
    """One row per reader, for one recipe."""
    config = importlib.import_module(f"configs.{RECIPES[recipe]}").get_config()
    drawn = plan_lib.Recipe.from_config(config, config.model.patch_size)
    buckets = plan_lib.choose_buckets(index, drawn, config.buckets.count, 8, 101)
    plan = plan_lib.make_plan(index, drawn, buckets, seed=0, epoch=0, batch_size=batch_size)
    draws = augment.draw(index, drawn, seed=0, epoch=0)
    differences = check(index, plan, draws)
    own = np.arange(batch_size)
    readers = {
        "yolos_jax": lambda: pipeline.host_batches(index, plan, host_rows=own, workers=workers),
        "torch DataLoader": lambda: reference_loader.loader(
            index, draws, plan.rows, config.preprocess.mean, config.preprocess.std, workers
        ),
        "decode and resize alone": lambda: decode_and_resize(index, plan, workers),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for number in range(rounds):
        for name in list(readers) if number % 2 else reversed(readers):
            found[name].append(rates(readers[name], batch_size))
    middle = {name: np.median(np.array(each), axis=0) for name, each in found.items()}

    def ratio(one: str, other: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return timing.spread([mine[0] / theirs[0] for mine, theirs in pairs])[1]

    result = [
        {
            "recipe": recipe,
            "reader": name,
            "workers": workers,
            "images_per_s": rate,
            "per_core": rate / workers,
            "per_cpu_second": per_cpu,
        }
        for name, (rate, per_cpu) in middle.items()
    ]
    result[0] |= {
        "against_torch": ratio("yolos_jax", "torch DataLoader"),
        "of_decode_and_resize": ratio("yolos_jax", "decode and resize alone"),
        **differences,
    }
    return result


def rates(reader: Callable[[], Iterable], batch_size: int) -> tuple[float, float]:
    """Images per second from the first batch to the last, and per second of processor time.

    Processor time is that of everything from the start, of worker processes too.
    """
    cpu = _cpu_seconds()
    batches = iter(reader())
    next(batches)
    started, count = time.perf_counter(), 0
    for _ in batches:
        count += batch_size
    elapsed = time.perf_counter() - started
    del batches  # ends the worker processes, whose time is known then
    return count / elapsed, (count + batch_size) / (_cpu_seconds() - cpu)


def decode_and_resize(index: Index, plan: plan_lib.Plan, workers: int) -> Iterable[int]:
    """The least that any reader must do, picture by picture; yields once per batch."""

    def one(place: tuple[int, int]) -> None:
        path = index.path(plan.rows[place])
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), 3, dct_method="INTEGER_ACCURATE")
        rows.resize_crop(pixels.numpy(), plan.crop[place], plan.size[place])

    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(one, np.ndindex(plan.rows.shape))
        for number, _ in enumerate(done, 1):
            if number % plan.batch_size == 0:
                yield number


def check(index: Index, plan: plan_lib.Plan, draws: augment.Draws) -> dict[str, float]:
    """Compares the first batch with the reference's pictures.

    Returns:
      Grey levels: ``whole_difference`` (most of any pixel where nothing is cropped),
      ``patch_difference`` (most of any patch's mean, of crops), ``cropped_difference`` (mean over
      the pixels of a crop, the worst one's).

    Raises:
      RuntimeError: they are other pictures.
    """
    batches = pipeline.host_batches(index, plan, host_rows=np.arange(plan.batch_size), workers=1)
    batch = next(batches).batch
    batches.close()
    limits = {"whole": WHOLE_DIFFERENCE, "patch": PATCH_DIFFERENCE}
    found = {"whole": 0.0, "patch": 0.0, "cropped": 0.0}
    for place, row in enumerate(plan.rows[0]):
        picture = unpatchify(batch.patches[place], batch.grid[place], plan.patch_size)
        drawn = (column[row] for column in draws)
        expected = np.asarray(reference_loader.transformed(index.path(row), *drawn))
        if picture.shape != expected.shape:
            raise RuntimeError(f"{index.path(row)}: {picture.shape}, expected {expected.shape}")
        difference = picture.astype(float) - expected
        if (draws.rect[row, 2:] == (index.heights[row], index.widths[row])).all():
            here = {"whole": np.abs(difference).max()}
        else:
            means = patchify(difference, plan.patch_size).reshape(batch.grid[place].prod(), -1, 3)
            here = {"patch": np.abs(means.mean(axis=1)).max(), "cropped": np.abs(difference).mean()}
        found = {kind: max(value, float(here.get(kind, 0))) for kind, value in found.items()}
        for kind, limit in limits.items():
            if found[kind] > limit:
                raise RuntimeError(
                    f"{index.path(row)}: {found[kind]:.1f} grey levels from the reference's "
                    f"picture ({kind}), {limit} are allowed"
                )
    return {f"{kind}_difference": value for kind, value in found.items()}


def _cpu_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", default="", help="folder in COCO's layout")
    parser.add_argument("--annotations", default="annotations/instances_train2017.json")
    parser.add_argument("--images", default="train2017", help="folder of the pictures")
    parser.add_argument("--count", type=int, default=512, help="pictures, at most")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=isolated.available_cores())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    count, batch_size, rounds = arguments.count, arguments.batch_size, arguments.rounds
    if arguments.quick:
        count, batch_size, rounds = 12, 4, 1
    found = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = arguments.data or folder
        if not arguments.data:
            size = jpegs.write(Path(folder), count)
            print(f"{count} generated pictures of {size / count / 1000:.0f} kB")
        index = load_coco(root, arguments.annotations, arguments.images).subset(count)
        for recipe in RECIPES:
            found += measure(index, recipe, batch_size, arguments.workers, rounds)
    print(report.table(found, COLUMNS))
    report.write(arguments.out, "input", found, pictures=len(index))


if __name__ == "__main__":
    main()
