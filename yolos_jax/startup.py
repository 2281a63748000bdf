"""Everything a run needs before its first step, built from the configuration and printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from yolos_jax import (
    agreement,
    checks,
    compilation,
    datasets,
    launch,
    mesh,
    optimizer,
    report,
    runlog,
    schedules,
    scoring,
    settings,
    step,
    unused,
)
from yolos_jax.checkpoint import FORMAT, Checkpoints, load_params
from yolos_jax.claim import Claim
from yolos_jax.convert import start
from yolos_jax.data import plan as plan_lib
from yolos_jax.labels import LabelMap
from yolos_jax.models.build import build_model
from yolos_jax.predict_step import PredictStep
from yolos_jax.progress import Progress
from yolos_jax.run import Run


def prepare(
    config: ConfigDict,
    workdir: str,
    changeable_on_resume: Sequence[str],
    defaults: Mapping[str, Any],
    claim: Claim,
) -> tuple[Run, Progress]:
    """Builds a run from its configuration, restores it if it was begun, and prints what it is.

    Raises:
      ValueError: anything about configuration, data, start or work directory that does not fit.
      OSError: not all processes of the run came.
      ImportError: a library that the run will want is not installed.
    """
    scoring.require()
    folder = runlog.local_folder(workdir)
    launch.initialise(config.mesh, config, folder)
    begun = opened = None
    if mesh.from_first((folder / "checkpoints").exists):
        opened = open_checkpoints(config, folder, claim)
        begun = opened.metadata()
    initial = load_start(config.init, folder) if config.init and begun is None else None
    source = str(folder) if begun is not None else config.init
    if initial is not None:
        agreement.check_checkpoint(config.init, *initial)
    in_vain = unused.notes(config, defaults)
    config = settings.complete(config, begun or (initial and initial[1]), source)
    checks.check_values(config)
    if begun is not None:
        runlog.refuse_changes(
            begun["config"], json.loads(config.to_json()), changeable_on_resume, folder, defaults
        )

    run = build(config, folder)
    for note in in_vain:
        say(note)
    rng = jax.random.key(config.seed)
    params = None
    if initial is not None:
        model = run.train_step.model
        params, changes = start.initial_params(
            model, *initial, rng, run.metadata["label_map"], config.init
        )
        say(changes)
        for note in report.preprocess_notes(config, initial[1]["preprocess"]):
            say(note)
    # Only now: a run that is refused leaves no folder behind.
    run = dataclasses.replace(run, checkpoints=opened or open_first(config, folder, claim))
    compilation.keep_programs(config.compile.cache, folder)
    if begun is not None:
        progress = resume(run, begun)
        progress.evaluated_on = begun.get("evaluated_on", "")  # older runs did not say
        if note := progress.other_set(run.data.validation_set):
            say(note)
        return run, progress
    return run, Progress(run.train_step.init_state(rng, params))


def build(config: ConfigDict, folder: Path) -> Run:
    """Puts a run together, checkpoints apart, and prints what it is."""
    device_mesh = mesh.make_mesh(config.mesh.fsdp)
    mesh.host_rows(device_mesh, config.batch_size, config.microbatches)  # refuses what it must
    cache_dir = config.data.cache_dir or folder.parent / "data_cache"
    data = datasets.load_data(config, device_mesh, cache_dir, say)
    label_map = data.train.label_map
    model = build_model(config.model, label_map.num_classes, device_mesh)
    shapes = jax.eval_shape(model.init, jax.random.key(config.seed))
    trainable, frozen = optimizer.partition(shapes, (*model.constants, *config.optimizer.freeze))
    steps_per_epoch = len(data.train) // config.batch_size
    run = Run(
        config=config,
        workdir=folder,
        data=data,
        mesh=device_mesh,
        train_step=step.TrainStep(
            model,
            optimizer.make_optimizer(config.optimizer, trainable, model.rules),
            device_mesh,
            config,
        ),
        predict_step=PredictStep(model, device_mesh, config.preprocess),
        schedule=schedules.make_schedule(
            config.optimizer,
            steps_per_epoch=steps_per_epoch,
            total_steps=steps_per_epoch * config.epochs,
            epochs=config.epochs,
        ),
        steps_per_epoch=steps_per_epoch,
        checkpoints=None,
        metadata={},
    )
    first_plan = run.train_plan(0)
    parts, max_boxes = config.microbatches, first_plan.max_boxes
    run.train_step.compiled.expect(
        step.StepShape(bucket, config.batch_size, max_boxes, parts) for bucket in data.buckets
    )
    run.predict_step.compiled.expect(
        (bucket, data.eval_plan.batch_size) for bucket in data.eval_plan.buckets
    )
    run.metadata.update(describe_checkpoint(config, label_map, first_plan))
    agreement.check_data(
        {
            "training pictures and annotations": first_plan.fingerprint(),
            "validation pictures and annotations": data.eval_plan.fingerprint(),
            "classes": str(label_map.to_json()),
        }
    )
    groups = optimizer.describe_groups(trainable, frozen, config.optimizer, model.rules)
    say(report.describe_run(run, first_plan, groups))
    return run


def open_checkpoints(config: ConfigDict, folder: Path, claim: Claim) -> Checkpoints:
    """The checkpoints of a run's folder, which is made where it is missing and no other run's."""
    claim.take(folder)
    keep = config.checkpoint
    return Checkpoints(
        folder / "checkpoints", keep.keep_last, keep.keep_best, wait_seconds=keep.wait_seconds
    )


def load_start(init: str, folder: Path) -> tuple[dict, dict]:
    """Parameters and metadata of ``config.init``; ValueError where the run would write there."""
    if Path(init).expanduser().resolve() == folder:
        raise ValueError(f"--workdir {folder}: is config.init too; choose another folder")
    return load_params(init)


def open_first(config: ConfigDict, folder: Path, claim: Claim) -> Checkpoints:
    """Those of a run that found none before it had claimed the folder; raises ValueError if now."""
    checkpoints = open_checkpoints(config, folder, claim)
    if checkpoints.last_step is not None:
        raise ValueError(
            f"{folder}: another run began here meanwhile, and has saved step "
            f"{checkpoints.last_step}: the same command goes on from there"
        )
    return checkpoints


def describe_checkpoint(config: ConfigDict, label_map: LabelMap, first_plan: plan_lib.Plan) -> dict:
    """What checkpoints say about themselves: enough to predict, and to resume."""
    plain = json.loads(config.to_json())
    return {
        "format": FORMAT,
        "model": plain["model"],
        "num_classes": label_map.num_classes,
        "label_map": label_map.to_json(),
        "preprocess": plain["preprocess"] | {"exif": plain["data"]["exif"]},
        "plan_fingerprint": first_plan.fingerprint(),
        "config": plain,
        "source": f"trained from {config.init or 'random parameters'}",
    }


def resume(run: Run, begun: Mapping[str, Any]) -> Progress:
    """Restores the newest checkpoint that is not damaged.

    Raises:
      ValueError: the data are not what they were, or no checkpoint fits.
    """
    for key, meaning in (("plan_fingerprint", "pictures or annotations"), ("label_map", "classes")):
        if begun[key] != run.metadata[key]:
            raise ValueError(
                f"{run.workdir} was begun with other {meaning} ({key} was {begun[key]}, is "
                f"{run.metadata[key]}): give back the data, or choose another --workdir"
            )
    state, metadata = run.checkpoints.restore(
        run.train_step.abstract_state, run.train_step.shardings
    )
    done = int(metadata["step"])
    say(f"resumed at step {done} of {run.total_steps} from {run.checkpoints.directory}")
    evaluated, found = metadata["evaluated"], metadata["evaluation"]
    return Progress(state, done, done, evaluated, evaluated, found, metadata.get("health", {}))


def say(text: str) -> None:
    """Prints once, however many processes run."""
    if jax.process_index() == 0:
        print(text, flush=True)
