"""From photographs to LMDBs: the right pixels under the right keys, whatever interrupts the work."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import util
from basicsr.data import build_dataset

from attnsr.data_prep import images, pairs
from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.matlab_resize import imresize
from attnsr.data_prep.pairs import Job, Pair, prepare, windows


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (height, width, 3), smooth with noise: PNG files of it are smaller than the pixels, and not by much."""
    source = np.random.default_rng(seed)
    coarse = source.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.add(smooth, source.integers(0, 8, smooth.shape, np.uint8))


def photographs(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Write PNG files; gives the pictures by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: picture(*size, seed) for seed, (name, size) in enumerate(sizes.items())}
    for name, image in made.items():
        cv2.imwrite(str(folder / f'{name}.png'), image)
    return made


def job(folder: Path, out: Path, **options: object) -> Job:
    of = tuple(Pair(path.stem, path) for path in sorted(folder.glob('*.png')))
    return Job(out, of, **{'scales': (2, 3, 4), **options})  # type: ignore[arg-type]


def decoded(path: Path) -> dict[str, np.ndarray]:
    """All images of an LMDB, as BasicSR decodes them."""
    return {
        key: np.asarray(cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR))
        for key, value in util.lmdb_values(path).items()
    }


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder; LMDB's lock files hold process numbers."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob('*'))
        if file.is_file() and file.name != 'lock.mdb'
    }


def test_whole_images(tmp_path: Path) -> None:
    hr = photographs(tmp_path / 'photos', {'even': (48, 60), 'odd': (53, 67), 'least': (12, 12)})
    grey = picture(24, 36, 9)[..., 0]
    cv2.imwrite(str(tmp_path / 'photos' / 'grey.png'), grey)
    summary = prepare([job(tmp_path / 'photos', tmp_path / 'out')], quiet=True)

    assert [row.path.name for row in summary] == ['HR.lmdb', 'LR_x2.lmdb', 'LR_x3.lmdb', 'LR_x4.lmdb']
    expected = {'even': hr['even'], 'odd': hr['odd'][:48, :60], 'least': hr['least'], 'grey': np.dstack([grey] * 3)}
    found = decoded(tmp_path / 'out' / 'HR.lmdb')
    assert found.keys() == expected.keys()
    for key, image in expected.items():
        np.testing.assert_array_equal(found[key], image, err_msg=key)
        for scale in (2, 3, 4):
            lr = decoded(tmp_path / 'out' / f'LR_x{scale}.lmdb')[key]
            np.testing.assert_array_equal(lr, imresize(image, Fraction(1, scale)), err_msg=f'{key} x{scale}')
    # A file whose pixels stay as they are is stored as it is.
    files = {name: (tmp_path / 'photos' / f'{name}.png').read_bytes() for name in expected}
    values = util.lmdb_values(tmp_path / 'out' / 'HR.lmdb')
    assert {name for name in files if values[name] == files[name]} == {'even', 'least', 'grey'}
    text = 'even.png (48,60,3) 1\ngrey.png (24,36,1) 1\nleast.png (12,12,3) 1\nodd.png (48,60,3) 1\n'
    assert (tmp_path / 'out' / 'HR.lmdb' / 'meta_info.txt').read_text() == text
    assert (tmp_path / 'out' / 'meta_info_HR.txt').read_text() == text.replace(' 1\n', '\n')
    assert summary[3].pixels == 12 * 15 * 2 + 3 * 3 + 6 * 9


def test_sub_images_lie_where_those_of_basicsr_do(tmp_path: Path) -> None:
    hr = photographs(tmp_path / 'photos', {'a': (100, 132), 'b': (60, 48), 'small': (36, 100)})
    prepare([job(tmp_path / 'photos', tmp_path / 'out', scales=(2, 3), crop=48, step=24)], quiet=True)
    found = decoded(tmp_path / 'out' / 'HR.lmdb')
    small = {scale: decoded(tmp_path / 'out' / f'LR_x{scale}.lmdb') for scale in (2, 3)}
    number = 0
    for name, image in hr.items():
        height, width = (side // 6 * 6 for side in image.shape[:2])
        tops, lefts = (
            # As in BasicSR's extract_subimages.
            [*range(0, side - 48 + 1, 24), *([side - 48] if (side - 48) % 24 else [])] if side >= 48 else [0]
            for side in (height, width)
        )
        places = [(top, left) for top in tops for left in lefts]
        for index, (top, left) in enumerate(places, start=1):
            key = f'{name}_s{index:03d}'
            part = np.s_[top : min(top + 48, height), left : min(left + 48, width)]
            np.testing.assert_array_equal(found[key], image[part], err_msg=key)
            for scale, lr in small.items():
                reduced = imresize(image[:height, :width], Fraction(1, scale))
                part = np.s_[top // scale :, left // scale :]
                h, w = (side // scale for side in found[key].shape[:2])
                np.testing.assert_array_equal(lr[key], reduced[part][:h, :w], err_msg=f'{key} x{scale}')
            number += 1
    assert number == len(found) == len(small[2]) == len(small[3]) == 3 * 5 + 2 + 3


def test_windows_cover_everything() -> None:
    assert windows(480, 480, 480, 240) == [(0, 0, 480, 480)]
    assert windows(5, 9, 4, 4) == [(0, 0, 4, 4), (0, 4, 4, 4), (0, 5, 4, 4), (1, 0, 4, 4), (1, 4, 4, 4), (1, 5, 4, 4)]
    assert windows(3, 8, 4, 4) == [(0, 0, 3, 4), (0, 4, 3, 4)]


def test_given_lr_is_taken_as_it_is(tmp_path: Path) -> None:
    hr = photographs(tmp_path / 'hr', {'a': (50, 61), 'b': (48, 60)})
    # Made from HR of another size than a multiple, as MATLAB rounds it up, and cut before.
    lr = photographs(tmp_path / 'lr', {'ax4': (13, 16), 'bx4': (12, 15)})
    given = tuple(Pair(key, tmp_path / 'hr' / f'{key}.png', {4: tmp_path / 'lr' / f'{key}x4.png'}) for key in 'ab')
    prepare([Job(tmp_path / 'out', given, (4,))], quiet=True)
    found, small = decoded(tmp_path / 'out' / 'HR.lmdb'), decoded(tmp_path / 'out' / 'LR_x4.lmdb')
    np.testing.assert_array_equal(found['a'], hr['a'][:48, :60])
    np.testing.assert_array_equal(small['a'], lr['ax4'][:12, :15])
    np.testing.assert_array_equal(small['b'], lr['bx4'])
    assert util.lmdb_values(tmp_path / 'out' / 'LR_x4.lmdb')['b'] == (tmp_path / 'lr' / 'bx4.png').read_bytes()


def test_basicsr_reads_the_pairs(tmp_path: Path) -> None:
    hr = photographs(tmp_path / 'photos', {'a': (60, 60), 'b.c d': (48, 72)})
    odd = tuple(Pair(path.stem.replace('.', '_').replace(' ', '_'), path) for path in (tmp_path / 'photos').iterdir())
    prepare([Job(tmp_path / 'out', odd, (3,))], quiet=True)
    dataset = build_dataset(
        {
            'name': 'pairs',
            'type': 'PairedImageDataset',
            'dataroot_gt': str(tmp_path / 'out' / 'HR.lmdb'),
            'dataroot_lq': str(tmp_path / 'out' / 'LR_x3.lmdb'),
            'io_backend': {'type': 'lmdb'},
            'phase': 'val',
            'scale': 3,
        }
    )
    assert len(dataset) == 2
    found = {item['gt_path']: item for item in (dataset[0], dataset[1])}
    for key, name in (('a', 'a'), ('b_c_d', 'b.c d')):
        np.testing.assert_array_equal(
            np.rint(found[key]['gt'].numpy().transpose(1, 2, 0)[..., ::-1] * 255), hr[name], err_msg=name
        )
        reduced = imresize(hr[name], Fraction(1, 3))
        np.testing.assert_array_equal(np.rint(found[key]['lq'].numpy().transpose(1, 2, 0)[..., ::-1] * 255), reduced)


def test_every_problem_is_told_before_anything_is_written(tmp_path: Path) -> None:
    photos = tmp_path / 'photos'
    photographs(photos, {'right': (48, 48), 'tiny': (11, 48), 'other': (48, 48)})
    photographs(tmp_path / 'lr', {'otherx2': (24, 23)})
    (photos / 'empty.png').write_bytes(b'')
    whole = (photos / 'right.png').read_bytes()
    (photos / 'cut.png').write_bytes(whole[:-40])

    def pair(name: str, lr: Path | None = None) -> Pair:
        return Pair(name, photos / f'{name}.png', {2: lr} if lr else {})

    wrong = ('right', 'empty', 'tiny', 'cut')
    broken = Job(
        tmp_path / 'out',
        (*map(pair, wrong), pair('other', tmp_path / 'lr' / 'otherx2.png')),
        (2, 3, 4),
        problems=('x.png: has no LR image',),
    )
    with pytest.raises(DataSetError) as caught:
        prepare([broken], quiet=True)
    cut, empty, *lines = str(caught.value).splitlines()
    assert cut.startswith(f'{photos}/cut.png: ')
    assert empty.startswith(f'{photos}/empty.png: ')
    assert lines == [
        'x.png: has no LR image',
        f'{photos}/tiny.png: has 11 x 48 pixels (height x width); for scales 2, 3, 4 an image needs 12 x 12 at least',
        f'{tmp_path}/lr/otherx2.png: has 24 x 23 pixels (height x width), and as the x2 image of {photos}/other.png '
        '(48 x 48) it must have 24 x 24',
        '5 problems; nothing was written',
    ]
    twice = Job(tmp_path / 'out', (pair('right'), Pair('right', photos / 'other.png')), (2,))
    with pytest.raises(
        DataSetError, match=r"right\.png and .*other\.png: have the same key 'right'; rename all but one"
    ):
        prepare([twice], quiet=True)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'crop': 50, 'step': 24}, r'crop: is 50, and must be a multiple of 12 .* 48 would be'),
        ({'crop': 48, 'step': 0}, r'step: is 0, and must be a multiple of 12 .* 12 would be'),
        ({'step': 24}, r'step: has no meaning without crop'),
        ({'scales': (1, 2)}, r'scale: is 1; choose from 2, 3, 4'),
        ({'scales': ()}, r'scale: none given'),
    ],
    ids=['crop', 'step', 'step alone', 'scale 1', 'no scale'],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, object], message: str) -> None:
    photographs(tmp_path / 'photos', {'a': (48, 48)})
    with pytest.raises(DataSetError, match=message):
        prepare([job(tmp_path / 'photos', tmp_path / 'out', **options)], quiet=True)
    assert not (tmp_path / 'out').exists()


def test_keeps_what_is_there_and_adds_a_scale(tmp_path: Path) -> None:
    photos = tmp_path / 'photos'
    photographs(photos, {'a': (48, 48), 'b': (60, 48)})
    prepare([job(photos, tmp_path / 'out', scales=(4,))], quiet=True)
    before = contents(tmp_path / 'out')
    assert all(row.kept for row in prepare([job(photos, tmp_path / 'out', scales=(4,))], quiet=True))
    assert contents(tmp_path / 'out') == before
    rows = prepare([job(photos, tmp_path / 'out', scales=(2, 3, 4))], quiet=True)
    assert [row.kept for row in rows] == [True, False, False, True]
    prepare([job(photos, tmp_path / 'at_once')], quiet=True)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'at_once')

    cv2.imwrite(str(photos / 'b.png'), picture(60, 48, 7))
    with pytest.raises(
        DataSetError, match=r'HR\.lmdb holds other images than would be written now: other source files'
    ):
        prepare([job(photos, tmp_path / 'out')], quiet=True)
    with pytest.raises(DataSetError, match=r'holds other images than would be written now: crop none there and 48 now'):
        prepare([job(photos, tmp_path / 'out', crop=48)], quiet=True)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'at_once')
    prepare([job(photos, tmp_path / 'out')], overwrite=True, quiet=True)
    np.testing.assert_array_equal(decoded(tmp_path / 'out' / 'HR.lmdb')['b'], picture(60, 48, 7))


def test_interrupted_before_the_last_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta information and preview of what was replaced are not left beside what has taken its place."""
    photos, out = tmp_path / 'photos', tmp_path / 'out'
    photographs(photos, {'a': (48, 48), 'b': (60, 48)})
    prepare([job(photos, out)], quiet=True)
    (photos / 'a.png').rename(photos / 'c.png')

    def interrupt(work: pairs._Work) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pairs._Work, '_write_meta_info', interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([job(photos, out)], overwrite=True, quiet=True)
    # What was done is kept, although it was told to overwrite.
    assert all(row.kept for row in prepare([job(photos, out)], overwrite=True, quiet=True))
    prepare([job(photos, tmp_path / 'at_once')], quiet=True)
    assert contents(out) == contents(tmp_path / 'at_once')


def test_lr_of_an_hr_that_is_replaced_is_told(tmp_path: Path) -> None:
    photos, out = tmp_path / 'photos', tmp_path / 'out'
    photographs(photos, {'a': (240, 240)})
    assert prepare([job(photos, out)], quiet=True).notes == []
    notes = prepare([job(photos, out, scales=(4,), crop=120)], overwrite=True, quiet=True).notes
    assert [note for note in notes if 'smallest' not in note] == [
        f'{out}/LR_x{scale}.lmdb: was made for an HR.lmdb that is replaced now; make it anew or remove it'
        for scale in (2, 3)
    ]
    # Another scale of the same HR images is none.
    assert len(prepare([job(photos, tmp_path / 'more', scales=(4,))], quiet=True)) == 2
    assert prepare([job(photos, tmp_path / 'more')], quiet=True).notes == []


def test_one_folder_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / 'photos', {'a': (48, 48)})
    two = [
        job(Path('photos'), Path('out'), scales=(2,), hr_name='HR_x2'),
        job(tmp_path / 'photos', tmp_path / 'out', scales=(4,), hr_name='HR_x4'),
    ]
    rows = prepare(two, quiet=True)
    assert [row.path.name for row in rows] == ['HR_x2.lmdb', 'LR_x2.lmdb', 'HR_x4.lmdb', 'LR_x4.lmdb']
    with pytest.raises(
        DataSetError, match=r'out/HR_x2\.lmdb.*: would be written twice; give each job a folder or names'
    ):
        prepare([two[0], job(tmp_path / 'photos', tmp_path / 'out', scales=(3,), hr_name='HR_x2')], quiet=True)
    with pytest.raises(DataSetError, match=r'^out: there is no image to make HR\.lmdb of$'):
        prepare([Job(Path('out'), (), (2,))], quiet=True)


def test_space_is_estimated_from_above(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    photos = tmp_path / 'photos'
    photographs(photos, {f'smooth{number}': (240, 240) for number in range(4)})
    cv2.imwrite(str(photos / 'noise.png'), random.integers(0, 256, (240, 241, 3), np.uint8))
    cv2.imwrite(str(photos / 'flat.png'), np.zeros((240, 240, 3), np.uint8))
    for level, crop in ((0, None), (0, 48), (1, None), (1, 48)):
        out = tmp_path / f'out{level}{crop}'
        work = pairs._Work(one := job(photos, out, crop=crop), pairs._plan(one, inspected(one))[0], level)
        out.mkdir()
        work.look(False)
        needed = work.needed_bytes()
        prepare([one], compress_level=level, quiet=True)
        taken = sum(file.stat().st_size for file in out.rglob('*') if file.name == 'data.mdb')
        assert taken < needed < 4 * taken, (level, crop)


def inspected(one: Job) -> dict[Path, images.ImageFile]:
    return {pair.hr: images.inspect(pair.hr) for pair in one.pairs}


def test_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / 'photos', {'a': (48, 48)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    message = (
        rf'^{tmp_path}/out: up to 0\.0 GB \(\d+ bytes\) are needed, and 0\.0 GB \(1000 bytes\) are free; nothing was'
    )
    with pytest.raises(OSError, match=message):
        prepare([job(tmp_path / 'photos', tmp_path / 'out')], quiet=True)
    assert not os.listdir(tmp_path / 'out')


# Interruptions, by the command line ----------------------------------------------------------------------------------

COUNT = 50


@pytest.fixture(scope='module')
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[util.CommandLine]:
    """In a folder with photographs whose sub-images are committed many times, and what becomes of them."""
    folder = tmp_path_factory.mktemp('prepare')
    photographs(folder / 'photos', {f'{number:04d}': (150 + number, 210 - number) for number in range(COUNT)})
    with util.CommandLine(folder) as command_line:
        command_line.run(*PREPARE, 'whole', '--workers', '1')
        yield command_line
    shutil.rmtree(folder)


PREPARE = ('prepare', 'pairs', 'photos', '--scale', '2', '4', '--crop', '96', '--step', '48', '--quiet', '--out')


def committed(out: Path) -> int:
    """Entries that the HR LMDB of an interrupted run holds."""
    partial = out / '.HR.partial.lmdb'
    if not (partial / 'data.mdb').exists():
        return 0
    with lmdb.open(str(partial), readonly=True, lock=False) as environment:
        return environment.stat()['entries']


def test_killed_at_twenty_random_moments(command_line: util.CommandLine) -> None:
    out, whole = command_line.folder / 'killed', contents(command_line.folder / 'whole')
    source, kills, resumed, status = random.Random(0), 0, 0, -1
    start = time.monotonic()
    prepare(
        [job(command_line.folder / 'photos', command_line.folder / 'timed', scales=(2, 4), crop=96, step=48)],
        quiet=True,
    )
    duration = time.monotonic() - start
    while kills < 20:
        before = committed(out)
        process = command_line.start(*PREPARE, out, '--workers', source.choice('123'))
        time.sleep(source.uniform(0.02, duration * 0.6))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGKILL)
        status, said = command_line.finish()
        for name in ('HR', 'LR_x2', 'LR_x4'):  # whole, or not there
            if (out / f'{name}.lmdb').exists():
                kept = contents(out / f'{name}.lmdb')
                assert kept == {key: whole[f'{name}.lmdb/{key}'] for key in kept}
                assert len(kept) == 2
        assert status in (0, -signal.SIGKILL), said
        after = committed(out)
        assert after >= before or (out / 'HR.lmdb').exists(), 'work is lost'
        if (out / 'HR.preview.png').exists():  # the last file that is written
            assert contents(out) == whole
            shutil.rmtree(out)
        else:
            kills += 1
            resumed += before > 0
    command_line.run(*PREPARE, out, '--workers', '2')
    assert contents(out) == whole
    assert resumed > 3, 'no run went on from the middle of another'


def test_interrupted_by_the_user(command_line: util.CommandLine) -> None:
    out = command_line.folder / 'interrupted'
    process = command_line.start(*PREPARE, out)
    deadline = time.monotonic() + util.PATIENCE
    while not committed(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    status, said = command_line.finish()
    assert (status, said) == (130, 'interrupted; the same command goes on from there\n')
    assert committed(out) > 0
    assert not (out / 'HR.lmdb').exists()
    command_line.run(*PREPARE, out)
    assert contents(out) == contents(command_line.folder / 'whole')


def test_full_disk(command_line: util.CommandLine) -> None:
    """No file may grow beyond a size, which fails as a full disk does: in the middle of writing."""
    out = command_line.folder / 'full'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = command_line.start(*PREPARE, out)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (8_000_000, limits[1]))
    status, said = command_line.finish()
    assert status == 1
    reason = r'cannot be written: [^\n]+; what was written so far is kept, the same command goes on from there\n'
    assert re.fullmatch(rf'{out}/HR\.lmdb {reason}', said)
    assert not (out / 'HR.lmdb').exists()
    assert committed(out) > 0
    command_line.run(*PREPARE, out)
    assert contents(out) == contents(command_line.folder / 'whole')
