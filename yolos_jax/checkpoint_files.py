"""What a step folder of a checkpoint holds, seen without a manager: metadata, hashes, entries."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from yolos_jax.data.files import path_of

ARRAYS = ("params", "optimizer", "ema")  # items of arrays; the last only with an average
OPTIMIZER = "optimizer"  # which nobody needs to predict
SUMS = "SHA256SUMS"  # relative paths, as ``sha256sum -c`` reads them
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names that orbax writes under
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")  # by orbax, after the hashes


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns an absolute path, as orbax demands; gs:// paths are absolute already.

    Raises:
      ValueError: a path of a file system that nobody knows.
    """
    text = os.fspath(path)
    return path_of(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps whose folders are here, in order; half-written ones have other names."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def unfinished(folder: epath.Path) -> list[str]:
    """Returns the names of what orbax had not finished to write here when its process ended."""
    return sorted(path.name for path in folder.iterdir() if _UNFINISHED in path.name)


class AP(NamedTuple):
    """What an evaluation of a step found, and on what."""

    value: float
    evaluated_on: str  # Data.validation_set; "": not known, as in checkpoints that do not say


def ap_of(metadata: Mapping[str, Any]) -> AP | None:
    """Returns the AP that a step's metadata states; None where it was not evaluated."""
    value = metadata.get("ap")
    return None if value is None else AP(value, metadata.get("evaluated_on", ""))


def best(ap: Mapping[int, AP | None], count: int) -> list[int]:
    """Returns the steps of the highest AP, best first, the later one first among equals.

    Only those evaluated on the validation set of the newest evaluated one, or on one that is not
    known: an AP on another set says nothing about which is better.
    """
    known = {step: found for step, found in ap.items() if found is not None}
    newest = known[max(known)].evaluated_on if known else ""
    if newest:
        known = {s: found for s, found in known.items() if found.evaluated_on in ("", newest)}
    return sorted(known, key=lambda step: (known[step].value, step), reverse=True)[:count]


def read_metadata(folder: epath.Path) -> dict:
    """Returns the metadata of a step folder.

    Raises:
      ValueError: if it cannot be read.
    """
    path = folder / "metadata" / "metadata"
    try:
        metadata = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read the checkpoint's metadata: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(metadata).__name__}")
    return metadata | read_late_evaluation(folder)


def late_evaluation(folder: epath.Path) -> epath.Path:
    """Where an evaluation stands that was made after its step was saved."""
    return folder.parent / f"{folder.name}.evaluated.json"


def write_late_evaluation(folder: epath.Path, metadata: Mapping[str, Any]) -> None:
    """Writes metadata that replaces what the step folder itself says."""
    path = late_evaluation(folder)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(metadata))
    unfinished.replace(path)


def read_late_evaluation(folder: epath.Path) -> dict:
    """Returns the metadata that it replaces; nothing where there is none, or none to be read."""
    try:
        late = json.loads(late_evaluation(folder).read_text())
        return late if isinstance(late, dict) else {}
    except (OSError, ValueError):
        return {}  # The step itself is as good as before: it is evaluated once more.


def unreadable_late_evaluations(directory: epath.Path) -> list[str]:
    """Returns the names of late evaluations that are there and hold nothing that can be read."""
    names = {f"{step}": late_evaluation(directory / str(step)) for step in steps(directory)}
    return [
        path.name
        for step, path in names.items()
        if path.exists() and not read_late_evaluation(directory / step)
    ]


def drop_late_evaluations(directory: epath.Path, kept: Sequence[int]) -> None:
    """Removes the evaluations of steps that are no longer there."""
    names = {late_evaluation(directory / str(step)).name for step in kept}
    for path in directory.glob(late_evaluation(directory / "*").name):
        if path.name not in names:
            path.unlink(missing_ok=True)


def read_ap(folder: epath.Path) -> AP | None:
    """Returns the AP that a step's metadata states; None where there is none to be read."""
    try:
        return ap_of(read_metadata(folder))
    except ValueError:
        return None  # The step is damaged, which is said when it is wanted.


def write_sums(folder: epath.Path) -> None:
    """Writes the hashes of a step's files beside them."""
    names = _files(folder, "")
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / SUMS).write_text("".join(lines))


def damage(folder: epath.Path, dispensable: str = "") -> str | None:
    """Compares a step's files with their hashes.

    Args:
      folder: of the step.
      dispensable: item that may be missing as a whole; all or nothing of it.

    Returns:
      One line that names the first file in disorder and what is wrong; None if all is well.
    """
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"{folder / SUMS}: cannot be read: {error}"
    named = set()
    for line in lines:
        expected, gap, name = line.partition("  ")
        if not gap or len(expected) != 64:
            return f"{folder / SUMS}: not a list of SHA-256 hashes"
        if name.startswith(f"{dispensable}/") and not (folder / dispensable).exists():
            continue
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{folder / name}: cannot be read: {error}"
        if found != expected:
            return f"{folder / name}: its bytes are not those written (SHA-256 differs)"
        named.add(name)
    if not named:
        return f"{folder / SUMS}: names no file"
    unnamed = sorted(set(_files(folder, "")) - named)
    return f"{folder / SUMS}: has no hash of {unnamed[0]}" if unnamed else None


def find_damage(
    directory: epath.Path, steps: Sequence[int], ap: Mapping[int, AP | None], keep_best: int
) -> dict[int, str]:
    """Looks for damage in the newest steps until one is whole, and in the best ones likewise.

    Args:
      directory: of the steps.
      steps: there.
      ap: of each, where it is known.
      keep_best: so many best ones are wanted whole.

    Returns:
      What ``damage`` says of the damaged ones.

    Raises:
      ValueError: no run can go on from the newest, though it is whole to whoever predicts.
    """
    found: dict[int, str | None] = {}

    def whole(step: int) -> bool:
        if step not in found:
            found[step] = damage(directory / str(step), OPTIMIZER)
        return found[step] is None

    for step in sorted(steps, reverse=True):
        if whole(step):
            folder = directory / str(step)
            had_one = f"  {OPTIMIZER}/" in (folder / SUMS).read_text()  # converted weights had not
            if had_one and not (folder / OPTIMIZER).exists():
                raise ValueError(
                    f"{folder}: no run goes on from here, its {OPTIMIZER} is gone; "
                    "start another one from it with --config.init, or move it away"
                )
            break
    wanted = keep_best
    for step in best({step: ap.get(step) for step in steps}, len(steps)):
        if not wanted:
            break
        wanted -= whole(step)
    return {step: what for step, what in found.items() if what is not None}


def named_leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of a tree by path; keys, indices and field names all become text."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((k,), simple=True) for k in p): leaf for p, leaf in leaves}


def items(state: Any) -> dict[str, Any]:
    """Returns what is stored of a state: item -> nested dict of its leaves."""
    # The optimizer's state as nested dicts, so that neither optax's classes nor its empty states
    # are part of the format.
    opt_state: dict = {}
    for path, leaf in named_leaves(state.opt_state).items():
        node = opt_state
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    found = {"params": state.params, "optimizer": {"step": state.step, "state": opt_state}}
    return found if state.ema is None else found | {"ema": state.ema}


def stored(folder: epath.Path) -> dict[str, Any]:
    """Returns shape and dtype of every array of a step: item -> nested dict."""
    reader = ocp.PyTreeCheckpointHandler()
    found = [name for name in ARRAYS if (folder / name).is_dir()]
    return {name: reader.metadata(folder / name).tree for name in found}


def refuse_differences(folder: epath.Path, stored: Any, expected: Any) -> None:
    """Compares what a checkpoint holds with what is expected, entry by entry.

    Args:
      folder: the step, for the message.
      stored: tree of anything with shape and dtype, as orbax's metadata.
      expected: likewise.

    Raises:
      ValueError: naming every entry that is missing, superfluous, or of another shape or type.
    """
    stored, expected = named_leaves(stored), named_leaves(expected)
    lines = []
    for path in sorted(stored.keys() | expected.keys()):
        name = "/".join(path)
        if path not in stored:
            lines.append(f"missing: {name}, expected {_kind(expected[path])}")
        elif path not in expected:
            lines.append(f"superfluous: {name}, {_kind(stored[path])}")
        elif _kind(stored[path]) != _kind(expected[path]):
            lines.append(f"{name}: {_kind(stored[path])}, expected {_kind(expected[path])}")
    if lines:
        raise ValueError(
            f"checkpoint {folder} does not hold what this run expects:\n  " + "\n  ".join(lines)
        )


def set_aside(folder: epath.Path) -> None:
    """Renames a step's folder to one that is no step."""
    taken = {path.name for path in folder.parent.iterdir()}
    names = (f"{folder.name}.damaged{n}" for n in ("", *range(2, len(taken) + 3)))
    folder.rename(folder.parent / next(name for name in names if name not in taken))


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _files(folder: epath.Path, prefix: str) -> list[str]:
    names = []
    for path in folder.iterdir():
        if path.is_dir():
            names += _files(path, f"{prefix}{path.name}/")
        elif not path.name.startswith(".") and prefix + path.name not in (*_WRITTEN_LAST, SUMS):
            names.append(prefix + path.name)
    return names


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
