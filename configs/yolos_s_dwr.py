"""YOLOS-S (dWr), 150 epochs on COCO: published AP 37.6, 27.6 M parameters.

    python train.py --config=configs/yolos_s_dwr.py --workdir=runs/yolos_s_dwr \\
        --config.data.root=/data/coco --config.init=runs/start/fa_deit_small_dwr

Depth and width scaled together (fast scaling): 14 blocks of width 330. Start: the authors'
DeiT-S (dWr) (ImageNet-1k, 240x240) converted with convert_torch_weights.py.
Published hardware: 8 GPUs, one image each.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.model.width = 330
    config.model.depth = 14
    config.model.mlp_width = 1320
    config.data.labels = "coco91"
    return config
