"""Compiles a recipe's training step for chips that are not here, and says what came out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import cards, hlo, slices
from benchmarks.coco_like import coco_like
from yolos_jax import mesh as mesh_lib
from yolos_jax import step
from yolos_jax.batch import Bucket
from yolos_jax.data.plan import TARGETS_MULTIPLE, Recipe, choose_buckets
from yolos_jax.models.build import build_model
from yolos_jax.optimizer import make_optimizer, partition
from yolos_jax.programs import bytes_of_shards

ROOT = Path(__file__).resolve().parent.parent
IMAGES, BOXES = 118_000, 860_000  # of COCO's training set, about
NUM_CLASSES = 91  # of the published recipes


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled."""

    chip: str
    chips: int
    recipe: str  # a file of configs/
    fsdp: int
    images: int  # per chip
    attention: str = "auto"  # ``config.model.attention``

    def __str__(self) -> str:
        name = slices.topology(self.chip, self.chips)
        attention = "" if self.attention == "auto" else f", attention '{self.attention}'"
        return (
            f"{self.recipe} on {name}, fsdp {self.fsdp}, {self.images} images per chip{attention}"
        )


@functools.cache
def read_recipe(name: str) -> Any:
    """The configuration of a published recipe."""
    return importlib.import_module(f"configs.{name}").get_config()


@functools.cache
def longest(recipe: str) -> tuple[Bucket, int]:
    """The bucket of the longest sequences over a dataset like COCO, and M."""
    config, index = read_recipe(recipe), coco_like(IMAGES, BOXES)
    prefix = 1 + config.model.num_queries
    shape = (config.buckets.count, config.buckets.multiple, prefix)
    buckets = choose_buckets(index, Recipe.from_config(config, config.model.patch_size), *shape)
    return buckets[-1], -(-index.max_boxes // TARGETS_MULTIPLE) * TARGETS_MULTIPLE


def slice_devices(chip: str, chips: int) -> list[Any]:
    """The devices of a slice that is not here.

    Raises:
      ValueError: if there is no such slice.
    """
    name = slices.topology(chip, chips)
    if slices.CHIPS[chip].platform == "tpu":
        return topologies.get_topology_desc(name, "tpu").devices
    return cards.devices(chip, chips)


def slice_mesh(chip: str, chips: int, fsdp: int) -> Mesh:
    """The mesh that training makes of a slice's devices.

    Raises:
      ValueError: if there is no such slice, or fsdp does not divide its chips.
    """
    return mesh_lib.make_mesh(fsdp, slice_devices(chip, chips))


def arguments(case: Case) -> tuple[Any, Mesh, step.StepShape, int]:
    """What ``compile_step`` and ``describe`` take, of a case."""
    bucket, max_boxes = longest(case.recipe)
    config = read_recipe(case.recipe).copy_and_resolve_references()
    config.model.attention = case.attention
    if case.attention == "auto" and slices.CHIPS[case.chip].platform == "cuda":
        config.model.attention = "cudnn"  # which 'auto' takes after a trial on the card
    shape = step.StepShape(bucket, case.images * case.chips, max_boxes)
    return config, slice_mesh(case.chip, case.chips, case.fsdp), shape, NUM_CLASSES


def compile_step(
    config: Any, mesh: Mesh, shape: step.StepShape, num_classes: int
) -> tuple[step.TrainStep, dict[str, Any]]:
    """A training step and its compiled programs, 'forward' and 'update'; as ``describe``."""
    model = build_model(config.model, num_classes, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    trainable, _ = partition(params, config.optimizer.freeze)
    optimizer = make_optimizer(config.optimizer, trainable)
    train_step = step.TrainStep(model, optimizer, mesh, config)
    return train_step, train_step.compile(shape)


def describe(config: Any, mesh: Mesh, shape: step.StepShape, num_classes: int) -> dict:
    """Compiles forward and update and reads what the compiler says of them.

    Args:
      config: of the run.
      mesh: of the slice, or of any devices.
      shape: of the step.
      num_classes: K.

    Returns:
      ``programs``: of 'forward' and 'update' the bytes on one device of arguments, results, what
      of them lies in arguments' places, temporaries, code, and the peak that the compiler states;
      the collectives (fields of ``hlo.Collective``), or why jax cannot read them (``unread``); the
      seconds that compiling took. Besides ``params_bytes``, ``state_bytes``, ``batch_bytes`` and
      ``residual_bytes`` on one device.
    """
    train_step, programs = compile_step(config, mesh, shape, num_classes)
    state = train_step.abstract_state
    per_device = shape.batch_size // mesh.size
    return {
        "programs": {kind: _read(program) for kind, program in programs.items()},
        "params_bytes": mesh_lib.bytes_per_device(state.params, mesh),
        "state_bytes": mesh_lib.bytes_per_device(state, mesh),
        "batch_bytes": per_device * shape.bucket.patches * 3 * config.model.patch_size**2,
        "residual_bytes": bytes_of_shards(programs["forward"].outputs.residuals),
    }


def _read(program: Any) -> dict:
    sizes = program.compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    found = {name: getattr(sizes, f"{name}_size_in_bytes") for name in names}
    found["peak"] = sizes.peak_memory_in_bytes
    found["seconds"] = round(program.seconds, 1)
    found["unread"], found["collectives"] = "", []
    try:
        text = program.compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # of a compiler that is newer than this jaxlib
        found["unread"] = str(error).splitlines()[0]
    else:
        found["collectives"] = [c._asdict() for c in hlo.collectives(text)]
    return found


def facts(case: Case, cache: Path) -> dict:
    """What ``describe`` says of a case, or ``{"error": ...}`` where the compiler found no room.

    Args:
      case: to compile.
      cache: folder of results of the same code, compiler and case; made when missing.
    """
    path = cache / f"{_key(case)}.json"
    if path.exists():
        return json.loads(path.read_text())
    bucket, _ = longest(case.recipe)
    started = time.monotonic()
    try:
        found = describe(*arguments(case))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {"error": " ".join(re.sub(r"See https\S+.*", "", str(error)).split())}
    found |= {"bucket": bucket, "seconds": round(time.monotonic() - started, 1)}
    found = json.loads(json.dumps(found))  # as it will be when read from the cache
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def _key(case: Case) -> str:
    """Changes with the case, the versions of the compiler, and any line that it could depend on."""
    return hashlib.sha256(repr((dataclasses.astuple(case), _code())).encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    digest = hashlib.sha256(os.environ.get("XLA_FLAGS", "").encode())
    for package in ("jax", "flax", "optax", "libtpu", *cards.PACKAGES):
        digest.update(f"{package} {_version(package)}\n".encode())
    files = [*(ROOT / "yolos_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    beside = [
        ROOT / "benchmarks" / name for name in ("cards.py", "coco_like.py", "hlo.py", "planned.py")
    ]
    for path in sorted([*files, *beside]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
