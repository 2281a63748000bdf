"""Everything that needs a card, against PyTorch, in two commands of less than seven minutes.

    python -m benchmarks.gpu --rows train,forward,mix --cache c --out first.json
    python -m benchmarks.gpu --rows memory,programs,idle,forward_mix --cache c --out second.json
    python -m benchmarks.gpu --device cpu --quick      the same code at small sizes

Forward pass and training step at one size and over a COCO-like mix, memory, one program against
two, and how long the card waits for the match. Each measurement is a process of its own; some
compile side by side, one at a time runs (``turns``). Both sides get the same weights, pictures and
objects, and must come to the same losses, gradients and boxes. Needs jax, flax, optax, numpy,
scipy, torch, transformers and ml_collections, and no dataset. The most telling comes first; the
results are written after every measurement, and what there was no time for is named.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import gpu_cases, gpu_tables, report
from benchmarks.gpu_runner import Runner


def read_options() -> argparse.Namespace:
    """The command line's flags."""
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=_some(gpu_cases.PARTS), default=",".join(gpu_cases.PARTS))
    parser.add_argument("--models", type=_some(gpu_cases.GRIDS), default="s,b,ti")
    parser.add_argument("--sides", type=_some(("ours", "theirs")), default="ours,theirs")
    parser.add_argument(
        "--images",
        type=_images,
        default=gpu_cases.IMAGES,
        help="of a training step; fewer if too many",
    )
    parser.add_argument("--budget", type=float, default=380, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=2, help="that each program is timed for")
    parser.add_argument(
        "--lanes", type=int, default=2, help="processes of each side at once; all compile, one runs"
    )
    parser.add_argument(
        "--cache", default="", help="folder of compiled programs, kept; none: empty"
    )
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.1
    return options


def _some(known: object) -> object:
    """A type of flags: names with commas between, all of them known."""

    def check(text: str) -> str:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: there are {', '.join(known)}")
        return text

    return check


def _images(text: str) -> dict[str, int]:
    """'ti=256,s=64' as a dictionary; what it does not name is as IMAGES says."""
    known = dict(pair.split("=") for pair in gpu_cases.IMAGES.split(","))
    given = dict(pair.split("=") for pair in text.split(","))
    if not given.keys() <= known.keys():
        raise argparse.ArgumentTypeError(f"{text}: models are {', '.join(known)}")
    return {model: int(count) for model, count in (known | given).items()}


@contextlib.contextmanager
def _folder(path: str) -> Iterator[Path]:
    """The folder of compiled programs, made when missing; one for this run when there is none."""
    if not path:
        with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as name:
            yield Path(name)
        return
    Path(path).mkdir(parents=True, exist_ok=True)
    yield Path(path).resolve()


def write(device: str, runner: Runner) -> None:
    """Writes all that is known until now."""
    tables, failures = gpu_tables.summary(runner.results)
    report.write(
        runner.options.out,
        "gpu",
        [{"table": title, **row} for title, rows, _ in tables for row in rows],
        measurements=runner.results,
        wrong=[*failures, *runner.failures],
        left_out=runner.left_out,
        device=device,
        options={key: value for key, value in vars(runner.options).items() if key != "out"},
    )


def main() -> None:
    options = read_options()
    started = time.monotonic()
    device = gpu_tables.device_name(options.device)
    with tempfile.TemporaryDirectory(prefix="benchmark-lock-") as folder:
        lock = str(Path(folder) / "lock")
        pending = gpu_cases.cases(options, lock)
        with _folder(options.cache) as cache:
            runner = Runner(options, str(cache), functools.partial(write, device))
            runner.stop_on_signals()
            runner.prepare(sorted({case.side for case in pending}))
            if not runner.failures:
                runner.run(pending)
    tables, failures = gpu_tables.summary(runner.results)
    for title, rows, columns in tables:
        print(f"\n{title}\n{report.table(rows, columns)}")
    for line in runner.left_out:
        print(f"\nleft out: {line}")
    failures += runner.failures
    for line in failures:
        print(f"\nwrong: {line}")
    print(f"\n{time.monotonic() - started:.0f} s; device: {device}")
    write(device, runner)
    if runner.stopped:
        raise SystemExit(128 + runner.stopped)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
