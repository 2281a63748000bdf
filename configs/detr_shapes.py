"""A small DETR on the demo's shapes, from nothing, for two CPU cores.

    python -m yolos_jax.data.shapes runs/shapes
    python train.py --config=configs/detr_shapes.py --workdir=runs/detr_shapes \\
        --config.data.root=runs/shapes

AP 0.650 and AP50 0.961 on the 300 pictures kept back, seed 0; a YOLOS (configs/shapes.py) has 0.652
and 0.949 after as many steps.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.epochs = 10
    config.batch_size = 32

    config.model.name = "detr"
    config.model.width = 64
    config.model.heads = 4
    config.model.mlp_width = 128
    config.model.num_queries = 10
    config.model.layer_norm_eps = 1e-5
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.detr.blocks = (1, 1, 1, 1)
    config.model.detr.stem_width = 8
    config.model.detr.dilation = True  # 4 x 4 cells of 64 x 64 pixels
    config.model.detr.encoder_depth = 2
    config.model.detr.decoder_depth = 3
    config.model.detr.dropout = 0.0

    config.preprocess.size = 64
    config.preprocess.max_size = 64
    config.augment.scales = (64,)
    config.augment.max_size = 64
    config.augment.crop = 0.0
    config.buckets.multiple = 1

    # As of configs/shapes.py: of few queries two find something.
    config.loss.eos_coef = 0.4
    config.loss.class_loss_group = 0
    config.loss.reference_processes = 1
    config.optimizer.schedule = "cosine"
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0

    config.eval.every_epochs = 5
    config.eval.batch_size = 60
    return config
