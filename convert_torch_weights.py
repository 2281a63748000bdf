"""PyTorch, Hugging Face and big_vision checkpoints into ours, and back.

    python convert_torch_weights.py yolos_s.pth runs/yolos_s --verify
    python convert_torch_weights.py hustvl/yolos-tiny runs/yolos_ti
    python convert_torch_weights.py deit_tiny_patch16_224.pth runs/start/deit_tiny
    python convert_torch_weights.py detr-r50-e632da11.pth runs/detr_r50 --verify
    python convert_torch_weights.py resnet50-0676ba61.pth runs/start/resnet50
    python convert_torch_weights.py runs/mine exported --to=hf

Known sources: the original YOLOS and DETR, and transformers' of both; as a start for training DeiT
and plain vision transformers in the layouts of timm, transformers and google-research (.npz), and
ResNets in those of torchvision, timm and transformers; and this project's own checkpoints. Nothing
is written unless everything fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from yolos_jax import interrupt


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    # Here, so that an interruption while importing is one line, too.
    from yolos_jax.convert import compare, export

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="checkpoint: file, folder, run, or hub name")
    parser.add_argument("destination", help="folder to write (a file with --to=yolos, --to=detr)")
    parser.add_argument("--to", choices=sorted(export.WRITERS), default="yolos_jax")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="PICTURE",
        help="run source and result on a picture, a generated one if none is named; "
        f"fails where logits or boxes differ by more than {compare.TOLERANCE:g}",
    )
    compare.add_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with interrupt.one_line("convert_torch_weights"):
        args = parse(argv)
        from yolos_jax.convert import command, read

        try:
            command.convert(args)
        except (ValueError, OSError) as error:
            sys.exit(f"convert_torch_weights: {error}")
        except ImportError as error:
            sys.exit(f"convert_torch_weights: {read.missing(error)}")


if __name__ == "__main__":
    main()
