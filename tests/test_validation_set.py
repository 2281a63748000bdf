"""Another validation set on the way: APs of two sets are not compared, and no old AP is shown."""

from __future__ import annotations

import json

import pytest

from tests.test_checkpoint import METADATA, make_state
from tests.test_trainer import lines, stop_at, tiny, train
from yolos_jax import checkpoint
from yolos_jax import checkpoint_files as files
from yolos_jax.data import shapes

SUBSET = {"data.val_subset": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes.write(root, seed=3, train=48, val=10, size=32)
    return root


def save_all(directory, evaluations, keep_last=1):
    checkpoints = checkpoint.Checkpoints(directory, keep_last, keep_best=1)
    for step, ap, evaluated_on in evaluations:
        said = {"evaluated_on": evaluated_on} if evaluated_on else {}
        checkpoints.save(step, make_state(step), METADATA | said, ap)
    checkpoints.close()


def test_the_best_is_one_of_the_newest_validation_set(tmp_path):
    save_all(tmp_path, [(1, 0.9, "few"), (2, 0.3, "all"), (3, 0.2, "all"), (4, None, "all")])
    assert files.steps(files.absolute(tmp_path)) == [2, 4]
    assert checkpoint.load_params(tmp_path)[1]["step"] == 2


def test_the_best_stays_until_there_is_one_to_compare(tmp_path):
    # Step 3 is the newest, but not evaluated: what it carries is the evaluation of step 2.
    save_all(tmp_path, [(1, 0.9, "few"), (2, 0.3, "few"), (3, None, "all")])
    assert checkpoint.load_params(tmp_path)[1]["step"] == 1


def test_checkpoints_that_do_not_name_their_set_are_compared_as_before(tmp_path):
    save_all(tmp_path, [(1, 0.4, ""), (2, 0.9, ""), (3, 0.3, "")])
    assert files.steps(files.absolute(tmp_path)) == [2, 3]
    save_all(tmp_path, [(4, 0.5, "all"), (5, 0.2, "all")])
    assert files.steps(files.absolute(tmp_path)) == [2, 5]


def test_a_late_evaluation_names_its_set(tmp_path):
    save_all(tmp_path, [(1, 0.9, "few"), (2, 0.8, "few")])
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, 1)
    checkpoints.note(2, {"AP": 0.1}, "all")
    checkpoints.close()
    assert checkpoint.load_params(tmp_path)[1]["step"] == 2
    assert files.read_ap(files.absolute(tmp_path) / "2") == files.AP(0.1, "all")


def test_a_run_that_goes_on_says_that_the_set_is_another(pictures, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # evaluated at 3
        train(tiny(pictures, **SUBSET), tmp_path)
    assert "validation set is not" not in capfd.readouterr().out
    summary = train(tiny(pictures), tmp_path)
    assert capfd.readouterr().out.count("the validation set is not that of the evaluation at") == 1
    assert checkpoint.load_params(tmp_path)[1]["step"] == summary["step"] == 6
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "eval"] == [3, 6]


@pytest.fixture
def finished(pictures, tmp_path):
    train(tiny(pictures, epochs=1, **SUBSET), tmp_path)
    return tmp_path


def test_a_finished_run_is_evaluated_on_the_other_set(finished, pictures, capfd):
    capfd.readouterr()
    summary = train(tiny(pictures, epochs=1), finished)
    assert "the validation set is not that of the evaluation at step 3" in capfd.readouterr().out
    evaluations = [line for line in lines(finished) if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [3, 3]  # neither replaces the other
    # The spread of boxes is known of eight pictures or more: of ten, not of three.
    assert evaluations[0]["box_spread"] == -1 != evaluations[1]["box_spread"]
    metadata = checkpoint.load_params(finished)[1]
    assert metadata["evaluation"]["box_spread"] == evaluations[1]["box_spread"]
    assert metadata["ap"] == summary["AP"] == evaluations[1]["AP"]
    # Once: batches of another size are no other set.
    again = train(tiny(pictures, epochs=1, **{"eval.batch_size": 16}), finished)
    assert "validation set is not" not in capfd.readouterr().out
    assert again["AP"] == summary["AP"] and len(lines(finished)) == 5


def test_a_finished_run_that_does_not_name_its_set_is_left_as_it_is(finished, pictures):
    step = finished / "checkpoints" / "3"
    metadata = json.loads((step / "metadata" / "metadata").read_text())
    del metadata["evaluated_on"]
    (step / "metadata" / "metadata").write_text(json.dumps(metadata))
    files.write_sums(files.absolute(step))
    before = lines(finished)
    assert train(tiny(pictures, epochs=1), finished)["AP"] == metadata["ap"]
    assert lines(finished) == before
