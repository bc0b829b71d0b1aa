"""What BasicSR reads from an option file, as tables: each key with its kind of value and a description.

A table is what :mod:`attnsr.options.checking` enforces, what missing options are filled in from, and what
documentation can be made from. Networks, losses, metrics and optimizers have no table: their options are the
parameters of the class or function that their ``type`` names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

# Model types whose keys are all known. Others (GAN and video models, a user's own) may read keys of their own.
SR_MODELS = ('SRModel', 'SwinIRModel')

# Who cannot do without a field (Field.required).
ALWAYS = 'always'  # BasicSR's pipelines
TRAINING = 'training'  # BasicSR's training pipeline, or a training set
SR_MODEL = 'SRModel'  # the types in SR_MODELS

NO_DEFAULT = object()


@dataclass(frozen=True)
class Kind:
    """A kind of value: ``text`` completes the sentence 'must be ...', ``accepts`` tells whether a value is one."""

    text: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """One key of a table.

    Args:
        kind (Kind): What its value must be.
        help (str): What it does.
        required (str): Who needs it: ALWAYS, TRAINING, SR_MODEL, or '' if it may be left out.
        default (Any): What is filled in if it is left out; NO_DEFAULT if it then stays out.
    """

    kind: Kind
    help: str
    required: str = ''
    default: Any = NO_DEFAULT


Table: TypeAlias = dict[str, Field]


# Kinds of value ------------------------------------------------------------------------------------------------------


def is_whole(value: Any) -> bool:
    """Whether a value is an int (and not a bool, which Python counts as one)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def whole(least: int) -> Kind:
    """Whole numbers of at least ``least``."""
    return Kind(f'a whole number of at least {least}', lambda value: is_whole(value) and value >= least)


def count(least: int) -> Kind:
    """Whole numbers of at least ``least`` that may be written as ``5e3`` too, as BasicSR's own files do."""
    return Kind(
        f'a whole number of at least {least}',
        lambda value: is_number(value) and value == int(value) and value >= least,
    )


def optional(kind: Kind) -> Kind:
    """``kind`` or ``~`` (None)."""
    return Kind(f'{kind.text}, or ~ for none', lambda value: value is None or kind.accepts(value))


def one_of(*names: str) -> Kind:
    """One of some words."""
    return Kind(f'{", ".join(names[:-1])} or {names[-1]}', lambda value: isinstance(value, str) and value in names)


def list_of(kind: Kind, of: str) -> Kind:
    """Non-empty lists whose values are all of one kind; ``of`` names them in the plural."""
    return Kind(
        f'a list of {of}', lambda value: isinstance(value, list) and bool(value) and all(map(kind.accepts, value))
    )


def is_folder_name(value: Any) -> bool:
    """Whether a value can name a folder; log files add up to 40 characters, of the 255 bytes that are allowed."""
    if not isinstance(value, str) or value != value.strip() or value in ('', '.', '..'):
        return False
    return not set(value) & set('/\\\0') and len(value.encode()) <= 200


def is_template(value: Any) -> bool:
    """Whether a value is text with one ``{}`` for a file's name."""
    try:
        return isinstance(value, str) and value.format('\0').count('\0') == 1
    except (ValueError, IndexError, KeyError, AttributeError):
        return False


TEXT = Kind('text', lambda value: isinstance(value, str) and value != '')
BOOL = Kind('true or false', lambda value: isinstance(value, bool))
SECTION = Kind('a section (lines of key: value below it)', lambda value: isinstance(value, dict))
POSITIVE = Kind('a number above 0', lambda value: is_number(value) and value > 0)
NON_NEGATIVE = Kind('a number of at least 0', lambda value: is_number(value) and value >= 0)
DECAY = Kind('a number from 0 to below 1', lambda value: is_number(value) and 0 <= value < 1)
FOLDER_NAME = Kind('text that can name a folder (no /)', is_folder_name)
TEMPLATE = Kind("text with one {} for the name of the HR picture, as '{}x4'", is_template)
SEED = Kind('a whole number from 0 to 4294967295', lambda value: is_whole(value) and 0 <= value < 2**32)
GPUS = Kind('auto or a whole number of at least 0', lambda value: value == 'auto' or (is_whole(value) and value >= 0))
WARM_UP = Kind('a whole number of at least 0, or -1 for none', lambda value: count(-1).accepts(value))
COUNTS = list_of(count(1), 'whole numbers of at least 1')
ASCENDING = Kind(
    'a list of whole numbers of at least 1, in ascending order',
    lambda value: value == [] or (COUNTS.accepts(value) and value == sorted(value)),
)
NETWORKS = Kind(
    "a network's name as network_g, or a list of them",
    lambda value: TEXT.accepts(value) or list_of(TEXT, '').accepts(value),
)
CHANNELS = list_of(Kind('a number', is_number), 'numbers, one for each channel')
SPREADS = list_of(
    Kind('a number', lambda value: is_number(value) and value != 0), 'numbers other than 0, one a channel'
)


# The option file -----------------------------------------------------------------------------------------------------

TOP: Table = {
    'name': Field(FOLDER_NAME, 'name of the experiment and of its folder', ALWAYS),
    'model_type': Field(TEXT, 'name in MODEL_REGISTRY, such as SRModel', ALWAYS),
    'scale': Field(whole(1), 'how many times larger HR is than LR', SR_MODEL),
    'num_gpu': Field(GPUS, 'GPUs to use in one process; 0 is the CPU, auto all GPUs', default='auto'),
    'manual_seed': Field(optional(SEED), 'seed of all random numbers; drawn if it is missing'),
    'find_unused_parameters': Field(BOOL, 'distributed training finds parameters that a loss does not reach'),
    'datasets': Field(SECTION, 'train, val or val_*, test or test_*', ALWAYS),
    'network_g': Field(SECTION, 'type, a name in ARCH_REGISTRY, and parameters of its constructor', SR_MODEL),
    'path': Field(optional(SECTION), 'weights to start from, folders to write to'),
    'train': Field(SECTION, 'optimizer, schedule and losses; a file without it is for testing', TRAINING),
    'val': Field(optional(SECTION), 'validation and metrics'),
    'logger': Field(optional(SECTION), 'how often to log and to save'),
    'dist_params': Field(optional(SECTION), "distributed training by Slurm's launcher"),
}

# Given on the command line, and easily written into the file.
COMMAND_LINE = {'auto_resume': '--auto_resume', 'launcher': '--launcher', 'debug': '--debug'}

PATH: Table = {
    'pretrain_network_g': Field(optional(TEXT), 'file of weights to start from or to test'),
    'param_key_g': Field(
        optional(TEXT), 'entry of that file that holds the weights: params or params_ema; ~ is the file'
    ),
    'strict_load_g': Field(BOOL, 'whether the weights must have exactly the parameters of the network'),
    'resume_state': Field(optional(TEXT), 'training state (.state file) to go on from'),
    'ignore_resume_networks': Field(optional(NETWORKS), 'networks that resuming does not load'),
    'experiments_root': Field(optional(TEXT), 'folder in which the folders of experiments are made'),
    'results_root': Field(optional(TEXT), 'folder in which the folders of test results are made'),
}

TRAIN: Table = {
    'total_iter': Field(count(1), 'iterations to train', ALWAYS),
    'warmup_iter': Field(WARM_UP, 'iterations over which the learning rate rises to its first value'),
    'ema_decay': Field(DECAY, 'decay of the moving average of the weights, which is then what is tested; 0 is off'),
    'optim_g': Field(SECTION, 'type, a class of torch.optim, and its parameters', SR_MODEL),
    'scheduler': Field(SECTION, 'type and parameters of the learning rate schedule', SR_MODEL),
    'pixel_opt': Field(optional(SECTION), 'type, a name in LOSS_REGISTRY, and its parameters'),
    'perceptual_opt': Field(optional(SECTION), 'the same for a perceptual loss, such as PerceptualLoss'),
}

VAL: Table = {
    'val_freq': Field(count(1), 'iterations between validations', TRAINING),
    'save_img': Field(BOOL, 'whether to write the pictures', default=False),
    'suffix': Field(
        optional(TEXT), "added to the pictures' names in tests; the experiment's name if it is missing", default=None
    ),
    'pbar': Field(BOOL, 'whether to show a progress bar'),
    'metrics': Field(optional(SECTION), 'any name: type, a name in METRIC_REGISTRY, and its parameters', default=None),
}

LOGGER: Table = {
    'print_freq': Field(count(1), 'iterations between lines of the log', default=100),
    'save_checkpoint_freq': Field(count(1), 'iterations between checkpoints', default=5000),
    'use_tb_logger': Field(BOOL, 'whether to write TensorBoard files', default=False),
    'wandb': Field(optional(SECTION), 'logging to Weights & Biases, beside TensorBoard'),
}

WANDB: Table = {
    'project': Field(optional(TEXT), 'name of the project; ~ is off'),
    'resume_id': Field(optional(TEXT), 'id of the run to go on with'),
}

DIST_PARAMS: Table = {
    'backend': Field(one_of('nccl', 'gloo', 'mpi'), 'how processes exchange tensors'),
    'port': Field(whole(1), 'port of the first process'),
}

# Options that metrics share; a metric's other options are checked by its parameters.
METRIC: Table = {
    'type': Field(TEXT, 'name in METRIC_REGISTRY', ALWAYS),
    'better': Field(one_of('higher', 'lower'), 'which values are better'),
    'crop_border': Field(whole(0), 'pixels left out at each edge'),
    'test_y_channel': Field(BOOL, 'whether to measure on Y of YCbCr instead of RGB'),
}

_MULTI_STEP: Table = {
    'milestones': Field(ASCENDING, 'iterations at which the learning rate is multiplied by gamma', ALWAYS),
    'gamma': Field(POSITIVE, 'factor at each milestone'),
    'restarts': Field(list_of(count(0), 'whole numbers of at least 0'), 'iterations that restart the learning rate'),
    'restart_weights': Field(list_of(POSITIVE, 'numbers above 0'), 'factor of the first learning rate at each restart'),
}
SCHEDULERS: dict[str, Table] = {
    'MultiStepLR': _MULTI_STEP,
    'MultiStepRestartLR': _MULTI_STEP,
    'CosineAnnealingRestartLR': {
        'periods': Field(COUNTS, 'iterations of each cosine', ALWAYS),
        'restart_weights': Field(
            list_of(POSITIVE, 'numbers above 0'), 'factor of the first learning rate in each period'
        ),
        'eta_min': Field(NON_NEGATIVE, 'learning rate at the end of a cosine'),
    },
}


# Data sets -----------------------------------------------------------------------------------------------------------

# What BasicSR's loader reads of every data set, whatever its type.
DATASET: Table = {
    'name': Field(TEXT, 'name of the data set in logs and results', ALWAYS),
    'type': Field(TEXT, 'name in DATASET_REGISTRY', ALWAYS),
    'num_worker_per_gpu': Field(whole(0), 'processes that read pictures, for each GPU', TRAINING),
    'batch_size_per_gpu': Field(whole(1), 'patches in a batch, for each GPU', TRAINING),
    'dataset_enlarge_ratio': Field(POSITIVE, 'how many times an epoch goes through the pictures'),
    'prefetch_mode': Field(optional(one_of('cpu', 'cuda')), 'reads the next batch ahead, on the CPU or onto the GPU'),
    'num_prefetch_queue': Field(whole(1), 'batches to read ahead in the mode cpu'),
    'pin_memory': Field(BOOL, 'reads into memory that is quicker to copy to a GPU'),
    'persistent_workers': Field(BOOL, 'keeps the reading processes between epochs'),
}

_IMAGES: Table = {
    'use_shuffle': Field(Kind('true: training sets are always shuffled', lambda value: value is True), 'no effect'),
    'dataroot_lq': Field(TEXT, 'folder or LMDB of LR pictures', ALWAYS),
    'io_backend': Field(SECTION, 'type: disk, lmdb or memcached; taken from the name of the folder if it is missing'),
    'meta_info_file': Field(optional(TEXT), 'file that lists the pictures, one a line; not for LMDBs'),
    'color': Field(optional(one_of('y', 'rgb')), 'y reads the Y channel only'),
    'mean': Field(optional(CHANNELS), 'subtracted from each channel'),
    'std': Field(optional(SPREADS), 'each channel is divided by it'),
}

# Data set types whose keys are all known. Others are a user's own or made for video and GAN models.
DATASETS: dict[str, Table] = {
    'PairedImageDataset': {
        **DATASET,
        'dataroot_gt': Field(TEXT, 'folder or LMDB of HR pictures', ALWAYS),
        **_IMAGES,
        'filename_tmpl': Field(TEMPLATE, 'name of the LR file, made of the name of the HR file'),
        'gt_size': Field(whole(1), 'side of the HR patches, in pixels; a multiple of scale', TRAINING),
        'use_hflip': Field(BOOL, 'flips patches at random', default=True),
        'use_rot': Field(BOOL, 'turns patches at random', default=True),
    },
    'SingleImageDataset': {**DATASET, **_IMAGES},
}

# BasicSR sets them from the key and from `scale`; a file may say the same.
SET_BY_BASICSR = ('phase', 'scale')

# lmdb.open's parameters, beyond the paths that BasicSR sets.
_LMDB_FLAGS = (
    'readonly',
    'lock',
    'readahead',
    'subdir',
    'create',
    'meminit',
    'metasync',
    'sync',
    'map_async',
    'writemap',
)
_LMDB_NUMBERS = ('map_size', 'max_readers', 'max_dbs', 'max_spare_txns', 'mode')

IO_BACKENDS: dict[str, Table] = {
    'disk': {},
    'lmdb': {
        **{key: Field(BOOL, 'parameter of lmdb.open') for key in _LMDB_FLAGS},
        **{key: Field(whole(0), 'parameter of lmdb.open') for key in _LMDB_NUMBERS},
    },
    'memcached': {
        'server_list_cfg': Field(TEXT, 'file that lists the servers', ALWAYS),
        'client_cfg': Field(TEXT, "the client's settings", ALWAYS),
        'sys_path': Field(optional(TEXT), 'folder of the Python package mc'),
    },
}


# Names that are registered and yet cannot work here: why, and what to name instead ------------------------------------

UNUSABLE_OPTIMIZERS = {
    'LBFGS': "needs a closure, which BasicSR's training step does not give",
    'SparseAdam': 'needs sparse gradients',
    'Muon': 'takes matrices only, and no biases or convolutions',
}
UNUSABLE_METRICS = {
    'calculate_psnr_pt': 'works on tensors, and the model gives arrays; name calculate_psnr',
    'calculate_ssim_pt': 'works on tensors, and the model gives arrays; name calculate_ssim',
}
