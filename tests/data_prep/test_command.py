"""``basicsr prepare`` as people use it: from unpacked archives to a training, and everything that can be wrong."""

import os
import re
import shutil
from collections.abc import Iterator

import cv2
import pytest
import util
import yaml
from test_pairs import decoded, photographs, picture

# A network that trains in a moment, in the place of the option file's own.
SMALL = ('network_g:m_elan=2', 'network_g:c_elan=12', 'network_g:n_share=0', 'network_g:window_sizes=[2,4,8]')
SHORT = (
    *('num_gpu=0', 'datasets:train:batch_size_per_gpu=1', 'datasets:train:num_worker_per_gpu=0'),
    *('train:total_iter=2', 'logger:print_freq=1', 'logger:use_tb_logger=False'),
)


@pytest.fixture(scope='module')
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[util.CommandLine]:
    """In a folder with ``downloads``: miniatures of all data sets, as their archives unpack."""
    folder = tmp_path_factory.mktemp('command')
    downloads = folder / 'downloads'
    photographs(downloads / 'DIV2K_train_HR', {'0001': (264, 276), '0002': (276, 300), '0003': (520, 264)})
    for scale in (2, 4):  # of x3 there are none
        lr = downloads / 'DIV2K_train_LR_bicubic' / f'X{scale}'
        sizes = {'0001': (264, 276), '0002': (276, 300), '0003': (520, 264)}
        photographs(lr, {f'{name}x{scale}': (h // scale, w // scale) for name, (h, w) in sizes.items()})
    photographs(downloads / 'DIV2K_valid_HR', {'0801': (60, 60)})
    photographs(downloads / 'Flickr2K' / 'Flickr2K_HR', {'000001': (264, 288), '000002': (300, 264)})
    photographs(downloads / 'Set5' / 'GTmod12', {'baby': (48, 60), 'bird': (36, 36)})
    photographs(downloads / 'Set5' / 'LRbicx4', {'baby': (12, 15), 'bird': (9, 9)})
    photographs(downloads / 'Set14' / 'image_SRF_4', {'img_001_SRF_4_HR': (48, 60), 'img_001_SRF_4_LR': (12, 15)})
    photographs(downloads / 'benchmark' / 'Urban100' / 'HR', {'img_001': (50, 61)})
    photographs(downloads / 'benchmark' / 'Urban100' / 'LR_bicubic' / 'X4', {'img_001x4': (12, 15)})
    with util.CommandLine(folder) as command_line:
        yield command_line
    shutil.rmtree(folder)


def assert_trains(said: str) -> None:
    assert list(util.iterations(said)) == [1, 2]


def test_a_shipped_option_file_runs_on_what_the_presets_make(command_line: util.CommandLine) -> None:
    """Its data sets as they stand; only the network and the duration are cut down."""
    said = command_line.run('prepare', 'div2k', 'downloads', '--quiet')
    assert said == ''
    said = command_line.run('prepare', 'benchmark', 'downloads', '--scale', '4')
    assert re.findall(r'^not found: (\w+)', said, re.MULTILINE) == ['B100', 'Manga109']
    said = command_line.run('train', '-opt', 'elan_light_x4', '--force_yml', *SMALL, *SHORT)
    assert_trains(said)
    assert re.findall(r'Validation (\w+)', said) == ['Set5', 'Set14']

    data = command_line.folder / 'datasets'
    assert sorted(path.name for path in (data / 'DIV2K').glob('*.lmdb')) == [
        *(f'DIV2K_train_{name}_sub.lmdb' for name in ('HR', *(f'LR_bicubic_X{scale}' for scale in (2, 3, 4)))),
        *(f'DIV2K_valid_{name}.lmdb' for name in ('HR', *(f'LR_bicubic_X{scale}' for scale in (2, 3, 4)))),
    ]
    # One sub-image each, but for the one that is taller than 480 pixels.
    assert len(decoded(data / 'DIV2K' / 'DIV2K_train_HR_sub.lmdb')) == 4
    # HR of each scale as papers cut it: to a multiple of that scale, not of 12.
    assert decoded(data / 'Urban100' / 'HR_x4.lmdb')['img_001'].shape == (48, 60, 3)
    said = command_line.run('prepare', 'div2k', 'downloads', '--crop', '480')  # which is the default
    assert said.count(' kept\n') == 8
    said = command_line.run('prepare', 'verify', *data.glob('*/*.lmdb'))
    assert said.count(' right (compared with ') == 8 + 6


@pytest.mark.parametrize(('preset', 'scale', 'images'), [('df2k', 2, 6), ('flickr2k', 3, 2)])
def test_the_block_that_is_printed_trains(command_line: util.CommandLine, preset: str, scale: int, images: int) -> None:
    said = command_line.run('prepare', preset, 'downloads', '--scale', str(scale), '--out', f'{preset} # "sets"')
    block = yaml.safe_load(said[said.index('datasets:\n') :])
    options = yaml.safe_load(util.OPTIONS.format(data='none'))
    options |= {'name': preset, 'scale': scale, **block}
    options['network_g']['upscale'] = scale
    del options['val']
    file = command_line.folder / f'{preset}.yml'
    file.write_text(yaml.safe_dump(options))
    said = command_line.run('train', '-opt', file, '--force_yml', *SHORT)
    assert_trains(said)
    assert f'Number of train images: {images}\n' in said


def test_pairs_with_given_lr(command_line: util.CommandLine) -> None:
    folder = command_line.folder
    hr = photographs(folder / 'own' / 'HR', {'a b': (24, 36), 'c': (36, 24)})
    lr = photographs(folder / 'own' / 'LR' / 'X2', {'a bx2': (12, 18), 'cx2': (18, 12)})
    photographs(folder / 'own' / 'LR' / 'X3', {'a bx3': (8, 12), 'cx3': (12, 8)})
    common = ('prepare', 'pairs', 'own/HR', '--scale', '2', '3', '--quiet')
    command_line.run(*common, '--lr', 'own/LR/X{scale}', '--out', 'own/out')
    found = decoded(folder / 'own' / 'out' / 'LR_x2.lmdb')
    assert (found['a_b'] == lr['a bx2']).all()
    assert (decoded(folder / 'own' / 'out' / 'HR.lmdb')['c'] == hr['c']).all()
    (folder / 'own' / 'LR' / 'X3' / 'cx3.png').unlink()
    said = command_line.run(*common, '--lr', 'own/LR', '--out', 'own/other', status=2)
    assert 'own/HR/c.png' in said
    assert not (folder / 'own' / 'other').exists()


def test_everything_wrong_in_a_folder_is_one_report(command_line: util.CommandLine) -> None:
    folder = command_line.folder / 'bad'
    photographs(folder, {'right': (48, 48), 'small': (8, 48)})
    (folder / 'sub').mkdir()
    shutil.copy(folder / 'right.png', folder / 'sub' / 'right.png')
    (folder / 'empty.png').touch()
    (folder / 'text.jpg').write_text('no image')
    (folder / 'cut.png').write_bytes((folder / 'right.png').read_bytes()[:500])
    cv2.imwrite(str(folder / 'deep.png'), picture(48, 48, 0).astype('uint16') * 257)
    said = command_line.run('prepare', 'pairs', 'bad', '--out', 'never', '--quiet', status=2)
    assert [re.sub(r'(^bad/\w+\.\w+: ).*', r'\1', line) for line in said.splitlines()] == [
        *(f'bad/{name}: ' for name in ('cut.png', 'deep.png', 'empty.png', 'text.jpg')),
        "bad/right.png and bad/sub/right.png: have the same key 'right'; rename all but one",
        'bad/small.png: ',
        '6 problems; nothing was written',
    ]
    assert not (command_line.folder / 'never').exists()


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (('pairs', 'nowhere', '--out', 'x'), 2, 'nowhere: there is no such folder'),
        (('pairs', 'one', '--out', 'x', '--scale', '1'), 2, 'scale: is 1; choose from 2, 3, 4 and more'),
        (('pairs', 'one', '--out', 'x', '--crop', '50'), 2, 'crop: is 50, and must be a multiple of 12'),
        (('pairs', 'one', '--out', 'x', '--step', '24'), 2, 'step: has no meaning without crop'),
        (('pairs', 'one', '--out', 'x', '--compression', '10'), 2, 'compression: is 10; PNG has 0 to 9'),
        (('pairs', 'one', '--out', 'x', '--workers', '0'), 2, 'workers: is 0; at least 1 is needed'),
        (('pairs', 'one', '--out', 'one/p0.png'), 1, 'one/p0.png cannot be written: '),
        (('div2k', 'one'), 2, 'one: there is no folder DIV2K_train_HR'),
        (('div2k', 'downloads', '--crop', '0', '--step', '24'), 2, 'step: has no meaning without crop'),
        (('verify', 'nowhere.lmdb'), 2, 'nowhere.lmdb: there is no such folder; name an LMDB folder'),
        (('verify', 'one'), 1, 'one: data.mdb is missing'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)
def test_wrong_arguments_are_one_line(
    command_line: util.CommandLine, arguments: tuple[str, ...], status: int, message: str
) -> None:
    photographs(command_line.folder / 'one', {'p0': (48, 48)})
    said = command_line.run('prepare', *arguments, '--quiet', status=status)
    (line,) = said.splitlines()
    assert line.startswith(message)
    assert not (command_line.folder / 'x').exists()


def test_verify_against_a_folder_above_the_images(command_line: util.CommandLine) -> None:
    folder = command_line.folder / 'nested'
    photographs(folder / 'hr' / 'deep', {'a': (48, 48)})
    photographs(folder / 'lr' / 'X2', {'ax2': (24, 24)})
    command_line.run(
        'prepare', 'pairs', 'nested/hr', '--lr', 'nested/lr/X2', '--scale', '2', '--out', 'nested', '--quiet'
    )
    command_line.run('prepare', 'verify', 'nested/HR.lmdb', '--against', 'nested/hr')
    command_line.run('prepare', 'verify', 'nested/LR_x2.lmdb', '--against', 'nested/lr')
    said = command_line.run('prepare', 'verify', 'nested/LR_x2.lmdb', '--against', 'nested/hr', status=2)
    assert said == 'nested/hr: does not hold ax2.png, nor any other image that the LMDB was made of\n'


def test_patches_of_the_printed_block_fit_into_the_smallest_image(command_line: util.CommandLine) -> None:
    photographs(command_line.folder / 'little', {'a': (100, 100), 'b': (60, 85)})
    said = command_line.run('prepare', 'pairs', 'little', '--scale', '2', '4', '--out', 'little/out')
    assert re.findall(r'gt_size: (\d+)', said) == ['60', '60']


def test_what_it_says(command_line: util.CommandLine) -> None:
    """A table, what was done to files, and progress with rate and time left; nothing with --quiet."""
    folder = command_line.folder / 'said'
    photographs(folder, {'a': (48, 48), 'b': (60, 48)})
    cv2.imwrite(str(folder / 'c.png'), cv2.cvtColor(picture(24, 24, 1), cv2.COLOR_BGR2BGRA))
    said = command_line.run('prepare', 'pairs', 'said', '--scale', '2', '--out', 'said/out')
    assert re.search(r'HR: 100%\|.*\| 3/3 \[\d\d:\d\d<\d\d:\d\d, .*image/s\]', said)
    lines = said.splitlines()
    table = [line for line in lines if re.match(r'(said/out\S+lmdb|all) +\d', line)]
    assert [line.split()[:3] for line in table] == [
        ['said/out/HR.lmdb', '3', '5,760'],
        ['said/out/LR_x2.lmdb', '3', '1,440'],
        ['all', '6', '7,200'],
    ]
    smallest = 'the smallest image has a side of 24 pixels (c.png); no larger patches (gt_size) can be cut from it'
    assert f'said/out/HR.lmdb: {smallest}' in lines
    assert '1 file: opaque alpha channel left out (c.png)' in lines
    assert sorted(os.listdir(folder / 'out')) == [
        *('HR.lmdb', 'HR.preview.png', 'HR.record.jsonl', 'LR_x2.lmdb', 'LR_x2.record.jsonl', 'meta_info_HR.txt'),
    ]
    # What lies in the folder now is no photograph of it.
    said = command_line.run('prepare', 'pairs', 'said', '--scale', '2', '--out', 'said/out')
    assert said.count(' kept\n') == 2
    assert command_line.run('prepare', 'pairs', 'said', '--scale', '2', '--out', 'said/out', '--quiet') == ''
