"""``parse_options``: BasicSR's function of that name, on top of safe reading and strict checking."""

import argparse
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import dist_util, set_random_seed

from attnsr.options import schema
from attnsr.options.checking import check
from attnsr.options.datasets import io_backend
from attnsr.options.reading import OptionError, find, force, load, shipped
from attnsr.options.report import section

# Keys of `path` that BasicSR's make_exp_dirs takes for settings. It makes a folder of every other one.
NOT_FOLDERS = ('strict_load', 'pretrain_network', 'resume', 'param_key')

# Keys of `path` that start a training. A test of what was trained takes the checkpoints instead.
TRAINING_PATHS = ('pretrain_network', 'strict_load', 'resume_state', 'ignore_resume')


def add_arguments(parser: argparse.ArgumentParser, is_train: bool, required: bool = True) -> None:
    """Adds BasicSR's arguments to a parser, and ``-w`` for tests.

    Args:
        parser (argparse.ArgumentParser): Parser to add to.
        is_train (bool): For training; otherwise for testing.
        required (bool): Whether there must be an option file.
    """
    names = ', '.join(shipped())
    parser.add_argument(
        '-opt',
        required=required,
        metavar='FILE',
        help=f'option file (YAML), or the name of one that comes with attnsr: {names}',
    )
    if not is_train:
        parser.add_argument(
            '-w',
            '--weights',
            metavar='FILE',
            help='weights to test; default: path.pretrain_network_g, or the newest checkpoint of a training file',
        )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm'],
        default='none',
        help='what started the processes of distributed training: pytorch is torchrun (default: none)',
    )
    parser.add_argument(
        '--auto_resume',
        action='store_true',
        help='go on from the newest whole training state of the experiment'
        if is_train
        else argparse.SUPPRESS,  # which BasicSR accepts, for one launch script for both
    )
    parser.add_argument(
        '--debug', action='store_true', help='prefix the name with debug_, and log, validate and save every few steps'
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='for old launchers; torchrun sets LOCAL_RANK instead'
    )
    parser.add_argument(
        '--force_yml',
        nargs='+',
        metavar='KEY:KEY=VALUE',
        help='options to override, such as train:ema_decay=0.99 datasets:train:batch_size_per_gpu=4',
    )


def parse_options(root_path: str, is_train: bool = True) -> tuple[dict[str, Any], argparse.Namespace]:
    """Reads the command line and the option file that it names; takes the place of BasicSR's ``parse_options``.

    The file and its overrides are checked before a process group or a folder is made. Experiments go to
    ``path.experiments_root``/NAME (default: ``root_path``/experiments/NAME), test results to
    ``path.results_root``/NAME (default: ``root_path``/results/NAME). A test of a training file measures on its
    ``val`` sets with ``-w FILE`` or the newest checkpoint of its experiment.

    Args:
        root_path (str): Folder of ``experiments`` and ``results``.
        is_train (bool): For training; otherwise for testing.

    Returns:
        tuple[dict, argparse.Namespace]: Options as BasicSR has them, and the arguments; ``args.opt`` is the path of
        the file that was read.

    Raises:
        OptionError: If the file or an override is wrong; one line for each problem.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser, is_train)
    args = parser.parse_args()
    args.opt = find(args.opt)
    opt = load(args.opt)
    force(opt, args.force_yml or [])
    if isinstance(opt.get('name'), str) and args.debug and not opt['name'].startswith('debug'):
        opt['name'] = f'debug_{opt["name"]}'
    problems = [] if is_train else _prepare_test(opt, args, root_path)
    problems = check(opt, args.opt, is_train, args.launcher) + problems
    if problems:
        raise OptionError(problems)

    _fill_in(opt, is_train)
    opt['auto_resume'], opt['is_train'] = args.auto_resume, is_train
    _init_dist(opt, args.launcher)
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = random.randint(1, 10000)
    set_random_seed(opt['manual_seed'] + opt['rank'])
    _set_paths(opt, root_path, is_train)
    if is_train and 'debug' in opt['name']:
        if opt.get('val'):
            opt['val']['val_freq'] = 8
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
    return opt, args


def _prepare_test(opt: dict[str, Any], args: argparse.Namespace, root_path: str) -> list[str]:
    """Chooses the weights of a test, and makes the options of a training those of a test of what it trained.

    Returns:
        list[str]: What is wrong with the choice. The options are not checked yet: what is odd is left for the check.
    """
    if opt.get('path') is None:
        opt['path'] = OrderedDict()
    path = opt['path']
    if not isinstance(path, dict):
        return []
    weights, right = args.weights, 'name a file there or by -w FILE'
    if 'train' in opt:
        folder = Path(_below(path.get('experiments_root'), root_path, 'experiments', opt.get('name')), 'models')
        weights = weights or newest_checkpoint(folder)
        right = (
            f'{folder} has no checkpoint (net_g_*.pth) of it; name one by -w FILE, '
            f'or make one: `basicsr train -opt {args.opt}`'
        )
        if section(opt, 'train').get('ema_decay'):
            path['param_key_g'] = 'params_ema'
        for key in [key for key in path if key.startswith(TRAINING_PATHS)]:
            del path[key]
        if isinstance(opt.get('datasets'), dict):
            kept = [(key, each) for key, each in opt['datasets'].items() if key.split('_')[0] == 'val']
            opt['datasets'] = OrderedDict(kept)
        for key in ('train', 'logger'):
            opt.pop(key, None)
    if weights:
        path['pretrain_network_g'] = weights
    elif opt.get('model_type') in schema.SR_MODELS and not path.get('pretrain_network_g'):
        return [f'{args.opt}: path.pretrain_network_g: is missing, and a test needs weights; {right}']
    return []


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint in a folder that was written last; None if there is none."""
    checkpoints = sorted(folder.glob('net_g_*.pth'), key=lambda file: file.stat().st_mtime_ns)
    return str(checkpoints[-1]) if checkpoints else None


def _fill_in(opt: dict[str, Any], is_train: bool) -> None:
    """Fills in what BasicSR reads without asking whether it is there."""
    # Training without `val` does not validate.
    for key in ('path', 'logger') if is_train else ('path', 'val'):
        if opt.get(key) is None:
            opt[key] = OrderedDict()
    train_set = section(opt['datasets'], 'train')
    for options, table in (
        (opt, schema.TOP),
        (opt.get('logger'), schema.LOGGER),
        (opt.get('val'), schema.VAL),
        (train_set, schema.DATASETS.get(train_set.get('type', ''), {})),
    ):
        for key, field in table.items():
            if options is not None and field.default is not schema.NO_DEFAULT:
                options.setdefault(key, field.default)

    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = torch.cuda.device_count()
    for phase, options in opt['datasets'].items():
        options['phase'] = phase.split('_')[0]
        if 'scale' in opt:
            options['scale'] = opt['scale']
        if options['type'] in schema.DATASETS:
            options['io_backend'] = io_backend(options)
            if options.get('meta_info_file') is None:
                options.pop('meta_info_file', None)  # SingleImageDataset opens whatever is there
        for key, value in options.items():
            if isinstance(value, str) and key.startswith(('dataroot', 'meta_info')):
                options[key] = os.path.expanduser(value)


def _init_dist(opt: dict[str, Any], launcher: str) -> None:
    opt['dist'] = launcher != 'none'
    if opt['dist']:
        # Slurm's launcher alone reads the file's settings, as in BasicSR.
        params = dict(opt.get('dist_params') or {}) if launcher == 'slurm' else {}
        params['backend'] = params.get('backend', 'nccl') if opt['num_gpu'] else 'gloo'
        dist_util.init_dist(launcher, **params)
    opt['rank'], opt['world_size'] = dist_util.get_dist_info()


def _below(parent: Any, root_path: str, default: str, name: Any) -> str:
    """Folder of an experiment or of test results: NAME below what the file says or below the default."""
    root = os.path.expanduser(parent) if isinstance(parent, str) else os.path.join(root_path, default)
    return os.path.join(root, str(name))


def _set_paths(opt: dict[str, Any], root_path: str, is_train: bool) -> None:
    """Sets the folders that BasicSR writes to, and drops what it would take for the name of a further one."""
    given = opt['path']
    path: OrderedDict[str, Any] = OrderedDict()
    for key, value in given.items():
        is_setting = any(word in key for word in NOT_FOLDERS)
        if key not in ('experiments_root', 'results_root') and (is_setting or isinstance(value, str)):
            is_path = isinstance(value, str) and not key.startswith('param_key')
            path[key] = os.path.expanduser(value) if is_path else value
    if is_train:
        root = _below(given.get('experiments_root'), root_path, 'experiments', opt['name'])
        path['experiments_root'] = root
        path['models'] = os.path.join(root, 'models')
        path['training_states'] = os.path.join(root, 'training_states')
    else:
        root = _below(given.get('results_root'), root_path, 'results', opt['name'])
        path['results_root'] = root
    path['log'] = root
    path['visualization'] = os.path.join(root, 'visualization')
    opt['path'] = path
