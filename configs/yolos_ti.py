"""YOLOS-Ti, 300 epochs on COCO: published AP 28.7, 6.5 M parameters.

    python train.py --config=configs/yolos_ti.py --workdir=runs/yolos_ti \\
        --config.data.root=/data/coco --config.init=runs/start/deit_tiny

Start: DeiT-Ti (distilled for ImageNet-1k, 224x224) converted with convert_torch_weights.py.
Published hardware: 8 GPUs, two images each, padded to a pair: the published AP is that of padded
pairs, which eval.py --reference_padding=2 reproduces.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.epochs = 300
    config.batch_size = 16
    config.model.width = 192
    config.model.heads = 3
    config.model.mlp_width = 768
    config.model.position_grid = (50, 83)
    config.model.mid_position_grid = ()
    config.data.labels = "coco91"
    config.preprocess.size = 512
    config.preprocess.max_size = 853
    config.augment.scales = tuple(range(256, 609, 16))
    config.augment.max_size = 1013
    config.buckets.count = 12  # lengths span a factor of 8: 8 buckets pad 12 % of the patches
    config.loss.class_loss_group = 2
    config.optimizer.lr = 5e-5
    return config
