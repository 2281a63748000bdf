"""Compiled programs kept for the next start, and compiled before they are needed."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src.compilation_cache import decompress_executable
from jax.experimental.compilation_cache import compilation_cache

from yolos_jax.predict_step import PredictStep
from yolos_jax.programs import Program, bytes_of_shards
from yolos_jax.step import TrainStep

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
BEING_WRITTEN = 60  # seconds; a program that is younger may belong to a run that writes it now
CHECKED = "checked"  # a file that is as old as the last look at all others
CLOCKS_DIFFER = 600  # seconds, at most, between hosts and file servers


def keep_programs(folder: str, workdir: Path) -> None:
    """Has jax keep compiled programs in a folder, where the next start finds them.

    A folder that cannot be used costs a warning, and compiling again. Several processes share it:
    jax writes from the first of them only. What a kill cut off while it was written is removed.
    Where the environment variable ``JAX_COMPILATION_CACHE_DIR`` names a folder, that one is used.
    Several processes on CPUs keep nothing: ``launch.initialise`` says why.

    Args:
      folder: ``config.compile.cache``: seen from the work directory, or absolute; '': none.
      workdir: of the run; exists.
    """
    if os.environ.get(VARIABLE) or not jax.config.jax_enable_compilation_cache:
        return
    path = (workdir / folder).resolve() if folder else None
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            warnings.warn(
                f"compiled programs are not kept: {path} cannot be written ({error}); "
                f"compile.cache or {VARIABLE} names another folder",
                stacklevel=2,
            )
            path = None
    if path is not None and jax.process_index() == 0:
        remove_cut_off(path)
    jax.config.update("jax_compilation_cache_dir", path and str(path))
    # The small ones too: there are many of them in a start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Of an earlier run in this process; or "no cache", which jax concludes from a first program.
    compilation_cache.reset_cache()


def remove_cut_off(folder: Path) -> None:
    """Removes programs that are not whole: jax would warn of them, and keep them, for ever.

    Args:
      folder: where jax keeps programs. Those that an earlier call has looked at are left alone,
        and so are those of the last minute: another run may be writing them.
    """
    checked, now = folder / CHECKED, time.time()
    try:
        since = checked.stat().st_mtime - CLOCKS_DIFFER if checked.exists() else 0
        for path in folder.glob("*-cache"):
            written = path.stat().st_mtime
            if since <= written <= now - BEING_WRITTEN and not _whole(path):
                path.unlink(missing_ok=True)
                print(
                    f"{path}: a program that was not written to its end; removed", file=sys.stderr
                )
        checked.touch()
        os.utime(checked, (now - BEING_WRITTEN,) * 2)
    except OSError as error:
        warnings.warn(f"compiled programs in {folder} were not looked at: {error}", stacklevel=3)


def _whole(path: Path) -> bool:
    try:
        decompress_executable(path.read_bytes())
    except OSError:
        raise
    except Exception:  # Of the library that jax found to compress with.
        return False
    return True


def compile_ahead(train_step: TrainStep, predict_step: PredictStep, params: Any) -> Iterator[str]:
    """Compiles every program that the two expect, and says what each takes of a device's memory.

    Args:
      train_step: that was told what to ``expect``.
      predict_step: likewise.
      params: on the mesh; those that are evaluated.

    Yields:
      Lines for people, after each program was compiled; columns of MiB on each device.
    """
    shapes = train_step.compiled.expected or ()
    unit = shapes[0].bucket.unit if shapes else ""
    yield (
        "compiled before the first step, MiB on each device:\n"
        f"  {unit:>7}  rows  cols  program     arguments  outputs  temporary  residuals  seconds"
    )
    shown = set()
    for shape in shapes:
        for kind, program in train_step.compile(shape).items():
            if id(program) not in shown:  # Buckets share some.
                yield _line(shape.bucket, kind, program)
            shown.add(id(program))
    for bucket, batch_size in predict_step.compiled.expected or ():
        yield _line(bucket, "predict", predict_step.compile(params, bucket, batch_size))


def _line(bucket: Any, kind: str, program: Program) -> str:
    memory = program.compiled.memory_analysis()
    if memory is None:
        sizes = " " * 9 + "unknown" + " " * 13
    else:
        arguments, outputs, temporary = (
            size / 2**20
            for size in (
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes,
                memory.temp_size_in_bytes,
            )
        )
        sizes = f"{arguments:9.1f} {outputs:8.1f} {temporary:10.1f}"
    residuals = " " * 9
    if kind == "forward":
        residuals = f"{bytes_of_shards(program.outputs.residuals) / 2**20:9.1f}"
    shape = "      -     -     -"
    if kind not in ("zeros", "apply"):
        shape = f"{bucket.patches:7d} {bucket.rows:5d} {bucket.cols:5d}"
    return f"  {shape}  {kind:10s}  {sizes}  {residuals} {program.seconds:8.1f}"
