"""DETR with a dilated ResNet-50 ("DC5"), 500 epochs on COCO: published AP 43.3.

    python train.py --config=configs/detr_r50_dc5.py --workdir=runs/detr_r50_dc5 \\
        --config.data.root=/data/coco --config.init=runs/start/resnet50

Published hardware: 64 V100, one image each (facebookresearch/detr, issue 283). Features have four
times as many cells as those of configs/detr_r50.py.
"""

from configs import detr_r50


def get_config():
    config = detr_r50.get_config()
    config.model.detr.dilation = True
    config.loss.class_loss_group = 1
    config.loss.reference_processes = 64
    return config
