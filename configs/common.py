"""Every configuration key once, with its unit; the recipes beside this file override values.

Tuples stand for lists, 0 or '' for "none", so that every key has one type and can be overridden
on the command line: ``--config.optimizer.lr=1e-4 --config.augment.scales='(480,512)'``.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults: YOLOS-S on COCO as published, on one accelerator or many."""
    config = ConfigDict()
    config.seed = 0  # of parameters, data order and augmentation
    config.init = ""  # checkpoint to start from (a converted DeiT or YOLOS, or a run); '': random
    config.epochs = 150
    config.batch_size = 8  # images per optimiser step, over all hosts
    config.microbatches = 1  # the step's images go through the model in this many parts

    config.model = ConfigDict()
    config.model.name = "yolos"
    config.model.patch_size = 16  # pixels
    config.model.width = 384  # D
    config.model.depth = 12  # L
    config.model.heads = 6  # H
    config.model.mlp_width = 1536
    config.model.num_queries = 100  # Q, detection tokens
    config.model.position_grid = (32, 54)  # rows, columns of the first position table
    config.model.mid_position_grid = (32, 54)  # of the tables after each block; () for none
    config.model.position_init = "normal"  # 'normal' (std 0.02) or 'sincos', when not loaded
    config.model.det_token_std = 0.02  # of the detection tokens, when not loaded
    config.model.layer_norm_eps = 1e-6  # 1e-12 in the weights on the Hugging Face hub
    config.model.dtype = "bfloat16"  # of matrix products; 'float32' or 'bfloat16'
    config.model.attention = "auto"  # models/attention.py lists the backends
    config.model.scan = True  # one compiled block, scanned; False: blocks unrolled
    config.model.remat = "default"  # what the forward pass keeps: 'none', 'default', 'full'

    config.data = ConfigDict()
    config.data.root = ""  # folder or gs:// path that the next four are relative to
    config.data.train_annotations = "annotations/instances_train2017.json"
    config.data.train_images = "train2017"
    config.data.val_annotations = "annotations/instances_val2017.json"
    config.data.val_images = "val2017"
    config.data.labels = "dataset"  # slots: 'dataset' (its categories, by id) or 'coco91'
    config.data.train_subset = 0  # train on the first n images only; 0: all
    config.data.val_subset = 0  # evaluate the first n images only; 0: all
    config.data.on_error = "raise"  # annotations that make no sense: 'raise' or 'skip'
    config.data.keep_empty = True  # train on pictures without boxes too
    config.data.max_bad_fraction = 0.01  # stop when more pictures than this cannot be read
    config.data.exif = "ignore"  # orientation tags: 'ignore' as the reference, or 'apply'
    config.data.workers = 0  # pictures decoded at once; 0: one per core
    config.data.prefetch = 2  # host batches ready ahead of the device

    config.preprocess = ConfigDict()  # travels with checkpoints: evaluation and predict use it
    config.preprocess.size = 800  # shorter side of a picture, pixels
    config.preprocess.max_size = 1333  # longer side at most, pixels
    config.preprocess.mean = (0.485, 0.456, 0.406)  # of red, green, blue in 0..1
    config.preprocess.std = (0.229, 0.224, 0.225)

    config.augment = ConfigDict()  # training only
    config.augment.flip = 0.5  # probability of a horizontal flip
    config.augment.scales = tuple(range(480, 801, 16))  # shorter sides, pixels
    config.augment.max_size = 1333  # longer side at most, pixels
    config.augment.crop = 0.5  # probability of resize, crop, resize
    config.augment.crop_resize = (400, 500, 600)  # shorter sides before the crop, pixels
    config.augment.crop_range = (384, 600)  # least and largest side of the crop, pixels

    config.buckets = ConfigDict()
    config.buckets.count = 8  # static sequence lengths; each is two compiled programs
    config.buckets.multiple = 128  # of the whole sequence: 1 + Q + N
    config.buckets.window = 64  # global batches within which images are grouped by length; 1: off

    config.matcher = ConfigDict()
    config.matcher.class_cost = 1.0
    config.matcher.l1_cost = 5.0
    config.matcher.giou_cost = 2.0
    config.matcher.where = "host"  # 'host' (scipy) or 'device' (optax)

    config.loss = ConfigDict()
    config.loss.class_weight = 1.0
    config.loss.l1_weight = 5.0
    config.loss.giou_weight = 2.0
    config.loss.eos_coef = 0.1  # weight of the no-object class
    config.loss.class_loss_group = 1  # images per weighted mean of the class loss; 0: the batch
    config.loss.reference_processes = 8  # least divisor of the box losses: see losses.py

    config.optimizer = ConfigDict()
    config.optimizer.lr = 2.5e-5  # per global batch, not per image
    config.optimizer.schedule = "published"  # 'published' (per epoch), 'published_step', 'cosine'
    config.optimizer.warmup_steps = 0  # of 'cosine'
    config.optimizer.warmup_epochs = 0  # of 'published'
    config.optimizer.warmup_lr = 1e-6  # where the warm-up starts
    config.optimizer.min_lr = 1e-7  # where the cosine ends
    config.optimizer.lr_drop = 100  # of 'published_step': epoch after which lr is divided by ten
    config.optimizer.weight_decay = 1e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.1  # of the global gradient norm; 0: no clipping
    config.optimizer.ema_decay = 0.0  # of an average of the parameters; 0: none
    config.optimizer.freeze = ()  # regular expressions of parameter paths that are not trained
    config.optimizer.max_skipped = 10  # stop after so many non-finite steps in a row

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices that share one copy of the parameters

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 0  # 0: once per epoch
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_best = 1  # by AP

    config.eval = ConfigDict()
    config.eval.every_epochs = 5  # 0: only after the last step
    config.eval.batch_size = 8  # images, over all hosts

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.pictures = 8  # validation pictures drawn with their predictions at the end
    return config


# Keys that may differ when a run is resumed: none changes what the run computes at a given step.
# Everything else must be as it was, or train.py stops and names both values.
CHANGEABLE_ON_RESUME = (
    "data.root",
    "data.val_annotations",
    "data.val_images",
    "data.val_subset",
    "data.max_bad_fraction",
    "data.workers",
    "data.prefetch",
    "model.attention",
    "model.scan",
    "model.remat",
    "matcher.where",
    "optimizer.max_skipped",
    "mesh.fsdp",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "eval.every_epochs",
    "eval.batch_size",
    "log.every_steps",
    "log.pictures",
)
