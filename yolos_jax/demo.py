"""The demo: makes pictures, trains on them, evaluates, draws. ``make demo`` runs it.

    python -m yolos_jax.demo --seed=0 --out=runs/demo-0

The configuration is ``configs/shapes.py``; the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

from yolos_jax import launch, trainer
from yolos_jax.data import shapes

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "shapes.py"


def main() -> None:
    """Runs the demo as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and the training")
    parser.add_argument("--out", required=True, help="folder of the run; what is there is replaced")
    arguments = parser.parse_args()
    started = time.monotonic()
    out = Path(arguments.out)
    if not CONFIG.exists():
        sys.exit(f"demo: {CONFIG}: no such file; the demo is for a clone of the repository")
    config = runpy.run_path(str(CONFIG))["get_config"]()
    # A demo measures from nothing: a finished run in its place would only be read again.
    for part in ("data", "run"):
        shutil.rmtree(out / part, ignore_errors=True)
    config.seed = arguments.seed
    config.data.root = str(out / "data")
    try:
        shapes.write(out / "data", seed=arguments.seed)
        summary = trainer.train(config, str(out / "run"))
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
    # As a person would type them here.
    summary |= {name: os.path.relpath(summary[name]) for name in ("checkpoint", "metrics")}
    summary["pictures"] = [os.path.relpath(path) for path in summary["pictures"]]
    print(json.dumps(summary | {"seconds": round(time.monotonic() - started, 1)}))
    if not summary["finished"]:
        launch.finish(1)  # A thread may still compile.


if __name__ == "__main__":
    main()
