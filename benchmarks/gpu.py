"""Everything that needs a card, against PyTorch, in one command of eight minutes.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --device cpu --quick      the same code at small sizes

Forward pass and training step at one size and over a COCO-like mix, memory, one program against
two, and how long the card waits for the match. Each measurement is a process of its own; some
compile side by side, one at a time is timed (``turns``). Both sides get the same weights, pictures
and objects, and must come to the same losses and boxes. Needs jax, flax, optax, numpy, scipy,
torch, transformers and ml_collections, and no dataset. What there was no time for is named;
--rows and --models choose.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_tables, isolated, report

GRIDS = {"ti": (32, 53), "s": (50, 83), "b": (50, 83)}  # 512 and 800 pixels, in patches
IMAGES = "ti=256,s=64,b=32"  # of a training step; of the mix half of that
FORWARD = {"batches": (1, 8, 32), "mixed": 32}
FEW = 60  # seconds; with less left nothing is begun


class Case(NamedTuple):
    """One process."""

    row: str  # of the table: 'forward', 'train', 'memory', 'programs', 'idle'
    side: str  # 'ours' or 'theirs'
    model: str
    target: str  # module:function
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """What to call it in messages."""
        shown = ("mixed", "remat", "checkpointing", "form")
        detail = [f"{key}={self.arguments[key]}" for key in shown if key in self.arguments]
        return " ".join([self.row, self.side, self.model, *detail])


def cases(options: argparse.Namespace, lock: str) -> list[Case]:
    """All that is asked for, the most telling first."""
    tiny, device = options.quick, options.device
    common = {"tiny": tiny, "lock": lock}
    torch = {"compiled": not options.eager, "device": device}
    sizes = {model: 4 for model in GRIDS} if tiny else options.images
    found = []

    def add(row: str, side: str, model: str, **arguments: Any) -> None:
        function = {"programs": "two_programs:measure"}.get(row, f"gpu_{side}:{row}")
        extra = torch if side == "theirs" else {}
        order = {**arguments, **extra, **common}
        found.append(Case(row, side, model, f"benchmarks.{function}", {"model": model, **order}))

    for mixed in (False, True):
        for model in ("s", "b", "ti"):
            images = sizes[model] // (2 if mixed else 1)
            sized = {"grid": _grid(model, tiny), "images": images, "mixed": mixed}
            for side in ("ours", "theirs"):
                add("train", side, model, **sized, seconds=options.seconds)
    for model in ("s", "b"):
        forward = {"batches": (1, 2), "mixed": 2} if tiny else FORWARD
        sized = {"grid": _grid(model, tiny), **forward, "seconds": options.seconds}
        for side in ("ours", "theirs"):
            add("forward", side, model, **sized)
        memory = {"grid": _grid(model, tiny), "batches": (1, 2) if tiny else (4, 8)}
        for remat in ("none", "default", "full"):
            add("memory", "ours", model, **memory, remat=remat)
        for checkpointing in (False, True):
            add("memory", "theirs", model, **memory, checkpointing=checkpointing)
    add("idle", "ours", "s", grid=_grid("s", tiny), images=sizes["s"], steps=5)
    for model in ("s", "b", "ti"):
        rows, cols = _grid(model, tiny)
        sized = {"rows": rows, "cols": cols, "images": sizes[model], "seconds": options.seconds}
        for form in ("host", "device", "one"):
            add("programs", "ours", model, **sized, form=form, dtype="bfloat16", multiple=128)
    chosen = options.rows.split(","), options.models.split(",")
    return [case for case in found if case.row in chosen[0] and case.model in chosen[1]]


class Runner:
    """Runs cases in lanes, side by side, until they are done or the time is."""

    def __init__(self, options: argparse.Namespace, cache: str) -> None:
        self.options, self.cache = options, cache
        self.deadline = time.monotonic() + options.budget
        self.results: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._guard = threading.Lock()

    def run(self, pending: list[Case]) -> None:
        """Runs everything; ours and theirs have lanes of their own."""
        lanes = []
        for side in ("ours", "theirs"):
            queue = [case for case in pending if case.side == side]
            for _ in range(self.options.lanes):
                lanes.append(threading.Thread(target=self._lane, args=(queue,)))
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    def _lane(self, queue: list[Case]) -> None:
        while True:
            with self._guard:
                if not queue:
                    return
                case = queue.pop(0)
            remaining = self.deadline - time.monotonic()
            if remaining < min(FEW, self.options.budget / 4):
                with self._guard:
                    self.left_out.append(f"{case.name}: no time left")
                continue
            started = time.monotonic()
            job = isolated.Job(case.target, case.arguments, environment=self._environment(case))
            rows, error = job.result(timeout=remaining)
            with self._guard:
                print(f"{case.name}: {time.monotonic() - started:.0f} s", flush=True)
                of_case = {"row": case.row, "side": case.side, "model": case.model}
                mixed = {"mixed": case.arguments["mixed"]} if case.row == "train" else {}
                self.results += [{**row, **of_case, **mixed} for row in rows]
                if error:
                    self.left_out.append(f"{case.name}: {error}")

    def _environment(self, case: Case) -> dict[str, str]:
        on_card = case.side == "ours" and self.options.device == "cuda"
        platforms = "cuda" if on_card else "cpu"
        return {
            "JAX_PLATFORMS": platforms,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": self.cache,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }


def _grid(model: str, tiny: bool) -> tuple[int, int]:
    return (4, 6) if tiny else GRIDS[model]


def _images(text: str) -> dict[str, int]:
    """'ti=256,s=64' as a dictionary; what it does not name is as IMAGES says."""
    known = dict(pair.split("=") for pair in IMAGES.split(","))
    given = dict(pair.split("=") for pair in text.split(","))
    if not given.keys() <= known.keys():
        raise argparse.ArgumentTypeError(f"{text}: models are {', '.join(known)}")
    return {model: int(count) for model, count in (known | given).items()}


def read_options() -> argparse.Namespace:
    """The command line's flags."""
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", default="train,forward,memory,programs,idle")
    parser.add_argument("--models", default="ti,s,b")
    parser.add_argument(
        "--images", type=_images, default=IMAGES, help="of a training step; halved if too many"
    )
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=2, help="that each program is timed for")
    parser.add_argument(
        "--lanes", type=int, default=2, help="processes of each side at once; all compile, one runs"
    )
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.1
    return options


def main() -> None:
    options = read_options()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        lock = Path(folder) / "lock"
        lock.touch()
        cache = os.path.join(folder, "cache")
        runner = Runner(options, cache)
        runner.run(cases(options, str(lock)))
    tables, failures = gpu_tables.summary(runner.results)
    for title, rows, columns in tables:
        print(f"\n{title}\n{report.table(rows, columns)}")
    for line in [*failures, *runner.left_out]:
        print(f"\nleft out or wrong: {line}")
    print(f"\n{time.monotonic() - started:.0f} s; device: {gpu_tables.device_name(options.device)}")
    report.write(
        options.out,
        "gpu",
        [{"table": title, **row} for title, rows, _ in tables for row in rows],
        measurements=runner.results,
        left_out=[*failures, *runner.left_out],
        device=gpu_tables.device_name(options.device),
    )
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
