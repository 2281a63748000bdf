"""YOLOS-B, 150 epochs on COCO: published AP 42.0, 127.8 M parameters.

    python train.py --config=configs/yolos_b.py --workdir=runs/yolos_b \\
        --config.data.root=/data/coco --config.init=runs/start/deit_base_384

Start: DeiT-B (distilled, fine-tuned at 384x384) converted with convert_torch_weights.py.
Published hardware: 8 GPUs, one image each.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.model.width = 768
    config.model.heads = 12
    config.model.mlp_width = 3072
    config.model.position_grid = (50, 84)
    config.model.mid_position_grid = (50, 84)
    config.data.labels = "coco91"
    return config
