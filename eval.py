"""Evaluates a checkpoint on a folder of pictures in COCO format, with COCO's own numbers.

    python eval.py --checkpoint runs/yolos_s --data_root /data/coco [--results found.json]

The configuration is the checkpoint's; ``--set preprocess.size=512 model.dtype=float32`` changes
what may be changed. The last line printed is JSON. Several processes start as those of train.py
do: by themselves in a cluster, elsewhere with ``--set mesh.coordinator=HOST:PORT
mesh.num_processes=2 mesh.process_id=0``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs import common
from yolos_jax import interrupt, other_names

# How this process finds the others; nothing of the run that wrote the checkpoint.
LAUNCH = (
    "mesh.distributed",
    "mesh.coordinator",
    "mesh.num_processes",
    "mesh.process_id",
    "mesh.wait_seconds",
)
# What is given otherwise.
FLAGS = {
    "data.root": "--data_root",
    "data.val_annotations": "--annotations",
    "data.val_images": "--images",
    "data.val_subset": "--subset",
    "eval.batch_size": "--batch_size",
}
# What neither the checkpoint's arrays nor what it has learnt fix.
SETTABLE = (
    "model.attention",
    "model.dtype",
    "model.scan",
    "preprocess.size",
    "preprocess.max_size",
    "preprocess.mean",
    "preprocess.std",
    "buckets.count",
    "buckets.multiple",
    "data.on_error",
    "data.exif",
    "data.max_bad_fraction",
    "data.workers",
    "data.prefetch",
    "data.tfds_name",
    "data.tfds_dir",
    "data.tfds_val",
    "data.cache_dir",
    "mesh.fsdp",
    *LAUNCH,
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluates a checkpoint with COCO's numbers.", allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or converted weights")
    parser.add_argument("--data_root", required=True, help="folder of annotations and pictures")
    parser.add_argument("--split", default="val", help="annotations/instances_{split}2017.json")
    parser.add_argument("--annotations", help="COCO file, relative to the root (of the split)")
    parser.add_argument("--images", help="folder, relative to the root ({split}2017)")
    parser.add_argument("--subset", type=int, default=0, help="first n images only (0: all)")
    parser.add_argument("--batch_size", type=int, help="images at once, over all devices")
    parser.add_argument("--results", help="file for the detections, in COCO's results format")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="settings",
        help=f"changes to the checkpoint's configuration: {', '.join(SETTABLE)}",
    )  # fmt: skip
    parser.add_argument(
        "--reference_padding", type=int, default=0, metavar="N",
        help="pad N pictures to one canvas, unmasked, as the published Ti was evaluated (2)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("subset", "reference_padding"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 or more")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: expected at least 1")
    if args.results and (os.path.isdir(args.results) or not os.path.basename(args.results)):
        parser.error(f"--results {args.results}: is a folder, expected a file")
    return args


def checkpoint_config(metadata: dict) -> ConfigDict:
    """Returns the configuration that a checkpoint carries, defaults where it has none."""
    from yolos_jax.models import attention

    config = common.get_config()
    stored = dict(metadata.get("config") or {})
    for section in (*stored, "model", "preprocess"):
        values = metadata[section] if section in ("model", "preprocess") else stored[section]
        # The devices of the training are not those of the evaluation.
        if isinstance(values, dict) and section in config and section != "mesh":
            _take_over(config[section], values)
    config.data.exif = metadata["preprocess"].get("exif", "ignore")
    config.model.attention = attention.portable(config.model.attention)
    return config


def _take_over(section: ConfigDict, values: dict) -> None:
    """Sets the keys of a section that there are; sections within it likewise."""
    for key, value in values.items():
        if isinstance(value, dict) and key in section:
            _take_over(section[key], value)
        elif key in section:
            # JSON knows no tuples.
            section[key] = tuple(value) if isinstance(value, list) else value


def override(config: ConfigDict, setting: str) -> None:
    """Applies ``key=value``.

    Raises:
      ValueError: no such key, not one that may change, or a value of another kind.
    """
    key, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"--set {setting}: expected KEY=VALUE")
    if key in FLAGS:
        raise ValueError(f"--set {key}: that is {FLAGS[key]}")
    if key not in SETTABLE:
        section, _, name = key.partition(".")
        known = section in config and isinstance(config[section], ConfigDict)
        problem = "is fixed by the checkpoint" if known and name in config[section] else "is no key"
        hint = other_names.hint(key, dict(zip(SETTABLE, SETTABLE, strict=True)) | FLAGS, {})
        raise ValueError(f"--set {key}: {problem}{hint}; these can be set: {', '.join(SETTABLE)}")
    section, name = key.split(".")
    current = config[section][name]
    try:
        value = text if isinstance(current, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = text
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(current):
        raise ValueError(
            f"--set {setting}: expected {type(current).__name__}, as in {key}={current!r}"
        )
    config[section][name] = value


def run(args: argparse.Namespace) -> dict:
    """Evaluates; returns the summary that becomes the last line."""
    # Here, so that --help answers at once.
    from yolos_jax import checkpoint, checks, compilation, evaluator, launch, unused
    from yolos_jax.data.index import picture_path

    join(args)
    params, metadata = checkpoint.load_params(args.checkpoint)
    config = checkpoint_config(metadata)
    config.data.tfds_name = config.data.cache_dir = ""  # of the training's machine
    before = config.to_dict()
    for setting in args.settings:
        override(config, setting)
    in_vain = unused.notes(config, before)
    if args.batch_size is not None:
        config.eval.batch_size = args.batch_size
    config.data.root = args.data_root
    checks.check_values(config)
    keys = [setting.partition("=")[0] for setting in args.settings]
    evaluator.check_request(config, keys, args.reference_padding)
    if (Path(args.checkpoint) / config.compile.cache).is_dir():  # the run's own programs
        compilation.keep_programs(config.compile.cache, Path(args.checkpoint))
    split = evaluator.Split(
        root=args.data_root,
        annotations=args.annotations or f"annotations/instances_{args.split}2017.json",
        images=args.images or f"{args.split}2017",
        subset=args.subset,
    )
    if launch.is_first():
        if args.results:
            make_place(args.results, picture_path(split.root, "", split.annotations))
        if metadata.get("new"):
            print(f"{args.checkpoint}: its heads are random, it is a start for training")
        print(f"{args.checkpoint}: step {metadata['step']}, {metadata['source']}")
        for note in in_vain:
            print(note)
    found, summary = evaluator.evaluate_checkpoint(
        params, metadata, config, split, padding=args.reference_padding
    )
    named = {"annotations": args.annotations} if args.annotations else {"split": args.split}
    summary |= {"checkpoint": os.path.abspath(args.checkpoint), **named}
    if args.results and launch.is_first():
        with interrupt.complete_or_nothing(args.results) as path:
            path.write_text(json.dumps(found.results, allow_nan=False), encoding="utf-8")
        summary["results"] = os.path.abspath(args.results)
    return summary


def join(args: argparse.Namespace) -> None:
    """Joins the other processes of this evaluation, if there are any."""
    from yolos_jax import launch

    config = common.get_config()
    for setting in args.settings:
        if setting.startswith("mesh."):
            override(config, setting)
    before = signal.getsignal(signal.SIGTERM)
    launch.initialise(config.mesh, requested(args))
    # Of several processes jax takes note of SIGTERM; an evaluation has nothing to save.
    signal.signal(signal.SIGTERM, before)


def requested(args: argparse.Namespace) -> dict:
    """What the processes are asked for, under the keys by which they know what may differ."""
    settings = dict(text.partition("=")[::2] for text in args.settings)
    named = vars(args) | settings | {"data.root": args.data_root}
    return {key: named[key] for key in named.keys() - {"settings", "data_root", *LAUNCH}}


def make_place(path: str, annotations: str) -> None:
    """Makes the folder of a file that will be written when everything else is done.

    Raises:
      ValueError: nothing can be written there, or the annotations would be lost.
    """
    from yolos_jax.data import files

    if os.path.realpath(path) == os.path.realpath(annotations):
        raise ValueError(f"--results {path}: is the annotation file; expected another one")
    if files.is_remote(path):
        raise ValueError(f"--results {path}: expected a local file")
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--results {path}: cannot be written: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with interrupt.one_line("eval.py"):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates and prints the last line; ends the program with one message where it cannot."""
    from yolos_jax import launch
    from yolos_jax.programs import no_room

    try:
        summary = run(args)
    except KeyboardInterrupt:
        launch.interrupted("eval.py")
        raise
    except (ValueError, OSError, ImportError) as error:
        launch.fail(f"eval.py: {error}")
    except Exception as error:
        if not (what := no_room(error)):
            raise
        launch.end(
            "eval.py: out of memory; a smaller --batch_size or (with several devices) --set "
            f"mesh.fsdp=N need less: {what}"
        )
    if launch.is_first():
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
