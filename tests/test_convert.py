"""Original YOLOS checkpoints, in and out, and the commands that convert and compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import convert_sources as sources
from tests import torch_weights
from yolos_jax import interrupt
from yolos_jax.convert import command, compare, export, names, original, weights
from yolos_jax.convert.conversion import Options
from yolos_jax.convert.read import Source, read
from yolos_jax.models.build import build_model

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
HEADS = Options(num_heads=sources.HEADS)
CLI = Path(__file__).resolve().parent.parent / "convert_torch_weights.py"


def flat_equal(a, b):
    a, b = names.flatten(a), names.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def converted(path, options=HEADS):
    return weights.open_checkpoint(path, options)[0]


def test_one_block_has_no_tables_between_blocks():
    model = sources.yolos_model() | {"depth": 1, "mid_position_grid": (2, 2)}
    params = sources.numpy_draw(build_model(model, 3), jax.random.key(0))
    tensors = names.from_params(params, model)
    queries = model["num_queries"]
    assert tensors[names.MID_POSITION].shape == (0, 1, 1 + 4 + queries, model["width"])
    flat_equal(params, names.to_params(tensors, model, 3, "here"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mid", [False, True])
def test_original_yolos(tmp_path, mid, legacy):
    tensors = sources.yolos(mid=mid)
    path = sources.save(
        tmp_path / "y.pth", tensors, legacy, epoch=3, args=sources.yolos_args(mid=mid)
    )
    found = converted(path)
    mid_grid = sources.GRID if mid else ()
    expected = torch_weights.params_from_yolos(
        tensors,
        depth=sources.DEPTH,
        num_queries=sources.QUERIES,
        grid=sources.GRID,
        mid_grid=mid_grid,
    )
    flat_equal(found.params, expected)
    assert found.model["position_grid"] == sources.GRID
    assert found.model["mid_position_grid"] == mid_grid
    assert (found.model["heads"], found.model["mlp_width"]) == (sources.HEADS, sources.MLP)
    assert (found.preprocess["size"], found.preprocess["max_size"]) == (512, 853)
    back = names.from_params(found.params, found.model)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)


@pytest.mark.parametrize(
    ("width", "depth", "grid", "mid", "heads", "parameters"),
    [
        (192, 12, (50, 83), (), 3, 6_488_736),
        (384, 12, (32, 54), (32, 54), 6, 30_684_768),
        (330, 14, (32, 54), (32, 54), 6, 27_561_696),
        (768, 12, (50, 84), (50, 84), 12, 127_798_368),
    ],
)
def test_published_models_are_known_by_their_width(width, depth, grid, mid, heads, parameters):
    model = {
        "width": width, "depth": depth, "mlp_width": 4 * width, "patch_size": 16,
        "num_queries": 100, "position_grid": grid, "mid_position_grid": mid,
    }  # fmt: skip
    shapes = names.expected_shapes(model, 91)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    # Zeros of any shape that take no memory: nothing but shapes is looked at.
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    found, num_classes = original.infer_model(Source("published.pth", tensors), Options())
    assert num_classes == 91
    assert found["heads"] == heads
    assert {key: found[key] for key in model} == model


def test_half_precision_is_widened(tmp_path):
    path = tmp_path / "half.pth"
    tensors = {k: torch.from_numpy(v).half() for k, v in sources.yolos().items()}
    torch.save({"model": tensors, "args": sources.yolos_args()}, path)
    kernel = converted(path).params["box_head"]["layers_0"]["kernel"]
    assert kernel.dtype == np.float32
    expected = tensors["bbox_embed.layers.0.weight"].float().numpy().T
    np.testing.assert_array_equal(kernel, expected)


def test_what_tensors_do_not_tell_is_asked_for(tmp_path):
    path = sources.save(tmp_path / "y.pth", sources.yolos())
    with pytest.raises(ValueError, match="--num_heads"):
        converted(path, Options(init_pe_size=(48, 64), mid_pe_size=(48, 64)))
    with pytest.raises(ValueError, match="does not divide"):
        converted(path, Options(7, (48, 64), (48, 64)))
    # 12 rows of patches: 2x6, 3x4, 4x3, 6x2 are plausible.
    with pytest.raises(ValueError, match=r"12 rows.*2x6, 3x4, 4x3, 6x2.*--mid_pe_size 32 96"):
        converted(path, Options(num_heads=3, init_pe_size=(48, 64)))
    with pytest.raises(ValueError, match="--init_pe_size"):
        converted(path, Options(num_heads=3, init_pe_size=(64, 64), mid_pe_size=(48, 64)))
    found = converted(path, Options(num_heads=3, init_pe_size=(64, 48), mid_pe_size=(32, 96)))
    assert found.model["position_grid"] == (4, 3)
    assert found.model["mid_position_grid"] == (2, 6)


def test_arguments_that_do_not_fit_are_no_grid(tmp_path):
    args = sources.yolos_args(init_pe_size=[800, 1333])
    path = sources.save(tmp_path / "y.pth", sources.yolos(), args=args)
    with pytest.raises(ValueError, match="args says 800x1333 pixels"):
        converted(path)
    flag = Options(num_heads=3, init_pe_size=(48, 64))
    assert converted(path, flag).model["position_grid"] == sources.GRID


def test_everything_wrong_is_named_at_once(tmp_path):
    tensors = sources.yolos()
    del tensors["backbone.blocks.1.norm1.weight"]
    tensors["surplus"] = np.zeros(3, np.float32)
    tensors["backbone.norm.bias"] = np.zeros(7, np.float32)
    tensors["backbone.norm.weight"] = np.zeros(sources.WIDTH, np.int32)
    path = sources.save(tmp_path / "y.pth", tensors, args=sources.yolos_args())
    with pytest.raises(ValueError) as caught:
        converted(path)
    message = str(caught.value)
    assert "missing: backbone.blocks.1.norm1.weight (24,)" in message
    assert "not part of the model: surplus (3,)" in message
    assert "backbone.norm.bias has shape (7,), expected (24,)" in message
    assert "backbone.norm.weight holds int32" in message


def categories(tmp_path, ids):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"categories": [{"id": i, "name": f"name {i}"} for i in ids]}))
    return str(path)


@pytest.mark.parametrize(
    ("ids", "expected_ids", "expected_names"),
    [
        # The original puts ids into slots as they are ...
        ([1, 3], (0, 1, 2, 3), ("N/A", "name 1", "N/A", "name 3")),
        # ... which these do not fit into.
        ([7, 5, 90, 11], (5, 7, 11, 90), ("name 5", "name 7", "name 11", "name 90")),
    ],
)
def test_labels_from_a_file(tmp_path, ids, expected_ids, expected_names):
    path = sources.save(tmp_path / "y.pth", sources.yolos(4), args=sources.yolos_args())
    found = converted(path, Options(num_heads=3, labels=categories(tmp_path, ids))).label_map
    assert (found.category_ids, found.names) == (expected_ids, expected_names)


def test_labels_without_a_file(tmp_path):
    path = sources.save(tmp_path / "y.pth", sources.yolos(4), args=sources.yolos_args())
    assert converted(path).label_map.names == ("class_0", "class_1", "class_2", "class_3")
    path = sources.save(tmp_path / "coco.pth", sources.yolos(91), args=sources.yolos_args())
    assert converted(path).label_map.names[90] == "toothbrush"
    with pytest.raises(ValueError, match=r"labels.json.*3 categories.*4 classes"):
        converted(path.with_name("y.pth"), Options(3, labels=categories(tmp_path, [5, 6, 7])))


def test_out_and_back_is_equal_to_the_last_bit(tmp_path):
    tensors = sources.yolos(4)
    path = sources.save(tmp_path / "y.pth", tensors, args=sources.yolos_args())
    labels = categories(tmp_path, [5, 7, 11, 90])
    found = converted(path, Options(num_heads=3, labels=labels, size=320))
    out = tmp_path / "out.pth"
    export.write_yolos(found, out, str(path))
    # Nothing is to be told again: heads, grids, labels and sizes are in the file.
    again = converted(out, Options())
    flat_equal(again.params, found.params)
    assert again.model == found.model
    assert again.label_map == found.label_map
    assert again.preprocess == found.preprocess
    stored = read(out).tensors
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)


def arguments(*words):
    """The command line of convert_torch_weights.py, parsed."""
    sys.path.insert(0, str(CLI.parent))
    try:
        import convert_torch_weights
    finally:
        sys.path.pop(0)
    return convert_torch_weights.parse([str(word) for word in words])


def test_the_command_writes_verifies_and_replaces(tmp_path, capsys):
    path = sources.save(tmp_path / "y.pth", sources.yolos(), args=sources.yolos_args())
    out = tmp_path / "out"
    command.convert(arguments(path, out, "--num_heads=3", "--size=64", "--verify"))
    printed = capsys.readouterr().out
    assert "loaded  backbone.pos_embed" in printed
    assert "verified" in printed
    assert f"{sum(array.size for array in sources.yolos().values()):,} parameters" in printed
    flat_equal(converted(out).params, converted(path).params)
    with pytest.raises(ValueError, match="--overwrite"):
        command.convert(arguments(path, out, "--num_heads=3"))
    command.convert(arguments(path, out, "--num_heads=6", "--overwrite"))
    assert converted(out, Options()).model["heads"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "y.pth"]
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="something else"):
        command.convert(arguments(path, out, "--num_heads=3", "--overwrite"))
    (out / "thesis.tex").unlink()
    (out / "0" / "optimizer").mkdir()  # as a run has
    with pytest.raises(ValueError, match="something else"):
        command.convert(arguments(path, out, "--num_heads=3", "--overwrite"))
    with pytest.raises(ValueError, match="lies in it"):
        command.convert(arguments(out / "0", out, "--overwrite"))
    with pytest.raises(ValueError, match="the same"):
        command.convert(arguments(path, path, "--to=yolos", "--overwrite"))


def test_what_is_replaced_stays_until_all_is_written(tmp_path):
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(KeyError), interrupt.complete_or_nothing(target) as path:
        path.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    with pytest.raises(OSError), interrupt.complete_or_nothing(target):
        pass  # nothing was written, so there is nothing to rename
    assert target.read_text() == "old"
    with interrupt.complete_or_nothing(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_verify_fails_where_outputs_differ(tmp_path, monkeypatch):
    path = sources.save(tmp_path / "y.pth", sources.yolos(), args=sources.yolos_args())
    write = export.WRITERS["yolos_jax"]

    def write_wrong(found, destination, source):
        found.params["backbone"]["norm"]["bias"] = found.params["backbone"]["norm"]["bias"] + 0.1
        write(found, destination, source)

    monkeypatch.setitem(export.WRITERS, "yolos_jax", write_wrong)
    with pytest.raises(ValueError, match="--verify: logits or boxes differ"):
        command.convert(arguments(path, tmp_path / "out", "--num_heads=3", "--size=64", "--verify"))
    assert [p.name for p in tmp_path.iterdir()] == ["y.pth"]


def test_compare_finds_the_stage(tmp_path, capsys):
    tensors = sources.yolos()
    first = sources.save(tmp_path / "a.pth", tensors, args=sources.yolos_args())
    tensors["backbone.blocks.1.mlp.fc2.bias"][0] += 0.5
    second = sources.save(tmp_path / "b.pth", tensors, args=sources.yolos_args())
    flags = ["--num_heads=3", "--size=64"]
    with pytest.raises(SystemExit) as stop:
        compare.main([str(first), str(first), *flags])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        compare.main([str(first), str(second), *flags])
    assert stop.value.code == 1
    lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: float(line[1]) for line in lines if line[0].startswith("block")}
    assert rows == {"block 0": 0, "block 1": pytest.approx(0.5, abs=1e-3)}
