"""Names of DETR: the original's and transformers' to ours and back, strict both ways."""

from __future__ import annotations

import argparse

import jax
import numpy as np
import pytest

from tests import tiny_detr
from yolos_jax.convert import detr, detr_hf_names, detr_names, names, read
from yolos_jax.convert.conversion import Options
from yolos_jax.convert.detr_hf_names import Dialect

CLASSES = 4


def model_of(**changes):
    return tiny_detr.model_config(pre_norm=True, position="learned", **changes)


@pytest.fixture(scope="module")
def state():
    return tiny_detr.make_state(model_of())


def test_a_round_trip_is_equal_to_the_last_bit(state):
    params = detr_names.to_params(state, model_of(), CLASSES, "x")
    back = detr_names.from_params(params, model_of())
    assert list(back) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_the_table_makes_what_the_model_has(state):
    params = detr_names.to_params(state, model_of(), CLASSES, "x")
    network = tiny_detr.make_model(pre_norm=True, position="learned")
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    found, expected = (names.flatten(jax.tree.map(np.shape, tree)) for tree in (params, shapes))
    assert found == expected


def test_projections_are_thirds_and_turned(state):
    params = detr_names.to_params(state, model_of(), CLASSES, "x")
    layers = params["decoder"]["layers"]["cross_attention"]
    theirs = state["transformer.decoder.layers.1.multihead_attn.in_proj_weight"]
    np.testing.assert_array_equal(layers["key"]["kernel"][1], theirs[16:32].T)
    convolution = state["backbone.0.body.layer4.1.conv2.weight"]
    ours = params["backbone"]["layer4"]["block_1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(ours[0, 2], convolution[:, :, 0, 2].T)


def test_published_layout():
    """The number of entries of the original's state dicts, and names of every kind."""
    values = tiny_detr.model_config(
        width=256, heads=8, mlp_width=2048, num_queries=100, blocks=(3, 4, 6, 3), stem_width=64,
        encoder_depth=6, decoder_depth=6,
    )  # fmt: skip
    table = detr_names.table(values, 91)
    assert len(table) == 458
    assert sum(int(np.prod(place.shape)) for place in table.values()) == 41_631_008
    for name, shape in {
        "transformer.encoder.layers.5.self_attn.in_proj_weight": (768, 256),
        "transformer.decoder.layers.0.multihead_attn.out_proj.bias": (256,),
        "transformer.decoder.norm.weight": (256,),
        "class_embed.weight": (92, 256),
        "bbox_embed.layers.2.bias": (4,),
        "query_embed.weight": (100, 256),
        "input_proj.weight": (256, 2048, 1, 1),
        "backbone.0.body.bn1.running_var": (64,),
        "backbone.0.body.layer2.0.downsample.0.weight": (512, 256, 1, 1),
        "backbone.0.body.layer4.2.conv2.weight": (512, 512, 3, 3),
    }.items():
        assert table[name].shape == shape
    values["detr"]["blocks"] = (3, 4, 23, 3)
    assert len(detr_names.table(values, 91)) == 713


def test_what_does_not_fit_is_named_both_ways(state):
    wrong = dict(state)
    del wrong["query_embed.weight"]
    wrong["mask_head.lay1.weight"] = np.zeros(3, np.float32)
    wrong["class_embed.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        detr_names.to_params(wrong, model_of(), CLASSES, "some.pth")
    for part in (
        "some.pth does not fit the model",
        "missing: query_embed.weight (5, 16)",
        "not part of the model: mask_head.lay1.weight (3,)",
        "class_embed.bias has shape (7,), expected (5,)",
    ):
        assert part in str(error.value)
    params = detr_names.to_params(state, model_of(), CLASSES, "x")
    params["query_embeddings"] = params.pop("query_embed")
    with pytest.raises(ValueError) as error:
        detr_names.from_params(params, model_of())
    for part in ("missing: query_embed", "not part of the model: query_embeddings"):
        assert part in str(error.value)
    params["query_embed"] = params.pop("query_embeddings")
    fewer = model_of(decoder_depth=1)
    with pytest.raises(ValueError, match=r"decoder/layers/norm1/scale has 2 layers, the model 1"):
        detr_names.from_params(params, fewer)


def test_an_original_checkpoint_tells_what_it_is(state, tmp_path):
    torch = pytest.importorskip("torch")
    counter = "backbone.0.body.bn1.num_batches_tracked"
    tensors = {name: torch.from_numpy(tensor) for name, tensor in state.items()}
    args = argparse.Namespace(nheads=2, dilation=True, dropout=0.2)
    file = tmp_path / "detr.pth"
    torch.save({"model": tensors | {counter: torch.tensor(3)}, "args": args}, file)
    source = read.read(file)
    assert detr.recognises(source.tensors)
    converted = detr.convert(source, Options())
    wanted = model_of(heads=2, dilation=True, dropout=0.2)
    assert converted.model["detr"] == wanted["detr"]
    shared = converted.model.keys() - {"detr", "dtype", "remat"}
    assert {key: converted.model[key] for key in shared} == {key: wanted[key] for key in shared}
    assert converted.label_map.num_classes == CLASSES and not converted.notes
    assert [row.name for row in converted.rows if row.action == "unused"] == [counter]

    torch.save({"model": tensors}, file)
    converted = detr.convert(read.read(file), Options())
    assert converted.model["heads"] == 8 and not converted.model["detr"]["dilation"]
    assert len(converted.notes) == 2 and all("ASSUMED" in note for note in converted.notes)
    with pytest.raises(ValueError, match=r"detr.pth: 5 heads do not divide the width 16"):
        detr.convert(read.read(file), Options(num_heads=5))


@pytest.mark.parametrize(
    "dialect",
    [Dialect(), Dialect(timm=True, before_version5=True), Dialect(in_memory=True)],
    ids=("file", "older file", "module"),
)
def test_transformers_names_and_back(dialect):
    model = tiny_detr.model_config(position="learned")
    state = tiny_detr.make_state(model)
    theirs = detr_hf_names.from_original(state, dialect)
    assert detr_hf_names.dialect_of(theirs) == dialect
    places = detr_names.table(model, CLASSES)
    expected = {name: place.shape for name, place in places.items()}
    back = detr_hf_names.to_original(theirs, expected, "x")
    assert list(back) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor)
    theirs["model.mask"] = theirs.pop("class_labels_classifier.bias")
    with pytest.raises(ValueError, match=r"missing: class_labels_classifier.bias \(5,\)"):
        detr_hf_names.to_original(theirs, expected, "x")


IN_FILES = {  # the original's names: those of files with transformers' own ResNet, and with timm's
    "conv1.weight": ("embedder.embedder.convolution.weight", "conv1.weight"),
    "bn1.running_mean": ("embedder.embedder.normalization.running_mean", "bn1.running_mean"),
    "layer2.0.downsample.0.weight": (
        "encoder.stages.1.layers.0.shortcut.convolution.weight", "layer2.0.downsample.0.weight"
    ),
    "layer2.0.downsample.1.running_var": (
        "encoder.stages.1.layers.0.shortcut.normalization.running_var",
        "layer2.0.downsample.1.running_var",
    ),
    "layer4.2.conv3.weight": (
        "encoder.stages.3.layers.2.layer.2.convolution.weight", "layer4.2.conv3.weight"
    ),
    "layer4.2.bn2.bias": (
        "encoder.stages.3.layers.2.layer.1.normalization.bias", "layer4.2.bn2.bias"
    ),
}  # fmt: skip


def test_names_of_both_backbones_and_of_layers():
    for name, expected in IN_FILES.items():
        for dialect, theirs in zip((Dialect(), Dialect(timm=True)), expected, strict=True):
            found = detr_hf_names.their_names(f"backbone.0.body.{name}", dialect)
            assert found == (f"model.backbone.conv_encoder.model.{theirs}",)
    for name, theirs in {
        "encoder.layers.0.norm2.weight": "encoder.layers.0.final_layer_norm.weight",
        "decoder.layers.5.norm2.bias": "decoder.layers.5.encoder_attn_layer_norm.bias",
        "decoder.layers.0.linear2.weight": "decoder.layers.0.fc2.weight",
        "encoder.layers.5.self_attn.out_proj.bias": "encoder.layers.5.self_attn.out_proj.bias",
    }.items():
        assert detr_hf_names.their_names(f"transformer.{name}", Dialect()) == (f"model.{theirs}",)
    assert detr_hf_names.their_names(
        "transformer.decoder.layers.1.multihead_attn.in_proj_bias", Dialect()
    ) == tuple(f"model.decoder.layers.1.encoder_attn.{part}_proj.bias" for part in "qkv")


def test_transformers_has_no_pre_norm(state):
    with pytest.raises(ValueError, match=r"encoder\.norm\.weight: transformers' DETR has"):
        detr_hf_names.from_original(state, Dialect())
