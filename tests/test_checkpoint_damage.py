"""Whatever is wrong with a checkpoint is noticed and named, and a whole one is used."""

from __future__ import annotations

import shutil

import jax
import pytest

from tests.test_checkpoint import (
    METADATA,
    assert_equal,
    data_file,
    everywhere,
    flip_a_bit,
    make_state,
    save_all,
)
from yolos_jax import checkpoint
from yolos_jax import checkpoint_files as files


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def overwrite(path):
    path.write_bytes(b"\x00garbage\xff")


SPOILS = [flip_a_bit, truncate, overwrite, lambda path: path.unlink()]
# Orbax's own, written after the hashes; nothing that is restored is in them.
UNHASHED = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder, [(1, 0.2), (2, 0.3)], ema=True).close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def restore(folder, keep_best=1):
    """What a run would go on from: the state, and its step."""
    state = make_state(1, ema=True)
    checkpoints = checkpoint.Checkpoints(folder, 2, keep_best)
    restored, metadata = checkpoints.restore(jax.eval_shape(lambda: state), everywhere(state))
    checkpoints.close()
    assert_equal(restored, make_state(metadata["step"], ema=True))
    return metadata["step"]


def test_no_file_is_left_out_of_the_hashes(saved):
    step = files.absolute(saved / "2")
    names = [path for path in (saved / "2").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(names) > 15
    for path in names:
        before = path.read_bytes()
        for spoil in SPOILS:
            spoil(path)
            damage = files.damage(step)
            assert (damage is None) == (path.parent == saved / "2" and path.name in UNHASHED), path
            path.write_bytes(before)
    assert files.damage(step) is None


@pytest.mark.parametrize("name", UNHASHED)
@pytest.mark.parametrize("spoil", SPOILS[2:])
def test_what_is_not_hashed_is_not_needed(folder, name, spoil):
    spoil(folder / "2" / name)
    assert restore(folder) in (1, 2)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def hashes_of_nothing(step):
    (step / files.SUMS).write_text("")


def half_of_the_hashes(step):
    lines = (step / files.SUMS).read_text().splitlines()
    (step / files.SUMS).write_text("\n".join(lines[: len(lines) // 2]))


def an_item_gone(step):
    shutil.rmtree(step / "params")


@pytest.mark.parametrize("spoil", [empty, hashes_of_nothing, half_of_the_hashes, an_item_gone])
def test_a_folder_that_is_no_checkpoint_is_set_aside(folder, spoil, capfd):
    spoil(folder / "2")
    assert checkpoint.load_params(folder)[1]["step"] == 1
    assert restore(folder) == 1
    assert "checkpoint 2 is damaged" in capfd.readouterr().err


def test_predicting_does_without_the_optimizers_state(folder, capfd):
    shutil.rmtree(folder / "2" / "optimizer")
    assert checkpoint.load_params(folder)[1]["step"] == 2
    assert checkpoint.load_params(folder / "2")[1]["step"] == 2
    assert not capfd.readouterr().err
    # What a run is to go on from needs it, and nothing is set aside.
    with pytest.raises(ValueError, match="2: no run goes on from here, its optimizer is gone"):
        restore(folder)
    assert files.steps(files.absolute(folder)) == [1, 2]


def test_a_damaged_best_gives_way_to_the_best_that_is_whole(tmp_path, capfd):
    save_all(tmp_path, [(1, 0.4), (2, 0.9), (3, 0.5)], keep_last=1, keep_best=2).close()
    save_all(tmp_path, [(4, 0.1)], keep_last=1, keep_best=2).close()
    assert files.steps(files.absolute(tmp_path)) == [2, 3, 4]
    flip_a_bit(data_file(tmp_path, 2))
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, 1)
    assert checkpoints.metadata()["step"] == 4
    assert "checkpoint 2 is damaged" in capfd.readouterr().err
    assert checkpoint.load_params(tmp_path)[1]["step"] == 3
    assert checkpoints.save(5, make_state(5), METADATA, 0.2)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.damaged", "3", "5"]


def test_the_best_is_kept_when_its_ap_came_late(tmp_path):
    checkpoints = save_all(tmp_path, [(1, None)], keep_last=1)
    checkpoints.note(1, {"AP": 0.8})
    for step in (2, 3):
        checkpoints.save(step, make_state(step), METADATA, 0.1)
    checkpoints.close()
    assert files.steps(files.absolute(tmp_path)) == [1, 3]
    checkpoints = save_all(tmp_path, [(4, None)], keep_last=1)  # another attempt knows of it, too
    assert checkpoint.load_params(tmp_path)[1]["step"] == 1
    checkpoints.save(5, make_state(5), METADATA, 0.9)
    checkpoints.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-1] == "5" and "1" not in names


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_late_evaluation_that_cannot_be_read_is_left_out(tmp_path, capfd, text):
    checkpoints = save_all(tmp_path, [(1, None)])
    checkpoints.note(1, {"AP": 0.8})
    checkpoints.close()
    (tmp_path / "1.evaluated.json").write_text(text)
    assert checkpoint.load_params(tmp_path)[1]["ap"] is None
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, 1)
    assert checkpoints.metadata()["ap"] is None
    assert "1.evaluated.json: not an evaluation" in capfd.readouterr().err
    checkpoints.close()


def test_a_checkpoint_that_was_not_finished_is_named(folder, capfd):
    (folder / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert restore(folder) == 2
    said = capfd.readouterr().err
    assert "3.orbax-checkpoint-tmp: a checkpoint that was not finished" in said
    assert files.steps(files.absolute(folder)) == [1, 2]
    assert not list(folder.glob("*tmp*"))


def test_the_best_step_needs_no_optimizer(tmp_path):
    save_all(tmp_path, [(1, 0.3), (2, 0.2)], ema=True).close()
    shutil.rmtree(tmp_path / "1" / "optimizer")
    assert restore(tmp_path) == 2
    assert files.steps(files.absolute(tmp_path)) == [1, 2]
    assert checkpoint.load_params(tmp_path)[1]["step"] == 1


def test_a_resume_reads_the_bytes_once(folder, monkeypatch):
    read = []
    damage = files.damage
    monkeypatch.setattr(files, "damage", lambda step, *_: read.append(step.name) or damage(step))
    checkpoints = checkpoint.Checkpoints(folder, 2, 1)
    assert checkpoints.metadata()["step"] == 2
    state = make_state(1, ema=True)
    checkpoints.restore(state, everywhere(state))
    assert read == ["2"]  # the newest, which is the best, too
    checkpoints.close()


def test_a_failed_write_is_seen_without_waiting(tmp_path, monkeypatch):
    checkpoints = save_all(tmp_path, [(1, 0.5)])
    monkeypatch.setattr(files, "write_sums", lambda folder: 1 / 0)
    checkpoints.check()
    checkpoints.save(2, make_state(2), METADATA, 0.9)
    with pytest.raises(OSError, match="checkpoint 2 could not be written"):
        for _ in range(10**9):
            checkpoints.check()
    with pytest.raises(OSError, match="checkpoint 2 could not be written"):
        checkpoints.wait()
