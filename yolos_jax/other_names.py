"""What a mistyped key may have meant, and what other trainers call ours."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

CALLED_ELSEWHERE = {
    "data.root": "coco_path data_dir data_path data_root dataset dataset_dir dataset_path",
    "data.train_annotations": "ann_file train_ann_file train_json",
    "epochs": "max_epochs num_epochs num_train_epochs",
    "batch_size": "global_batch_size per_device_train_batch_size train_batch_size",
    "init": "checkpoint_path finetune load_from pretrain_weights pretrained weights",
    "microbatches": "accum_steps accumulate_grad_batches grad_accum gradient_accumulation_steps",
    "model.dtype": "amp bf16 fp16 half mixed_precision precision",
    "model.num_queries": "det_token_num num_det_tokens num_detection_tokens",
    "model.remat": "gradient_checkpointing use_checkpoint",
    "optimizer.clip_norm": "clip_max_norm grad_clip gradient_clip_val max_grad_norm max_norm",
    "optimizer.freeze": "freeze_backbone frozen_weights",
    "optimizer.lr": "base_learning_rate base_lr learning_rate",
    "preprocess.size": "eval_size image_size img_size imgsz input_size resolution",
}
NO_KEY = {
    "classes are the categories of the annotations": "classes nc num_classes num_labels",
    "the same --workdir goes on where it stopped": "auto_resume resume resume_from",
    "the run's folder is --workdir": "out_dir output output_dir save_dir work_dir workdir",
}


def hint(key: str, known: Mapping[str, str], no_key: Mapping[str, str] = NO_KEY) -> str:
    """What to say behind "unknown key": ``; the nearest is ...``, or nothing.

    Args:
      key: what was given; dots between its parts.
      known: the keys that there are, and how each is given.
      no_key: what there is instead of a key, and names of it.
    """
    tail = key.split(".")[-1]
    # The last part of a key is what people remember: compare it alone, too. Where several keys end
    # in it, the shortest is the run's own.
    tails = {path.split(".")[-1]: path for path in sorted(known, key=len, reverse=True)}
    elsewhere = [path for path, names in CALLED_ELSEWHERE.items() if tail in names.split()]
    instead = [text for text, names in no_key.items() if tail in names.split()]
    if instead and tail not in tails:
        return f"; {instead[0]}"
    near = [
        *(path for path in elsewhere if path in known and tail not in tails),
        *(tails[found] for found in difflib.get_close_matches(tail, tails, 1)),
        *difflib.get_close_matches(key, known, 1),
    ]
    return f"; the nearest is {known[near[0]]}" if near else ""
