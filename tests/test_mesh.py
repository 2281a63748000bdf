"""Sharding rules, host rows and the way to global arrays and back."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from yolos_jax import mesh as mesh_lib
from yolos_jax import optimizer as optimizer_lib
from yolos_jax import report
from yolos_jax.batch import Batch, Bucket, HostBatch, Targets
from yolos_jax.models.build import build_model
from yolos_jax.train_state import Updater


def test_mesh_covers_all_devices():
    mesh = mesh_lib.make_mesh(2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2} and mesh.size == 8
    for fsdp in (0, 3, 16):
        with pytest.raises(ValueError, match=f"mesh.fsdp is {fsdp}: .* number of devices, 8"):
            mesh_lib.make_mesh(fsdp)


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """What is asked of a device when a mesh is laid over a TPU slice."""

    id: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    slice_index: int = 0
    core_on_chip: int = 0


def test_mesh_of_a_slice_whose_axes_do_not_divide_into_the_groups():
    # Eight of 4 x 4 x 4 chips are two rows of four.
    places = [tuple(map(int, np.unravel_index(chip, (4, 4, 4)))) for chip in range(64)]
    chips = [FakeChip(number, place) for number, place in enumerate(places)]
    mesh = mesh_lib.make_mesh(8, chips)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8}
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(64))
    for group in mesh.devices:
        sizes = np.ptp([chip.coords for chip in group], axis=0) + 1
        assert np.prod(sizes) == 8, "chips of a group are neighbours"


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((12, 192, 576), (None, None, "fsdp")),  # stacked, no kernel: the widest axis
        ((12, 768, 192), (None, "fsdp", None)),
        ((64, 64), (None, "fsdp")),  # equal axes: the last
        ((50, 83, 192), (None, None, "fsdp")),
        ((14, 331, 990), (None, None, "fsdp")),
        ((13, 331, 991), ()),  # nothing divides
        ((12, 2), ()),  # small
        ((), ()),
    ],
)
def test_rule(shape, spec):
    assert mesh_lib.sharding_of(shape, mesh_lib.make_mesh(2), "table").spec == PartitionSpec(*spec)
    assert mesh_lib.sharding_of(shape, mesh_lib.make_mesh(1), "table").spec == PartitionSpec()


def test_kernels_are_split_along_their_inputs():
    mesh = mesh_lib.make_mesh(2)
    for shape in ((12, 192, 576), (768, 192), (3, 3, 64, 128)):
        expected = [None] * len(shape)
        expected[-2] = "fsdp"
        assert mesh_lib.sharding_of(shape, mesh, "kernel").spec == PartitionSpec(*expected)
    assert mesh_lib.sharding_of((331, 990), mesh, "kernel").spec == PartitionSpec(None, "fsdp")
    tree = {"qkv": {"kernel": np.zeros((64, 192)), "bias": np.zeros((64, 192))}}
    places = mesh_lib.shardings(tree, mesh)["qkv"]
    assert places["kernel"].spec == PartitionSpec("fsdp", None)
    assert places["bias"].spec == PartitionSpec()  # as are all vectors


def test_bytes_per_device():
    tree = {"kernel": np.zeros((64, 256), np.float32), "bias": np.zeros(256, np.float32)}
    assert mesh_lib.bytes_per_device(tree, mesh_lib.make_mesh(8)) == 64 * 256 * 4 // 8 + 1024
    assert mesh_lib.bytes_per_device(tree, mesh_lib.make_mesh(1)) == 64 * 256 * 4 + 1024


def specs_by_name(tree, mesh):
    """Where every parameter lives; the same of trees of the same parameters."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(mesh_lib.shardings(tree, mesh))
    return tuple((jax.tree_util.keystr(path), str(place.spec)) for path, place in leaves)


def moments(opt_state):
    """The trees of AdamW's state that look like the parameters."""
    adam = [part for part in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(part)]
    assert len(adam) == 1
    return adam[0].mu, adam[0].nu


def is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


@pytest.mark.parametrize(
    ("recipe", "fsdp", "most"),
    [("yolos_b", 8, 1 / 8 + 0.05), ("yolos_s_dwr", 2, 1 / 2 + 0.05), ("yolos_s_dwr", 8, 0.4)],
)
def test_state_of_the_recipes_is_spread(recipe, fsdp, most):
    """By arithmetic. Of 330, the width of S (dWr), 8 is no divisor; the note says so."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    model = build_model(config.model, 91)
    params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optimizer_lib.make_optimizer(config.optimizer, params)
    state = jax.eval_shape(Updater(optimizer, (), 0.999).start, params)
    mesh = mesh_lib.make_mesh(fsdp)
    rules = {specs_by_name(tree, mesh) for tree in (state.params, *moments(state.opt_state))}
    assert rules == {specs_by_name(state.ema, mesh)}, "what is updated together lives together"
    for tree in (state.params, state.opt_state, state.ema):
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        assert mesh_lib.bytes_per_device(tree, mesh) <= most * whole
    lines = report.describe_memory(state, mesh)
    assert len(lines) == (2 if most == 0.4 else 1)
    assert f"mesh.fsdp={fsdp}" in lines[0] and "average" in lines[0]


def test_host_rows_of_one_process_are_all():
    mesh = mesh_lib.make_mesh(2)
    np.testing.assert_array_equal(mesh_lib.host_rows(mesh, 16), np.arange(16))
    np.testing.assert_array_equal(mesh_lib.host_rows(mesh, 16, 2), np.arange(16))
    with pytest.raises(ValueError, match=r"12 images .* 8 devices: .* multiple of 8"):
        mesh_lib.host_rows(mesh, 12)
    with pytest.raises(ValueError, match=r"8 devices x 2 microbatches: .* multiple of 16"):
        mesh_lib.host_rows(mesh, 8, 2)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_host_rows_are_those_of_the_process_devices(fsdp, monkeypatch):
    # As the second of two processes with four devices each sees it.
    mesh = mesh_lib.make_mesh(fsdp)
    sharding = mesh_lib.batch_sharding(mesh)
    mine = dict(list(sharding.devices_indices_map((8,)).items())[4:])
    monkeypatch.setattr(
        jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda self, shape: mine
    )
    np.testing.assert_array_equal(mesh_lib.host_rows(mesh, 16, 2), [4, 5, 6, 7, 12, 13, 14, 15])


@pytest.mark.parametrize("owners", ["00001111", "01010101", "10011010"])
def test_batches_of_processes_whose_devices_do_not_lie_side_by_side(owners, monkeypatch):
    mesh = mesh_lib.make_mesh()
    sharding, whole = mesh_lib.batch_sharding(mesh), np.arange(16 * 3).reshape(16, 3)
    index_of = sharding.devices_indices_map((16,))
    put = {}

    def of_process(number):
        return {
            device: index
            for owner, (device, index) in zip(owners, index_of.items(), strict=True)
            if owner == number
        }

    def make(shape, sharding, block):
        assert shape == whole.shape
        return put.update({device: block(index) for device, index in mine.items()})

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_callback", make)
    for number in "01":
        mine = of_process(number)
        monkeypatch.setattr(
            jax.sharding.NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, mine=mine: mine,
        )
        mesh_lib.put_batch(whole[mesh_lib.host_rows(mesh, 16)], mesh)
    for device, index in index_of.items():
        np.testing.assert_array_equal(put[device], whole[index])


def test_arrays_of_one_batch_have_as_many_rows():
    with pytest.raises(ValueError, match="16 and of 32 rows"):
        mesh_lib.put_batch((np.zeros(16), np.zeros(32)), mesh_lib.make_mesh())


def test_what_the_first_process_reads_is_taken_by_all(monkeypatch):
    assert mesh_lib.from_first(lambda: {"evaluated": 3}) == {"evaluated": 3}
    said = []  # of both processes, one after the other

    def gather(texts):
        said.extend(texts)
        return said

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(mesh_lib, "gather_texts", gather)
    for number, read in enumerate((lambda: {"evaluated": 3, "AP": [None, 0.5]}, pytest.fail)):
        monkeypatch.setattr("jax.process_index", lambda number=number: number)
        assert mesh_lib.from_first(read) == {"evaluated": 3, "AP": [None, 0.5]}


def test_to_global_arrays_and_back():
    mesh = mesh_lib.make_mesh(2)
    host = HostBatch(
        batch=Batch(np.arange(16 * 4 * 3).astype(np.uint8).reshape(16, 4, 3),
                    np.ones((16, 2), np.int32), np.arange(16) % 2 == 0),
        targets=Targets(np.arange(16, dtype=np.int32)[:, None], np.zeros((16, 1, 4), np.float32),
                        np.ones((16, 1), bool)),
        image_ids=np.arange(16), original_size=np.ones((16, 2), np.int32), bucket=Bucket(4, 2, 2),
    )  # fmt: skip
    parts = mesh_lib.put_microbatches(host, mesh, 2)
    assert len(parts) == 2
    for index, (batch, targets) in enumerate(parts):
        assert batch.patches.sharding == mesh_lib.batch_sharding(mesh)
        assert batch.patches.dtype == np.uint8
        gathered, labels = mesh_lib.gather_rows((batch, targets.labels))
        rows = slice(index * 8, index * 8 + 8)
        jax.tree.map(np.testing.assert_array_equal, gathered, Batch(*(a[rows] for a in host.batch)))
        np.testing.assert_array_equal(labels[:, 0], np.arange(16)[rows])
