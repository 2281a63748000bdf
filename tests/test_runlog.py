"""The metrics file survives crashes and resumes without doubles; changed keys are named."""

from __future__ import annotations

import json
import re

import pytest

from configs import common
from yolos_jax import runlog


def open_log(path, step=0, every=2, total=10, evaluated=None):
    evaluated = step if evaluated is None else evaluated
    return runlog.RunLog(
        path, step=step, evaluated=evaluated, total_steps=total, batch_size=4, every=every
    )


def train(log, first, last):
    for step in range(first, last):
        log.step(step, {"loss": float(step), "finite": 1.0}, lr=0.1, epoch=step / 5)


def read(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_line_every_so_many_steps_and_after_the_last(tmp_path, capsys):
    with open_log(tmp_path, every=4) as log:
        train(log, 0, 10)
        scores = {"AP": 0.5, "AP50": 0.75, "AP75": 0.4, "per_class": {"a": 0.1}}
        log.evaluation(10, scores | {"best_score": 0.2}, 1.5)
    assert "note: no box scores 0.5 or more, the best 0.200" in capsys.readouterr().err
    lines = read(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 4), ("train", 8), ("train", 10), ("eval", 10)
    ]  # fmt: skip
    assert lines[0]["loss"] == 3.0 and lines[0]["epoch"] == 0.6 and lines[0]["lr"] == 0.1
    assert lines[0]["images_per_s"] > 0
    assert lines[3]["per_class"] == {"a": 0.1} and lines[3]["seconds"] == 1.5


def test_resuming_drops_what_will_be_done_again(tmp_path):
    with open_log(tmp_path) as log:
        train(log, 0, 4)
        log.evaluation(4, {"AP": 0.25, "AP50": 0.5, "AP75": 0.1}, 1)
        train(log, 4, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # died here
    with open_log(tmp_path, step=4) as log:
        assert [line["step"] for line in read(tmp_path)] == [2, 4, 4]
        train(log, 4, 10)
    assert [line["step"] for line in read(tmp_path)] == [2, 4, 4, 6, 8, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    # Saved without the evaluation of its step, which will be made again.
    with open_log(tmp_path, step=4, evaluated=0):
        assert [(line["kind"], line["step"]) for line in read(tmp_path)] == [
            ("train", 2), ("train", 4)
        ]  # fmt: skip


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with open_log(tmp_path, every=1) as log:
        log.step(0, {"loss": float("nan"), "grad_norm": float("inf")}, lr=0.1, epoch=0)
    line = read(tmp_path)[0]
    assert line["loss"] is None and line["grad_norm"] is None


def test_the_bar_shows_loss_ap_and_speed(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.evaluation(0, {"AP": 0.25, "AP50": 0.5, "AP75": 0.125}, 1)
        train(log, 0, 10)
        log.say("a remark")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 0: AP 0.250, AP50 0.500, AP75 0.125" in shown.err and "a remark\n" in shown.err
    assert re.search(r"10/10 .*loss 9\.000, AP 0\.250, \d+ images/s", shown.err)


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with open_log(tmp_path) as log:
        train(log, 0, 10)
        log.evaluation(10, {"AP": 0.25, "AP50": 0.5, "AP75": 0.1}, 1)
        log.say("a remark")
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_changed_configurations_are_named_with_both_values(tmp_path):
    old = json.loads(common.get_config().to_json())
    config = common.get_config()
    config.log.every_steps = 7  # may change
    new = json.loads(config.to_json())
    runlog.refuse_changes(old, new, common.CHANGEABLE_ON_RESUME, tmp_path, {})
    config.optimizer.lr = 0.5
    config.augment.scales = (64, 96)
    new = json.loads(config.to_json())
    del old["loss"]["eos_coef"]
    with pytest.raises(ValueError) as error:
        runlog.refuse_changes(old, new, common.CHANGEABLE_ON_RESUME, tmp_path, {})
    message = str(error.value)
    assert f"optimizer.lr: was {old['optimizer']['lr']}, is 0.5" in message
    assert "augment.scales: was [480, 496" in message and "is [64, 96]" in message
    assert "loss.eos_coef: was (no such key), is 0.1" in message
    assert "every_steps" not in message and str(tmp_path) in message


def test_a_run_may_have_been_begun_before_there_was_a_key(tmp_path):
    config = common.get_config()
    old, new = (json.loads(config.to_json()) for _ in range(2))
    del old["model"]["scan"], old["model"]["detr"], old["loss"]["eos_coef"]
    defaults = common.get_config().to_dict()
    runlog.refuse_changes(old, new, (), tmp_path, defaults)
    new["loss"]["eos_coef"] = 0.2
    with pytest.raises(ValueError, match=r"\n  loss\.eos_coef: was 0\.1, is 0\.2$"):
        runlog.refuse_changes(old, new, (), tmp_path, defaults)


def test_a_work_directory_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    assert runlog.local_folder(str(tmp_path / "a" / "b")) == (tmp_path / "a" / "b").resolve()
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    for wrong, message in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file" / "run", "file is a file"),
        ("gs://bucket/run", "only the pictures may be in an object store"),
    ):
        with pytest.raises(ValueError, match=message):
            runlog.local_folder(str(wrong))
