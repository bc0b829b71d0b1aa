"""Which weights are meant, and the network that they are of."""

from os import PathLike
from pathlib import Path

from attnsr import archs, checkpoints, options
from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.state_dicts import identify
from attnsr.archs.variants import SCALES, VARIANTS
from attnsr.errors import UsageError

__all__ = ['find_weights', 'load_network', 'variant_named']


def find_weights(name: str | PathLike[str]) -> Path:
    """The checkpoint file that a name means.

    Args:
        name: A file; or a training, whose newest checkpoint is taken: its folder, its name below ``./experiments``, its
            option file, or the name of one that comes with attnsr, such as ``'elan_light_x4'``.

    Raises:
        UsageError: there is none.
    """
    path = Path(name).expanduser()
    is_option_file = path.suffix in ('.yml', '.yaml') or str(name) in options.shipped()
    if path.is_file() and not is_option_file:
        return path
    names = [str(name)] if path.name == str(name) else []
    if is_option_file:
        names.append(str(options.load(options.find(str(name))).get('name')))
    for folder in (path, *(Path('experiments') / each for each in names)):
        if folder.is_dir():
            newest = options.newest_checkpoint(folder / 'models') or options.newest_checkpoint(folder)
            if newest is None:
                raise UsageError(f'{folder}: holds no checkpoint (models/net_g_*.pth); name a file, or train first')
            return Path(newest)
    if is_option_file:
        raise UsageError(
            f'{name}: there is no training of this name in ./experiments ({names[-1]}); `basicsr train -opt {name}` '
            'makes it, or name its weights'
        )
    raise UsageError(f'{name}: there is no such file, and no such training in ./experiments')


def load_network(network: str | None, weights: str | PathLike[str]) -> SRNetwork:
    """The network that weights are of.

    Args:
        network: What they are to be of: one of :data:`attnsr.archs.variants.VARIANTS`, with or without ``_x<scale>``
            behind it, or an option file that has the network as ``network_g``. None: what the option file in the
            folder of their training says, if they lie in one, and else what their tensors tell.
        weights: See :func:`find_weights`.

    Returns:
        The network in float32 on the CPU, in eval mode.

    Raises:
        UsageError: there are no such weights, or they are of another network.
        CheckpointError: the file is torn, is no checkpoint, or is of no network of attnsr.
        OSError: it cannot be read.
    """
    path = find_weights(weights)
    if network is None:
        network = _option_file_of_training(path)
    if network is None:
        try:
            return checkpoints.load(path)
        except checkpoints.UntoldError as error:
            told = str(error).partition('; write load')[0]
            raise UsageError(f'{told}; name the option file of its training: --network FILE.yml') from None
    wanted = variant_named(network)
    if wanted is None:
        return _of_option_file(network, path)
    net = checkpoints.load(path)
    name, scale = wanted
    identity = identify(net.state_dict())
    if identity is None or identity.variant is not VARIANTS[name] or scale not in (None, net.upscale):
        asked = VARIANTS[name].title + (f' x{scale}' if scale else '')
        raise UsageError(f'{path}: this is a checkpoint of {identity}, not of {asked} (--network {network})')
    return net


def _option_file_of_training(weights: Path) -> str | None:
    """The option file that BasicSR has copied last into the folder of a training, of whose ``models`` weights are."""
    folder = weights.resolve().parent
    files = folder.parent.glob('*.yml') if folder.name == 'models' else iter(())
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if newest is None else str(newest)


def variant_named(network: str) -> tuple[str, int | None] | None:
    """Name and scale of ``elan_light_x4`` or ``elan_light``; None of any other text."""
    name, _, scale = network.rpartition('_x')
    if name in VARIANTS and scale in map(str, SCALES):
        return name, int(scale)
    return (network, None) if network in VARIANTS else None


def _of_option_file(network: str, weights: Path) -> SRNetwork:
    """The network that an option file has as ``network_g``, with these weights."""
    try:
        path = options.find(network)
    except options.OptionError:
        raise UsageError(
            f'--network {network}: is no network and no option file; networks are {", ".join(VARIANTS)}, with or '
            'without the scale behind it (elan_light_x4)'
        ) from None
    described = dict(options.load(path).get('network_g') or {})
    kinds = {variant.network.__name__ for variant in VARIANTS.values()}
    kind = described.pop('type', None)
    if kind not in kinds:
        raise UsageError(f'{path}: network_g.type: is {kind}; --network takes one of {", ".join(sorted(kinds))}')
    try:
        net = getattr(archs, kind)(**described)
        net.load_state_dict(checkpoints.state_dict_of(checkpoints.read(weights), weights))
    except checkpoints.CheckpointError:
        raise
    except TypeError as error:
        raise UsageError(f'{path}: network_g: {error}') from None
    except (RuntimeError, ValueError) as error:
        raise UsageError(f'{weights}: {error} (--network {network})') from None
    return net.eval()
