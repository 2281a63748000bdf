"""What all processes of a run must have in common, compared before anything is compiled."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# What may differ from host to host: who it is, and where and how fast it reads the same data.
OF_ONE_PROCESS = (
    "data.cache_dir",
    "data.root",
    "data.tfds_dir",
    "data.workers",
    "mesh.coordinator",
    "mesh.distributed",
    "mesh.process_id",
    "mesh.wait_seconds",
)
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
# Of jax, set by the environment or a user's own start: they change numbers, not shapes, and nothing
# else would notice.
JAX_SETTINGS = (
    "jax_allow_f16_reductions",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_custom_prng",
    "jax_enable_x64",
    "jax_high_dynamic_range_gumbel",
    "jax_numpy_dtype_promotion",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
)
SEEN_WITHIN = 20  # seconds: network folders show others' files late
SHOWN = 20  # differences, or processes, named in one message


def facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what this process is about to run, flat and JSON.

    Args:
      settings: its configuration, nested or with dotted keys.
    """
    found = {key: value for key, value in _flat(settings).items() if key not in OF_ONE_PROCESS}
    found |= {f"version of {name}": _version(name) for name in LIBRARIES}
    found |= {name: getattr(jax.config, name, None) for name in JAX_SETTINGS}
    found["version of python"] = ".".join(platform.python_version_tuple()[:2])
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        name = f"code of {package.name}/{path.relative_to(package).as_posix()}"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def differences(of_processes: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns what processes have not in common, or None.

    Args:
      of_processes: facts of each, in the order of their numbers.
    """
    keys = sorted({key for found in of_processes for key in found})
    lines = []
    for key in keys:
        holders: dict[str, list[int]] = {}
        for number, found in enumerate(of_processes):
            value = repr(found[key]) if key in found else "(no such key)"
            holders.setdefault(value, []).append(number)
        if len(holders) > 1:
            sides = [f"{value} on {_processes(numbers)}" for value, numbers in holders.items()]
            lines.append(f"{key}: {', '.join(sides)}")
    if not lines:
        return None
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    return "the processes of this run are not about to run the same:\n  " + "\n  ".join(lines)


class Token:
    """A file that process 0 leaves in the work directory for the others to find."""

    def __init__(self, folder: Path):
        """Writes it, making the folder where it is missing."""
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.path = folder / f".meeting-{uuid.uuid4().hex}"
        self.problem = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text(socket.gethostname(), encoding="utf-8")
        except OSError as error:
            self.problem = f"process 0 cannot write to the work directory: {error}"

    def remove(self) -> None:
        """A run that is refused leaves no folder behind."""
        try:
            self.path.unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()
        except OSError:
            pass  # Somebody uses it already.


def look_for(folder: Path, name: str) -> str:
    """Looks for process 0's token; returns '' or what is there instead."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            there = "has other files" if folder.exists() else "does not exist"
            return f"{folder} on {socket.gethostname()} {there}"
        time.sleep(0.2)
    return ""


def judge_folder(folder: Path, unseen: Iterable[str]) -> str | None:
    """Returns what is wrong with a work directory, given what ``look_for`` found everywhere."""
    unseen = [(number, found) for number, found in enumerate(unseen) if found]
    if not unseen:
        return None
    lines = [f"process {number}: {found}" for number, found in unseen[:SHOWN]]
    return (
        f"the work directory must be one that all hosts share: process 0 wrote a file to {folder} "
        f"on {socket.gethostname()}, and {len(unseen)} of the other processes did not find it:\n  "
        + "\n  ".join(lines)
    )


def check_devices() -> None:
    """Refuses processes with unequal numbers of devices: each reads an equal part of a batch.

    Call it before anything that the processes do together. They know each other's devices.

    Raises:
      ValueError: naming which process has how many.
    """
    owners = [device.process_index for device in jax.devices()]
    problem = differences([{"devices": owners.count(i)} for i in range(jax.process_count())])
    if problem:
        raise ValueError(f"{problem}\n(each must have as many, for its equal part of a batch)")


def check_data(described: Mapping[str, str]) -> None:
    """Compares the data that every process has read, and raises the same error on all.

    Args:
      described: what must be the same, such as fingerprints, by name; the same names everywhere.

    Raises:
      ValueError: naming what differs, with both sides.
    """
    if jax.process_count() == 1:
        return
    names = sorted(described)
    hashes = [hashlib.sha256(described[name].encode()).digest()[:8] for name in names]
    gathered = multihost_utils.process_allgather(np.frombuffer(b"".join(hashes), np.uint8))
    per_process = gathered.reshape(jax.process_count(), len(names), 8)
    found = [
        {name: bytes(row).hex() for name, row in zip(names, rows, strict=True)}
        for rows in per_process
    ]
    problem = differences(found)
    if problem:
        raise ValueError(f"{problem}\n(fingerprints of what each process has read)")


def check_checkpoint(source: str, params: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Compares a checkpoint that every process has read for itself; one on its own does nothing.

    Args:
      source: what to call it.
      params: nested dict of numpy arrays, whole on every process.
      metadata: what the checkpoint says about itself.

    Raises:
      ValueError: parameters, or what they are of, differ.
    """
    if jax.process_count() == 1:
        return
    what = {key: metadata.get(key) for key in ("model", "preprocess", "label_map")}
    check_data(
        {
            f"model and classes in {source}": json.dumps(what, sort_keys=True),
            f"parameters in {source}": fingerprint(params),
        }
    )


def fingerprint(params: Mapping[str, Any]) -> str:
    """Returns a hash of names, types, shapes and bytes of a tree of numpy arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)};".encode())
        digest.update(array.reshape(-1).view(np.uint8))  # bfloat16 has no buffer of its own
    return digest.hexdigest()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processes(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:SHOWN])
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}"
