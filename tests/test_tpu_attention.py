"""Cycles read from a kernel's schedule, by hand; the compiler itself is not asked."""

from __future__ import annotations

import json
import re
import sys

import jax
import pytest

from benchmarks import planned, scale, tpu_attention
from yolos_jax.models import splash_attention

# As the compiler writes it: six lines before the loop; in it 3 that every step takes, 2 of a row's
# first step, 1, 4 of the product, 1, 3 of a row's last step, 2 to its end; 1 after.
LINES = "LH: loop header\nPF: predicated region fallthrough\n\n" + "".join(
    f"{address:#6x} {label}: {'> ' if label or inside else ''}{{ {text} }}\n"
    for address, (label, inside, text) in enumerate(
        [("  ", False, "%s1 = smov.u32 0")] * 6
        + [("LB", True, "a"), ("  ", True, "b")]
        + [("  ", True, "%1 = sbr.rel (%p1_p0) target = $region8")]
        + [("  ", True, "first")] * 2
        + [("PF", True, "%2 = sbr.rel (%p2_p0) target = $region9")]
        + [("  ", True, "product")] * 4
        + [("PF", True, "%3 = sbr.rel (!%p3_p0) target = $region10")]
        + [("  ", True, "last")] * 3
        + [("PF", True, "a\nsecond_minor_factor: 1 */ }")]
        + [("  ", True, "%4 = sbr.rel (!%p4_p0) target = $region1")]
        + [("  ", False, "after")]
    )
)


def test_what_only_the_ends_of_a_row_do_counts_once_per_row():
    assert tpu_attention.read_schedule(LINES, steps=5) == (3 + 1 + 4 + 1 + 2, 2 + 3)


def test_a_row_of_one_step_does_everything():
    assert tpu_attention.read_schedule(LINES, steps=1) == (16, 0)


@pytest.mark.parametrize("text", ["", LINES.replace("LB", "  "), LINES.replace("PF", "  ")])
def test_what_is_no_such_schedule_is_refused(text):
    with pytest.raises(ValueError, match="not the schedule of a kernel over blocks"):
        tpu_attention.read_schedule(text, steps=5)


def test_cycles_of_a_head(tmp_path):
    for name in ("fwd", "dkv", "dq"):
        (tmp_path / f"1-splash_mha_{name}_segmented.1-72-final_bundles.txt").write_text(LINES)
        other = tmp_path / f"1-splash_mha_{name}_segmented.1-71-schedule-analysis_final_bundles.txt"
        other.write_text("Schedule analysis:")
    # Of 1000 tokens padded to four squares of 256: four rows of four steps.
    found = tpu_attention.kcycles(tmp_path, tpu_attention.square(256), 1000)
    assert found == {name: (16 * 11 + 4 * 5) / 1e3 for name in tpu_attention.KERNELS}
    # Of 16 tiles 4 x 16: four rows of one step.
    found = tpu_attention.kcycles(tmp_path, splash_attention.block_sizes(2048, 2048), 2048)
    assert found == dict.fromkeys(tpu_attention.KERNELS, 4 * 16 / 1e3)


def test_a_compiler_that_wrote_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"0 files \*splash_mha_fwd_.* expected one"):
        tpu_attention.kcycles(tmp_path, tpu_attention.square(256), 1000)


def test_squares_change_nothing_but_the_blocks():
    ours, square = splash_attention.block_sizes(2048, 2048), tpu_attention.square(256)
    assert {square.block_q, square.block_kv, square.block_kv_dkv, square.block_q_dq} == {256}
    assert square.q_layout == ours.q_layout
    assert square.use_fused_bwd_kernel == ours.use_fused_bwd_kernel


def test_command(monkeypatch, tmp_path, capsys):
    def measure(chip, tokens, side, dump):
        cycles = {f"{name}_kcycles": 10.0 + side / 16 for name in tpu_attention.KERNELS}
        return {"chip": chip, "tokens": tokens, "blocks": str(side or "ours"), **cycles}

    out = tmp_path / "out.json"
    monkeypatch.setattr(tpu_attention, "measure", measure)
    monkeypatch.setattr(scale, "prepare", lambda: None)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setattr(sys, "argv", ["tpu_attention", "--quick", "--out", str(out)])
    tpu_attention.main()
    assert re.search("v5e +640 +128 +18.0 +18.0 +18.0 +1.80", capsys.readouterr().out)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["blocks"], row["relative"]) for row in rows] == [("ours", 1), ("128", 1.8)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--squares", "100"), "--squares 100: not a multiple of 128"),
        (("--tokens", "640", "0"), "--tokens 0: not positive"),
    ],
)
def test_numbers_that_cannot_be_are_named(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tpu_attention", *given])
    with pytest.raises(SystemExit):
        tpu_attention.main()
    assert said in capsys.readouterr().err


def test_blocks_without_room_are_named_in_one_line(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nand much more")

    monkeypatch.setattr(planned, "slice_devices", lambda chip, chips: jax.devices())
    monkeypatch.setattr(splash_attention, "attend", refuse)
    with pytest.raises(SystemExit, match=r"^v5e, 640 tokens, squares of 2048: .*: no room$"):
        tpu_attention.measure("v5e", 640, 2048, tmp_path)
