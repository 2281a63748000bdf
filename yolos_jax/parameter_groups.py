"""Which parameters decay, and which learn at the backbone's rate: rules of paths, per model."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """Puts the parameters whose whole path matches into a group."""

    pattern: str  # regular expression of the path, names joined by '/'
    group: str
    decay: bool  # whether weight decay applies
    backbone: bool = False  # whether ``optimizer.backbone_lr`` is its learning rate


# The reference's groups (main.py of hustvl/YOLOS). It asks for names and for the number of
# dimensions, which stacked blocks do not keep. Both heads decay entirely, biases too.
YOLOS_RULES = (
    Rule(r"(class_head|box_head)/.*", "head", True),
    Rule(r"backbone/(cls_token|det_tokens|position/.*)", "backbone_no_decay", False, True),
    Rule(r"backbone/(.*/)?(bias|scale)", "backbone_no_decay", False, True),
    Rule(r"backbone/(.*/)?kernel", "backbone_decay", True, True),
    Rule(r"backbone/mid_position/.*", "backbone_decay", True, True),
)

# The original's (main.py of facebookresearch/detr): everything decays. Learned positions are part
# of its backbone.
DETR_RULES = (
    Rule(r"(backbone|position)/.*", "backbone", True, True),
    Rule(r"(encoder|decoder|input_proj|class_head|box_head)/.*", "main", True),
    Rule(r"query_embed", "main", True),
)
