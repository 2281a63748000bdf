"""How pictures are divided into the shards of a packed folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from yolos_jax.data import shards


class Part(NamedTuple):
    """One shard to be: its file, and the pictures that belong into it with their bytes."""

    path: Path
    pictures: list[list]  # [file name, bytes; -1 when it is missing]
    written: list[int]  # when each file was, nanoseconds; -1 when it is missing


def divide(
    target: Path,
    names: Sequence[str],
    states: Sequence[tuple[int, int] | None],
    shard_bytes: int,
    count: int,
) -> list[Part]:
    """Neighbours of the annotation file into shards of about equal size.

    Args:
      target: the folder of the shards.
      names: of the pictures.
      states: their bytes and times, as ``files.state`` has them; None for a missing one.
      shard_bytes: about how large a shard is to be.
      count: how many there are to be; 0: as shard_bytes says.

    Raises:
      ValueError: all pictures are missing.
    """
    pictures = [(name, *(state or (-1, -1))) for name, state in zip(names, states, strict=True)]
    total = sum(max(size, 0) for _, size, _ in pictures)
    if not total:
        raise ValueError(f"none of the {len(pictures)} pictures for {target} is there")
    count = min(count or -(-total // shard_bytes), len(pictures))
    groups: list[list] = [[] for _ in range(count)]
    before = 0
    for picture in pictures:
        groups[min(before * count // total, count - 1)].append(picture)
        before += max(picture[1], 0)
    filled: list[list] = []
    for group in groups:
        if any(size >= 0 for _, size, _ in group):
            filled.append(group)
        elif filled:  # none, or only missing ones
            filled[-1] += group
    return [
        Part(
            target / f"pictures-{k:05d}-of-{len(filled):05d}{shards.SUFFIX}",
            [[name, size] for name, size, _ in group],
            [time for _, _, time in group],
        )
        for k, group in enumerate(filled)
    ]
