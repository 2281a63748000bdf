"""A YOLOS on a small set of your own, started from a converted or trained one.

    python train.py --config=configs/finetune.py --workdir=runs/mine \\
        --config.init=runs/yolos_s --config.data.root=/data/mine

What is 0, -1 or () here is taken from the checkpoint that ``config.init`` names, so one file serves
every YOLOS (finetune_detr.py every DETR); override it to differ (more detection tokens, smaller
pictures). The schedule suits hundreds to thousands of pictures. Give ``config.augment.scales`` in
the range of ``config.preprocess.size``.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.epochs = 50
    config.batch_size = 8

    config.model.patch_size = 0
    config.model.width = 0
    config.model.depth = 0
    config.model.heads = 0
    config.model.mlp_width = 0
    config.model.num_queries = 0
    config.model.position_grid = (0, 0)
    config.model.mid_position_grid = (0, 0)
    config.model.layer_norm_eps = 0.0
    config.preprocess.size = 0
    config.preprocess.max_size = -1
    config.preprocess.mean = ()
    config.preprocess.std = ()

    config.optimizer.schedule = "cosine"
    config.optimizer.lr = 1e-4
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 1e-4
    config.loss.class_loss_group = 0
    config.loss.reference_processes = 1
    config.checkpoint.every_steps = 0
    config.eval.every_epochs = 5
    return config
