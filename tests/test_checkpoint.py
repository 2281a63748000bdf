"""Checkpoints come back as they were, strictly, and damage is noticed."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from yolos_jax import checkpoint, checkpoint_files, mesh

METADATA = {
    "format": 1,
    "model": {"name": "yolos"},
    "num_classes": 3,
    "preprocess": {"exif": "ignore"},
}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any


def make_state(step: int = 3, width: int = 4, ema: bool = False) -> State:
    params = {
        "backbone": {"kernel": jnp.arange(8.0 * width).reshape(8, width) + step},
        "head": {"bias": jnp.full((width,), float(step))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    opt_state = jax.tree.map(lambda leaf: leaf + 1, optimizer.init(params))
    average = jax.tree.map(lambda leaf: leaf * 2, params) if ema else None
    return State(jnp.int32(step), params, opt_state, average)


def everywhere(state: State, *axes: str) -> State:
    devices = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(leaf):
        return NamedSharding(devices, PartitionSpec(*axes) if leaf.ndim == 2 else PartitionSpec())

    return jax.tree.map(sharding, state)


def assert_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def save_all(directory, steps_and_ap, keep_last=2, keep_best=1, **kwargs) -> checkpoint.Checkpoints:
    checkpoints = checkpoint.Checkpoints(directory, keep_last, keep_best)
    for step, ap in steps_and_ap:
        assert checkpoints.save(step, make_state(step, **kwargs), METADATA, ap)
    checkpoints.wait()
    return checkpoints


def data_file(directory, step: int, item: str = "params"):
    return max((directory / str(step) / item).rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_onto_another_mesh(tmp_path, ema):
    save_all(tmp_path, [(3, 0.25)], ema=ema).close()
    state = make_state(3, ema=ema)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, 1)
    shardings = everywhere(state, "data")
    restored, metadata = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
    assert_equal(restored, state)
    assert restored.params["backbone"]["kernel"].sharding == NamedSharding(
        shardings.step.mesh, PartitionSpec("data")
    )
    assert metadata == METADATA | {"step": 3, "ap": 0.25}
    assert checkpoints.last_step == 3
    checkpoints.close()


def test_what_a_step_says_of_itself_is_the_word_of_process_0(tmp_path, monkeypatch):
    state = make_state()
    save_all(tmp_path, [(2, 0.5), (3, 0.25)]).close()

    def of_another_host(folder):
        raise ValueError("not there yet")

    read = checkpoint_files.read_metadata

    def from_first(ask):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "read_metadata", read)
            return json.loads(json.dumps(ask()))  # as it travels

    monkeypatch.setattr(checkpoint_files, "read_metadata", of_another_host)
    monkeypatch.setattr(mesh, "from_first", from_first)
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, 1)
    assert checkpoints._ap == {2: (0.5, ""), 3: (0.25, "")}
    assert checkpoints.metadata()["ap"] == 0.25
    assert checkpoints.restore(state, everywhere(state))[1]["ap"] == 0.25
    checkpoints.close()


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "new", 2, 1)
    state = make_state()
    assert checkpoints.restore(state, everywhere(state)) is None
    assert checkpoints.metadata() is None
    assert checkpoints.last_step is None
    checkpoints.close()


def test_last_and_best_are_kept_over_restarts(tmp_path):
    save_all(tmp_path, [(1, 0.1), (2, 0.9), (3, None), (4, 0.3)]).close()
    checkpoints = save_all(tmp_path, [(5, None), (6, float("nan"))])
    assert checkpoints.last_step == 6
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    params, metadata = checkpoint.load_params(tmp_path)
    assert metadata["step"] == 2 and params["head"]["bias"][0] == 2
    assert checkpoint.load_params(tmp_path, prefer="last")[1]["step"] == 6


def test_a_step_is_saved_once_and_never_backwards(tmp_path):
    checkpoints = save_all(tmp_path, [(4, None)])
    assert not checkpoints.save(4, make_state(7), METADATA)
    with pytest.raises(ValueError, match="holds step 4; step 3 cannot be saved"):
        checkpoints.save(3, make_state(3), METADATA)
    checkpoints.close()
    assert checkpoint.load_params(tmp_path)[0]["head"]["bias"][0] == 4


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    state = make_state(5)
    expected = jax.tree.map(np.array, state.params)
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, 0)
    checkpoints.save(5, state, METADATA)
    update(state.params)  # Reuses the buffers while they are being written.
    checkpoints.close()
    assert_equal(checkpoint.load_params(tmp_path)[0], expected)


def test_every_difference_is_named_at_once(tmp_path):
    save_all(tmp_path, [(3, None)], ema=True).close()
    state = make_state(3)
    params = {
        "backbone": {"kernel": jnp.zeros((8, 5))},
        "head": {"bias": jnp.zeros(4, jnp.bfloat16), "scale": jnp.zeros(2)},
    }
    other = state._replace(params=params)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, 1)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(other, everywhere(other))
    for line in (
        "params/backbone/kernel: float32[8, 4], expected float32[8, 5]",
        "params/head/bias: float32[4], expected bfloat16[4]",
        "missing: params/head/scale, expected float32[2]",
        "superfluous: ema/head/bias, float32[4]",
    ):
        assert line in str(error.value)
    assert "optimizer" not in str(error.value)
    checkpoints.close()


@pytest.mark.parametrize("item", ["params", "optimizer", "metadata"])
@pytest.mark.parametrize("spoil", ["flip", "truncate", "remove"])
def test_a_damaged_step_is_named_and_the_previous_used(tmp_path, capfd, item, spoil):
    save_all(tmp_path, [(1, 0.2), (2, 0.3)]).close()
    victim = (
        tmp_path / "2/metadata/metadata" if item == "metadata" else data_file(tmp_path, 2, item)
    )
    if spoil == "flip":
        flip_a_bit(victim)
    elif spoil == "truncate":
        victim.write_bytes(victim.read_bytes()[:-3])
    else:
        victim.unlink()
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*{victim.name}"):
        checkpoint.load_params(tmp_path / "2")
    assert checkpoint.load_params(tmp_path)[1]["step"] == 1
    state = make_state(1)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, 1)
    capfd.readouterr()
    assert checkpoints.metadata()["step"] == 1
    restored, _ = checkpoints.restore(state, everywhere(state))
    assert_equal(restored, state)
    said = capfd.readouterr().err
    assert "checkpoint 2 is damaged" in said and victim.name in said
    # The step can be reached and saved again, and its AP counts again.
    assert checkpoints.save(2, make_state(2), METADATA, 0.4)
    checkpoints.close()
    assert checkpoint.load_params(tmp_path)[1]["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.damaged"]


def test_all_steps_damaged_is_an_error_and_nothing_is_moved(tmp_path):
    save_all(tmp_path, [(1, None), (2, None)]).close()
    for step in (1, 2):
        flip_a_bit(data_file(tmp_path, step))
    state = make_state(2)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, 1)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(steps \[1, 2\]\)"):
        checkpoints.restore(state, everywhere(state))
    checkpoints.close()
    with pytest.raises(ValueError, match="every checkpoint there is damaged"):
        checkpoint.load_params(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_half_written_steps_are_ignored_and_removed(tmp_path):
    save_all(tmp_path, [(1, None)]).close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert checkpoint.load_params(tmp_path)[1]["step"] == 1
    checkpoints = save_all(tmp_path, [(2, None)])
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert checkpoint.load_params(tmp_path)[1]["step"] == 2


def test_hashes_are_those_of_sha256sum(tmp_path):
    save_all(tmp_path, [(1, None)]).close()
    lines = (tmp_path / "1" / "SHA256SUMS").read_text().splitlines()
    assert any("params/" in line for line in lines)
    for line in lines:
        expected, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "1" / name).read_bytes()).hexdigest() == expected


def test_a_failing_disk_is_an_os_error_and_the_previous_step_is_intact(tmp_path, monkeypatch):
    checkpoints = save_all(tmp_path, [(1, 0.5)])

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yolos_jax.checkpoint_files.write_sums", full)
    checkpoints.save(2, make_state(2), METADATA, 0.9)
    with pytest.raises(OSError, match=r"checkpoint 2 could not be written(.|\n)*steps \[1\]"):
        checkpoints.wait()
    assert checkpoint.load_params(tmp_path)[1]["step"] == 1


def test_orbax_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
    """Its numbers, the steps', are not those of the loop's questions."""

    def asked(number):
        raise AssertionError(f"asked with {number}")

    monkeypatch.setattr("orbax.checkpoint.utils.reached_preemption", asked)
    save_all(tmp_path, [(1, 0.5)]).close()


def test_params_from_elsewhere(tmp_path):
    params = {"head": {"bias": np.arange(3, dtype=np.float32)}}
    checkpoint.save_params(tmp_path / "out", params, METADATA)
    for path in (tmp_path / "out", tmp_path / "out" / "0"):
        loaded, metadata = checkpoint.load_params(path)
        assert_equal(loaded, params)
        assert metadata == METADATA | {"step": 0, "ap": None}
    with pytest.raises(ValueError, match=r"already holds checkpoints \(steps \[0\]\)"):
        checkpoint.save_params(tmp_path / "out", params, METADATA)


def test_a_work_directory_gives_its_best_and_the_average(tmp_path):
    save_all(tmp_path / checkpoint.FOLDER, [(1, 0.5), (2, 0.4)], ema=True).close()
    params, metadata = checkpoint.load_params(tmp_path)
    assert metadata["step"] == 1 and params["head"]["bias"][0] == 2.0  # the average is the double


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        checkpoint.load_params(tmp_path / "nowhere")
    (tmp_path / "detr.pth").touch()
    with pytest.raises(ValueError, match=r"detr.pth: a file; .*convert_torch_weights.py makes one"):
        checkpoint.load_params(tmp_path / "detr.pth")
    with pytest.raises(ValueError, match="not a checkpoint; expected"):
        checkpoint.load_params(tmp_path)
    checkpoint.save_params(tmp_path / "new", {"bias": np.zeros(2)}, METADATA | {"format": 2})
    with pytest.raises(ValueError, match="checkpoint of format 2; this program reads 1"):
        checkpoint.load_params(tmp_path / "new")
