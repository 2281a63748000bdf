"""DETR with a ResNet-50, 500 epochs on COCO: published AP 42.0, 41.3 M parameters that train.

    python train.py --config=configs/detr_r50.py --workdir=runs/detr_r50 \\
        --config.data.root=/data/coco --config.init=runs/start/resnet50

Start: ResNet-50 (trained on ImageNet) converted with convert_torch_weights.py. Published hardware:
32 V100, two images each (facebookresearch/detr, issue 283); 16 of them take four each (the paper).
The shorter schedule of the README, 300 epochs and ``optimizer.lr_drop`` 200, is 40.6 (issue 61).
"""

from configs import common


def get_config():
    config = common.get_config()
    config.epochs = 500
    config.batch_size = 64

    config.model.name = "detr"
    config.model.width = 256
    config.model.heads = 8
    config.model.mlp_width = 2048
    config.model.layer_norm_eps = 1e-5

    config.data.labels = "coco91"
    config.augment.scales = tuple(range(480, 801, 32))
    # Pictures differ in two sides here, not in one length: more shapes. 12 % of the pixels of an
    # epoch are padding; 21 % with 8 canvases.
    config.buckets.count = 20
    config.buckets.multiple = 32

    config.loss.class_loss_group = 2
    config.loss.reference_processes = 32
    config.optimizer.lr = 1e-4
    config.optimizer.backbone_lr = 1e-5
    config.optimizer.schedule = "step"
    config.optimizer.lr_drop = 400
    config.optimizer.freeze = (r"backbone/conv1/.*", r"backbone/layer1/.*")
    return config
