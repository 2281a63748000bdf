"""Which backend 'auto' is."""

from __future__ import annotations

from yolos_jax.models import attention


def test_auto_picks_by_platform_type_and_length(monkeypatch):
    monkeypatch.setattr(attention, "_cudnn_works", lambda: True)

    def pick(platform, dtype, tokens):
        return attention.resolve("auto", platform=platform, dtype=dtype, tokens=tokens)

    assert pick("cpu", "float32", 1829) == pick("cpu", "bfloat16", 1829) == "heads"
    assert pick("tpu", "bfloat16", 4352) == "splash"
    assert pick("tpu", "float32", 4352) == pick("gpu", "float32", 4352) == "chunked"
    assert pick("gpu", "bfloat16", 4352) == "cudnn"
    assert {pick(platform, "bfloat16", 80) for platform in ("cpu", "gpu", "tpu")} == {"stock"}
    named = attention.resolve("chunked", platform="cpu", dtype="float32", tokens=9)
    assert named == "chunked"


def test_without_cudnn_auto_says_so_once_and_goes_on(capsys):
    attention._cudnn_works.cache_clear()
    attention._print_once.cache_clear()
    for _ in range(2):
        choice = attention.resolve("auto", platform="gpu", dtype="bfloat16", tokens=4352)
        assert choice == "chunked"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "no cuDNN attention here" in lines[0]
    assert lines[1] == "attention: 'chunked' for long sequences in bfloat16 on gpu"
