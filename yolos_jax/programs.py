"""Compiled programs, each made once from shapes alone: kept, counted, measured."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from yolos_jax.batch import Batch, Bucket, Canvas
from yolos_jax.models import registers

LONGEST_COMPILATION = 24 * 3600  # seconds that processes wait for each other
_ON_GPUS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
BETWEEN_QUESTIONS = 2.0  # seconds of compiling, in which nobody asks whether to stop


class UnexpectedProgram(UserWarning):
    """A program was compiled that nobody had announced: time lost, and a sign of a mistake."""


class Program(NamedTuple):
    """A compiled program."""

    compiled: jax.stages.Compiled
    outputs: Any  # tree of jax.ShapeDtypeStruct with shardings
    seconds: float  # that compiling took, or reading it from the cache, until all processes had it

    def __call__(self, *args: Any) -> Any:
        """Runs it; arrays of other shapes, types or places than it was made for are an error."""
        return self.compiled(*args)


def jit(
    function: Callable, mesh: Mesh | None = None, *, backward: bool = False, **options: Any
) -> Any:
    """``jax.jit`` for programs that spend their time in a model.

    On CPUs XLA fills 256 bits of a register on its own; it is told to use 512. Where there is no
    AVX-512, the machine code is the same. With AVX2 only, YNNPACK's products are up to a third
    slower than Eigen's, but for those of attention's forward pass: a backward pass leaves it
    reductions only. On GPUs products are those of cuBLAS, which adds biases on the way: XLA would
    time its own against them, in the compilation, and make one product of those for queries, keys
    and values, to divide it again. What ``XLA_FLAGS`` says of that stays.

    Args:
      mesh: that it will run on; None: the default device.
      backward: whether most of it is a backward pass.
      options: of ``jax.jit``.
    """
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    told: dict[str, Any] = {}
    if platform == "cpu":
        told["xla_cpu_prefer_vector_width"] = 512
        if backward and registers.are_avx2():
            told["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
    elif platform == "gpu":
        flags = os.environ.get("XLA_FLAGS", "")
        told |= {name: value for name, value in _ON_GPUS.items() if name not in flags}
    return jax.jit(function, compiler_options=told or None, **options)


class Programs:
    """The programs of a run by kind ('forward', ...) and by what they were made for.

    Nothing is compiled behind the back of whoever reads the counts: arguments that do not fit a
    program raise, where ``jax.jit`` would make another one.
    """

    _numbers = itertools.count()  # of all programs of this process: names are to be used once
    abandoned = False  # one of this process' threads compiles what nobody waits for any more

    def __init__(self) -> None:
        self._made: dict[tuple[str, Hashable], Program] = {}
        self.expected: tuple[Hashable, ...] | None = None  # shapes; None: any
        # Asked every few seconds while a program is compiled, equally often on all processes, which
        # must all have set it, or none. What it raises ends the waiting; the compiler has no brake.
        self.meanwhile: Callable[[], None] | None = None

    def expect(self, shapes: Iterable[Hashable]) -> None:
        """Announces the shapes that programs will be made for."""
        self.expected = tuple(shapes)

    def check_expected(self, shape: Hashable) -> None:
        """Warns of a shape that nobody had announced."""
        if self.expected is not None and shape not in self.expected:
            warnings.warn(
                f"compiling for {shape}, which is none of the {len(self.expected)} shapes that "
                "were expected",
                UnexpectedProgram,
                stacklevel=3,
            )

    def make(self, kind: str, shape: Hashable, jitted: Any, *args: Any) -> Program:
        """Returns the program of a kind for a shape, compiled unless it was before.

        Args:
          kind: what it is, for the counts.
          shape: what distinguishes it from others of its kind.
          jitted: of ``jit``.
          args: its arguments: static ones, and trees of ``jax.ShapeDtypeStruct`` with shardings.

        Several processes must make the same ones in the same order, and wait for each other.
        """
        if (kind, shape) not in self._made:
            started = time.monotonic()
            lowered = jitted.lower(*args)
            compiled = self._compile(lowered, kind)
            outputs = jax.tree.map(
                lambda info, place: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=place),
                lowered.out_info,
                compiled.output_shardings,
            )
            self._made[kind, shape] = Program(compiled, outputs, time.monotonic() - started)
        return self._made[kind, shape]

    def _compile(self, lowered: jax.stages.Lowered, kind: str) -> jax.stages.Compiled:
        name = f"program {next(self._numbers)}, {kind}"
        if self.meanwhile is None:
            compiled = lowered.compile()
            _all_have_it(f"{name}, 0", True)
            return compiled
        # Beside this thread, to which signals come: it would notice none before the compiler ends.
        result = futures.Future()
        work = (result, lowered.compile)
        threading.Thread(target=_fulfil, args=work, name=f"compile {kind}", daemon=True).start()
        try:
            for number in itertools.count():
                futures.wait([result], BETWEEN_QUESTIONS)
                if _all_have_it(f"{name}, {number}", result.done()):
                    return result.result()
                self.meanwhile()
        except BaseException:
            # On every process, though there may be some that have compiled it: they leave alike.
            Programs.abandoned = Programs.abandoned or not result.done() or jax.process_count() > 1
            raise

    def items(self) -> list[tuple[str, Hashable, Program]]:
        """Every program with its kind and shape, in the order they were made."""
        return [(kind, shape, program) for (kind, shape), program in self._made.items()]

    def counts(self) -> dict[str, int]:
        """How many programs of each kind there are; kinds without any are left out."""
        return dict(collections.Counter(kind for kind, _ in self._made))


def _fulfil(result: futures.Future, compute: Callable[[], Any]) -> None:
    try:
        result.set_result(compute())
    except BaseException as error:  # for whoever waits for the result
        result.set_exception(error)


def _all_have_it(name: str, here: bool) -> bool:
    """Whether every process has a program, asked by all of them under a name of its own.

    One that found it in its cache must not run it yet: on CPUs the first exchange of numbers gives
    the others half a minute (gloo), which they may need to compile.
    """
    if jax.process_count() == 1:
        return here
    from orbax.checkpoint import multihost  # a step on one device does without

    client = multihost.get_jax_distributed_client()
    client.key_value_set(f"{name}/{jax.process_index()}", str(here))
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_COMPILATION * 1000)
    return all(said == str(True) for _, said in client.key_value_dir_get(f"{name}/"))


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An argument of a program that is being made."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_tree(tree: Any, shardings: Any) -> Any:
    """A tree of arguments from the shapes and types of ``tree`` and its shardings."""
    return jax.tree.map(lambda x, sharding: abstract(x.shape, x.dtype, sharding), tree, shardings)


def abstract_batch(bucket: Bucket, images: int, patch_size: int, rows: Any) -> Batch | Canvas:
    """A batch of raw pictures as an argument of a program that is being made."""
    batch = jax.eval_shape(lambda: bucket.empty(images, patch_size, jnp.zeros))
    return jax.tree.map(lambda x: abstract(x.shape, x.dtype, rows), batch)


def bytes_of_shards(tree: Any) -> int:
    """What a tree of abstract or real arrays takes on the device that holds most of each."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def no_room(error: Exception) -> str:
    """What there was no memory for, on one line; empty for any other error."""
    text = str(error)
    return text.splitlines()[0] if "RESOURCE_EXHAUSTED" in text else ""


@contextlib.contextmanager
def one_message(program: str, needs_less: str) -> Iterator[None]:
    """Ends a command with its name, code 1 and one message where its input makes no sense.

    Args:
      program: its name.
      needs_less: what to do about too little memory.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except Exception as error:
        if not (what := no_room(error)):
            raise
        sys.exit(f"{program}: out of memory; {needs_less}: {what}")
