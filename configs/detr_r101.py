"""DETR with a ResNet-101, 500 epochs on COCO: published AP 43.5, 60.2 M parameters that train.

    python train.py --config=configs/detr_r101.py --workdir=runs/detr_r101 \\
        --config.data.root=/data/coco --config.init=runs/start/resnet101

Published hardware: two images per GPU (README of facebookresearch/detr); how many GPUs is not
said, here as for configs/detr_r50.py.
"""

from configs import detr_r50


def get_config():
    config = detr_r50.get_config()
    config.model.detr.blocks = (3, 4, 23, 3)
    return config
