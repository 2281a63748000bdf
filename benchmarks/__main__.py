"""Runs the benchmarks that this machine can run, each in a process of its own.

    python -m benchmarks --out results          all of them, JSON files in a folder
    python -m benchmarks forward gpu --quick    these two, at small sizes
    python -m benchmarks --list                 which there are, and what they need

Ends with a summary: what ran, what was left out and why, what failed. The exit code is not 0 when
something failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Benchmark(NamedTuple):
    """One script."""

    rows: str  # of the table in docs/benchmarks.md that it fills
    question: str
    libraries: tuple[str, ...] = ()  # beside those that training needs everywhere
    device: str = ""  # 'gpu': needs one
    quick: tuple[str, ...] = ("--quick",)  # flags that make it small


TORCH = ("torch", "transformers")
BENCHMARKS = {
    "padding": Benchmark("1", "tokens wasted by padding", quick=("--images", "2000")),
    "planning": Benchmark(
        "2", "seconds to plan an epoch", quick=("--images", "2000", "--boxes", "14000")
    ),
    "input": Benchmark("3", "pictures from files to batches", ("tensorflow", "torch")),
    "matching": Benchmark("4", "from costs to assignment"),
    "forward": Benchmark("5", "forward pass on the CPU against transformers", TORCH),
    "train_step": Benchmark("6", "training step on the CPU against transformers", TORCH),
    "compile_time": Benchmark("7", "seconds to compile, and to restart"),
    "host_time": Benchmark("8", "what the host does in a step"),
    "gpu": Benchmark("9, 10, 11, 14", "everything that needs a card", TORCH, "gpu"),
    "end_to_end": Benchmark("12", "a run beside its bare steps", ("tensorflow", "pycocotools")),
    "tpu_memory": Benchmark("13", "memory on TPU, compiled without one", ("libtpu",)),
    "tpu_attention": Benchmark("", "what a TPU's attention kernels cost by block", ("libtpu",)),
    "tpu_cycles": Benchmark("", "where a TPU's time goes beside attention", ("libtpu",)),
    "gpu_kernels": Benchmark("", "what a GPU's kernels move, without one", ("jax_cuda13_plugin",)),
    "scale": Benchmark("", "training on TPU slices, compiled without one", ("libtpu",)),
    "two_programs": Benchmark("14", "one program or two"),
}


def obstacle(name: str) -> str:
    """Why this machine cannot run a benchmark; '' when it can."""
    benchmark = BENCHMARKS[name]
    if not (ROOT / "benchmarks" / f"{name}.py").exists():
        return f"there is no benchmarks/{name}.py"
    missing = [each for each in benchmark.libraries if importlib.util.find_spec(each) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if benchmark.device == "gpu" and not _has_gpu():
        return "no GPU (nvidia-smi finds none)"
    return ""


def _has_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return found.returncode == 0 and bool(found.stdout.strip())


def describe() -> str:
    """A line per benchmark: its rows of the table, its question, and what stands in its way."""
    lines = []
    for name, benchmark in BENCHMARKS.items():
        reason = obstacle(name)
        state = f"cannot run here: {reason}" if reason else "can run here"
        lines.append(f"{name:13s} row {benchmark.rows:14s} {benchmark.question:48s} {state}")
    return "\n".join(lines)


def run(names: Sequence[str], out: str, quick: bool) -> int:
    """Runs benchmarks one after the other and prints a summary.

    Args:
      names: of benchmarks.
      out: folder for their JSON files; '': none.
      quick: at small sizes.

    Returns:
      How many failed.
    """
    summary = []
    for name in names:
        reason = obstacle(name)
        # What needs a card runs at small sizes without one.
        extra = ["--device", "cpu"] if quick and reason.startswith("no GPU") else []
        if reason and not extra:
            summary.append({"benchmark": name, "result": f"left out: {reason}", "seconds": 0})
            continue
        command = [sys.executable, "-m", f"benchmarks.{name}", *extra]
        command += BENCHMARKS[name].quick if quick else ()
        command += ["--out", str(Path(out).resolve() / f"{name}.json")] if out else ()
        print(f"\n== {name}: {BENCHMARKS[name].question} ==", flush=True)
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        result = "ran" if code == 0 else f"failed with exit code {code}"
        seconds = round(time.monotonic() - started, 1)
        summary.append({"benchmark": name, "result": result, "seconds": seconds})
    print("\n== summary ==")
    for line in summary:
        print(f"{line['benchmark']:13s} {line['seconds']:7.1f} s  {line['result']}")
    if out:
        (Path(out) / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return sum(line["result"].startswith("failed") for line in summary)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", default="", help="folder for JSON files, made when missing")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that they run")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if arguments.list:
        print(describe())
        return
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
    if run(arguments.names or list(BENCHMARKS), arguments.out, arguments.quick):
        sys.exit(1)


if __name__ == "__main__":
    main()
