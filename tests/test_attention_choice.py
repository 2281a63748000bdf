"""Which backend 'auto' is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

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


def fails_when_run(q, k, v, lengths):
    """What a card or a driver may do: there is a program, and it ends in an error."""

    def fail(q):
        raise RuntimeError("not on this card")

    return jax.pure_callback(fail, q, q)


def ignores_lengths(q, k, v, lengths):
    return attention.attention(q, k, v, jnp.full_like(lengths, q.shape[1]), "stock")


def right(q, k, v, lengths):
    return attention.attention(q, k, v, lengths, "chunked")


@pytest.mark.parametrize(
    ("cudnn", "choice", "reason"),
    [
        (fails_when_run, "chunked", "(Pure callbacks do not support"),
        (jax.custom_jvp(fails_when_run), "chunked", "(INTERNAL: CpuCallback error"),
        (ignores_lengths, "chunked", "(its results are wrong)"),
        (right, "cudnn", ""),
    ],
)
def test_cudnn_is_tried_while_a_program_is_traced(cudnn, choice, reason, monkeypatch, capsys):
    """Its own program then, run at once: not a part of the one that asks."""
    if isinstance(cudnn, jax.custom_jvp):
        cudnn.defjvp(lambda primals, tangents: (cudnn(*primals), tangents[0]))
    monkeypatch.setattr(attention, "_cudnn", cudnn)
    attention._cudnn_works.cache_clear()
    attention._print_once.cache_clear()
    choices = []

    @jax.jit
    def program(x):
        choices.append(attention.resolve("auto", platform="gpu", dtype="bfloat16", tokens=4352))
        return x

    assert str(jax.make_jaxpr(program)(1.0)).count("\n") < 5
    assert choices == [choice]
    assert reason in capsys.readouterr().err
    attention._cudnn_works.cache_clear()
