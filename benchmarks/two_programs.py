"""A step of training as two programs or as one: bytes and time.

    python -m benchmarks.two_programs --out two_programs.json

    host     forward, match by scipy on the host, update: two programs (matcher.where='host')
    device   the same two programs, matched at the end of the first (matcher.where='device')
    one      forward, match and update in one program

Every form is measured in a process of its own, since a peak does not go down again. What a program
needs is what its compiler says; what a device held at most, where it tells, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import checks, isolated, ours, pictures, report, timing, turns
from yolos_jax import mesh as mesh_lib
from yolos_jax.metrics import Metrics
from yolos_jax.passes import Passes
from yolos_jax.programs import jit
from yolos_jax.step import StepShape, TrainStep

FORMS = ("host", "device", "one")
# Recipe, rows and columns of patches, images of a step.
CASES = (("ti", 16, 22, 8), ("ti", 32, 43, 2), ("s", 32, 43, 2))
QUICK = (("ti", 4, 6, 2),)
COLUMNS = {
    "model": "", "patches": "d", "images": "d", "form": "", "step_ms": ".1f", "program_MiB": ".1f",
    "peak_MiB": ".1f", "residual_MiB": ".1f", "loss": ".4f",
}  # fmt: skip
MIB = 2**20


def measure(
    model: str,
    rows: int,
    cols: int,
    images: int,
    form: str,
    dtype: str,
    multiple: int,
    seconds: float,
    tiny: bool,
    lock: str = "",
) -> Iterator[dict[str, Any]]:
    """Measures one form; yields one row."""
    config = ours.recipe(model, tiny=tiny, dtype=dtype)
    config.buckets.multiple = multiple
    config.matcher.where = "host" if form == "host" else "device"
    train_step = ours.make_train_step(config)
    on_host, bucket = ours.make_host_part(config, images, (rows, cols))
    params = ours.draw_params(train_step.model)
    with turns.shared(lock):
        part = mesh_lib.put_batch(on_host, train_step.mesh)
        state = train_step.init_state(jax.random.key(0), params)
        residuals = None
        if form == "one":
            take_step, needed = one_program(train_step, state, part, bucket)
        else:
            programs = train_step.compile(StepShape(bucket, images, pictures.MOST_BOXES))
            residuals = train_step.residual_bytes()[bucket]
            needed = step_bytes(train_step, programs)

            def take_step(state: Any) -> tuple[Any, Metrics]:
                return train_step(state, [part], bucket, 1e-6)

    def step() -> Metrics:
        nonlocal state
        state, metrics = take_step(state)
        return metrics

    with turns.alone(lock):
        first_loss = step()["loss"]
        each = timing.seconds_each(step, at_least=seconds)
    yield {
        "model": model,
        **row_of(form, bucket, images, each, needed, residuals, first_loss),
        **ours.surroundings(config, bucket),
    }


def row_of(
    form: str,
    bucket: Any,
    images: int,
    seconds: float,
    needed: int,
    residuals: int | None,
    loss: float,
) -> dict[str, Any]:
    """What is said of a form: its seconds, the bytes of its programs and between them."""
    peak = ours.peak_bytes()
    return {
        "patches": bucket.patches,
        "images": images,
        "form": form,
        "step_ms": 1000 * seconds,
        "images_per_s": images / seconds,
        "program_MiB": needed / MIB,
        "peak_MiB": None if peak is None else peak / MIB,
        "residual_MiB": None if residuals is None else residuals / MIB,
        "loss": loss,
        "device": jax.devices()[0].device_kind,
    }


def one_program(
    train_step: TrainStep, state: Any, part: Any, bucket: Any
) -> tuple[Callable[[Any], tuple[Any, Metrics]], int]:
    """The whole step compiled as one program, and the bytes that it needs.

    Args:
      train_step: with matcher.where 'device'.
      state: of it; only shapes and places matter.
      part: the batch and its targets.
      bucket: of the batch.
    """
    passes = Passes(train_step.model, train_step.updater, train_step.config)
    bounds = (bucket.rows, bucket.cols)

    def whole(state: Any, microbatch: Any, lr: Any) -> tuple[Any, Metrics]:
        forward = passes.forward(state.params, state.step, microbatch, bounds)
        return passes.update(state, microbatch, forward, forward.matched_query, lr)

    microbatch, lr = ours.microbatch(part), np.float32(1e-6)
    jitted = jit(whole, train_step.mesh, backward=True, donate_argnums=0)
    compiled = jitted.lower(state, microbatch, lr).compile()
    return lambda state: compiled(state, microbatch, lr), program_bytes(compiled)


def program_bytes(compiled: Any) -> int:
    """What a program needs on the device: arguments, results and temporaries; no byte twice."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def step_bytes(train_step: TrainStep, programs: dict[str, Any]) -> int:
    """What a step of two programs needs on the device."""
    # The optimiser's state is no argument of the first program, and on the device all the same.
    return max(
        program_bytes(programs["forward"].compiled) + bytes_of(train_step.abstract_state.opt_state),
        program_bytes(programs["update"].compiled),
    )


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, real or abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=10, help="that every form is run for")
    arguments = parser.parse_args()
    rows = []
    for case in QUICK if arguments.quick else CASES:
        of_case = []
        for form in FORMS:
            order = dict(zip(("model", "rows", "cols", "images"), case, strict=True))
            order |= {"form": form, "dtype": arguments.dtype, "multiple": 8}
            order |= {"seconds": 0.1 if arguments.quick else arguments.seconds}
            environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            of_case += isolated.rows_of(
                "benchmarks.two_programs:measure",
                {**order, "tiny": arguments.quick},
                environment=environment,
            )
        for row in of_case[1:]:
            checks.same(f"loss, {row['form']}", row["loss"], of_case[0]["loss"], most=1e-2)
        rows += of_case
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "two_programs", rows)


if __name__ == "__main__":
    main()
