"""Strict checking of an option file: every misspelt key and impossible value becomes one line.

Strict only where BasicSR would ignore a key or crash on it: a file that BasicSR can use passes.
"""

import importlib.util
import inspect
import os
from typing import Any

import basicsr  # noqa: F401  (fills the registries)
import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)

from attnsr import checkpoints
from attnsr.ops import dispatch
from attnsr.options import datasets, schema, signatures
from attnsr.options.reading import nearest, suggest
from attnsr.options.report import Report, lookup, origin, registered_names, section, show, without_type
from attnsr.options.schema import ALWAYS, SR_MODEL, SR_MODELS, TRAINING

LOSSES = ('pixel_opt', 'perceptual_opt')


def check(opt: dict[str, Any], file: str, is_train: bool, launcher: str = 'none') -> list[str]:
    """Checks options as they stand in a file, before defaults are filled in. Nothing is changed or written.

    Args:
        opt (dict): Options, as :func:`attnsr.options.load` returns them.
        file (str): The file's name, for the messages.
        is_train (bool): For training; otherwise for testing, which looks at neither ``train`` nor ``logger``.
        launcher (str): ``none``, ``pytorch`` or ``slurm``; says how many processes share a batch.

    Returns:
        list[str]: One line for each problem, ``FILE: key.path: what is wrong; what would be right``; empty if none.
    """
    report = Report(file)
    model = opt.get('model_type')
    strict = model in SR_MODELS or 'model_type' not in opt
    unused = ('train', 'logger') if not is_train else ()
    needs = {ALWAYS} | ({SR_MODEL} if strict else set())
    top = {key: field for key, field in schema.TOP.items() if key not in unused}

    meant = report.table('', opt, top, needs, strict, also=unused)
    if is_train and 'train' not in opt and 'train' not in meant:
        report.add('train', 'is missing, so this file is for testing: `basicsr test -opt FILE`; or add the section')
    model_class = lookup(MODEL_REGISTRY, model)
    if isinstance(model, str) and model_class is None:
        report.add('model_type', f'no model is registered as {model}; {registered_names(model, MODEL_REGISTRY)}')
    scale = opt['scale'] if schema.TOP['scale'].kind.accepts(opt.get('scale')) else None
    gpus = _num_gpu(report, opt, launcher)

    phases = _phases(report, section(opt, 'datasets'), is_train)
    if 'scale' not in opt and not strict and any(each.get('type') == 'PairedImageDataset' for each in phases.values()):
        report.add('scale', f'is missing, and PairedImageDataset needs it; it must be {schema.TOP["scale"].kind.text}')
    for phase, options in phases.items():
        right = _dataset(report, f'datasets.{phase}', phase, options, scale, gpus, strict)
        if right and options['type'] in schema.DATASETS:
            processes = _processes(launcher)
            devices = max(gpus, 1) if processes is None else 1
            datasets.check_pictures(
                report.add, f'datasets.{phase}', options, scale, phase == 'train', processes or 1, devices
            )

    for key, options in opt.items():
        # A model from elsewhere may build its further networks in its own way.
        if key == 'network_g' or (key.startswith('network_') and not strict and origin(model_class) == 'basicsr'):
            _network(report, key, options, scale, 'cuda' if gpus and torch.cuda.is_available() else 'cpu')
    if model == 'SwinIRModel' and 'window_size' not in section(opt, 'network_g'):
        report.add('network_g.window_size', 'is missing; SwinIRModel pads pictures to a multiple of it')
    _path(report, opt, strict)
    if isinstance(opt.get('val'), dict):
        _val(report, opt['val'], needs | ({TRAINING} if is_train else set()), phases, strict)
    if is_train:
        if isinstance(opt.get('train'), dict):
            gt_size = section(section(opt, 'datasets'), 'train').get('gt_size')
            _train(report, opt['train'], needs, strict, model_class, gt_size)
        _logger(report, opt, strict)
    report.table('dist_params', section(opt, 'dist_params'), schema.DIST_PARAMS, ())
    return report.lines


# Sections ------------------------------------------------------------------------------------------------------------


def _num_gpu(report: Report, opt: dict[str, Any], launcher: str) -> int:
    """How many GPUs are asked for; more than there are is a problem, unless other machines may have them."""
    there = torch.cuda.device_count()
    asked = opt.get('num_gpu', 'auto')
    if asked == 'auto' or not schema.GPUS.accepts(asked):
        return there
    if asked > there and (there == 0 or _processes(launcher) is None):
        has = 'none' if there == 0 else str(there)
        right = '0 or auto' if there == 0 else f'auto or at most {there}'
        report.add('num_gpu', f'is {asked}, and PyTorch sees {has} on this machine; write {right}')
    return asked


def _processes(launcher: str) -> int | None:
    """How many processes train together; None if they are not launched for that."""
    names = {'pytorch': 'WORLD_SIZE', 'slurm': 'SLURM_NTASKS'}
    return int(os.environ.get(names[launcher], '1')) if launcher in names else None


def _phases(report: Report, options: dict[str, Any], is_train: bool) -> dict[str, Any]:
    """The data sets that the pipeline reads, by their keys."""
    phases: dict[str, Any] = {}
    allowed = ('train', 'val') if is_train else ('val', 'test')
    names = 'train, val and val_*' if is_train else 'val, val_*, test and test_*'
    wrong = []
    for key, value in options.items():
        if key.split('_')[0] not in allowed or key.startswith('train_'):
            wrong.append(key)
            use = 'training' if is_train else 'testing'
            report.add(f'datasets.{key}', f'is not a data set for {use}; valid are: {names}')
        elif not isinstance(value, dict):
            report.add(f'datasets.{key}', f'is {show(value)}; it must be {schema.SECTION.text}')
        else:
            phases[key] = value
    if is_train and 'train' not in options and not nearest('train', wrong):
        report.add('datasets.train', 'is missing; training needs a data set')
    elif not options and not is_train:
        report.add('datasets', f'has none to test on; valid are: {names} (of a training file, its val sets)')
    return phases


def _dataset(
    report: Report, where: str, phase: str, options: dict[str, Any], scale: int | None, gpus: int, strict: bool
) -> bool:
    """Checks the options of a data set; whether they are right, so that its pictures can be looked at."""
    before = len(report.lines)
    is_train = phase == 'train'
    name = options.get('type')
    needs = {ALWAYS} | ({TRAINING} if is_train else set())
    if isinstance(name, str) and lookup(DATASET_REGISTRY, name) is None:
        report.add(f'{where}.type', f'no data set is registered as {name}; {registered_names(name, DATASET_REGISTRY)}')
    table = schema.DATASETS.get(name, schema.DATASET) if isinstance(name, str) else schema.DATASET
    report.table(where, options, table, needs, strict=table is not schema.DATASET, also=schema.SET_BY_BASICSR)

    workers, persistent = options.get('num_worker_per_gpu'), options.get('persistent_workers')
    if persistent is True and (not is_train or workers == 0):
        has = 'it has num_worker_per_gpu: 0' if is_train else 'only training sets have workers'
        report.add(f'{where}.persistent_workers', f'is true, and {has}; leave it out')
    if options.get('prefetch_mode') == 'cpu' and is_train and workers == 0:
        report.add(
            f'{where}.prefetch_mode',
            'is cpu, and num_worker_per_gpu is 0: a thread would draw from the random numbers of the training; '
            'give it workers, or leave prefetch_mode out',
        )
    if options.get('prefetch_mode') == 'cuda' and is_train:
        if options.get('pin_memory') is not True:
            report.add(f'{where}.pin_memory', 'must be true with prefetch_mode: cuda')
        if gpus == 0:
            report.add(f'{where}.prefetch_mode', 'is cuda, and no GPU is used; write cpu or ~')
    if table is schema.DATASET:
        return len(report.lines) == before

    for key, right in (('scale', scale), ('phase', phase.split('_')[0])):
        if key in options and options[key] != right:
            report.add(f'{where}.{key}', f'is {show(options[key])}, and BasicSR sets it to {right}; leave it out')
    if (options.get('mean') is None) != (options.get('std') is None):
        report.add(where, 'has only one of mean and std; give both or none')
    if name == 'SingleImageDataset' and is_train and strict:
        report.add(f'{where}.type', 'SingleImageDataset has no HR pictures to train with; use PairedImageDataset')
    gt_size = options.get('gt_size')
    if scale and is_train and isinstance(gt_size, int) and gt_size % scale:
        multiple = max(round(gt_size / scale), 1) * scale
        report.add(f'{where}.gt_size', f'is {gt_size}, not a multiple of scale {scale}; {multiple} would be')
    _io_backend(report, f'{where}.io_backend', options)
    return len(report.lines) == before


def _io_backend(report: Report, where: str, options: dict[str, Any]) -> None:
    backend = options.get('io_backend')
    if not isinstance(backend, dict):
        return
    name = backend.get('type')
    if not isinstance(name, str) or name not in schema.IO_BACKENDS:
        wrong = f'is {show(name)}' if 'type' in backend else 'is missing'
        report.add(f'{where}.type', f'{wrong}; {suggest(name, schema.IO_BACKENDS)}')
        return
    report.table(where, without_type(backend), schema.IO_BACKENDS[name], {ALWAYS})
    if name == 'memcached' and importlib.util.find_spec('mc') is None and not backend.get('sys_path'):
        report.add(f'{where}.type', 'is memcached, and its Python package mc is not installed; write disk or lmdb')


def _network(report: Report, where: str, options: Any, scale: int | None, device: str) -> None:
    target = report.registered(where, options, ARCH_REGISTRY, 'network')
    if target is None:
        return
    name, given = options['type'], without_type(options)
    right = report.arguments(where, name, target, given)
    if where == 'network_g' and scale:
        # Elsewhere, a parameter of the name "scale" may be anything.
        for key in ('upscale', 'scale') if origin(target) in ('attnsr', 'basicsr') else ('upscale',):
            parameter = signatures.parameters(target).get(key)
            value = given.get(key, parameter.default) if parameter else None
            if schema.is_whole(value) and value != scale:
                default = '' if key in given else f', the default of {name}'
                report.add(f'{where}.{key}', f'is {value}{default}, and scale is {scale}; both must be the same')
                right = False
    if origin(target) == 'attnsr' and (reason := dispatch.unavailable(torch.device(device))):
        report.add(where, f'{name}: {reason}; valid here: {dispatch.VARIABLE}=auto or reference')
    if right and origin(target) == 'attnsr':
        with torch.device('meta'):  # checks what the constructor checks, without memory for the weights
            report.attempt(where, lambda: target(**given))


def _path(report: Report, opt: dict[str, Any], strict: bool) -> None:
    path = section(opt, 'path')
    report.table('path', path, schema.PATH, (), strict)
    for key, value in path.items():
        if value is None:
            continue
        if key.startswith(('pretrain_network', 'resume_state')) and isinstance(value, str):
            wrong = datasets.missing(value, 'a file') or _unreadable(value)
            if wrong:
                report.add(f'path.{key}', wrong)
        elif key.startswith('strict_load') and key not in schema.PATH and not isinstance(value, bool):
            report.add(f'path.{key}', f'is {show(value)}; it must be {schema.BOOL.text}')
        elif key == 'ignore_resume_networks' and schema.NETWORKS.accepts(value):
            networks = [name for name in opt if name.startswith('network_')]
            for name in [value] if isinstance(value, str) else value:
                if name not in networks:
                    report.add(f'path.{key}', f'there is no section {name}; {suggest(name, networks)}')


def _unreadable(file: str) -> str:
    try:
        checkpoints.read(os.path.expanduser(file))
    except (checkpoints.CheckpointError, OSError) as error:
        return str(error)
    return ''


def _val(report: Report, val: dict[str, Any], needs: set[str], phases: dict[str, Any], strict: bool) -> None:
    report.table('val', val, schema.VAL, needs, strict)
    for label, options in section(val, 'metrics').items():
        where = f'val.metrics.{label}'
        if not isinstance(options, dict):
            report.add(where, f'is {show(options)}; it must be {schema.SECTION.text}')
            continue
        target = report.registered(where, options, METRIC_REGISTRY, 'metric')
        if target is None:
            continue
        name = options['type']
        if strict and name in schema.UNUSABLE_METRICS:
            report.add(f'{where}.type', f'{name} {schema.UNUSABLE_METRICS[name]}')
        before = len(report.lines)
        known = signatures.parameters(target)
        report.table(where, options, {key: each for key, each in schema.METRIC.items() if key in options}, (), False)
        if len(report.lines) == before:
            takes_any = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(target).parameters.values())
            given = {key: each for key, each in without_type(options).items() if not (key == 'better' and takes_any)}
            report.arguments(where, name, target, given, given=('img', 'img2'))
        if strict and 'img2' in known and known['img2'].default is inspect.Parameter.empty:
            for phase, dataset in phases.items():
                if phase != 'train' and dataset.get('type') == 'SingleImageDataset':
                    report.add(where, f'{name} compares with HR pictures, and datasets.{phase} has none; leave one out')


def _train(report: Report, train: dict[str, Any], needs: set[str], strict: bool, model: Any, gt_size: Any) -> None:
    meant = report.table('train', train, schema.TRAIN, needs, strict)
    for key, options in train.items():
        where = f'train.{key}'
        if not isinstance(options, dict):
            continue
        if key.startswith('optim_') and _inherits(model, 'get_optimizer'):
            _optimizer(report, where, options)
        elif key == 'scheduler' and _inherits(model, 'setup_schedulers'):
            _scheduler(report, options, train.get('total_iter'))
        elif key in LOSSES or (key.endswith('_opt') and lookup(LOSS_REGISTRY, options.get('type'))):
            _loss(report, where, options, strict, gt_size)
    if strict and not any(train.get(key) for key in LOSSES) and not meant & set(LOSSES):
        report.add('train.pixel_opt', f'is missing, and so is perceptual_opt; {registered_names("", LOSS_REGISTRY)}')


def _inherits(model: Any, method: str) -> bool:
    """Whether a model leaves a method as BasicSR has it; otherwise its options are its own affair."""
    return model is not None and getattr(model, method, None) is getattr(BaseModel, method)


def _optimizer(report: Report, where: str, options: dict[str, Any]) -> None:
    classes = {
        name: each
        for name, each in vars(torch.optim).items()
        if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    }
    usable = [name for name in classes if name not in schema.UNUSABLE_OPTIMIZERS]
    name = options.get('type')
    if not isinstance(name, str) or name not in classes:
        wrong = f'torch.optim has no {name}' if 'type' in options else 'is missing'
        report.add(f'{where}.type', f'{wrong}; {suggest(name, usable)}')
    elif name in schema.UNUSABLE_OPTIMIZERS:
        report.add(f'{where}.type', f'{name} {schema.UNUSABLE_OPTIMIZERS[name]}; valid are: {", ".join(usable)}')
    elif 'lr' not in options:
        report.add(f'{where}.lr', f'is missing; it must be {schema.POSITIVE.text} (learning rate)')
    elif not schema.POSITIVE.accepts(options['lr']):
        report.add(f'{where}.lr', f'is {show(options["lr"])}; it must be {schema.POSITIVE.text}')
    elif report.arguments(where, name, classes[name], without_type(options), given=('params',)):
        weights = [torch.nn.Parameter(torch.zeros(1))]
        report.attempt(where, lambda: classes[name](weights, **without_type(options)))


def _scheduler(report: Report, options: dict[str, Any], total_iter: Any) -> None:
    where, name = 'train.scheduler', options.get('type')
    if not isinstance(name, str) or name not in schema.SCHEDULERS:
        wrong = f'there is no schedule {name}' if 'type' in options else 'is missing'
        report.add(f'{where}.type', f'{wrong}; {suggest(name, schema.SCHEDULERS)}')
        return
    before = len(report.lines)
    report.table(where, without_type(options), schema.SCHEDULERS[name], {ALWAYS})
    if len(report.lines) > before:
        return
    each = 'periods' if 'periods' in schema.SCHEDULERS[name] else 'restarts'
    values, weights = options.get(each, [0]), options.get('restart_weights', [1])
    if len(values) != len(weights):
        report.add(
            f'{where}.restart_weights',
            f'has {len(weights)} and {each} has {len(values)} values; each of {each} needs a weight (1 if left out)',
        )
    # The last step is number total_iter - 1: beyond its periods the schedule has no learning rate.
    if each == 'periods' and schema.TRAIN['total_iter'].kind.accepts(total_iter) and sum(values) < total_iter - 1:
        report.add(
            f'{where}.periods', f'end after {sum(values)} iterations, before total_iter {total_iter}; add to them'
        )


def _loss(report: Report, where: str, options: dict[str, Any], strict: bool, gt_size: Any) -> None:
    target = report.registered(where, options, LOSS_REGISTRY, 'loss')
    if target is None:
        return
    name, given = options['type'], without_type(options)
    right = report.arguments(where, name, target, given)
    if strict and where == 'train.pixel_opt' and name == 'PerceptualLoss':
        report.add(where, 'PerceptualLoss gives two values, of content and of style; write it below perceptual_opt')
    elif strict and where == 'train.perceptual_opt' and 'reduction' in signatures.parameters(target):
        report.add(where, f'{name} gives one value, and two are expected; write it below pixel_opt')
    elif strict and given.get('reduction') == 'none':
        report.add(f'{where}.reduction', 'is none, and training needs one number; write mean or sum')
    elif right and name == 'PerceptualLoss':
        _perceptual_loss(report, where, given)
    elif right and origin(target) == 'attnsr' and isinstance(gt_size, int) and gt_size > 0:
        patch = torch.zeros(1, 3, gt_size, gt_size)
        report.attempt(where, lambda: target(**given)(patch, patch))  # some losses ask for a smallest size
    elif right and origin(target) in ('attnsr', 'basicsr'):
        report.attempt(where, lambda: target(**given))


def _perceptual_loss(report: Report, where: str, given: dict[str, Any]) -> None:
    """PerceptualLoss is not built, as its constructor may download weights; what it crashes on is looked at instead."""
    from basicsr.archs.vgg_arch import NAMES, insert_bn

    vgg = given.get('vgg_type', 'vgg19')
    layers = NAMES.get(str(vgg).removesuffix('_bn'))
    if layers is None:
        valid = [name for plain in NAMES for name in (plain, f'{plain}_bn')]
        report.add(f'{where}.vgg_type', f'there is no {vgg}; {suggest(vgg, valid)}')
    elif not isinstance(given['layer_weights'], dict):
        report.add(f'{where}.layer_weights', f'is {show(given["layer_weights"])}; it must be lines of layer: weight')
    else:
        layers = insert_bn(layers) if str(vgg).endswith('_bn') else layers
        for layer in given['layer_weights']:
            if layer not in layers:
                report.add(f'{where}.layer_weights.{layer}', f'is not a layer of {vgg}; {suggest(layer, layers)}')
    if given.get('criterion', 'l1') not in ('l1', 'fro'):
        report.add(f'{where}.criterion', f'is {show(given["criterion"])}; it must be l1 or fro')


def _logger(report: Report, opt: dict[str, Any], strict: bool) -> None:
    logger = section(opt, 'logger')
    report.table('logger', logger, schema.LOGGER, (), strict)
    wandb = section(logger, 'wandb')
    report.table('logger.wandb', wandb, schema.WANDB, (), strict)
    if wandb.get('project') and 'debug' not in str(opt.get('name')):
        if logger.get('use_tb_logger') is not True:
            report.add('logger.use_tb_logger', 'must be true with wandb.project, which copies what TensorBoard gets')
        if importlib.util.find_spec('wandb') is None:
            report.add('logger.wandb.project', 'needs the package wandb: `pip install wandb`; or write ~')
