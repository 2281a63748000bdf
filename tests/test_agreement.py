"""What processes must have in common is compared key by key, and both sides are named."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import common
from yolos_jax import agreement


@pytest.fixture(scope="module")
def facts():
    return agreement.facts(common.get_config())


def test_facts_are_the_configuration_the_code_and_the_libraries(facts):
    assert facts["optimizer.lr"] == common.get_config().optimizer.lr
    assert facts["version of jax"] == jax.__version__
    code = [key for key in facts if key.startswith("code of yolos_jax/")]
    assert "code of yolos_jax/data/plan.py" in code and len(code) > 50
    assert json.loads(json.dumps(facts)) == facts


def test_the_same_is_no_difference(facts):
    config = common.get_config()
    config.mesh.process_id = 1
    config.mesh.coordinator = "other-name-of-it:1"
    config.data.root = "/local/ssd"
    assert agreement.differences([facts, agreement.facts(config)]) is None


def test_other_keys_values_and_code_are_named_with_both_sides(facts):
    other = facts | {"seed": 1, "code of yolos_jax/step.py": "abc", "new": (1, 2)}
    del other["version of jax"]
    text = agreement.differences([facts, other, facts])
    assert "\n  seed: 0 on processes 0, 2, 1 on process 1\n" in text
    assert "code of yolos_jax/step.py: '" in text and "'abc' on process 1" in text
    assert "\n  new: (no such key) on processes 0, 2, (1, 2) on process 1" in text
    assert f"version of jax: '{jax.__version__}' on processes 0, 2, (no such key) on" in text
    assert len(text.splitlines()) == 5


def test_many_differences_and_processes_stay_readable():
    text = agreement.differences([{f"key{i}": 0 for i in range(50)}] + [{}] * 100)
    assert "and 30 more" in text and "and 80 more" in text and len(text) < 12000


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "bfloat16"),
    ],
)
def test_settings_of_jax_that_change_numbers_are_facts(facts, name, other):
    before = getattr(jax.config, name)
    jax.config.update(name, other)
    try:
        text = agreement.differences([facts, agreement.facts(common.get_config())])
    finally:
        jax.config.update(name, before)
    assert text.splitlines()[1:] == [f"  {name}: {before!r} on process 0, {other!r} on process 1"]


def test_changed_code_changes_the_facts(facts, tmp_path, monkeypatch):
    package = tmp_path / "yolos_jax"
    package.mkdir()
    (package / "agreement.py").write_text("a = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(package / "agreement.py"))
    before = agreement.facts({})
    (package / "agreement.py").write_text("a = 2\n")
    text = agreement.differences([before, agreement.facts({})])
    assert "code of yolos_jax/agreement.py" in text and len(text.splitlines()) == 2


def test_a_shared_folder_is_seen_and_left_as_it_was(tmp_path):
    folder = tmp_path / "runs" / "one"
    token = agreement.Token(folder)
    assert not token.problem
    assert agreement.look_for(folder, token.path.name) == ""
    token.remove()
    assert not (tmp_path / "runs").exists()
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    token = agreement.Token(folder)
    token.remove()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_others_do_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "SEEN_WITHIN", 0.3)
    token = agreement.Token(tmp_path / "here")
    (tmp_path / "there").mkdir()
    found = [
        agreement.look_for(tmp_path / where, token.path.name) for where in ("here", "there", "gone")
    ]
    text = agreement.judge_folder(tmp_path / "here", found)
    assert "2 of the other processes" in text
    assert f"process 1: {tmp_path / 'there'} on" in text and "has other files" in text
    assert f"process 2: {tmp_path / 'gone'} on" in text and "does not exist" in text
    assert agreement.judge_folder(tmp_path / "here", ["", ""]) is None


def test_a_network_folder_that_shows_files_late_is_waited_for(tmp_path, monkeypatch):
    started = time.monotonic()
    token = agreement.Token(tmp_path)
    late = type(tmp_path)(tmp_path)
    seen = type(late).exists
    monkeypatch.setattr(
        type(late), "exists", lambda self: time.monotonic() > started + 0.4 and seen(self)
    )
    assert agreement.look_for(late, token.path.name) == ""
    assert time.monotonic() > started + 0.4


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    token = agreement.Token(tmp_path / "file" / "run")
    assert "process 0 cannot write to the work directory" in token.problem
    assert str(tmp_path / "file") in token.problem
    token.remove()


def test_unequal_numbers_of_devices_are_named(monkeypatch):
    def devices(*owners):
        monkeypatch.setattr("jax.process_count", lambda: 3)
        monkeypatch.setattr(
            "jax.devices", lambda: [SimpleNamespace(process_index=i) for i in owners]
        )

    devices(0, 1, 2, 2, 1, 0)
    agreement.check_devices()
    devices(0, 0, 1, 2, 2)
    with pytest.raises(ValueError, match="same:\n  devices: 2 on processes 0, 2, 1 on process 1\n"):
        agreement.check_devices()


def test_one_process_agrees_with_itself():
    agreement.check_data({"classes": "a"})


@pytest.fixture
def after_the_first(monkeypatch):
    """What is compared is compared with the first that was, as if another process had said that."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    sent = []

    def gather(mine):
        sent.append(mine)
        return np.stack(sent[:1] + [mine])

    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)


def test_other_data_are_named(after_the_first):
    agreement.check_data({"classes": "a", "pictures": "x"})
    with pytest.raises(ValueError, match=r"(?s)not about to run the same:\n  pictures: '\w+' on"):
        agreement.check_data({"classes": "a", "pictures": "y"})


CHECKPOINT = {"model": {"depth": 2}, "preprocess": {}, "label_map": ["dog"]}


def parameters(changed=0.0):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    kernel[1, 2] += changed
    half = np.ones(3, jax.numpy.bfloat16)
    return {"head": {"kernel": kernel, "bias": half}, "scale": np.float32(2)}


def test_parameters_have_a_fingerprint():
    found = agreement.fingerprint(parameters())
    assert found == agreement.fingerprint(parameters())
    others = [
        parameters(1e-6),
        {"head": parameters()["head"]},
        parameters() | {"scale": np.float32([2])},
        parameters() | {"scale": np.int32(0x40000000)},  # the same bytes
        jax.tree.map(np.transpose, parameters()),
    ]
    assert len({found, *map(agreement.fingerprint, others)}) == 6


def test_processes_that_read_other_parameters_are_told(after_the_first):
    agreement.check_checkpoint("start", parameters(), CHECKPOINT)
    agreement.check_checkpoint("start", parameters(), CHECKPOINT | {"source": "elsewhere"})
    with pytest.raises(ValueError, match=r"the same:\n  parameters in start: '\w+' on process 0"):
        agreement.check_checkpoint("start", parameters(1e-6), CHECKPOINT)
    with pytest.raises(ValueError, match=r"the same:\n  model and classes in start: '\w+' on"):
        agreement.check_checkpoint("start", parameters(), CHECKPOINT | {"label_map": ["cat"]})


def test_one_process_hashes_no_parameters(monkeypatch):
    monkeypatch.setattr(agreement, "fingerprint", pytest.fail)
    agreement.check_checkpoint("start", parameters(), CHECKPOINT)
