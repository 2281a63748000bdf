"""When a run goes on in spite of what went wrong, and when it stops."""

from __future__ import annotations

import json

import pytest

from yolos_jax.health import Health


def make(tmp_path, **changes):
    values = {"num_images": 100, "max_bad_fraction": 0.1, "max_skipped": 3} | changes
    return Health(tmp_path, **values)


def step(images=8, finite=True):
    return {"images": images, "finite": finite, "loss": float("nan"), "grad_norm": 1.0}


def test_a_few_unreadable_pictures_pass(tmp_path):
    health = make(tmp_path)
    for number in range(10):
        health.check(number, 8, range(8), step(images=7))
    assert health.unreadable == 10


def test_too_many_unreadable_pictures_stop_and_are_named(tmp_path):
    health = make(tmp_path)
    assert health.note_unreadable(["a.jpg: truncated"]) == ["a.jpg: truncated"]
    with pytest.raises(
        ValueError, match=r"11 of 88 .*max_bad_fraction=0.1 .*100 there are:\n  a.jpg"
    ):
        for number in range(11):
            health.check(number, 8, range(8), step(images=7))


def test_validation_has_the_same_limit(tmp_path):
    health = make(tmp_path)
    said = ["v.jpg: missing", "w.jpg: missing"]
    assert health.note_unreadable(said, training=False) == said
    assert health.note_unreadable(["a.jpg: truncated"]) == ["a.jpg: truncated"]
    assert not health.note_unreadable(said, training=False)  # the next evaluation finds the same
    health.check_validation(1, 10, said[:1])
    with pytest.raises(ValueError, match=r"2 of 10 validation .*=0.1:\n  v.*\n  w.jpg: missing$"):
        health.check_validation(2, 10, said)
    with pytest.raises(ValueError, match=r"there are:\n  a.jpg: truncated$"):
        health.check(0, 80, range(8), step(images=8))


def test_an_unreadable_picture_is_reported_once(tmp_path):
    health = make(tmp_path)
    health.note_unreadable(["a.jpg: truncated"])
    assert health.note_unreadable(["a.jpg: truncated", "b.jpg: missing"]) == ["b.jpg: missing"]
    assert (tmp_path / "unreadable.txt").read_text() == "a.jpg: truncated\nb.jpg: missing\n"


def test_steps_that_are_not_finite_are_recorded_and_forgiven(tmp_path):
    health = make(tmp_path)
    for number in range(10):
        health.check(number, 8, [number], step(finite=number % 3 == 0))
    assert health.skipped == 6
    records = [
        json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2, 4, 5, 7, 8]
    assert records[0]["image_ids"] == [1]


def test_too_many_in_a_row_stop_with_the_images(tmp_path):
    health = make(tmp_path)
    with pytest.raises(ValueError, match=r"3 steps in a row .* step 2 with image ids \[41\]"):
        for number in range(3):
            health.check(number, 8, [41], step(finite=False))


def test_a_resumed_run_counts_on_and_takes_later_steps_again(tmp_path):
    first = make(tmp_path)
    for number in range(4):
        first.check(number, 8, [number], step(images=7, finite=number < 2))
    with open(tmp_path / "skipped_steps.jsonl", "a") as file:
        file.write('{"step": 4, "imag')  # it died while writing
    saved = make(tmp_path / "elsewhere")  # what an attempt that was at step 3 had counted
    saved.writes = False
    for number in range(3):
        saved.check(number, 8, [number], step(images=7, finite=number < 2))
    again = make(tmp_path, first_step=3, counts=json.loads(json.dumps(saved.counts())))
    assert (again.images, again.unreadable, again.skipped, again.skipped_in_a_row) == (24, 3, 1, 1)
    with pytest.raises(ValueError, match=r"3 steps in a row .* step 4 "):
        for number in (3, 4):
            again.check(number, 8, [number], step(finite=False))
    records = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [2, 3, 4]


def test_one_process_writes_and_names_a_picture_once_over_attempts(tmp_path):
    for _ in range(2):
        assert make(tmp_path).note_unreadable(["a.jpg: gone"] * 2) == ["a.jpg: gone"]
        other = make(tmp_path, writes=False)
        assert other.note_unreadable(["b.jpg: gone"]) == ["b.jpg: gone"]
        other.check(0, 8, [1], step(finite=False))
    assert (tmp_path / "unreadable.txt").read_text() == "a.jpg: gone\n"
    assert not (tmp_path / "skipped_steps.jsonl").exists()
