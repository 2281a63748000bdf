"""Every image is scored exactly once, whatever the batch size, devices and processes."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.processes import Processes, free_address
from yolos_jax import evaluation, mesh
from yolos_jax.batch import Batch, Detections, HostBatch, Targets
from yolos_jax.data.coco import read_coco
from yolos_jax.data.index import load_coco
from yolos_jax.data.plan import EvalRecipe, choose_buckets, make_eval_plan
from yolos_jax.data.shapes import write as write_shapes
from yolos_jax.data.truth import ground_truth

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    root = tmp_path_factory.mktemp("seven")
    write_shapes(root, seed=0, train=1, val=7, size=64)
    return load_coco(root, "annotations/instances_val2017.json", "val2017")


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), mesh.ROWS)


def plan_of(index, batch_size):
    recipe = EvalRecipe(64, 64, 8)
    buckets = choose_buckets(index, recipe, 2, 8, 9)
    return make_eval_plan(index, recipe, buckets, batch_size=batch_size)


def host_batches(index, plan, device_mesh, unreadable=()):
    """What the pipeline yields, without pixels: the first patch says which image it is."""
    rows_here = mesh.host_rows(device_mesh, plan.batch_size)
    for step in range(plan.steps):
        rows = plan.rows[step][rows_here]
        bad = np.isin(index.image_ids[rows], unreadable)
        patches = np.zeros((len(rows), plan.buckets[plan.bucket[step]].patches, 192), np.uint8)
        patches[:, 0, 0] = rows
        yield HostBatch(
            Batch(patches, plan.grid[step][rows_here], (rows >= 0) & ~bad),
            Targets(
                *(
                    np.zeros((len(rows), 8, *s), t)
                    for s, t in (((), int), ((4,), float), ((), bool))
                )
            ),
            np.where(rows >= 0, index.image_ids[rows], -1),
            np.stack([index.heights[rows], index.widths[rows]], -1).astype(np.int32),
            plan.buckets[plan.bucket[step]],
            tuple(f"picture of image {i}: gone" for i in index.image_ids[rows][bad & (rows >= 0)]),
        )


def oracle(index, device_mesh):
    """A predict step that finds everything: it looks the answer up by the first patch."""
    queries = index.max_boxes + 1
    boxes = np.zeros((len(index), queries, 4), np.float32)
    labels = np.zeros((len(index), queries), np.int32)
    scores = np.zeros((len(index), queries), np.float32)
    for row in range(len(index)):
        mine = slice(index.box_offsets[row], index.box_offsets[row + 1])
        count = mine.stop - mine.start
        boxes[row, :count] = index.boxes_xyxy_px[mine]
        labels[row, :count] = index.labels[mine]
        scores[row, :count] = 0.9

    @jax.jit
    def look_up(batch):
        row = batch.patches[:, 0, 0].astype(int)
        return Detections(*(jax.numpy.asarray(x)[row] for x in (scores, labels, boxes)))

    def predict_step(params, batch, original_size, bucket):
        assert batch.patches.sharding.is_equivalent_to(mesh.batch_sharding(device_mesh), 3)
        assert original_size.shape == (batch.patches.shape[0], 2)
        assert batch.patches.shape[1] == bucket.patches
        return look_up(batch)

    return predict_step


def evaluate(index, device_mesh, batch_size, unreadable=(), batches=None, **kwargs):
    plan = plan_of(index, batch_size)
    return evaluation.evaluate(
        oracle(index, device_mesh),
        {},
        index,
        plan,
        host_batches(index, plan, device_mesh, unreadable) if batches is None else batches(plan),
        device_mesh,
        ground_truth(read_coco(index.annotations)),
        **kwargs,
    )


@pytest.mark.parametrize("devices, asked, taken", [(3, 4, 6), (1, 4, 4), (8, 1, 8), (2, 100, 100)])
def test_seven_images_are_each_scored_once(seven, devices, asked, taken):
    device_mesh = mesh_of(devices)
    batch_size = evaluation.round_up_batch(asked, device_mesh)
    assert batch_size == taken
    found = evaluate(seven, device_mesh, batch_size)
    assert found.metrics["AP"] == pytest.approx(1.0)
    per_image = {i: sum(r["image_id"] == i for r in found.results) for i in seven.image_ids}
    assert set(per_image.values()) == {seven.max_boxes + 1}  # every query, once
    assert [r["image_id"] for r in found.results][:: seven.max_boxes + 1] == list(seven.image_ids)
    assert found.results == evaluate(seven, mesh_of(1), 7).results


def test_batches_that_do_not_divide_are_refused(seven):
    with pytest.raises(ValueError, match="4 images do not divide among 3 devices: use 6"):
        evaluate(seven, mesh_of(3), 4)
    with pytest.raises(ValueError, match="0"):
        evaluation.round_up_batch(0, mesh_of(1))
    assert evaluation.round_up_batch(4, mesh_of(3), group=2) == 6
    assert evaluation.round_up_batch(4, mesh_of(1), group=3) == 6


def test_after_each_batch_it_is_told_what_all_hosts_could_not_read(seven):
    gone = tuple(int(seven.image_ids[i]) for i in (2, 5, 6))
    told = []
    judge = lambda unreadable, messages: told.append((unreadable, sorted(messages)))  # noqa: E731
    evaluate(seven, mesh_of(1), 2, unreadable=gone, judge=judge)
    assert len(told) == 4 and told == sorted(told)
    assert told[-1] == (3, sorted(f"picture of image {i}: gone" for i in gone))

    def stop(unreadable, messages):
        if unreadable > 1:
            raise ValueError(f"{unreadable} of all")

    with pytest.raises(ValueError, match="of all"):
        evaluate(seven, mesh_of(1), 2, unreadable=gone, judge=stop)


def test_unreadable_pictures_count_as_without_detections(seven):
    gone = (int(seven.image_ids[2]), int(seven.image_ids[5]))
    found = evaluate(seven, mesh_of(3), 6, unreadable=gone)
    assert found.unreadable == gone
    assert sorted(found.messages) == [f"picture of image {i}: gone" for i in gone]
    assert not {r["image_id"] for r in found.results} & set(gone)
    assert len({r["image_id"] for r in found.results}) == 5
    assert 0 < found.metrics["AR100"] < 1  # their boxes are still to be found


def test_a_pipeline_that_strays_from_the_plan_is_noticed(seven):
    def swapped(plan):
        first, *rest = host_batches(seven, plan, mesh_of(1))
        return [first._replace(image_ids=first.image_ids[::-1]), *rest]

    with pytest.raises(RuntimeError, match="the plan says"):
        evaluate(seven, mesh_of(1), 4, batches=swapped)
    with pytest.raises(ValueError, match="shorter"):
        evaluate(
            seven,
            mesh_of(1),
            4,
            batches=lambda plan: list(host_batches(seven, plan, mesh_of(1)))[:1],
        )


def test_a_plan_that_forgets_an_image_is_noticed(seven):
    plan = plan_of(seven.select(np.array([0, 1, 2, 3, 4, 5, 5])), 7)
    plan.rows[plan.rows == 6] = 5
    with pytest.raises(RuntimeError, match="1 of 7 were not, 1 were more than once"):
        evaluation.evaluate(
            oracle(seven, mesh_of(1)),
            {},
            seven,
            plan,
            host_batches(seven, plan, mesh_of(1)),
            mesh_of(1),
            ground_truth(read_coco(seven.annotations)),
        )


def test_a_subset_is_scored_against_its_own_ground_truth(seven):
    found = evaluate(seven.subset(3), mesh_of(2), 2)
    assert {r["image_id"] for r in found.results} == set(seven.image_ids[:3].tolist())
    assert found.metrics["AR100"] == pytest.approx(1.0)


def test_results_carry_the_categories_they_are_told(seven):
    ids = np.array([seven.label_map.category_ids[0], 12345, -1])
    found = evaluate(seven, mesh_of(1), 7, category_ids=ids)
    # 12345 is no category of the dataset, -1 none at all.
    assert {r["category_id"] for r in found.results} == {int(ids[0])}


def test_slots_that_no_category_has_leave_no_results(seven):
    labels = np.array([0, 1, 0], np.int32)
    predict = lambda *_: Detections(  # noqa: E731
        jax.numpy.full((7, 3), 0.5), jax.numpy.tile(labels, (7, 1)), jax.numpy.zeros((7, 3, 4))
    )
    plan = plan_of(seven, 7)
    truth = ground_truth(read_coco(seven.annotations))
    truth["categories"] = [
        c for c in truth["categories"] if c["id"] != seven.label_map.category_ids[1]
    ]
    batches = host_batches(seven, plan, mesh_of(1))
    found = evaluation.evaluate(predict, {}, seven, plan, batches, mesh_of(1), truth)
    assert {r["category_id"] for r in found.results} == {seven.label_map.category_ids[0]}


WORKER = """
import json, sys
import jax
address, process, root, out = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(process), initialization_timeout=60)
from tests import test_evaluation as test
index = test.load_coco(root, "annotations/instances_val2017.json", "val2017")
device_mesh = test.mesh.make_mesh()
assert device_mesh.size == 4
told = []
found = test.evaluate(
    index, device_mesh, 4, unreadable=(int(index.image_ids[2]),),
    judge=lambda unreadable, messages: told.append(unreadable),
)
assert told[-1] == 1  # though one of the two has read all of its own
with open(out, "w") as file:
    json.dump([found.metrics, found.results, found.unreadable, found.messages], file)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(seven, tmp_path):
    address = free_address()
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    commands = [["-c", WORKER, address, str(i), seven.root, str(outs[i])] for i in range(2)]
    with Processes(commands, tmp_path / "printed", devices=2) as group:
        assert group.wait(180) == [0, 0], group.printed()
    first, second = (json.loads(out.read_text()) for out in outs)
    assert first[:3] == second[:3]  # every process knows everything ...
    gone = int(seven.image_ids[2])
    assert sorted(first[3] + second[3]) == [f"picture of image {gone}: gone"]  # ... reasons apart
    alone = evaluate(seven, mesh_of(1), 7, unreadable=(gone,))
    assert first[:3] == [alone.metrics, alone.results, [gone]]
