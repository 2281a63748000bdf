"""YOLOS-S, 150 epochs on COCO: published AP 36.1, 30.7 M parameters.

    python train.py --config=configs/yolos_s.py --workdir=runs/yolos_s \\
        --config.data.root=/data/coco --config.init=runs/start/deit_small

Start: DeiT-S (distilled for ImageNet-1k, 224x224) converted with convert_torch_weights.py.
Published hardware: 8 GPUs, one image each. On more devices raise config.batch_size, and
config.optimizer.lr with it.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.data.labels = "coco91"
    return config
