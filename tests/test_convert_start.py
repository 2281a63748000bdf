"""Pre-trained transformers in all their layouts become the start of a detector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import convert_sources as sources
from yolos_jax.convert import conversion, names, start, vit_layouts, weights
from yolos_jax.convert.conversion import Options
from yolos_jax.convert.read import Source
from yolos_jax.labels import LabelMap

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
GOLDEN = np.load(Path(__file__).parent / "goldens" / "deit_start.npz")
FLAGS = Options(**sources.FLAGS)


@pytest.fixture(autouse=True)
def quick_draws(monkeypatch):
    """Random parameters without compiling anything, where what they are does not matter."""
    monkeypatch.setattr(start, "draw", sources.numpy_draw)


def opened(path, **changes):
    return weights.open_checkpoint(path, Options(**(sources.FLAGS | changes)))[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A start from a plain checkpoint, which other layouts of the same numbers must equal."""
    path = sources.save(tmp_path_factory.mktemp("timm") / "vit.pth", sources.timm())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "draw", sources.numpy_draw)
        return opened(path)


def assert_same_start(found, expected):
    ours, theirs = names.flatten(found.params), names.flatten(expected.params)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert found.model == expected.model
    assert found.new == expected.new


def test_a_plain_transformer(plain):
    tensors = sources.timm()
    params = names.flatten(plain.params)
    body = names.from_params(plain.params, plain.model)
    for name, tensor in tensors.items():
        if name != "pos_embed" and not name.startswith("head"):
            np.testing.assert_array_equal(body[f"backbone.{name}"], tensor, err_msg=name)
    np.testing.assert_array_equal(params["backbone/position/cls"], tensors["pos_embed"][0, :1])
    assert plain.model["num_queries"] == 100
    assert plain.label_map == LabelMap.coco91()
    actions = {row.name: row.action for row in plain.rows}
    assert actions["blocks.0.attn.qkv.weight"] == "loaded"
    assert actions["pos_embed"] == "resized"
    assert actions["head.weight"] == "unused"
    assert actions["class_head/layers_2/kernel"] == "new"
    assert set(plain.new) == {
        "backbone/det_tokens",
        "backbone/position/det",
        *(path for path in params if "_head/" in path),
    }


def test_what_is_new_is_drawn_as_the_reference_does(tmp_path, monkeypatch):
    monkeypatch.undo()
    found = opened(sources.save(tmp_path / "v.pth", sources.timm()), mid_pe_size=(48, 64))
    params = names.flatten(found.params)
    for path in ("det_tokens", "position/det", "mid_position/cls", "mid_position/grid"):
        assert np.std(params[f"backbone/{path}"]) == pytest.approx(0.02, rel=0.3), path
    bound = sources.WIDTH**-0.5  # torch's default for linear layers
    for path in found.new:
        if "_head/" in path and params[path].size > 50:
            assert bound * 0.9 < np.abs(params[path]).max() <= bound, path


@pytest.mark.parametrize(("variant", "prefix"), [("tiny", 1), ("distilled", 2), ("dwr", 1)])
def test_position_tables_are_resized_as_the_original_does(variant, prefix):
    stored = GOLDEN[f"{variant}_pos_embed"]
    side = int(np.sqrt(stored.shape[1] - prefix))
    patches = stored[0, prefix:].reshape(side, side, -1)
    grid = GOLDEN[f"{variant}_init_pe_size"] // 16
    found = start.resize_grid(patches, grid).reshape(1, -1, stored.shape[-1])
    np.testing.assert_allclose(found, GOLDEN[f"{variant}_patch"], atol=1e-5)
    np.testing.assert_array_equal(stored[:, prefix - 1 : prefix], GOLDEN[f"{variant}_cls"])


def test_a_distilled_transformer_keeps_the_distillation_row(tmp_path):
    tensors = sources.timm(prefix=2)
    path = sources.save(tmp_path / "d.pth", tensors)
    found = names.flatten(opened(path).params)
    np.testing.assert_array_equal(found["backbone/position/cls"], tensors["pos_embed"][0, 1:2])
    np.testing.assert_array_equal(found["backbone/cls_token"], tensors["cls_token"][0])
    # Without the token in the file, its row is known by a table that is no square and one.
    del tensors["dist_token"]
    again = names.flatten(opened(sources.save(path, tensors)).params)
    np.testing.assert_array_equal(again["backbone/position/cls"], found["backbone/position/cls"])


def test_mid_tables_and_published_sizes(tmp_path):
    path = sources.save(tmp_path / "vit.pth", sources.timm())
    found = opened(path, mid_pe_size=(32, 80))
    assert found.model["mid_position_grid"] == (2, 5)
    assert names.flatten(found.params)["backbone/mid_position/grid"].shape == (1, 2, 5, 24)
    assert "backbone/mid_position/cls" in found.new
    for flags, message in (
        ({"init_pe_size": None}, "--init_pe_size HEIGHT WIDTH"),
        ({"mid_pe_size": None}, r"--mid_pe_size HEIGHT WIDTH in pixels \(or none\)"),
        ({"num_heads": None}, "--num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path, **flags)
    for width, published in conversion.PUBLISHED.items():
        assert conversion.heads_of(width, Options()) == published.heads
        for grid in (published.position_grid, published.mid_position_grid):
            assert conversion.target_grid(None, grid, 16, "init_pe_size") == grid


WRAPPERS = {
    "timm": lambda t: t,
    "DataParallel": lambda t: {"state_dict": {f"module.{k}": v for k, v in t.items()}},
    "MAE": lambda t: {
        "model": t | {"mask_token": t["cls_token"], "decoder_norm.bias": t["norm.bias"]},
        "optimizer": {},
    },
    "DINO": lambda t: {
        "student": {f"module.backbone.{k}": v * 0 for k, v in t.items()},
        "teacher": {f"backbone.{k}": v for k, v in t.items()} | {"head.mlp.0.bias": t["norm.bias"]},
    },
    "MoCo v3": lambda t: {
        "arch": "vit_small",
        "state_dict": {f"module.base_encoder.{k}": v for k, v in t.items()}
        | {f"module.momentum_encoder.{k}": v * 0 for k, v in t.items()}
        | {"module.predictor.0.weight": t["head.weight"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_transformers(tmp_path, plain, name):
    tensors = {key: torch.from_numpy(array) for key, array in sources.timm().items()}
    torch.save(WRAPPERS[name](tensors), tmp_path / "vit.pth")
    found = opened(tmp_path / "vit.pth")
    assert_same_start(found, plain)
    unused = [row.name for row in found.rows if row.action == "unused"]
    assert all("head" in n or "momentum" in n or "decoder" in n or "predictor" in n
               or n == "mask_token" for n in unused)  # fmt: skip


def test_deit_three_has_no_row_for_the_class(tmp_path):
    tensors = sources.timm(prefix=0)
    found = names.flatten(opened(sources.save(tmp_path / "v.pth", tensors)).params)
    assert not found["backbone/position/cls"].any()
    np.testing.assert_array_equal(found["backbone/cls_token"], tensors["cls_token"][0])
    expected = start.resize_grid(tensors["pos_embed"].reshape(5, 5, -1), sources.GRID)
    np.testing.assert_array_equal(found["backbone/position/grid"], expected)


def test_without_biases_of_query_key_value(tmp_path):
    tensors = {k: v for k, v in sources.timm().items() if not k.endswith("qkv.bias")}
    found = opened(sources.save(tmp_path / "v.pth", tensors))
    assert not names.flatten(found.params)["backbone/blocks/attention/qkv/bias"].any()


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("blocks.0.ls1.gamma", (24,), "layer scale"),
        ("blocks.1.gamma_2", (24,), "layer scale"),
        ("reg_token", (1, 4, 24), "register tokens"),
        ("blocks.0.attn.relative_position_bias_table", (9, 3), "relative positions"),
        ("blocks.0.attn.q_norm.weight", (8,), "normalised queries"),
        ("fc_norm.weight", (24,), "fc_norm"),
        ("norm_pre.weight", (24,), "norm_pre"),
        ("blocks.0.mlp.w12.weight", (80, 24), "SwiGLU"),
    ],
)
def test_parts_that_yolos_lacks_are_refused(tmp_path, name, shape, part):
    path = sources.save(tmp_path / "v.pth", sources.timm() | {name: sources.numbers()(*shape)})
    with pytest.raises(ValueError, match=part) as caught:
        opened(path)
    assert name in str(caught.value)


def test_a_tensor_that_is_not_known_is_an_error(tmp_path):
    tensors = sources.timm() | {"blocks.0.attn.gate": sources.numbers()(24)}
    del tensors["norm.weight"]
    with pytest.raises(ValueError) as caught:
        opened(sources.save(tmp_path / "v.pth", tensors))
    assert "not part of the model: blocks.0.attn.gate (24,)" in str(caught.value)
    assert "missing: norm.weight (24,)" in str(caught.value)
    tensors = sources.timm() | {"pos_embed": sources.numbers()(1, 29, 24)}
    with pytest.raises(ValueError, match="29 rows"):
        opened(sources.save(tmp_path / "v.pth", tensors))


def transformers_folder(folder, config_class, model_class, **changes):
    transformers = pytest.importorskip("transformers", reason="it writes its own layouts")
    values = {
        "hidden_size": sources.WIDTH,
        "num_hidden_layers": sources.DEPTH,
        "num_attention_heads": sources.HEADS,
        "intermediate_size": sources.MLP,
        "image_size": 80,
    }
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**values | changes)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ("ViTConfig", "ViTModel"),
        ("ViTConfig", "ViTForImageClassification"),
        ("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
        ("ViTMAEConfig", "ViTMAEForPreTraining"),
    ],
)
def test_transformers_of_transformers(tmp_path, config, model):
    model = transformers_folder(tmp_path / "hf", config, model)
    found = names.flatten(opened(tmp_path / "hf", num_heads=None).params)
    inner = getattr(model, "vit", getattr(model, "deit", model))
    state = {name: tensor.numpy() for name, tensor in inner.state_dict().items()}
    distilled = "embeddings.distillation_token" in state
    table = state["embeddings.position_embeddings"]
    row = 1 if distilled else 0
    np.testing.assert_array_equal(found["backbone/position/cls"], table[0, row : row + 1])
    grid = start.resize_grid(table[0, row + 1 :].reshape(5, 5, -1), sources.GRID)
    np.testing.assert_array_equal(found["backbone/position/grid"], grid)
    np.testing.assert_array_equal(found["backbone/norm/bias"], state["layernorm.bias"])
    np.testing.assert_array_equal(found["backbone/cls_token"], state["embeddings.cls_token"][0])
    kernel = found["backbone/blocks/attention/qkv/kernel"][1]
    saved = torch_state(tmp_path / "hf")
    keys = [n for n in saved if n.endswith("encoder.layer.1.attention.attention.key.weight")
            and "decoder" not in n]  # fmt: skip
    np.testing.assert_array_equal(kernel[:, 24:48], saved[keys[0]].T)


def torch_state(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_dinov2_is_refused(tmp_path):
    transformers_folder(tmp_path / "hf", "Dinov2Config", "Dinov2Model")
    with pytest.raises(ValueError, match="layer scale"):
        opened(tmp_path / "hf")


def test_transformers_normalisation_is_kept(tmp_path):
    transformers_folder(tmp_path / "hf", "ViTConfig", "ViTModel", layer_norm_eps=1e-3)
    content = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 224}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(content))
    opened_folder = opened(tmp_path / "hf", num_heads=None)
    found = opened_folder.preprocess
    assert (found["mean"], found["std"]) == ([0.5] * 3, [0.25] * 3)
    assert found["size"] == 800  # of detection, not of the classifier
    assert opened_folder.model["layer_norm_eps"] == 1e-3


def test_vit_layouts_do_not_take_a_yolos():
    assert not vit_layouts.recognises(sources.yolos())


def test_a_checkpoint_without_patch_projection_says_so():
    with pytest.raises(ValueError, match=r"config.json is needed"):
        tensors = {"embeddings.patch_embeddings.projection.weight": np.zeros((4, 3, 2, 2))}
        vit_layouts.backbone_of(Source("model.safetensors", tensors))
