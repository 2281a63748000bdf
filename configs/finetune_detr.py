"""A DETR on a small set of your own, started from a converted or trained one.

    python train.py --config=configs/finetune_detr.py --workdir=runs/mine \\
        --config.init=runs/detr_r50 --config.data.root=/data/mine

As of finetune.py, 0, -1 and () are taken from the checkpoint that ``config.init`` names, and the
class head is made for the set's categories. Sizes, boxes' losses and canvases are those of
detr_r50.py.
"""

from configs import detr_r50


def get_config():
    config = detr_r50.get_config()
    config.epochs = 50
    config.batch_size = 8

    config.model.width = 0
    config.model.heads = 0
    config.model.mlp_width = 0
    config.model.num_queries = 0
    config.model.layer_norm_eps = 0.0
    config.model.detr.blocks = (0, 0, 0, 0)  # and with it all of model.detr but dropout
    config.data.labels = "dataset"
    config.preprocess.size = 0
    config.preprocess.max_size = -1
    config.preprocess.mean = ()
    config.preprocess.std = ()

    config.loss.class_loss_group = 0
    config.loss.reference_processes = 1
    config.optimizer.lr_drop = 40
    return config
