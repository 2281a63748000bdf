"""Devices tell each other gradients, parameters that are spread, and numbers; nothing else."""

from __future__ import annotations

import math

import jax
import pytest

from benchmarks import hlo
from tests import shared_programs, tiny_detr
from tests.tiny import BUCKET, QUERIES, TARGETS, make_config, make_step, mesh_of
from yolos_jax import mesh as mesh_lib
from yolos_jax import step

IMAGES = 8
MODULE = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %gathered = (f32[8,128]{1,0}, f32[8,256]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={1}
  %whole = f32[8,256]{1,0} all-gather-done(%gathered)
  ROOT %next = (s32[], f32[8,128]) tuple(%i, %x)
}

%scattering (p: f32[64,4]) -> f32[32,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %all-reduce.9 = f32[64,4]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %slice = f32[32,4]{1,0} dynamic-slice(%all-reduce.9, %i)
}

%beside (p: bf16[16]) -> bf16[4] {
  %p = bf16[16]{0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[4]{0} reduce-scatter(%p), replica_groups=mesh['data'=4,'fsdp'=2], device_ids=([4,2]T(1,0)) {'data'}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,128]) -> f32[] {
  %x = f32[8,128]{1,0} parameter(0)
  %loop = (s32[], f32[8,128]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"},"known_induction_variable":{}}
  %all-reduce-scatter.3 = f32[32,4]{1,0} fusion(%y), kind=kCustom, calls=%scattering
  %started = ((bf16[16]{0}), bf16[4]{0}, u32[]) async-start(%z), calls=%beside
  %done = bf16[4]{0} async-done(%started)
  ROOT %all-reduce.1 = (f32[], /*index=1*/pred[2]{0}) all-reduce(%l, %m), replica_groups={}, to_apply=%add, metadata={op_name="jit(f)/loss" source_line=3}
}
"""  # noqa: E501
# As libtpu writes it: loops say how often they run in their computations only, a collective that
# runs beside others stands in every fusion that carries it on, and attributes have several lines.
ON_TPU = """HloModule jit_f, is_scheduled=true

%start (p: f32[4]) -> (f32[4], f32[16], u32[]) {
  %p = f32[4]{0} parameter(0)
  %all-gather.1 = f32[16]{0:T(128)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  ROOT %started = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (p: f32[4], q: f32[8]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %all-gather.2 = f32[16]{0:T(128)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  ROOT %beside = f32[8]{0} parameter(1)
}

%all-reduce-scatter.5 (p: f32[64,4]) -> f32[32,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %all-reduce.9 = f32[64,4]{1,0} all-reduce(%p), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %slice = f32[32,4]{1,0} dynamic-slice(%all-reduce.9, %i)
}

%body (state: (f32[8], u32[])) -> (f32[8], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %state = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=0, frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(f)/attention"}
  %count = u32[]{:T(128)} get-tuple-element(%state), index=1
  %more = u32[]{:T(128)} add(%count, %two), metadata={op_name="jit(f)/while"}
  %all-reduce.2 = f32[8]{0} all-reduce(%x), channel_id=9, replica_groups={}, to_apply=%add
  ROOT %next = (f32[8]{0}, /*index=1*/u32[]{:T(128)}) tuple(%all-reduce.2, %more)
}

%condition (state: (f32[8], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(11)
  %state = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[] {
  %x = f32[4]{0} parameter(0)
  %gather = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %async_collective_fusion.1 = f32[8]{0} fusion(%x, %y), kind=kOutput, calls=%carry
  %loop = (f32[8]{0}, u32[]{:T(128)}) while(%init), condition=%condition, body=%body
  ROOT %fusion.3 = f32[32,4]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.5
}
"""  # noqa: E501


def test_collectives_of_a_module_by_hand():
    gather, reduced, scattered, numbers = hlo.collectives(MODULE)
    assert gather == hlo.Collective(
        "all-gather", (("f32", (8, 256)),), 8192, 2, True, True, 12, source=""
    )
    assert gather.total_bytes == 12 * 8192
    assert reduced[:7] == ("reduce-scatter", (("f32", (64, 4)),), 1024, 2, False, False, 1)
    assert scattered[:7] == ("reduce-scatter", (("bf16", (4,)),), 32, 4, True, False, 1)
    arrays = (("f32", ()), ("pred", (2,)))
    assert numbers == hlo.Collective("all-reduce", arrays, 6, 0, False, False, 1, "jit(f)/loss")


def test_collectives_as_they_stand_in_programs_for_tpu():
    gathered, scattered, looped = hlo.collectives(ON_TPU)
    assert gathered[:7] == ("all-gather", (("f32", (16,)),), 64, 4, True, False, 1)
    assert scattered[:7] == ("reduce-scatter", (("f32", (64, 4)),), 1024, 2, False, False, 1)
    assert looped[:7] == ("all-reduce", (("f32", (8,)),), 32, 0, False, True, 6)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("mesh['data'=8,'fsdp'=2] {'data'}", 8),
        ("mesh['data'=8,'fsdp'=2] {'data','fsdp'}", 16),
        # Of data = 0..7 those that differ in the last of its 4 x 2: 0 and 1, 2 and 3, ...
        ("mesh['data'=8,'fsdp'=2] {'data':(4)2}", 2),
        ("mesh['data'=8,'fsdp'=2] {'data':(1)4}", 4),  # 0, 2, 4, 6 and 1, 3, 5, 7
        ("mesh['data'=8,'fsdp'=2] {'fsdp','data':(2)2}", 4),
        # The first and the last of 2 x 2 x 2: 0, 1, 4, 5 and 2, 3, 6, 7.
        ("mesh['data'=8], device_ids=(1,0,2,3,4,5,6,7) {'data':(1)2,'data':(4)2}", 4),
        ("mesh['data'=8,'fsdp'=1] {}", 1),
    ],
)
def test_devices_of_a_group_by_axes_of_a_mesh(groups, devices):
    text = MODULE.replace("replica_groups={},", f"replica_groups={groups}, channel_id=1,")
    numbers = hlo.collectives(text)[-1]
    assert (numbers.kind, numbers.group) == ("all-reduce", devices)


@pytest.fixture(
    scope="module", params=[(1, "stock"), (2, "stock"), (2, "heads")], ids=["data", "fsdp", "heads"]
)
def compiled(request):
    """A step on 8 devices, and the collectives of its programs, numbers left out."""
    fsdp, attention = request.param
    mesh = mesh_of(8, fsdp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "SHARDED_FROM", 256)  # The model is small.
        train_step = make_step(mesh, make_config(**{"model.attention": attention}))
    programs = train_step.compile(step.StepShape(BUCKET, IMAGES, TARGETS))
    return train_step, collectives_of(programs)


def collectives_of(programs):
    """What devices tell each other by program, numbers left out."""
    found = {}
    for kind, program in programs.items():
        every = hlo.collectives(program.compiled.as_text())
        assert every, "the text of programs is not understood"
        found[kind] = [one for one in every if not is_numbers(one)]
    return found


def is_numbers(collective):
    """Whether it is about metrics and normalisers: no array has more than a number per image."""
    return all(math.prod(shape) <= IMAGES for _, shape in collective.arrays)


def parameter_shapes(train_step):
    """Of whole parameters and of one block's, halves included; the order of axes left out."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(train_step.abstract_state.params)}
    shapes |= {shape[1:] for shape in shapes}
    shapes.add((1 + QUERIES, train_step.model.config.width))  # class and detection tokens' tables
    halves = {
        (*shape[:axis], size // 2, *shape[axis + 1 :])
        for shape in shapes
        for axis, size in enumerate(shape)
    }
    return {tuple(sorted(shape)) for shape in shapes | halves}


def parameter_bytes(train_step):
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(train_step.abstract_state.params))


def assert_only_parameters_travel(train_step, found):
    known = parameter_shapes(train_step) | {()}
    for kind, collectives in found.items():
        for one in collectives:
            for _, shape in one.arrays:
                assert tuple(sorted(shape)) in known or math.prod(shape) <= IMAGES, (kind, one)
            assert one.kind in ("all-reduce", "all-gather", "reduce-scatter"), (kind, one)


def test_no_activation_travels(compiled):
    assert_only_parameters_travel(*compiled)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2], ids=["data", "fsdp"])
def test_no_activation_of_a_detr_travels(fsdp, monkeypatch, quick_to_compile):
    """One image a device: with fewer queries than a layer is wide, moving these would be less."""
    shared_programs.same_names(monkeypatch.setattr)  # with tests of the same step
    monkeypatch.setattr(mesh_lib, "SHARDED_FROM", 64)
    train_step = make_step(mesh_of(4, fsdp), tiny_detr.make_config(), tiny_detr.CLASSES)
    programs = train_step.compile(step.StepShape(tiny_detr.BUCKET, 4, TARGETS))
    found = collectives_of(programs)
    assert_only_parameters_travel(train_step, found)
    assert bool(found["forward"]) == (fsdp > 1)
    for leaf in programs["forward"].outputs.residuals:
        parts = math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert parts == 4 or math.prod(leaf.shape) <= 128, leaf


def test_forward_gathers_parameters_where_they_are_spread(compiled):
    train_step, found = compiled
    gathered = sum(one.total_bytes for one in found["forward"])
    assert {one.kind for one in found["forward"]} <= {"all-gather"}
    if train_step.mesh.shape["fsdp"] == 1:
        assert gathered == 0
    else:
        spread = [
            leaf.size * 4
            for leaf, sharding in zip(
                jax.tree.leaves(train_step.abstract_state.params),
                jax.tree.leaves(train_step.shardings.params),
                strict=True,
            )
            if not sharding.is_fully_replicated
        ]
        assert 0.9 * sum(spread) <= gathered <= 1.1 * sum(spread)


def test_update_reduces_every_gradient_once(compiled):
    train_step, found = compiled
    reduced = sum(one.total_bytes for one in found["update"] if one.kind != "all-gather")
    size = parameter_bytes(train_step)
    fsdp = train_step.mesh.shape["fsdp"]
    # The CPU has no reduce-scatter: it reduces the whole among the devices that share a copy, and
    # its own part among the others.
    most = size if fsdp == 1 else size * (1 + 1 / fsdp)
    assert size <= reduced <= 1.05 * most + 1000
    assert any(one.in_loop and one.times == 2 for one in found["update"])


def test_every_residual_is_spread_over_all_devices(compiled):
    train_step, _ = compiled
    programs = train_step.compile(step.StepShape(BUCKET, IMAGES, TARGETS))
    for leaf in programs["forward"].outputs.residuals:
        parts = math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert parts == IMAGES or math.prod(leaf.shape) <= 64, leaf
