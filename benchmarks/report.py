"""What every benchmark does alike: flags, a table, and JSON that names the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = ("jax", "flax", "optax", "numpy", "scipy", "torch", "transformers", "tensorflow")


def parser(doc: str) -> argparse.ArgumentParser:
    """Flags that every benchmark has; ``doc`` is the module's."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", default="", help="JSON file to write")
    found.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, measures nothing"
    )
    return found


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as text.

    Args:
      rows: one per line; what a row lacks, or is None, is shown as '-'.
      columns: key of a row -> how to format it (``'.1%'``, ``'.2f'``, '' for text). Headings are
        the keys with spaces for underscores.

    Returns:
      A line of headings and one per row; text to the left, numbers to the right.
    """
    lines = [[key.replace("_", " ") for key in columns]]
    for row in rows:
        values = [(row.get(key), form) for key, form in columns.items()]
        lines.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [
        [
            text.rjust(width) if form else text.ljust(width)
            for text, width, form in zip(line, widths, columns.values(), strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def write(path: str, benchmark: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Writes rows and machine as JSON; nothing where the path is empty.

    Args:
      path: of the file, whose folder is made when missing.
      benchmark: its name.
      rows: of plain values.
      more: what else there is to say of the run.

    Raises:
      OSError: naming the file, when it cannot be written.
    """
    if not path:
        return
    content = {"benchmark": benchmark, "machine": machine(), **more, "rows": list(rows)}
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # First beside it: whoever is ended meanwhile leaves what was there before.
        beside = file.with_name(f"{file.name}.new")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise OSError(f"--out={path}: cannot be written: {error}") from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
