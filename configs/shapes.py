"""The demo: rectangles, ellipses and triangles of 64x64 pixels; minutes on two CPU cores.

    python -m yolos_jax.data.shapes runs/shapes
    python train.py --config=configs/shapes.py --workdir=runs/demo --config.data.root=runs/shapes

``make demo`` does both, and prints one line of JSON at the end.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.model.patch_size = 8
    config.model.width = 96
    config.model.depth = 3
    config.model.heads = 3
    config.model.mlp_width = 192
    config.model.num_queries = 8
    config.model.position_grid = (8, 8)
    config.model.mid_position_grid = ()
    config.model.position_init = "sincos"
    config.model.det_token_std = 1.0
    config.model.dtype = "float32"

    learn_shapes(config)
    config.optimizer.lr = 1.5e-3
    return config


def learn_shapes(config):
    """What models of every kind need for these pictures: their size, losses and schedule."""
    config.epochs = 10
    config.batch_size = 32
    config.preprocess.size = 64
    config.preprocess.max_size = 64
    config.augment.scales = (64,)
    config.augment.max_size = 64
    config.augment.crop = 0.0
    config.buckets.multiple = 1

    # Of 8 or 10 tokens two find something, not 7 of 100: at 0.1 several claim the same object.
    config.loss.eos_coef = 0.4
    config.loss.class_loss_group = 0
    config.loss.reference_processes = 1
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0

    config.eval.every_epochs = 5
    config.eval.batch_size = 60
