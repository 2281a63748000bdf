"""Packs a COCO folder into array_record shards: few large files instead of many small ones.

    python -m yolos_jax.data.records ROOT OUT
    python -m yolos_jax.data.records ROOT OUT --annotations a.json --images pictures --shards 16

OUT is then a data.root like ROOT: annotations beside shards, the same plan, the same pictures byte
for byte. Every picture is decoded once to see that it is one, and every shard is read back before
it gets its name. Run it again after an interruption: finished shards are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from yolos_jax import interrupt
from yolos_jax.data import clean, files, packing, shards
from yolos_jax.data.coco import read_coco
from yolos_jax.data.index import picture_path
from yolos_jax.data.parts import divide
from yolos_jax.data.problems import Problems
from yolos_jax.data.validate import PUBLISHED

LISTED = 10  # pictures that one error names


def pack(
    root: str | os.PathLike,
    out: str | os.PathLike,
    annotations: str,
    images_dir: str,
    *,
    shards_dir: str = "",
    shard_bytes: int = 256 << 20,
    shard_count: int = 0,
    workers: int = 0,
    on_error: str = "raise",
) -> str:
    """Packs one split.

    Args:
      root: folder or gs:// path of the COCO folder.
      out: local folder to write to.
      annotations: COCO file, relative to root; copied to the same place below out.
      images_dir: picture folder, relative to root.
      shards_dir: folder of the shards, relative to out; '': as images_dir.
      shard_bytes: about how large a shard is to be.
      shard_count: how many there are to be; 0: as shard_bytes says.
      workers: pictures read and checked at once; 0: one per core.
      on_error: for pictures that are missing or do not decode, and entries that make no sense:
        'raise', or 'skip' to leave them out; training then counts such pictures as unreadable.

    Returns:
      What was done, in words.

    Raises:
      ValueError: files that cannot be read or written; what is finished stays for the next run.
    """
    _refuse_outside(annotations, images_dir)
    source, target = picture_path(root, images_dir, ""), Path(out) / (shards_dir or images_dir)
    if files.state(f"{source}/{shards.MANIFEST}") is not None:
        raise ValueError(f"{source}: is packed already")
    annotation_path = picture_path(root, "", annotations)
    names = _file_names(annotation_path, on_error)
    if not files.is_folder(source):
        raise ValueError(f"no such folder of pictures: {source!r}")
    copied = Path(out) / annotations
    packing.refuse_others(target, copied, annotations, annotation_path, names)
    target.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    bar = tqdm(total=len(names), desc=images_dir, unit="picture", disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:
        states = pool.map(lambda name: files.state(picture_path(source, "", name)), names)
        parts = divide(target, names, list(states), shard_bytes, shard_count)
        missing = packing.missing(target, parts, on_error)
        count, refuse = sum(len(part.pictures) for part in missing), on_error == "raise"
        bar.update(len(names) - count)
        if refuse and (target / shards.MANIFEST).exists():
            # What is packed already is not touched in vain: all are looked at once before.
            bar.total += count
            _refuse(packing.bad_pictures(missing, source, pool, workers, bar.update), len(names))
        bad = []
        for part in missing:
            bad += packing.write_shard(part, source, pool, workers, on_error, bar.update)
    _refuse(bad if refuse else (), len(names))
    left_out = packing.finish(target, parts, annotation_path, copied, annotations)
    return _summary(target, parts, len(parts) - len(missing), left_out)


def _refuse_outside(*names: str) -> None:
    """Raises ValueError for a path that has no like of it below another folder."""
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts or files.is_remote(name):
            raise ValueError(f"{name}: expected a path relative to ROOT, and below it")


def _refuse(bad: Sequence[str], of: int) -> None:
    """Raises ValueError where any picture is bad."""
    if bad:
        raise ValueError(
            f"{len(bad)} of {of} pictures cannot be packed; repair them, or leave them out "
            f"with --on_error skip:\n{_listed(bad)}"
        )


def _summary(target: Path, parts: list, kept: int, left_out: list) -> str:
    pictures = sum(len(part.pictures) for part in parts)
    megabytes = sum(part.path.stat().st_size for part in parts) / 1e6
    said = (
        f"{target}: {pictures - len(left_out)} pictures in {len(parts)} "
        f"shard{'s' * (len(parts) != 1)} ({kept} there before), {megabytes:.1f} MB; "
        f"{len(left_out)} left out"
    )
    return "\n".join([said, *([_listed([what for _, what in left_out])] if left_out else [])])


def _listed(problems: Sequence[str]) -> str:
    more = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return "\n".join(f"  {line}" for line in [*problems[:LISTED], *more])


def _file_names(annotations: str, on_error: str) -> list[str]:
    """The file names that the images of an annotation file have, each once, in its order."""
    coco = read_coco(annotations)
    images = clean.clean_images(coco["images"], problems := Problems(annotations))
    if problems.errors and on_error == "raise":
        raise ValueError(
            f"{problems.errors} entries make no sense; repair the file, or leave them out with "
            f"--on_error skip\n{problems.describe(('error',))}"
        )
    return list(dict.fromkeys(entry["file_name"] for entry in images.entries))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; None: of this process. Ends the program where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m yolos_jax.data.records", description=__doc__.splitlines()[0]
    )
    parser.add_argument("root", help="COCO folder, or gs:// path, that other paths are relative to")
    parser.add_argument("out", help="local folder to write to; becomes a data.root")
    parser.add_argument("--split", nargs="+", choices=("train", "val"), help="of COCO 2017 (both)")
    parser.add_argument("--annotations", nargs="+", help="COCO files, one per split")
    parser.add_argument("--images", nargs="+", help="picture folders, as many")
    parser.add_argument("--shard_size_mb", type=int, default=256, help="about (256)")
    parser.add_argument("--shards", type=int, default=0, help="how many (0: as --shard_size_mb)")
    parser.add_argument("--workers", type=int, default=0, help="pictures at once (0: one per core)")
    parser.add_argument(
        "--on_error", choices=("raise", "skip"), default="raise",
        help="pictures that are missing or do not decode: stop, or leave them out (raise)",
    )  # fmt: skip
    flags = parser.parse_args(arguments)
    if min(flags.shards, flags.workers) < 0 or flags.shard_size_mb < 1:
        parser.error("--shards and --workers must not be negative, --shard_size_mb at least 1")
    if files.is_remote(flags.out):
        parser.error(f"{flags.out}: array_record writes local files only; pack here, then copy")
    if not files.is_remote(flags.root) and os.path.realpath(flags.root) == os.path.realpath(
        flags.out
    ):
        parser.error(f"OUT is ROOT, {flags.root!r}: choose another folder")
    if len(flags.annotations or ()) != len(flags.images or ()):
        parser.error("--annotations and --images go together, one folder per file")
    if flags.annotations and flags.split:
        parser.error("--split is of COCO's own names; leave it out with --annotations")
    return flags


def splits(flags: argparse.Namespace) -> list[tuple[str, str]]:
    """Annotation file and picture folder of each split that is asked for, or is there."""
    if flags.annotations:
        return list(zip(flags.annotations, flags.images, strict=True))
    asked = [split for split in PUBLISHED if split[1].removesuffix("2017") in (flags.split or ())]
    there = [
        split
        for split in PUBLISHED
        if files.state(picture_path(flags.root, "", split[0])) is not None
    ]
    if not (asked or there):
        raise ValueError(
            f"{flags.root!r} has neither {PUBLISHED[0][0]} nor {PUBLISHED[1][0]}; name the files "
            "with --annotations and --images"
        )
    return asked or there


def shards_dir(annotation_file: str, folder: str, asked: Sequence[tuple[str, str]]) -> str:
    """Where the shards of a split go: splits of one picture folder have folders of their own."""
    sharing = [Path(name) for name, images in asked if images == folder]
    if len(sharing) == 1:
        return folder
    name = Path(annotation_file)
    alone = [other.stem for other in sharing].count(name.stem) == 1
    return os.path.join(folder, name.stem if alone else name.with_suffix(""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    flags = parse(arguments)
    try:
        with interrupt.one_line("records"):
            run(flags)
    except (ValueError, OSError) as error:
        sys.exit(f"records: {error}")


def run(flags: argparse.Namespace) -> None:
    """Packs the splits that are asked for; raises as ``pack``."""
    if not files.is_folder(flags.root):
        raise ValueError(f"no such folder: {flags.root!r}")
    asked = [tuple(map(os.path.normpath, split)) for split in splits(flags)]
    for annotation_file, folder in asked:
        target = shards_dir(annotation_file, folder, asked)
        said = pack(
            flags.root,
            flags.out,
            annotation_file,
            folder,
            shards_dir=target,
            shard_bytes=flags.shard_size_mb << 20,
            shard_count=flags.shards,
            workers=flags.workers,
            on_error=flags.on_error,
        )
        print(said, flush=True)
        if target != folder:
            print(f"  picture folder of {annotation_file}: {target}")
    print(f"to train from it: --config.data.root={flags.out}")


if __name__ == "__main__":
    main()
