"""Files of one photograph find each other in all usual layouts, and what is missing is listed with where it comes from.

Only names matter here, so files are empty, but where an option file is checked against real LMDBs.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from attnsr import options
from attnsr.data_prep import images, layouts
from attnsr.data_prep.layouts import benchmark, datasets_block, df2k, div2k, flickr2k, jobs_from_folders, pair_up
from attnsr.data_prep.lmdb_dataset import DataSetError, write_lmdb
from attnsr.data_prep.pairs import Job, Pair

OUT = Path('out')
SCALES = (2, 3, 4)


def tree(root: Path, *files: str) -> Path:
    """Empty files below ``root``; of a name with commas, as in 'HR/{a,b}.png', one for each."""
    for file in files:
        braces = re.search(r'{(.*?)}', file)
        for name in braces[1].split(',') if braces else ['']:
            path = root / (file.replace(braces[0], name) if braces else file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def pairs(root: Path, hr: str, keys: Sequence[str], **lr: str) -> tuple[Pair, ...]:
    """Pairs of files named by templates, LR ones as x4='LR/{}x4.png'."""
    return tuple(
        Pair(key, root / hr.format(key), {int(scale[1:]): root / name.format(key) for scale, name in lr.items()})
        for key in keys
    )


def problems(build: Callable[..., Any], *arguments: Any) -> list[str]:
    """The lines of the error, or what the jobs say of their files."""
    try:
        jobs, _ = build(*arguments)
    except DataSetError as error:
        return str(error).splitlines()
    assert any(job.problems for job in jobs)
    return [problem for job in jobs for problem in job.problems]


# Names of files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('hr', 'lr', 'key'),
    [
        ('baby', 'baby', 'baby'),
        ('baby', 'babyx4', 'baby'),
        ('baby', 'baby_x4', 'baby'),
        ('baby', 'babyX4', 'baby'),
        ('baby', 'baby_LR', 'baby'),
        ('baby', 'baby-lr', 'baby'),
        ('baby', 'baby_bicubic_x4', 'baby'),
        ('baby', 'babyx4_LR', 'baby'),
        ('baby_HR', 'baby_HRx4', 'baby'),
        ('baby_HR', 'baby_LR', 'baby'),
        ('baby_GT', 'baby', 'baby'),
        ('baby_HR_x4', 'baby_LRBI_x4', 'baby'),
        ('baby_HR_x4', 'baby_LR_bicubic_x4', 'baby'),
        ('Canon_001_HR', 'Canon_001_LR4', 'Canon_001'),
        ('img_001_SRF_4_HR', 'img_001_SRF_4_LR', 'img_001'),
        ('0001', '0001x4m', '0001'),
        ('ax4', 'ax4', 'ax4'),
        ('ax4', 'ax4x4', 'ax4'),
        ('ax2', 'ax2_x4', 'ax2'),
        ('x4', 'x4x4', 'x4'),
        ('HR', 'HR', 'HR'),
        ('a.b (c)', 'a.b (c)x4', 'a_b__c_'),
    ],
)
def test_names_that_belong_together(hr: str, lr: str, key: str) -> None:
    hr_file, lr_file = Path('HR', f'{hr}.png'), Path('LR', f'{lr}.jpg')
    assert pair_up([hr_file], {4: [lr_file]}) == ([Pair(key, hr_file, {4: lr_file})], [])
    assert pair_up([hr_file], {}) == ([Pair(key, hr_file)], [])


@pytest.mark.parametrize(
    ('hr', 'lr'),
    [
        ('baby', 'babyx2'),
        ('baby', 'baby_LRBI_x2'),
        ('baby', 'baby_SRF_2_LR'),
        ('baby', 'babyx14'),
        ('baby', 'baby4'),
        ('baby', 'baby_bicubic_x4_net'),
        ('baby_HR_x2', 'baby_LR_x4'),
        ('baby', 'Baby'),
        ('babyx4', 'baby'),
    ],
)
def test_names_that_do_not(hr: str, lr: str) -> None:
    pairs, lines = pair_up([Path(f'{hr}.png')], {4: [Path(f'{lr}.png')]})
    assert [pair.lr for pair in pairs] == [{}]
    assert [line.split(':')[0] for line in lines] == [f'{hr}.png', f'{lr}.png']


def test_an_equal_name_comes_first_and_scales_are_apart() -> None:
    hr = [Path('HR', name) for name in ('a.png', 'ax2.png')]
    lr = {
        2: [Path('X2', name) for name in ('a_x2.png', 'ax2.png')],
        4: [Path('X4', name) for name in ('ax4.png', 'ax2x4.png')],
    }
    found = [Pair('a', hr[0], {2: lr[2][0], 4: lr[4][0]}), Pair('ax2', hr[1], {2: lr[2][1], 4: lr[4][1]})]
    assert pair_up(hr, lr) == (found, [])


def test_every_file_that_does_not_pair_is_one_line() -> None:
    hr = [
        Path('HR', name) for name in ('a.png', 'b.png', 'b.jpg', 'sub/c.png', 'c_HR.png', 'd 1.png', 'd_1.png', 'e.png')
    ]
    lr = [
        Path('LR', name) for name in ('bx4.png', 'd 1x4.png', 'd_1x4.png', 'ex4.png', 'e_LR.png', 'e_x4.png', 'fx4.png')
    ]
    pairs, lines = pair_up(hr, {4: lr})
    assert [pair.hr for pair in pairs] == hr
    assert [pair.hr.name for pair in pairs if pair.lr] == ['d 1.png', 'd_1.png']
    assert lines == [
        "HR/b.png and HR/b.jpg: have the same key 'b'; rename all but one",
        "HR/sub/c.png and HR/c_HR.png: have the same key 'c'; rename all but one",
        "HR/d 1.png and HR/d_1.png: have the same key 'd_1'; rename all but one",
        'LR/ex4.png, LR/e_LR.png and LR/e_x4.png: are all named as the LR image of HR/e.png at x4',
        'HR/a.png: has no LR image of x4, which would be named a, ax4 or a_LR',
        'HR/sub/c.png: has no LR image of x4, which would be named c, cx4 or c_LR',
        'HR/c_HR.png: has no LR image of x4, which would be named c, cx4 or c_LR',
        'LR/fx4.png: has no HR image, which would be named f or f_HR',
    ]


# Any two folders -----------------------------------------------------------------------------------------------------


def test_a_folder_without_lr(tmp_path: Path) -> None:
    hr = tree(tmp_path, 'a.png', 'more/b.JPG', '.hidden.png', 'notes.txt', 'HR.preview.png')
    found = Pair('a', hr / 'a.png'), Pair('b', hr / 'more/b.JPG')
    assert jobs_from_folders(hr, None, SCALES, OUT, 480, 240) == ([Job(OUT, found, SCALES, crop=480, step=240)], [])


@pytest.mark.parametrize(
    ('lr', 'scales', 'note'),
    [
        ('LR/X{scale}', (2, 4), False),
        ('LR', (2, 4), True),
        ('LR', (4,), True),
        ('LR/X4', (4,), False),
        ('HR/LR/X{scale}', (2, 4), False),
    ],
)
def test_folders_of_lr(tmp_path: Path, lr: str, scales: tuple[int, ...], note: bool) -> None:
    top = 'HR/LR' if lr.startswith('HR') else 'LR'
    tree(tmp_path, 'HR/{a,b}.png', top + '/X2/{ax2,bx2}.png', top + '/X4/{ax4,bx4}.png')
    files = {f'x{scale}': f'{top}/X{scale}/{{}}x{scale}.png' for scale in scales}
    jobs, notes = jobs_from_folders(tmp_path / 'HR', f'{tmp_path}/{lr}', scales, OUT, None, None)
    assert jobs == [Job(OUT, pairs(tmp_path, 'HR/{}.png', 'ab', **files), scales)]
    assert notes == [f'LR images of x{scale} are taken from {tmp_path}/LR/X{scale}' for scale in scales if note]


def test_folders_of_lr_that_cannot_be(tmp_path: Path) -> None:
    root = tree(tmp_path, 'HR/a.png', 'LR/x2/ax2.png', 'LR/bx4.png', 'empty/readme.txt')
    hr, out = root / 'HR', (OUT, None, None)
    assert problems(jobs_from_folders, root / 'none', f'{root}/LR{{scale}}', (2, 4), *out) == [
        f'{root}/none: there is no such folder',
        f'{root}/LR2: there is no such folder',
        f'{root}/LR4: there is no such folder',
    ]
    assert problems(jobs_from_folders, root / 'none', f'{root}/LR', SCALES, *out) == [
        f'{root}/LR: there is no folder X3 or X4 in it; for several scales write the folder of LR images with '
        f"'{{scale}}' in its name, such as '{root}/LR/X{{scale}}', or give one scale",
        f'{root}/none: there is no such folder',
    ]
    with pytest.raises(DataSetError) as caught:
        images.find(root / 'empty')
    assert problems(jobs_from_folders, hr, f'{root}/empty', (4,), *out) == [str(caught.value)]
    tree(root, 'drawn/HR.preview.png')
    assert problems(jobs_from_folders, root / 'drawn', None, (4,), *out) == [
        f'{root}/drawn: holds no HR image, only previews of pairs'
    ]
    assert problems(jobs_from_folders, hr, str(hr), (4,), *out) == [f'{hr}: holds no HR image, only LR images']
    assert problems(jobs_from_folders, hr, f'{root}/LR', (4,), *out) == [
        f'{hr}/a.png: has no LR image of x4, which would be named a, ax4 or a_LR',
        f'{root}/LR/bx4.png: has no HR image, which would be named b or b_HR',
        f'{root}/LR/x2/ax2.png: has no HR image, which would be named ax2 or ax2_HR',
    ]


# DIV2K and Flickr2K --------------------------------------------------------------------------------------------------

NO_VALID = 'not found: DIV2K_valid_HR, the 100 validation images (0801.png to 0900.png)'


@pytest.mark.parametrize('place', ['', 'DIV2K/', 'DIV2K/DIV2K/', 'div2k/', 'datasets/DIV2K/', 'data/'])
@pytest.mark.parametrize(
    ('hr', 'lr'),
    [
        ('DIV2K_train_HR', 'DIV2K_train_LR_bicubic/X{}'),
        ('DIV2K_train_HR', 'DIV2K_train_LR_bicubic/x{}'),
        ('DIV2K_train_HR/DIV2K_train_HR', 'DIV2K_train_LR_bicubic_X{}/DIV2K_train_LR_bicubic/X{}'),
        ('DIV2K_train_HR', 'DIV2K_train_LR_bicubic_X{}/X{}'),
        ('DIV2K_train_HR', 'DIV2K_train_LR_bicubic_X{}'),
        ('DIV2K_train_HR', 'DIV2K_train_LR_bicubic/DIV2K_train_LR_bicubic/X{}'),
        ('DIV2K_train_HR', 'DIV2K_train_LR_bicubic_X{}/DIV2K_train_LR_bicubic_X{}'),
        ('train/HR', 'train/LR_bicubic/X{}'),
    ],
)
def test_div2k_wherever_it_was_unpacked(tmp_path: Path, place: str, hr: str, lr: str) -> None:
    keys = ['0001', '0800']
    folders = {scale: place + lr.replace('{}', str(scale)) for scale in (2, 4)}
    tree(tmp_path, f'{place}{hr}/{{0001,0800}}.png')
    for scale, folder in folders.items():
        tree(tmp_path, f'{folder}/{{0001x{scale},0800x{scale}}}.png')
    files = {f'x{scale}': f'{folder}/{{}}x{scale}.png' for scale, folder in folders.items()}
    found = pairs(tmp_path, f'{place}{hr}/{{}}.png', keys, **files)
    names = 'DIV2K_train_HR_sub', 'DIV2K_train_LR_bicubic_X{scale}_sub'
    assert div2k(tmp_path, OUT, (2, 4)) == (
        [Job(OUT / 'DIV2K', found, (2, 4), *names, 480, 240)],
        ['DIV2K: 2 of 800 training images', NO_VALID],
    )


def test_div2k_whole_and_with_validation_images_and_lr_of_some_scales(tmp_path: Path) -> None:
    tree(tmp_path, 'DIV2K_train_HR/0001.png', 'DIV2K_train_LR_bicubic/X2/0001x2.png')
    tree(tmp_path, 'DIV2K_valid_HR/0801.png', 'DIV2K_valid_LR_bicubic_X3/DIV2K_valid_LR_bicubic/X3/0801x3.png')
    train = pairs(tmp_path, 'DIV2K_train_HR/{}.png', ['0001'], x2='DIV2K_train_LR_bicubic/X2/{}x2.png')
    lr = 'DIV2K_valid_LR_bicubic_X3/DIV2K_valid_LR_bicubic/X3/{}x3.png'
    valid = pairs(tmp_path, 'DIV2K_valid_HR/{}.png', ['0801'], x3=lr)
    jobs, notes = div2k(tmp_path, OUT, (2, 3), None)
    assert jobs == [
        Job(OUT / 'DIV2K', train, (2, 3), 'DIV2K_train_HR', 'DIV2K_train_LR_bicubic_X{scale}'),
        Job(OUT / 'DIV2K', valid, (2, 3), 'DIV2K_valid_HR', 'DIV2K_valid_LR_bicubic_X{scale}'),
    ]
    assert notes == [
        'DIV2K: 1 of 800 training images',
        'LR images of x3 are made from the HR ones: no DIV2K_train_LR_bicubic/X3',
        'DIV2K: 1 of 100 validation images',
        'LR images of x2 are made from the HR ones: no DIV2K_valid_LR_bicubic/X2',
    ]


def test_a_complete_div2k_needs_no_note(tmp_path: Path) -> None:
    tree(tmp_path, *(f'DIV2K_train_HR/{number:04}.png' for number in range(1, 801)))
    tree(tmp_path, *(f'DIV2K_train_LR_bicubic/X4/{number:04}x4.png' for number in range(1, 801)))
    tree(tmp_path, *(f'DIV2K_valid_HR/{number:04}.png' for number in range(801, 901)))
    tree(tmp_path, *(f'DIV2K_valid_LR_bicubic/X4/{number:04}x4.png' for number in range(801, 901)))
    jobs, notes = div2k(tmp_path, OUT, (4,))
    assert [len(job.pairs) for job in jobs] == [800, 100]
    assert notes == []


def test_validation_images_in_the_training_folder_are_not_trained_on(tmp_path: Path) -> None:
    # As in EDSR's DIV2K.tar.
    tree(tmp_path, 'DIV2K/DIV2K_train_HR/{0001,0801,0900}.png')
    tree(tmp_path, 'DIV2K/DIV2K_train_LR_bicubic/X4/{0001x4,0801x4,0900x4}.png')
    (job,), notes = div2k(tmp_path, OUT, (4,))
    assert [pair.key for pair in job.pairs] == ['0001']
    assert notes == [
        f'DIV2K: 2 validation images in {tmp_path}/DIV2K/DIV2K_train_HR are left out',
        'DIV2K: 1 of 800 training images',
        NO_VALID,
    ]


def test_of_two_places_the_first_is_taken(tmp_path: Path) -> None:
    tree(tmp_path, 'DIV2K_train_HR/0001.png', 'datasets/DIV2K/DIV2K_train_HR/0002.png')
    (job,), notes = div2k(tmp_path, OUT, (4,))
    assert [pair.key for pair in job.pairs] == ['0001']
    assert notes[0] == (
        f'DIV2K: taken from {tmp_path}/DIV2K_train_HR; '
        f'also there and not used: {tmp_path}/datasets/DIV2K/DIV2K_train_HR'
    )


def test_flickr2k(tmp_path: Path) -> None:
    tree(tmp_path, 'Flickr2K/Flickr2K_HR/{000001,000002}.png')
    tree(tmp_path, 'Flickr2K/Flickr2K_LR_bicubic/X2/{000001x2,000002x2}.png')
    hr, lr = 'Flickr2K/Flickr2K_HR/{}.png', 'Flickr2K/Flickr2K_LR_bicubic/X2/{}x2.png'
    found = pairs(tmp_path, hr, ['000001', '000002'], x2=lr)
    names = 'Flickr2K_HR_sub', 'Flickr2K_LR_bicubic_X{scale}_sub'
    assert flickr2k(tmp_path, OUT, (2,), 240, 120) == (
        [Job(OUT / 'Flickr2K', found, (2,), *names, 240, 120)],
        ['Flickr2K: 2 of 2650 images'],
    )


def test_df2k_has_lr_given_or_made_for_each_of_the_two(tmp_path: Path) -> None:
    tree(tmp_path, 'DIV2K/DIV2K_train_HR/0001.png', 'DIV2K/DIV2K_valid_HR/0801.png')
    tree(tmp_path, 'Flickr2K/Flickr2K_HR/000001.png', 'Flickr2K/Flickr2K_LR_bicubic/X4/000001x4.png')
    lr = 'Flickr2K/Flickr2K_LR_bicubic/X4/{}x4.png'
    found = pairs(tmp_path, 'DIV2K/DIV2K_train_HR/{}.png', ['0001'])
    found += pairs(tmp_path, 'Flickr2K/Flickr2K_HR/{}.png', ['000001'], x4=lr)
    names = 'DF2K_train_HR_sub', 'DF2K_train_LR_bicubic_X{scale}_sub'
    jobs, notes = df2k(tmp_path, OUT, (4,))
    assert jobs == [Job(OUT / 'DF2K', found, (4,), *names, 480, 240)]
    assert notes == [
        'DIV2K: 1 of 800 training images',
        'LR images of x4 are made from the HR ones: no DIV2K_train_LR_bicubic/X4',
        'Flickr2K: 1 of 2650 images',
    ]


def test_missing_training_sets(tmp_path: Path) -> None:
    tree(tmp_path, 'DIV2K_train_HR/readme.txt')
    div2k_line = (
        f'{tmp_path}: there is no folder DIV2K_train_HR, DIV2K_train_HR/DIV2K_train_HR or train/HR with the 800 '
        'training images (0001.png to 0800.png) in it, nor in DIV2K, DIV2K/DIV2K, data, data/DIV2K, data/DIV2K/DIV2K, '
        'datasets, datasets/DIV2K or datasets/DIV2K/DIV2K below it; it comes in DIV2K_train_HR.zip of DIV2K (NTIRE '
        '2017, Agustsson and Timofte)'
    )
    flickr2k_line = (
        f'{tmp_path}: there is no folder Flickr2K_HR or Flickr2K_HR/Flickr2K_HR with the 2650 images (000001.png to '
        '002650.png) in it, nor in Flickr2K, Flickr2K/Flickr2K, data, data/Flickr2K, data/Flickr2K/Flickr2K, '
        'datasets, datasets/Flickr2K or datasets/Flickr2K/Flickr2K below it; it comes in Flickr2K.tar of Flickr2K '
        '(Lim et al., EDSR)'
    )
    assert problems(div2k, tmp_path, OUT, SCALES) == [div2k_line]
    assert problems(flickr2k, tmp_path, OUT, SCALES) == [flickr2k_line]
    assert problems(df2k, tmp_path, OUT, SCALES) == [div2k_line, flickr2k_line]
    tree(tmp_path, 'DIV2K_train_HR/0801.png')  # validation images alone are not what is looked for
    assert problems(div2k, tmp_path, OUT, SCALES) == [div2k_line]
    assert problems(div2k, tmp_path / 'none', OUT, SCALES) == [f'{tmp_path}/none: there is no such folder']


def test_training_and_validation_images_that_do_not_pair_are_told_together(tmp_path: Path) -> None:
    tree(tmp_path, 'DIV2K_train_HR/{0001,0002}.png', 'DIV2K_train_LR_bicubic/X4/{0002x4,0003x4}.png')
    tree(tmp_path, 'DIV2K_valid_HR/{0801.png,0801.jpg}')
    assert problems(div2k, tmp_path, OUT, (4,)) == [
        f'{tmp_path}/DIV2K_train_HR/0001.png: has no LR image of x4, which would be named 0001, 0001x4 or 0001_LR',
        f'{tmp_path}/DIV2K_train_LR_bicubic/X4/0003x4.png: has no HR image, which would be named 0003 or 0003_HR',
        f'{tmp_path}/DIV2K_valid_HR/0801.jpg and {tmp_path}/DIV2K_valid_HR/0801.png: '
        "have the same key '0801'; rename all but one",
    ]


# Benchmarks ----------------------------------------------------------------------------------------------------------

SET5 = ['baby', 'bird', 'butterfly', 'head', 'woman']
NOT_FOUND = {
    'Set5': 'not found: Set5 (Bevilacqua et al. 2012)',
    'Set14': 'not found: Set14 (Zeyde et al. 2010)',
    'B100': 'not found: B100, also called BSD100 or BSDS100 (Martin et al. 2001)',
    'Urban100': 'not found: Urban100 (Huang et al. 2015)',
    'Manga109': 'not found: Manga109 (Matsui et al. 2017)',
}
OTHERS = list(NOT_FOUND.values())[1:]

# HR and LR files by layout; {s} is the scale and {} the image.
PAIRED = {
    'own': ('Set5/HR_x{s}/{}.png', 'Set5/LR_bicubic_x{s}/{}.png'),
    'EDSR': ('Set5/HR/{}.png', 'Set5/LR_bicubic/X{s}/{}x{s}.png'),
    'RCAN': ('HR/Set5/x{s}/{}_HR_x{s}.png', 'LR/LRBI/Set5/x{s}/{}_LRBI_x{s}.png'),
    'SelfExSR': ('Set5/image_SRF_{s}/{}_SRF_{s}_HR.png', 'Set5/image_SRF_{s}/{}_SRF_{s}_LR.png'),
    'BasicSR': ('Set5/GTmod12/{}.png', 'Set5/LRbicx{s}/{}.png'),
    'BasicSR, another multiple': ('Set5/GTmod24/{}.png', 'Set5/LRbicx{s}/{}.png'),
}
HR_ONLY = {
    'KAIR': 'Set5/{}.bmp',
    'SRCNN': 'Set5/{}_GT.bmp',
    'original': 'Set5/original/{}.png',
    'HR': 'Set5/HR/{}.png',
    'GTmod12': 'Set5/GTmod12/{}.png',
}


def set5_files(template: str, scale: int = 0) -> list[str]:
    return [template.replace('{s}', str(scale)).format(key) for key in SET5]


def set5_job(root: Path, scale: int, hr: str, lr: str | None = None, out: Path = OUT) -> Job:
    hr_files = set5_files(hr, scale)
    lr_files = set5_files(lr, scale) if lr else []
    found = tuple(
        Pair(key, root / hr_files[i], {scale: root / lr_files[i]} if lr else {}) for i, key in enumerate(SET5)
    )
    return Job(out / 'Set5', found, (scale,), f'HR_x{scale}', 'LR_bicubic_x{scale}')


@pytest.mark.parametrize('place', ['', 'benchmark/', 'datasets/', 'testsets/', 'Benchmark/'])
@pytest.mark.parametrize('layout', PAIRED)
def test_layouts_with_lr(tmp_path: Path, layout: str, place: str) -> None:
    hr, lr = (place + template for template in PAIRED[layout])
    for scale in (3, 4):
        tree(tmp_path, *set5_files(hr, scale), *set5_files(lr, scale))
    assert benchmark(tmp_path, OUT, (3, 4)) == ([set5_job(tmp_path, scale, hr, lr) for scale in (3, 4)], OTHERS)


@pytest.mark.parametrize('layout', HR_ONLY)
def test_layouts_without_lr(tmp_path: Path, layout: str) -> None:
    hr = HR_ONLY[layout]
    tree(tmp_path, *set5_files(hr))
    jobs, notes = benchmark(tmp_path, OUT, (2, 4))
    assert jobs == [set5_job(tmp_path, scale, hr) for scale in (2, 4)]
    assert notes == [f'Set5 x2, x4: LR images are made from the HR ones in {(tmp_path / hr).parent}', *OTHERS]


@pytest.mark.parametrize(('root', 'place'), [('Set5', 'Set5'), ('SET5', 'SET5'), ('Set5', 'Set5/Set5')])
def test_the_folder_of_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, place: str) -> None:
    hr, lr = f'{place}/HR/{{}}.png', f'{place}/LR_bicubic/X4/{{}}x4.png'
    tree(tmp_path, *set5_files(hr), *set5_files(lr), 'Set14/HR/ppt3.png')
    monkeypatch.chdir(tmp_path)
    assert benchmark(Path(root), OUT, (4,)) == ([set5_job(Path(), 4, hr, lr)], [])
    monkeypatch.chdir(root)
    assert benchmark(Path(), OUT, (4,)) == ([set5_job(tmp_path, 4, hr, lr)], [])


def test_a_set_unpacked_into_a_folder_of_its_name(tmp_path: Path) -> None:
    hr, lr = 'data/Set5/Set5/GTmod12/{}.png', 'data/Set5/Set5/LRbicx4/{}.png'
    tree(tmp_path, *set5_files(hr), *set5_files(lr))
    assert benchmark(tmp_path, OUT, (4,)) == ([set5_job(tmp_path, 4, hr, lr)], OTHERS)


def test_results_of_other_methods_are_no_images_of_the_set(tmp_path: Path) -> None:
    files = set5_files('Set5/image_SRF_4/{}_SRF_4_HR.png') + set5_files('Set5/image_SRF_4/{}_SRF_4_LR.png')
    methods = ('bicubic', 'A+', 'SRCNN', 'glasner', 'nearest', 'SelfExSR')
    tree(tmp_path, *files, *(file.replace('_LR', f'_{method}') for method in methods for file in files[5:]))
    assert benchmark(tmp_path, OUT, (4,)) == ([set5_job(tmp_path, 4, *PAIRED['SelfExSR'])], OTHERS)


def test_a_layout_with_lr_is_taken_before_one_without(tmp_path: Path) -> None:
    tree(tmp_path, *set5_files('Set5/HR/{}.png'), *set5_files('Set5/original/{}.png'), *set5_files('Set5/{}.png'))
    tree(tmp_path, *set5_files('Set5/GTmod12/{}.png'), *set5_files('Set5/LRbicx4/{}.png'))
    jobs, notes = benchmark(tmp_path, OUT, (2, 4))
    assert jobs == [set5_job(tmp_path, 2, 'Set5/HR/{}.png'), set5_job(tmp_path, 4, *PAIRED['BasicSR'])]
    sets = tmp_path / 'Set5'
    assert notes == [
        f'Set5 x2: taken from {sets}/HR; also there and not used: {sets}/GTmod12, {sets}/original and {sets}',
        f'Set5 x2: LR images are made from the HR ones in {sets}/HR',
        f'Set5 x4: taken from {sets}/GTmod12; also there and not used: {sets}/HR, {sets}/original and {sets}',
        *OTHERS,
    ]


def test_the_first_of_several_layouts_with_lr_is_taken(tmp_path: Path) -> None:
    given = list(PAIRED)[:5]
    for number, layout in enumerate(given):
        later = tree(
            tmp_path / str(number), *(f for each in given[number:] for t in PAIRED[each] for f in set5_files(t, 4))
        )
        jobs, _ = benchmark(later, OUT, (4,))
        assert jobs == [set5_job(later, 4, *PAIRED[layout])]


def test_all_sets_by_all_names(tmp_path: Path) -> None:
    tree(tmp_path, 'benchmark/set5/HR/baby.png', 'Set14/HR/ppt3.png', 'BSDS100/HR/101085.png')
    tree(tmp_path, 'urban100/HR/img_001.png', 'Manga109/AisazuNihaIrarenai.png')
    jobs, notes = benchmark(tmp_path, OUT, (4,))
    assert [(job.out, [(pair.key, pair.hr) for pair in job.pairs]) for job in jobs] == [
        (OUT / 'Set5', [('baby', tmp_path / 'benchmark/set5/HR/baby.png')]),
        (OUT / 'Set14', [('ppt3', tmp_path / 'Set14/HR/ppt3.png')]),
        (OUT / 'B100', [('101085', tmp_path / 'BSDS100/HR/101085.png')]),
        (OUT / 'Urban100', [('img_001', tmp_path / 'urban100/HR/img_001.png')]),
        (OUT / 'Manga109', [('AisazuNihaIrarenai', tmp_path / 'Manga109/AisazuNihaIrarenai.png')]),
    ]
    counts = {'Set5': 5, 'Set14': 14, 'B100': 100, 'Urban100': 100, 'Manga109': 109}
    assert notes[1::2] == [f'{name} x4: 1 of {count} images' for name, count in counts.items()]


@pytest.mark.parametrize('name', ['BSD100', 'bsd100', 'BSDS100', 'B100'])
def test_b100_goes_by_three_names(tmp_path: Path, name: str) -> None:
    tree(tmp_path, f'{name}/GTmod12/3096.png', f'{name}/LRbicx4/3096.png')
    (job,), notes = benchmark(tmp_path, OUT, (4,))
    found = pairs(tmp_path, f'{name}/GTmod12/{{}}.png', ['3096'], x4=f'{name}/LRbicx4/{{}}.png')
    assert job == Job(OUT / 'B100', found, (4,), 'HR_x4', 'LR_bicubic_x{scale}')
    assert notes == ['B100 x4: 1 of 100 images', *(line for name, line in NOT_FOUND.items() if name != 'B100')]


def test_no_benchmark_at_all(tmp_path: Path) -> None:
    below = 'benchmark, benchmarks, data, dataset, datasets, test, testset or testsets below it'
    lines = problems(benchmark, tree(tmp_path, 'Set6/a.png'), OUT, (4,))
    assert lines[0] == (
        f'{tmp_path}: there is no folder Set5 in it, nor in {below}; it comes as Set5 (Bevilacqua et al. 2012), '
        'and in benchmark.tar of EDSR'
    )
    assert lines[2] == (
        f'{tmp_path}: there is no folder B100, BSD100 or BSDS100 in it, nor in {below}; it comes as B100, also called '
        'BSD100 or BSDS100 (Martin et al. 2001), and in benchmark.tar of EDSR'
    )
    assert len(lines) == 5
    assert problems(benchmark, tmp_path / 'none', OUT, (4,)) == [f'{tmp_path}/none: there is no such folder']


def test_sets_that_cannot_be_used_are_told_together(tmp_path: Path) -> None:
    tree(tmp_path, *set5_files('Set5/HR_x4/{}.png'), *set5_files('Set5/LR_bicubic_x4/{}.png')[1:])
    tree(tmp_path, 'Set14/GTmod12/{ppt3,man}.png', 'Set14/LRbicx4/{ppt3,Man}.png', 'B100/LR_bicubic/X4/3096x4.png')
    # Made by an earlier run into the same folder.
    tree(tmp_path, 'Urban100/HR_x4.preview.png', 'Urban100/HR_x4.lmdb/data.mdb')

    def known(name: str, scale: int) -> str:
        return (
            f'there are no HR images of {name} for x{scale}; they would be in {name}/HR_x{scale}, {name}/HR, '
            f'HR/{name}/x{scale}, {name}/image_SRF_{scale}, {name}/GTmod*, {name}/original or {name}'
        )

    root = tmp_path
    assert problems(benchmark, root, OUT, (3, 4)) == [
        f'{root}/Set5: {known("Set5", 3)}',
        f'{root}/B100: {known("B100", 3)}',
        f'{root}/B100: {known("B100", 4)}',
        f'{root}/Urban100: {known("Urban100", 3)}',
        f'{root}/Urban100: {known("Urban100", 4)}',
        f'{root}/Set5/HR_x4/baby.png: has no LR image of x4, which would be named baby, babyx4 or baby_LR',
        f'{root}/Set14/GTmod12/man.png: has no LR image of x4, which would be named man, manx4 or man_LR',
        f'{root}/Set14/LRbicx4/Man.png: has no HR image, which would be named Man or Man_HR',
    ]


# For the command line ------------------------------------------------------------------------------------------------


def test_presets() -> None:
    assert {name: (preset.jobs, preset.training) for name, preset in layouts.PRESETS.items()} == {
        'div2k': (div2k, True),
        'df2k': (df2k, True),
        'flickr2k': (flickr2k, True),
        'benchmark': (benchmark, False),
    }


def test_block_as_text() -> None:
    found = tuple(Pair(f'{number:04}', Path(f'{number:04}.png')) for number in range(800))
    names = 'DIV2K_train_HR_sub', 'DIV2K_train_LR_bicubic_X{scale}_sub'
    job = Job(Path('datasets/DIV2K'), found, SCALES, *names, 480, 240)
    valid = Job(Path('datasets/DIV2K'), found, SCALES, 'DIV2K_valid_HR', 'DIV2K_valid_LR_bicubic_X{scale}')
    assert datasets_block([job, valid], 3) == (
        'datasets:\n'
        '  train:\n'
        '    name: DIV2K\n'
        '    type: PairedImageDataset\n'
        '    dataroot_gt: datasets/DIV2K/DIV2K_train_HR_sub.lmdb\n'
        '    dataroot_lq: datasets/DIV2K/DIV2K_train_LR_bicubic_X3_sub.lmdb\n'
        '    io_backend:\n'
        '      type: lmdb\n'
        '    gt_size: 144\n'
        '    use_hflip: true\n'
        '    use_rot: true\n'
        '    num_worker_per_gpu: 6\n'
        '    batch_size_per_gpu: 16\n'
        '    dataset_enlarge_ratio: 10\n'
        '    prefetch_mode: ~\n'
        '  val:\n'
        '    name: DIV2K_valid\n'
        '    type: PairedImageDataset\n'
        '    dataroot_gt: datasets/DIV2K/DIV2K_valid_HR.lmdb\n'
        '    dataroot_lq: datasets/DIV2K/DIV2K_valid_LR_bicubic_X3.lmdb\n'
        '    io_backend:\n'
        '      type: lmdb\n'
    )
    with pytest.raises(ValueError, match='only one of the jobs can be for training'):
        datasets_block([job, job], 3)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('scale', SCALES)
def test_block_in_an_option_file(tmp_path: Path, scale: int, whole: bool) -> None:
    # The names of the folder are such that YAML would read something else without quotes.
    out = tmp_path / 'data: # "sets"' / '1e3'
    side = 192 if whole else 72
    crop, step = (None, None) if whole else (side, side)
    hr = tree(tmp_path / 'photographs', 'a.png', 'b.png')
    sets = tree(tmp_path / 'sets', 'Set5/{baby,bird}.png', 'Set14/ppt3.png')
    jobs = jobs_from_folders(hr, None, SCALES, out, crop, step)[0] + benchmark(sets, out, SCALES)[0]
    for job in jobs:
        if scale in job.scales:
            job.out.mkdir(parents=True, exist_ok=True)
            for name, size in ((job.hr_name, side), (job.lr_name.format(scale=scale), side // scale)):
                pictures = {pair.key: np.zeros((size, size, 3), np.uint8) for pair in job.pairs}
                write_lmdb(job.out / f'{name}.lmdb', pictures)

    block = datasets_block(jobs, scale)
    data = yaml.safe_load(block)['datasets']
    assert list(data) == ['train', 'val_1', 'val_2']
    assert data['train']['gt_size'] == (48 * scale if whole else 72)
    assert data['val_1']['dataroot_lq'] == f'{out}/Set5/LR_bicubic_x{scale}.lmdb'
    recipe = Path(options.find(f'elan_light_x{scale}')).read_text()
    file = tmp_path / 'options.yml'
    file.write_text(re.sub(r'datasets:\n.*?(?=network_g:)', lambda _: block, recipe, flags=re.DOTALL))
    read = options.load(str(file))
    assert read['datasets'] == data
    assert read['datasets']['train']['name'] == '1e3'
    assert options.check(read, 'F', is_train=True) == []
