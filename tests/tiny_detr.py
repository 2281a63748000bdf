"""A DETR so small that it compiles in seconds, and canvases for it, shared by tests."""

from __future__ import annotations

import jax
import numpy as np

from configs import common
from tests import tiny
from yolos_jax import step
from yolos_jax.batch import Canvas, CanvasBucket, HostBatch
from yolos_jax.convert import detr_names
from yolos_jax.models.build import build_model
from yolos_jax.models.detr_model import DetrModel

CLASSES, QUERIES = 4, 5
BUCKET = CanvasBucket(96 * 64, 96, 64)
OWN = dict(
    blocks=(1, 1, 1, 2), stem_width=4, encoder_depth=1, decoder_depth=2, position="sine"
)  # fmt: skip


def model_config(**changes) -> dict:
    """``config.model`` as recipes and runs have it; names of ``OWN`` go where they belong."""
    model = common.get_config().model.to_dict()
    model |= dict(
        name="detr", width=16, heads=2, mlp_width=24, num_queries=QUERIES, layer_norm_eps=1e-5,
        dtype="float32",
    )  # fmt: skip
    own = {name: changes.pop(name) for name in list(changes) if name in model["detr"]}
    return model | changes | {"detr": model["detr"] | OWN | own}


def make_config(**changes):
    """A run's, with what DETR's recipes have: dropout, two learning rates, frozen stages."""
    own = {
        "optimizer.backbone_lr": tiny.LR / 10,
        "optimizer.freeze": (r"backbone/conv1/.*", r"backbone/layer1/.*"),
    }
    config = tiny.make_config(**own | changes)
    config.model.update(model_config(blocks=(1, 1, 1, 1)))
    return config


def make_model(mesh=None, **changes) -> DetrModel:
    return build_model(model_config(**changes), CLASSES, mesh)


def make_params(model: DetrModel, seed: int = 0) -> dict:
    """Random parameters of numpy: drawing them in jax takes seconds to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("running_var", "weight", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = int(np.prod(leaf.shape[:-1])) if name == "kernel" else 1
        return (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def start(train_step: step.TrainStep, seed: int = 0) -> step.TrainState:
    """A state from ``make_params``."""
    return train_step.init_state(jax.random.key(0), make_params(train_step.model, seed))


def make_batch(seed: int, size: int = 4, boxes: bool = True) -> HostBatch:
    """Raw pictures of random sizes, and noise beside them, with targets of ``tiny.make_batch``."""
    rng = np.random.default_rng(seed)
    canvas = BUCKET.empty(size, 1)
    canvas.pixels[:] = rng.integers(0, 256, canvas.pixels.shape)
    canvas.size[:] = rng.integers(24, (BUCKET.rows + 1, BUCKET.cols + 1), (size, 2))
    canvas.image_valid[:] = True
    return tiny.make_batch(seed, size, boxes=boxes)._replace(batch=canvas, bucket=BUCKET)


def numpy_draw(model: DetrModel, rng: jax.Array) -> dict:
    """Random parameters of a model without tracing it, in place of ``start.draw``."""
    config = model.config._asdict()
    config |= {"detr": config}
    seed = np.asarray(jax.random.key_data(rng))
    state = make_state(config, model.num_classes, seed)
    return detr_names.to_params(state, config, model.num_classes, "random")


def make_state(model: dict, classes: int = CLASSES, seed=0) -> dict[str, np.ndarray]:
    """An original state dict of random numbers for the keys of ``config.model``."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, place in detr_names.table(model, classes).items():
        fan_in = np.prod(place.shape[1:])
        state[name] = (rng.normal(size=place.shape) * fan_in**-0.5).astype(np.float32)
        if name.endswith("running_var"):
            state[name] = rng.uniform(0.5, 1.5, place.shape).astype(np.float32)
    return state


def make_canvas(sizes, canvas: tuple[int, int], seed: int = 0) -> Canvas:
    """Normalised random pixels; what is outside of the images is not zero."""
    pixels = np.random.default_rng(seed).normal(size=(len(sizes), *canvas, 3))
    return Canvas(pixels.astype(np.float32), np.array(sizes, np.int32), np.ones(len(sizes), bool))


def zero_outside(canvas: Canvas) -> Canvas:
    """The same with zeros outside of the images, as other projects want it."""
    pixels = np.zeros_like(canvas.pixels)
    for new, old, (height, width) in zip(pixels, canvas.pixels, canvas.size, strict=True):
        new[:height, :width] = old[:height, :width]
    return canvas._replace(pixels=pixels)
