"""What ``benchmarks.gpu`` has measured, side by side; and whether both sides came to the same."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_checks import differences, of, pairs

GIB = 2**30

Row = dict[str, Any]
SPEED = {
    "model": "", "what": "", "our_images": "d", "our_rate": ".1f", "their_images": "d",
    "their_rate": ".1f", "ratio": ".2f", "our_mfu": ".1%", "their_mfu": ".1%",
    "our_programs": "d", "our_attention": "", "their_form": "",
}  # fmt: skip
MEMORY = {
    "model": "",
    "ours": "",
    "theirs": "",
    "our_GiB": ".3f",
    "their_GiB": ".3f",
    "ratio": ".2f",
}
PROGRAMS = {
    "model": "", "form": "", "images": "d", "step_ms": ".1f", "program_GiB": ".2f",
    "peak_GiB": ".2f", "residual_GiB": ".2f",
}  # fmt: skip

# Extremes of the repetitions beside their medians.
IDLE = {
    "model": "", "images": "d", "microbatches": "d", "step_ms": ".2f", "without_match_ms": ".2f",
    "idle": ".1%", "least": ".1%", "most": ".1%",
}  # fmt: skip


def summary(results: Sequence[Row]) -> tuple[list[tuple[str, list[Row], dict]], list[str]]:
    """Tables of what was measured.

    Args:
      results: rows of all processes, each with ``row``, ``side`` and ``model``.

    Returns:
      (title, rows, columns) of every table that has rows, and what was not the same on both sides.
    """
    tables = [
        ("Training step, images per second", speed(results, "train"), SPEED),
        ("Forward pass, images per second", speed(results, "forward"), SPEED),
        ("Memory of one more image in a training step", memory(results), MEMORY),
        ("One program or two", programs(results), PROGRAMS),
        ("The card waits for the match", of(results, "idle"), IDLE),
    ]
    return [table for table in tables if table[1]], differences(results)


def speed(results: Sequence[Row], row: str) -> list[Row]:
    """Rates of both sides, and ours over theirs."""
    rows = []
    for ours, theirs in pairs(results, row):
        rate, other = ours.get("images_per_s"), theirs.get("images_per_s")
        mfu = ours.get("mfu")
        ratio = rate / other if rate and other else None
        rows.append(
            {
                "model": (theirs or ours)["model"],
                "what": (theirs or ours)["what"],
                "our_images": ours.get("images"),
                "our_rate": rate,
                "their_images": theirs.get("images"),
                "their_rate": other,
                "ratio": ratio,
                "our_mfu": mfu,
                # The same arithmetic per picture on both sides.
                "their_mfu": mfu / ratio if mfu and ratio else None,
                "our_programs": ours.get("programs"),  # buckets: fewer than the recipe's
                "our_attention": ours.get("attention"),
                "their_form": theirs.get("form"),
            }
        )
    return rows


def memory(results: Sequence[Row]) -> list[Row]:
    """Bytes per image of what is compared: the same recomputation, and our default with none."""
    ours, theirs = (_per_image(of(results, "memory", side)) for side in ("ours", "theirs"))
    rows = []
    for model in sorted({model for model, _ in [*ours, *theirs]}):
        for mine, other in (("none", "none"), ("full", "full"), ("default", "none")):
            a, b = ours.get((model, mine)), theirs.get((model, other))
            rows.append(
                {
                    "model": model,
                    "ours": mine,
                    "theirs": other,
                    "our_GiB": None if a is None else a / GIB,
                    "their_GiB": None if b is None else b / GIB,
                    "ratio": a / b if a and b else None,
                }
            )
    return rows


def programs(results: Sequence[Row]) -> list[Row]:
    """The forms of a step, in GiB."""
    rows = []
    for each in of(results, "programs"):
        gib = {
            f"{name}_GiB": None if each.get(f"{name}_MiB") is None else each[f"{name}_MiB"] / 1024
            for name in ("program", "peak", "residual")
        }
        rows.append({**each, **gib})
    return sorted(rows, key=lambda row: row["model"])


def device_name(device: str) -> str:
    """What the card calls itself, or the processor's name."""
    if device == "cuda" and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return device


def _per_image(measured: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Bytes that one more image takes, by model and recomputation."""
    peaks: dict[tuple[str, str], dict[int, int]] = {}
    for each in measured:
        peak = each["peak_bytes"] or each.get("program_bytes")
        if peak is not None:
            peaks.setdefault((each["model"], each["remat"]), {})[each["images"]] = peak
    return {
        key: (by_images[max(by_images)] - by_images[min(by_images)])
        / (max(by_images) - min(by_images))
        for key, by_images in peaks.items()
        if len(by_images) > 1
    }
