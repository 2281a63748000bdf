"""What was read of a split's annotations, kept as columns, so that a restart parses no JSON.

A file holds an Index, and the ground truth where that was asked for. It is taken only with the
fingerprint that it was written with; anything else about it is damage, and nobody's error: what it
holds can be read again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from yolos_jax.data import files, truth
from yolos_jax.data.index import Index
from yolos_jax.data.problems import Problem, Problems
from yolos_jax.labels import LabelMap

# What decides about the columns: a cache is not taken by code that would make others.
SOURCES = tuple(
    f"data/{name}.py"
    for name in ("cache", "clean", "coco", "image", "index", "problems", "sizes", "tfds", "truth")
) + ("labels.py",)


class Cached(NamedTuple):
    """What one file holds."""

    index: Index  # without a store
    ground_truth: dict[str, Any] | None


def path_of(folder: str | os.PathLike, annotations: str, options: Mapping[str, Any]) -> str:
    """The file of a dataset read with some options; other versions of its files overwrite it."""
    told = json.dumps([os.fspath(annotations), dict(options)], sort_keys=True)
    stem = os.fspath(annotations).replace("\\", "/").split("/")[-1].removesuffix(".json")
    return f"{os.fspath(folder)}/{stem}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npz"


def fingerprint(paths: Sequence[str], options: Mapping[str, Any]) -> str:
    """Differs when a file's size or time, an option or the code that reads them does.

    Args:
      paths: of all files that the columns come from; they may be missing.
      options: everything else.
    """
    told = [[path, files.state(path)] for path in paths], sorted(options.items())
    digest = hashlib.sha256(repr(told).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent.parent / name).read_bytes())
    return digest.hexdigest()


def write(
    path: str, mark: str, index: Index, ground_truth: Mapping[str, Any] | None = None
) -> None:
    """Writes a file under its name when it is whole. Raises OSError."""
    columns = {
        field.name: getattr(index, field.name)
        for field in dataclasses.fields(index)
        if isinstance(getattr(index, field.name), np.ndarray)
    }
    meta = {
        "fingerprint": mark,
        "root": index.root,
        "images_dir": index.images_dir,
        "annotations": index.annotations,
        "label_map": index.label_map.to_json(),
        "file": index.dropped.file,
        "counts": index.dropped.counts,
        "listed": {kind: [list(p) for p in ps] for kind, ps in index.dropped.listed.items()},
    }
    scored = {} if ground_truth is None else truth.pack(ground_truth)
    content = io.BytesIO()
    np.savez(
        content,
        meta=np.array(json.dumps(meta, default=str)),
        **columns,
        **{f"truth.{name}": column for name, column in scored.items()},
    )
    target = epath.Path(path)
    partial = epath.Path(f"{path}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.getbuffer())
        partial.replace(target)
    except BaseException as error:
        with contextlib.suppress(Exception):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) or not isinstance(error, Exception):
            raise
        raise OSError(files.reason(error)) from error


def read(path: str, mark: str) -> Cached | None:
    """Reads a file; None when there is none, or one of another fingerprint.

    Raises:
      ValueError: the file is damaged; one line.
    """
    try:
        content = files.read_bytes(path)
    except OSError:
        return None
    try:
        # Archives check what is read of them; pickles, which could run code, are refused.
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            meta = json.loads(str(stored["meta"]))
            if meta["fingerprint"] != mark:
                return None
            arrays = {name: stored[name] for name in stored.files if name != "meta"}
        scored = {n.removeprefix("truth."): a for n, a in arrays.items() if "." in n}
        columns = {name: array for name, array in arrays.items() if "." not in name}
        listed = {kind: [Problem(*p) for p in ps] for kind, ps in meta["listed"].items()}
        index = Index(
            root=meta["root"],
            images_dir=meta["images_dir"],
            annotations=meta["annotations"],
            label_map=LabelMap.from_json(meta["label_map"]),
            dropped=Problems(meta["file"], counts=meta["counts"], listed=listed),
            **columns,
        )
        return Cached(index, truth.unpack(scored) if scored else None)
    except Exception as error:
        raise ValueError(f"{path}: damaged ({files.reason(error)})") from error
