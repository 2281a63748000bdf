"""Bytes and products read from a GPU program's text, by hand; the compiler itself is not asked."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from benchmarks import cards, gpu_kernels, kernels, planned, scale
from tests.test_scale import canned
from tests.tiny import BUCKET, TARGETS

PROGRAM = """HloModule jit_update, is_scheduled=true

%fused_slice (p0: f32[3,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = f32[3,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice.1 = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4,8}
  ROOT %bitcast.1 = f32[4,8]{1,0} bitcast(%slice.1)
}

%fused_update (p0.1: f32[3,4,8], p1.1: f32[4,8], p2.1: s32[]) -> f32[3,4,8] {
  %p0.1 = f32[3,4,8]{2,1,0} parameter(0)
  %p1.1 = f32[4,8]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %bitcast.2 = f32[1,4,8]{2,1,0} bitcast(%p1.1)
  ROOT %update.1 = f32[3,4,8]{2,1,0} dynamic-update-slice(%p0.1, %bitcast.2, %p2.1)
}

%fused_product (p0.2: f32[4,8], p1.2: f32[8,2]) -> f32[4,2] {
  %p0.2 = f32[4,8]{1,0} parameter(0)
  %p1.2 = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p0.2, %p1.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%beside (p0.3: f32[3,4,8], p1.3: f32[1,4,8], p2.3: s32[]) -> f32[3,4,8] {
  %p0.3 = f32[3,4,8]{2,1,0} parameter(0)
  %p1.3 = f32[1,4,8]{2,1,0} parameter(1)
  %p2.3 = s32[] parameter(2)
  ROOT %update.2 = f32[3,4,8]{2,1,0} dynamic-update-slice(%p0.3, %p1.3, %p2.3)
}

%body (t: (s32[], f32[3,4,8])) -> (s32[], f32[3,4,8]) {
  %t = (s32[], f32[3,4,8]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %kept = f32[3,4,8]{2,1,0} get-tuple-element(%t), index=1
  %q = bf16[2,5,3,8]{3,2,1,0} copy(%n)
  %one = f32[4,8]{1,0} fusion(%kept, %n), kind=kLoop, calls=%fused_slice, metadata={op_name="a/b/c/d/e"}
  %attend = (bf16[2,3,5,8]{3,1,2,0}, f32[2,3,5]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %product = (bf16[4,2]{1,0}, s8[4194304]{0}) custom-call(%one, %one), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %started = ((f32[3,4,8], f32[1,4,8], s32[]), f32[3,4,8], u32[]) fusion-start(%kept, %one, %n), kind=kLoop, calls=%beside
  %ended = f32[3,4,8]{2,1,0} fusion-done(%started)
  %updated = f32[3,4,8]{2,1,0} fusion(%ended, %one, %n), kind=kLoop, calls=%fused_update
  ROOT %all = (s32[], f32[3,4,8]{2,1,0}) tuple(%n, %updated)
}

%condition (t.1: (s32[], f32[3,4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %while = (s32[], f32[3,4,8]{2,1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = f32[4,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_product
}
"""  # noqa: E501


def test_kernels_by_hand():
    found = {
        (kernel.does, kernel.gives): kernel
        for kernel in kernels.read(PROGRAM)
        if kernel.does not in ("copy", "compare")
    }
    assert len(found) == 6
    sliced = found["fusion", "f32[4, 8]"]
    assert (sliced.times, sliced.bytes, sliced.flops) == (3, 3 * (128 + 4 + 128), 0)
    assert sliced.source == "b/c/d/e"
    in_place = found["fusion", "f32[3, 4, 8]"]  # reads 32 numbers and a place, writes 32
    assert in_place.bytes == 3 * (128 + 4 + 128)
    beside = found["dynamic-update-slice", "f32[3, 4, 8]"]  # once, where it begins
    assert (beside.times, beside.bytes) == (3, 3 * 2 * 128)
    attended = found["__cudnn$fmhaSoftmaxBackward", "bf16[2, 3, 5, 8]"]
    assert attended.flops == 3 * 2 * 5 * (2 * 3 * 5 * 8) * 5 and not attended.wide
    assert attended.bytes == 3 * (3 * 480 + 480 + 120)
    product = found["__cublas$lt$matmul", "bf16[4, 2]"]  # without its workspace
    assert (product.flops, product.wide) == (3 * 2 * 4 * 2 * 8, True)
    assert product.bytes == 3 * (2 * 128 + 16)
    last = found["fusion", "f32[4, 2]"]
    assert (last.times, last.flops, last.wide, last.bytes) == (1, 128, True, 128 + 64 + 32)
    assert last.seconds(bandwidth=224, flops=1e9, wide_flops=64) == 2
    assert last.seconds(bandwidth=56, flops=1e9, wide_flops=64) == 4


def test_costs_are_of_an_image_the_dearest_first():
    made = [
        kernels.Kernel("fusion", 1, 4.8e12 * 1e-6, 0, False, "", ""),
        kernels.Kernel("__cublas$gemm", 1, 0, 67e12 * 3e-6, True, "", ""),
    ]
    rows = gpu_kernels.costs(made, "h200", images=2)
    assert [row["does"] for row in rows] == ["__cublas$gemm", "fusion"]
    assert [row["us"] for row in rows] == pytest.approx([1.5, 0.5])
    assert [row["share"] for row in rows] == pytest.approx([0.75, 0.25])


def test_command(monkeypatch, tmp_path, capsys):
    memory = SimpleNamespace(temp_size_in_bytes=64 * 2**20)
    compiled = SimpleNamespace(as_text=lambda: PROGRAM, memory_analysis=lambda: memory)
    asked = []

    def compile_step(config, mesh, shape, classes):
        asked.append((config.model.attention, shape.batch_size))
        return None, {"update": SimpleNamespace(compiled=compiled)}

    monkeypatch.setattr(scale, "prepare", asked.append)
    monkeypatch.setattr(planned, "slice_mesh", lambda *_: None)
    monkeypatch.setattr(planned, "longest", lambda _: (BUCKET, TARGETS))
    monkeypatch.setattr(planned, "compile_step", compile_step)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--images", "32", "--out", str(out)])
    gpu_kernels.main()
    assert asked == [["h200"], ("cudnn", 32)]  # what 'auto' would try on a card
    printed = capsys.readouterr().out
    assert "yolos_s on h200:1, fsdp 1, 32 images per chip" in printed
    assert "2 MiB of temporaries" in printed
    assert {row["program"] for row in json.loads(out.read_text())["rows"]} == {"update"}


def test_a_machine_of_gpus_is_described_to_the_compiler(monkeypatch):
    seen = {}

    def describe(**asked):
        seen.update(asked)
        return SimpleNamespace(devices=["card"] * 8)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setattr(cards, "ENVIRONMENT", {})
    assert planned.slice_devices("h200", 8) == ["card"] * 8
    assert (seen["platform"], seen["topology"]) == ("cuda", "1x1x8")
    assert 'device_description_str: "NVIDIA H200"' in seen["target_config"]
    with pytest.raises(ValueError, match="a slice of 64 h200 chips; expected one of 1, 8"):
        planned.slice_devices("h200", 64)


def test_of_gpus_nothing_is_forecast_but_what_fits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale, "facts", canned)
    row = scale.examine(planned.Case("h200", 8, "yolos_s", 1, 16), tmp_path)
    printed = capsys.readouterr().out
    assert "a chip needs 16.00 GiB of 124.75 GiB" in printed and "step at least" not in printed
    assert "efficiency" not in row and "error" not in row
    assert scale.table([row]).splitlines()[-1].split()[-2:] == ["16.00", "GiB"]
    most = row["case"] | {"images": 16, "tried": {16: 2**30}}
    assert scale.table_of_largest([most]).endswith("| 16 | 1.00 GiB of 124.75 GiB | 16, 128 |")


@pytest.mark.parametrize(
    ("chips", "module", "says"),
    [
        (["h200"], "jax_cuda13_plugin", r"no jax_cuda13_plugin here: pip install 'jax\[cuda13\]'"),
        (["v5e"], "libtpu", "no libtpu here: pip install"),
    ],
)
def test_without_a_compiler_the_command_says_which(chips, module, says, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # which makes importing it an ImportError
    with pytest.raises(SystemExit, match=says):
        scale.prepare(chips)
