"""``basicsr upscale``: real files in, real files out, whatever goes wrong between."""

import os
import re
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import networks
import numpy as np
import pytest
import skimage.data
import torch
import util
from PIL import Image

from attnsr import pictures, upscale
from attnsr.errors import UsageError
from attnsr.files import TEMPORARY
from attnsr.upscaler import Upscaler

#: (80, 112, 3) uint8.
PHOTOGRAPH = skimage.data.chelsea()[100:180, 130:242]

OPTION_FILE = 'network_g: {type: ASID, upscale: 2, num_feat: 16, num_groups: 2, esa_channels: 4}\n'


@pytest.fixture(scope='module')
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[util.CommandLine]:
    folder = tmp_path_factory.mktemp('upscale')
    torch.save({'params': networks.build('ASID', upscale=2).state_dict()}, folder / 'net.pth')
    with util.CommandLine(folder) as line:
        yield line


@pytest.fixture
def place(command: util.CommandLine) -> Iterator[Path]:
    """An empty folder in the folder of the command line."""
    folder = command.folder / 'place'
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def wanted(pixels: np.ndarray, scale: int | None = None) -> np.ndarray:
    return Upscaler(networks.build('ASID', upscale=2), scale=scale, device='cpu')(pixels)


def save(path: Path, pixels: np.ndarray = PHOTOGRAPH, **settings: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_a_folder_with_all_that_is_below_it(command: util.CommandLine, place: Path) -> None:
    """Grey of 16 bits, RGB, alpha and a palette; what is kept of a file; one line a picture and one for all."""
    profile = b'profile' * 20
    save(place / 'in' / 'rgb.png', dpi=(300, 300))
    save(place / 'in' / 'deep' / 'turned.jpg', exif=_orientation(6), icc_profile=profile, quality=95)
    save(place / 'in' / 'deep' / 'alpha.webp', np.dstack((PHOTOGRAPH, PHOTOGRAPH[..., 0])), lossless=True)
    Image.fromarray(PHOTOGRAPH).convert('P').save(place / 'in' / 'palette.bmp')
    pictures.write(place / 'in' / 'grey16.tif', PHOTOGRAPH[..., :1].astype(np.uint16) * 257)
    said = command.run('upscale', 'place/in', '-o', 'place/out', '-w', 'net.pth', '--recursive', '--dtype', 'float32')
    out = place / 'out'
    assert files(out) == ['deep/alpha.webp', 'deep/turned.jpg', 'grey16.tif', 'palette.bmp', 'rgb.png']
    assert len(re.findall(r'^place/out/\S+: \d+ x \d+, \d+\.\d s$', said, re.MULTILINE)) == 5
    assert re.search(r'^5 pictures in \d+\.\d s, \d+\.\d\d megapixels a second$', said, re.MULTILINE)
    rgb = pictures.read(out / 'rgb.png')
    assert np.array_equal(rgb.pixels, wanted(PHOTOGRAPH))
    assert rgb.metadata.resolution == pytest.approx((300, 300), abs=0.01)
    turned = pictures.read(out / 'deep' / 'turned.jpg')
    assert turned.pixels.shape == (224, 160, 3)
    assert turned.metadata.icc == profile
    assert np.abs(turned.pixels - wanted(np.rot90(PHOTOGRAPH, -1)).astype(float)).mean() < 12  # JPEG, twice
    assert pictures.read(out / 'deep' / 'alpha.webp').pixels.shape == (160, 224, 4)
    assert pictures.read(out / 'palette.bmp').pixels.shape == (160, 224, 3)
    grey = pictures.read(out / 'grey16.tif').pixels
    assert np.array_equal(grey, wanted(PHOTOGRAPH[..., :1].astype(np.uint16) * 257))


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_one_file_its_name_scale_and_tiles(command: util.CommandLine, place: Path) -> None:
    save(place / 'a.png')
    (command.folder / 'asid.yml').write_text(OPTION_FILE)
    command.run(
        'upscale', 'place/a.png', '-o', 'place/large.tif', '-w', 'net.pth', '--scale', '3', '--network', 'asid.yml'
    )
    assert np.array_equal(pictures.read(place / 'large.tif').pixels, wanted(PHOTOGRAPH, 3))
    said = command.run(
        *('upscale', 'place/*.png', '-o', 'place/new', '-w', 'net.pth', '--tile', '64', '--overlap', '16'),
        *('--format', 'jpg', '--quality', '80', '--suffix', '_x2'),
    )
    assert files(place / 'new') == ['a_x2.jpg']
    assert 'place/new/a_x2.jpg: 224 x 160, ' in said


def test_what_a_format_cannot_keep_is_said(command: util.CommandLine, place: Path) -> None:
    pictures.write(place / 'a.png', np.dstack((PHOTOGRAPH, PHOTOGRAPH[..., 0])).astype(np.uint16) * 257)
    said = command.run('upscale', 'place/a.png', '-o', 'place/a.jpg', '-w', 'net.pth')
    assert re.search(r'place/a\.jpg: .* s, 16 bits a channel reduced to 8, alpha flattened onto white\n', said)


def test_one_bad_file_does_not_stop_a_folder(command: util.CommandLine, place: Path) -> None:
    for name in ('a.png', 'c.png'):
        save(place / 'in' / name)
    (place / 'in' / 'b.png').write_bytes((place / 'in' / 'a.png').read_bytes()[:-3000])
    (place / 'in' / 'empty.jpg').touch()
    (place / 'in' / 'text.tif').write_text('no picture')
    header = (place / 'in' / 'a.png').read_bytes()
    enormous = header[:16] + (200_000).to_bytes(4, 'big') * 2 + header[24:]
    (place / 'in' / 'enormous.png').write_bytes(enormous)
    (place / 'out').mkdir()
    (place / 'out' / 'c.png').mkdir()  # where a file should go
    said = command.run('upscale', 'place/in', '-o', 'place/out', '-w', 'net.pth', status=1)
    assert files(place / 'out') == ['a.png']
    assert 'Traceback' not in said
    for name, problem in (
        ('in/b.png', ''),
        ('in/empty.jpg', 'is empty'),
        ('in/text.tif', 'is no BMP, JPEG, PNG, TIFF or WebP image'),
        ('in/enormous.png', ''),
        ('out/c.png', 'is a folder'),
    ):
        assert len(re.findall(rf'^place/{re.escape(name)}: .*{problem}', said, re.MULTILINE)) == 1, said
    assert re.search(r'^1 picture in .*, 5 failed$', said, re.MULTILINE)
    save(place / 'in' / 'b.png')
    again = command.run(
        'upscale', 'place/in/b.png', 'place/in/a.png', '-o', 'place/out', '-w', 'net.pth', '--skip-existing'
    )
    assert re.search(r'^1 picture in .*, 1 skipped, as they were there$', again, re.MULTILINE)
    assert files(place / 'out') == ['a.png', 'b.png']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('place/none.png -o out -w net.pth', 'place/none.png: there is no such file or folder'),
        ("place/*.gif -o out -w net.pth", 'place/*.gif: matches no file'),
        ('place/empty -o out -w net.pth', 'place/empty: holds no pictures that can be upscaled (.png, '),
        ('place/deep -o out -w net.pth', '.bmp); --recursive looks into the folders below it too'),
        ('place/a.png -o place -w net.pth', 'would be written over place/a.png; name another folder, or --suffix'),
        ('place/a.png place/b/a.png -o out -w net.pth', 'b/a.png and place/a.png would both be written to out/a.png'),
        ('place/a.png place/b/a.png -o out.png -w net.pth', 'is the name of one file, and there are 2 pictures'),
        ('place/a.png -o out.png -w net.pth --format jpg', 'out.png: does not end as a JPEG file, as --format says'),
        ('place/a.png -o out -w net.pth --format gif', "'gif' is no format of pictures that can be written; valid: "),
        ('place/a.png -o large.gif -w net.pth', 'large.gif: the ending of the name must say the format; valid: .png'),
        ('place/a.png -o out -w net.pth --suffix a/b', '--suffix a/b: goes behind the names of files'),
        ('pla*e -o out -w net.pth', 'pla*e: matches only folders, such as place; name them without a pattern'),
        ('place/a.png -o out -w net.pth --scale nan', 'scale must be from 1/16 to 64, got nan'),
        ('place/a.png -o net.pth -w net.pth', 'net.pth: is a file, not a folder'),
        ('place/a.png -o out', 'weights are needed: -w FILE'),
        ('place/a.png -o out -w none.pth', 'none.pth: there is no such file, and no such training'),
        ('place/a.png -o out -w place/a.png', 'place/a.png: this file is torn'),
        ('place/a.png -o out -w net.pth --network elan_x2', 'net.pth: this is a checkpoint of ASID x2 (num_feat 16'),
        ('place/a.png -o out -w net.pth --network elan_x5', '--network elan_x5: is no network and no option file'),
        ('place/a.png -o out -w net.pth --tile 10', 'must be auto or a whole number of pixels, at least 64, got 10'),
        ('place/a.png -o out -w net.pth --tile ten', 'must be auto or a whole number of pixels, at least 64, got ten'),
        ('place/a.png -o out -w net.pth --device tpu', '--device tpu; valid here: auto, cpu'),
        ('place/a.png -o out -w net.pth --scael 2', 'unrecognized arguments: --scael 2; did you mean --scale?'),
        ('place/a.png -o place/b/a.png/out -w net.pth', 'place/b/a.png: is a file, not a folder; name another folder'),
        ('place/a.png -o out -w net.pth --tile 64 --overlap 40', 'overlap must be at most half of the tile'),
        ('place/a.png -o out -w net.pth --scale 100', 'scale must be from 1/16 to 64, got 100'),
        ('place/a.png -o out -w net.pth --quality 50', '--quality 50: only JPEG and WebP files have one'),
        ('place/a.png -o out -w net.pth --format jpg --quality 101', '--quality 101: must be from 0 to 100'),
        ('place/a.png -o out -w net.pth --dtype int8', 'invalid choice'),
    ],
)  # fmt: skip
def test_wrong_arguments(command: util.CommandLine, place: Path, arguments: str, message: str) -> None:
    save(place / 'a.png')
    save(place / 'b' / 'a.png')
    (place / 'empty').mkdir()
    save(place / 'deep' / 'b' / 'a.png')
    before = files(command.folder)
    said = command.run('upscale', *arguments.split(), status=2)
    assert message in said
    assert 'Traceback' not in said
    assert files(command.folder) == before


def test_a_picture_too_large_for_its_format_is_told_before_it_is_computed(
    command: util.CommandLine, place: Path
) -> None:
    save(place / 'long.png', np.zeros((8, 9000, 3), np.uint8))
    said = command.run('upscale', 'place/long.png', '-o', 'place/long.webp', '-w', 'net.pth', status=1)
    assert 'place/long.webp: would be 18,000 pixels wide and 16 high; WebP files hold 16,383 on a side at most' in said
    assert files(place) == ['long.png']


@pytest.mark.parametrize('arguments', [('', '-o', 'out'), ('place/a.png', '-o', '')])
def test_names_that_a_shell_has_left_empty(command: util.CommandLine, place: Path, arguments: tuple[str, ...]) -> None:
    """They do not mean the current folder."""
    save(place / 'a.png')
    before = files(command.folder)
    assert "'', which names nothing; name a" in command.run('upscale', *arguments, '-w', 'net.pth', status=2)
    assert files(command.folder) == before


def test_what_is_named_twice_is_done_once(command: util.CommandLine, place: Path) -> None:
    save(place / 'in' / 'a.png')
    said = command.run('upscale', 'place/in', 'place/in/a.png', 'place/i*/*.png', '-o', 'place/out', '-w', 'net.pth')
    assert re.search(r'^1 picture in', said, re.MULTILINE)
    assert files(place / 'out') == ['a.png']


def test_pictures_are_done_where_nobody_reads_any_more(command: util.CommandLine, place: Path) -> None:
    for name in 'abc':
        save(place / 'in' / f'{name}.png')
    reading, writing = os.pipe()
    arguments = ('-m', 'attnsr', 'upscale', 'place/in', '-o', 'place/out', '-w', 'net.pth')
    process = util.start(*arguments, cwd=command.folder, stdout=writing)
    os.close(writing)
    os.close(reading)
    assert util.finish(process).stderr == ''
    assert files(place / 'out') == ['a.png', 'b.png', 'c.png']


@pytest.mark.parametrize(
    ('when', 'how', 'ended', 'word'),
    [
        (0.0, signal.SIGINT, 130, 'interrupted'),
        (0.5, signal.SIGINT, 130, 'interrupted'),
        (0.2, signal.SIGTERM, 143, 'terminated'),
    ],
)
def test_ctrl_c_leaves_nothing_half_written(
    command: util.CommandLine, place: Path, when: float, how: signal.Signals, ended: int, word: str
) -> None:
    for name in 'abcd':
        save(place / 'in' / f'{name}.png', np.tile(PHOTOGRAPH, (2, 2, 1)))
    arguments = ['upscale', 'place/in', '-o', 'place/out', '-w', 'net.pth', '--tile', '64']
    process = command.start(*arguments)
    begun = time.monotonic()
    while not files(place / 'out') and time.monotonic() < begun + util.PATIENCE:
        time.sleep(0.01)
    time.sleep(when)
    os.kill(process, how)
    status, said = command.finish()
    there = files(place / 'out')
    if status == ended:
        assert said.splitlines()[-1].endswith(
            f'{word}; --skip-existing goes on with the pictures that are not there yet'
        )
    else:  # it was done before
        assert (status, len(there)) == (0, 4)
    assert 'Traceback' not in said
    whole = wanted(np.tile(PHOTOGRAPH, (2, 2, 1))).shape
    assert all(
        re.fullmatch(r'[abcd]\.png', name) and pictures.read(place / 'out' / name).pixels.shape == whole
        for name in there
    )
    command.run(*arguments, '--skip-existing')
    assert files(place / 'out') == ['a.png', 'b.png', 'c.png', 'd.png']


def test_a_full_disk_ends_the_run_and_keeps_what_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in 'abc':
        save(place / 'in' / f'{name}.png')
    tasks = upscale.plan([str(place / 'in')], place / 'out')
    write = pictures.PictureWriter.write

    def failing(self: pictures.PictureWriter, rows: np.ndarray) -> None:
        if self.path.name == 'b.png':
            with self._errors():
                raise OSError(28, 'No space left on device')
        write(self, rows)

    monkeypatch.setattr(pictures.PictureWriter, 'write', failing)
    told: list[str] = []
    report = upscale.run(
        tasks, Upscaler(networks.build('ASID', upscale=2), device='cpu'), tell=told.append, fail=told.append
    )
    assert files(place / 'out') in (['a.png'], ['a.png', 'c.png'])  # b may be found out while c is computed
    assert report.left == 3 - 1 - len(files(place / 'out'))
    (failed,) = report.failed
    problem = 'cannot be written: No space left on device; the disk is full: free some space, or write to another one'
    assert failed == f'{place}/out/b.png: {problem}'
    assert failed in told


@pytest.mark.parametrize('ending', ['png', 'webp'])
def test_a_disk_that_is_full_at_the_end_of_a_picture(place: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all rows are handed over, and nobody waits for the thread that writes them."""
    save(place / 'in' / 'a.png')
    save(place / 'in' / 'b.png')
    tasks = upscale.plan([str(place / 'in')], place / 'out', format=ending)
    made = pictures.PictureWriter._make_encoder

    def failing(self: pictures.PictureWriter, file: BinaryIO) -> Any:
        encoder = made(self, file)

        def finish() -> None:
            raise OSError(28, 'No space left on device')

        if self.path.stem == 'b':
            monkeypatch.setattr(encoder, 'finish', finish)
        return encoder

    monkeypatch.setattr(pictures.PictureWriter, '_make_encoder', failing)
    report = upscale.run(tasks, Upscaler(networks.build('ASID', upscale=2), device='cpu'))
    assert files(place / 'out') == [f'a.{ending}']
    (failed,) = report.failed
    assert failed.startswith(f'{place}/out/b.{ending}: cannot be written: No space left on device')


def test_memory_that_one_picture_lacks_is_its_own_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in 'abc':
        save(place / 'in' / f'{name}.png')
    write = pictures.PictureWriter.write

    def failing(self: pictures.PictureWriter, rows: np.ndarray) -> None:
        if self.path.name == 'a.png':
            raise MemoryError
        write(self, rows)

    monkeypatch.setattr(pictures.PictureWriter, 'write', failing)
    tasks = upscale.plan([str(place / 'in')], place / 'out')
    report = upscale.run(tasks, Upscaler(networks.build('ASID', upscale=2), device='cpu'))
    assert files(place / 'out') == ['b.png', 'c.png']
    assert [line.split(':')[0] for line in report.failed] == [f'{place}/in/a.png']
    assert 'is too large for the memory that is free' in report.failed[0]


def test_what_an_earlier_run_left_half_written_is_removed(command: util.CommandLine, place: Path) -> None:
    save(place / 'in' / 'a.png')
    (place / 'out').mkdir()
    (place / 'out' / f'a.png{TEMPORARY}999999999').touch()
    command.run('upscale', 'place/in', '-o', 'place/out', '-w', 'net.pth')
    assert files(place / 'out') == ['a.png']


def test_no_permission() -> None:
    """As another user, where this one may do everything."""
    with tempfile.TemporaryDirectory(dir='/tmp') as name:
        folder = Path(name)
        folder.chmod(0o755)
        save(folder / 'a.png')
        (folder / 'closed').mkdir(mode=0o555)
        upscaler = Upscaler(networks.build('ASID', upscale=2), device='cpu')
        problems = []
        for out in ('closed', 'closed/new'):
            tasks = upscale.plan([str(folder / 'a.png')], folder / out)
            root = os.geteuid() == 0
            if root:
                os.seteuid(65534)
            try:
                problems += upscale.run(tasks, upscaler).failed
            finally:
                if root:
                    os.seteuid(0)
        written, made = problems
        assert written.startswith(
            f'{folder}/closed/a.png: cannot be written: Permission denied; make the folder writable'
        )
        assert made == f'{folder}/closed/new: cannot be made: Permission denied; name another folder'
        assert files(folder) == ['a.png']


LARGE = """
import re, sys
sys.path.insert(0, sys.argv[1])
import networks, numpy as np
from pathlib import Path
from attnsr import pictures, upscale
from attnsr.upscaler import Upscaler

def peak():
    return 1024 * int(re.findall(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[0])

height, width = int(sys.argv[2]), int(sys.argv[3])
random = np.random.default_rng(0)
with pictures.PictureWriter('large.png', None, height, width, 3, np.uint8) as writer:
    for _ in range(height // 50):
        writer.write(random.integers(0, 256, (50, width, 3), np.uint8))
net = networks.build('ELAN', upscale=4)
upscaler = Upscaler(net, device='cpu', tile=64)
upscale.run(upscale.plan(['large.png'], Path('out.png')), upscaler, tell=lambda line: None)
print(peak())
"""


def test_memory_is_bounded_by_the_tile(tmp_path: Path) -> None:
    """Many more rows take the memory of the larger input, and hardly more; measured by the operating system."""
    peaks = {}
    for height in (150, 650):
        peaks[height] = int(util.run('-c', LARGE, Path(__file__).parent, height, 400, cwd=tmp_path).stdout)
        assert pictures.header(tmp_path / 'out.png')[:2] == (4 * height, 1600)
    # 500 rows more are 0.6 MB of the input, 10 MB of the result and 38 MB of it in float32.
    assert peaks[650] - peaks[150] < 8e6


@pytest.mark.parametrize('ahead', [True, False])
def test_what_would_take_the_memory_of_the_picture_before_is_not_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """It is read when the one before is done, and out of memory."""
    for name in 'ab':
        save(tmp_path / f'{name}.png', np.zeros((40, 50, 3), np.uint8))
    needed = pictures.memory_needed(tmp_path / 'b.png')
    assert needed == 40 * 50 * (4 + 3)
    monkeypatch.setattr(upscale, 'free_memory', lambda device: 4 * needed - (0 if ahead else 1))
    read, arrays, others = pictures.read, [], []

    def noting(path: Path) -> pictures.Picture:
        others.append([array() is not None for array in arrays])
        picture = read(path)
        arrays.append(weakref.ref(picture.pixels))
        return picture

    monkeypatch.setattr(pictures, 'read', noting)
    upscaler = Upscaler(networks.build('ASID', upscale=2), device='cpu')
    report = upscale.run(upscale.plan([str(tmp_path)], tmp_path / 'out'), upscaler)
    assert files(tmp_path / 'out') == ['a.png', 'b.png']
    assert not report.failed
    assert others == [[], [ahead]]


def test_results_below_a_folder_are_not_upscaled_again(tmp_path: Path) -> None:
    save(tmp_path / 'a.png')
    for _ in range(2):
        (task,) = upscale.plan([str(tmp_path)], tmp_path / 'out', recursive=True, suffix='_x2')
        assert task.target == tmp_path / 'out' / 'a_x2.png'
        save(task.target)


def test_plan_knows_what_goes_where(tmp_path: Path) -> None:
    for name in ('a.JPG', 'b.jpeg', 'deep/c.tiff'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).touch()
    tasks = upscale.plan([f'{tmp_path}/in'], tmp_path / 'out', suffix='_x4', recursive=True)
    assert [(str(task.target.relative_to(tmp_path)), task.format) for task in tasks] == [
        ('out/a_x4.JPG', 'jpg'),
        ('out/b_x4.jpeg', 'jpg'),
        ('out/deep/c_x4.tiff', 'tif'),
    ]
    tasks = upscale.plan([f'{tmp_path}/in'], tmp_path / 'out', format='png')
    assert [task.target.name for task in tasks] == ['a.png', 'b.png']
    (tmp_path / 'in' / 'a.png').touch()
    with pytest.raises(UsageError, match='would both be written to'):
        upscale.plan([f'{tmp_path}/in'], tmp_path / 'out', format='png')
