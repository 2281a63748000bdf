"""Which processes ``benchmarks.gpu`` runs, and in which order: what is cut is worth least."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

GRIDS = {"ti": (32, 53), "s": (50, 83), "b": (50, 83)}  # 512 and 800 pixels, in patches
IMAGES = "ti=384,s=96,b=48"  # of a training step; of the mix half of that
FORWARD = (1, 8, 32)  # batches of pictures of one size
FORWARD_MIX = 32  # pictures of a batch of the mix

# What --rows chooses from, and the row of the results that it gives.
PARTS = {
    "train": "train",  # one size; ours with the wait for the match and the two programs' bytes
    "forward": "forward",
    "mix": "train",
    "memory": "memory",
    "programs": "programs",
    "idle": "idle",
    "forward_mix": "forward",
}
# The most telling first. The same on both sides, so that no half of a comparison is cut alone.
ORDER = (
    ("train", "s"), ("train", "b"), ("forward", "s"), ("forward", "b"), ("mix", "s"),
    ("memory", "s"), ("programs", "s"), ("memory", "b"), ("programs", "b"),
    ("idle", "s"), ("mix", "b"), ("forward_mix", "s"), ("forward_mix", "b"),
    ("train", "ti"), ("mix", "ti"), ("programs", "ti"),
)  # fmt: skip
FUNCTIONS = {
    "programs": "two_programs:measure",
    "mix": "gpu_mix_{side}:train",
    "forward_mix": "gpu_mix_{side}:forward",
}


class Case(NamedTuple):
    """One process."""

    part: str  # a key of PARTS
    side: str  # 'ours' or 'theirs'
    model: str
    target: str  # module:function
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """What to call it in messages."""
        shown = ("remat", "checkpointing", "form", "microbatches")
        detail = [f"{key}={self.arguments[key]}" for key in shown if key in self.arguments]
        return " ".join([self.part, self.side, self.model, *detail])

    @property
    def labels(self) -> dict[str, str]:
        """What its rows are called, unless they say otherwise."""
        return {"row": PARTS[self.part], "side": self.side, "model": self.model}


def cases(options: argparse.Namespace, lock: str) -> list[Case]:
    """All that is asked for, the most telling first."""
    rows, models, sides = (
        text.split(",") for text in (options.rows, options.models, options.sides)
    )
    torch = {"compiled": not options.eager, "device": options.device}
    found = []
    for part, model in ORDER:
        if part not in rows or model not in models:
            continue
        for side in sides:
            for arguments in _variants(part, side, model, options):
                order = {"model": model, **arguments, "tiny": options.quick, "lock": lock}
                order |= torch if side == "theirs" else {}
                function = FUNCTIONS.get(part, "gpu_{side}:" + part).format(side=side)
                found.append(Case(part, side, model, f"benchmarks.{function}", order))
    return found


def _variants(
    part: str, side: str, model: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Arguments of each process of a part, but for those that all have."""
    tiny, seconds = options.quick, options.seconds
    grid = (4, 6) if tiny else GRIDS[model]
    images = 4 if tiny else options.images[model]
    # With the training step of one size these come out of its process.
    alone = "train" not in options.rows.split(",")
    if part == "train":
        steps = {"steps": 2 if tiny else 5} if side == "ours" else {}
        return [{"grid": grid, "images": images, "seconds": seconds, **steps}]
    if part == "mix":
        return [{"images": max(images // 2, 1), "seconds": seconds}]
    if part == "forward":
        return [{"grid": grid, "batches": (1, 2) if tiny else FORWARD, "seconds": seconds}]
    if part == "forward_mix":
        return [{"images": 2 if tiny else FORWARD_MIX, "seconds": seconds}]
    if part == "memory":
        key, values = {
            "ours": ("remat", ("none", "default", "full")),
            "theirs": ("checkpointing", (False, True)),
        }[side]
        sized = {"grid": grid, "batches": (1, 2) if tiny else (4, 8)}
        return [{**sized, key: value} for value in values]
    if side == "theirs":
        return []
    if part == "idle":
        sized = {"grid": grid, "images": images, "steps": 2 if tiny else 5}
        return [{**sized, "microbatches": count} for count in ((1, 2) if alone else (2,))]
    sized = {"rows": grid[0], "cols": grid[1], "images": images, "seconds": seconds}
    forms = ("host", "device", "one") if alone else ("device", "one")
    return [{**sized, "form": form, "dtype": "bfloat16", "multiple": 128} for form in forms]
