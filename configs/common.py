"""Every configuration key once, with its unit; the recipes beside this file override values.

Tuples stand for lists, 0 or '' for "none", so that every key has one type and can be overridden
on the command line: ``--config.optimizer.lr=1e-4 --config.augment.scales='(480,512)'``.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults: YOLOS-S on COCO as published, on one accelerator or many."""
    config = ConfigDict()
    config.seed = 0  # of parameters, data order and augmentation
    config.init = ""  # checkpoint to start from (converted weights, or a run); '': random
    config.epochs = 150
    config.batch_size = 8  # images per optimiser step, over all hosts
    config.microbatches = 1  # the step's images go through the model in this many parts
    config.model = _model()
    config.data = _data()
    config.preprocess = _preprocess()
    config.augment = _augment()
    config.buckets = _buckets()
    config.matcher = _matcher()
    config.loss = _loss()
    config.optimizer = _optimizer()
    config.mesh = _mesh()
    config.compile = _compile()
    config.checkpoint = _checkpoint()
    config.eval = _eval()
    config.log = _log()
    return config.lock()  # against mistyped keys in recipes


def _model() -> ConfigDict:
    """What is trained."""
    model = ConfigDict()
    model.name = "yolos"  # or 'detr': models/build.py
    model.patch_size = 16  # pixels; a DETR has none
    model.width = 384  # D
    model.depth = 12  # L; of a DETR see below
    model.heads = 6  # H
    model.mlp_width = 1536
    model.num_queries = 100  # Q, detection tokens
    model.position_grid = (32, 54)  # rows, columns of the first position table
    model.mid_position_grid = (32, 54)  # of the tables after each block; () for none
    model.position_init = "normal"  # 'normal' (std 0.02) or 'sincos', when not loaded
    model.det_token_std = 0.02  # of the detection tokens, when not loaded
    model.layer_norm_eps = 1e-6  # 1e-12 in the weights on the Hugging Face hub
    model.dtype = "bfloat16"  # of matrix products; 'float32' or 'bfloat16'
    model.attention = "auto"  # of a YOLOS; models/attention.py lists the backends
    model.scan = True  # one compiled block for all but the last; False: each its own
    model.remat = "default"  # what the forward pass keeps: 'none', 'default', 'full'
    model.detr = _detr()
    return model


def _detr() -> ConfigDict:
    """What only a DETR has; the keys above that it has too keep their meaning."""
    detr = ConfigDict()
    detr.blocks = (3, 4, 6, 3)  # bottlenecks per stage: ResNet-50; ResNet-101: (3, 4, 23, 3)
    detr.stem_width = 64  # channels of the first convolution; features have 32 times as many
    detr.dilation = False  # the last stage keeps the resolution of the one before ("DC5")
    detr.encoder_depth = 6  # layers
    detr.decoder_depth = 6  # layers, A: each one's answer has a loss of its own
    detr.pre_norm = False  # LayerNorm before each sublayer instead of after its sum
    detr.position = "sine"  # encodings of rows and columns: 'sine' or 'learned' (50 of each)
    detr.dropout = 0.1  # of training
    return detr


def _data() -> ConfigDict:
    """Where the pictures are and how they are read."""
    data = ConfigDict()
    data.root = ""  # folder or gs:// path that the next four are relative to; packed ones too
    data.train_annotations = "annotations/instances_train2017.json"
    data.train_images = "train2017"
    data.val_annotations = "annotations/instances_val2017.json"
    data.val_images = "val2017"
    data.tfds_name = ""  # pictures and boxes from TFDS, 'coco/2017' for example; '': from the root
    data.tfds_dir = ""  # folder that TFDS prepared it in; '': its own default
    data.tfds_train = "train"  # its split to train on
    data.tfds_val = "validation"  # its split to evaluate; scored against data.val_annotations
    data.cache_dir = ""  # keeps what was read of annotations; '': data_cache beside the workdir
    data.labels = "dataset"  # slots: 'dataset' (its categories, by id) or 'coco91'
    data.train_subset = 0  # train on the first n images only; 0: all
    data.val_subset = 0  # evaluate the first n images only; 0: all
    data.on_error = "raise"  # annotations that make no sense: 'raise' or 'skip'
    data.keep_empty = True  # train on pictures without boxes too
    data.max_bad_fraction = 0.01  # stop when more pictures than this cannot be read
    data.exif = "ignore"  # orientation tags: 'ignore' as the reference, or 'apply'
    data.workers = 0  # pictures decoded at once; 0: one per core
    data.prefetch = 2  # host batches ready ahead of the device
    return data


def _preprocess() -> ConfigDict:
    """Travels with checkpoints: evaluation and predict use it."""
    preprocess = ConfigDict()
    preprocess.size = 800  # shorter side of a picture, pixels
    preprocess.max_size = 1333  # longer side at most, pixels
    preprocess.mean = (0.485, 0.456, 0.406)  # of red, green, blue in 0..1
    preprocess.std = (0.229, 0.224, 0.225)
    return preprocess


def _augment() -> ConfigDict:
    """Of training only."""
    augment = ConfigDict()
    augment.flip = 0.5  # probability of a horizontal flip
    augment.scales = tuple(range(480, 801, 16))  # shorter sides, pixels
    augment.max_size = 1333  # longer side at most, pixels
    augment.crop = 0.5  # probability of resize, crop, resize
    augment.crop_resize = (400, 500, 600)  # shorter sides before the crop, pixels
    augment.crop_range = (384, 600)  # least and largest side of the crop, pixels
    return augment


def _buckets() -> ConfigDict:
    """The static shapes of batches: lengths of sequences, or canvases (of a DETR)."""
    buckets = ConfigDict()
    buckets.count = 8  # static shapes at most; each is two compiled programs
    # Of the whole sequence, 1 + Q + N; of sides of training's canvases. 128 is a TPU's tile; where
    # there is none 8 pads about 1 % less.
    buckets.multiple = 128
    buckets.grouped = True  # pictures of one shape share a step; False: steps at random
    return buckets


def _matcher() -> ConfigDict:
    """Which query answers for which object."""
    matcher = ConfigDict()
    matcher.class_cost = 1.0
    matcher.l1_cost = 5.0
    matcher.giou_cost = 2.0
    matcher.where = "host"  # 'host' (scipy) or 'device' (optax)
    return matcher


def _loss() -> ConfigDict:
    """What is minimised."""
    loss = ConfigDict()
    loss.class_weight = 1.0
    loss.l1_weight = 5.0
    loss.giou_weight = 2.0
    loss.eos_coef = 0.1  # weight of the no-object class
    loss.class_loss_group = 1  # images per weighted mean of the class loss; 0: the batch
    loss.reference_processes = 8  # least divisor of the box losses: see losses.py
    return loss


def _optimizer() -> ConfigDict:
    """How it is minimised."""
    optimizer = ConfigDict()
    optimizer.lr = 2.5e-5  # per global batch, not per image
    optimizer.backbone_lr = 0.0  # of the backbone, at the start; 0: as the rest
    optimizer.schedule = "published"  # 'published' (per epoch), 'published_step', 'step', 'cosine'
    optimizer.warmup_steps = 0  # of 'cosine'
    optimizer.warmup_epochs = 0  # of 'published'
    optimizer.warmup_lr = 1e-6  # of 'published': where the warm-up starts
    optimizer.min_lr = 1e-7  # where the cosine ends
    optimizer.lr_drop = 100  # of 'published_step' and 'step': epochs until lr is divided by ten
    optimizer.weight_decay = 1e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.clip_norm = 0.1  # of the global gradient norm; 0: no clipping
    optimizer.ema_decay = 0.0  # of an average of the parameters; 0: none
    optimizer.freeze = ()  # regular expressions of parameter paths that are not trained
    optimizer.max_skipped = 10  # stop after so many non-finite steps in a row
    return optimizer


def _mesh() -> ConfigDict:
    """Devices and processes."""
    mesh = ConfigDict()
    mesh.fsdp = 1  # devices that share one copy of the parameters
    mesh.distributed = "auto"  # join the cluster that jax recognises, if any; 'off': alone
    mesh.coordinator = ""  # host:port of process 0, without a cluster; '': as mesh.distributed says
    mesh.num_processes = 1  # with a coordinator: how many processes there are
    mesh.process_id = 0  # with a coordinator: which one this is
    mesh.wait_seconds = 300  # for the other processes at the start
    mesh.stopped_code = 0  # exit code of a run that was asked to stop and has saved
    return mesh


def _compile() -> ConfigDict:
    """Programs, each compiled once (by several processes on CPUs: at every start)."""
    compile = ConfigDict()
    compile.cache = "../compiled"  # folder that keeps them, seen from the work directory; '': none
    compile.ahead = False  # compile for every bucket before the first step
    return compile


def _checkpoint() -> ConfigDict:
    """When to save, and what to keep."""
    checkpoint = ConfigDict()
    checkpoint.every_steps = 0  # 0: once per epoch
    checkpoint.keep_last = 2
    checkpoint.keep_best = 1  # by AP
    checkpoint.wait_seconds = 300  # for the other processes, when this one has written its part
    return checkpoint


def _eval() -> ConfigDict:
    """When to evaluate."""
    eval = ConfigDict()
    eval.every_epochs = 5  # 0: only after the last step
    eval.batch_size = 8  # images, over all hosts
    return eval


def _log() -> ConfigDict:
    """What to write down."""
    log = ConfigDict()
    log.every_steps = 50
    log.pictures = 8  # validation pictures drawn with their predictions at the end
    log.watchdog_seconds = 1800  # a step that takes longer, compiling included, is dumped; 0: none
    log.watchdog_exit = False  # then end the run with an error; False: go on waiting
    return log


# Keys that may differ when a run is resumed: none changes what the run computes at a given step.
# Everything else must be as it was, or train.py stops and names both values.
CHANGEABLE_ON_RESUME = (
    "data.root",
    "data.train_images",
    "data.val_annotations",
    "data.tfds_dir",
    "data.tfds_val",
    "data.cache_dir",
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
    "mesh.distributed",
    "mesh.coordinator",
    "mesh.num_processes",
    "mesh.process_id",
    "mesh.wait_seconds",
    "mesh.stopped_code",
    "compile.cache",
    "compile.ahead",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.wait_seconds",
    "eval.every_epochs",
    "eval.batch_size",
    "log.every_steps",
    "log.pictures",
    "log.watchdog_seconds",
    "log.watchdog_exit",
)
