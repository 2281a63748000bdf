"""DETR with a dilated ResNet-101 ("DC5"), 500 epochs on COCO: published AP 44.9.

    python train.py --config=configs/detr_r101_dc5.py --workdir=runs/detr_r101_dc5 \\
        --config.data.root=/data/coco --config.init=runs/start/resnet101

Published hardware: one image per GPU (README of facebookresearch/detr); how many GPUs is not said,
here as for configs/detr_r50_dc5.py.
"""

from configs import detr_r50_dc5


def get_config():
    config = detr_r50_dc5.get_config()
    config.model.detr.blocks = (3, 4, 23, 3)
    return config
