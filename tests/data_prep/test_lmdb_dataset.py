"""An LMDB is in BasicSR's form, and under its final name it is whole whatever happens while it is written."""

import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import util

from attnsr.data_prep.lmdb_dataset import DataSetError, Entry, LmdbWriter, encode, read_header, read_record, write_lmdb


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored(path: Path) -> dict[str, np.ndarray]:
    """All pictures of an LMDB, decoded."""
    return {
        key: np.asarray(cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_UNCHANGED))
        for key, value in util.lmdb_values(path).items()
    }


def assert_holds(path: Path, images: dict[str, np.ndarray]) -> None:
    found = stored(path)
    assert found.keys() == images.keys()
    for key, image in images.items():
        np.testing.assert_array_equal(found[key], image, err_msg=key)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file may grow beyond this size, which fails as a full disk does: in the middle of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_form(tmp_path: Path) -> None:
    images = {'b_s002': noise(5, 7), 'a_s001': noise(1, 1), 'c': noise(300, 200)}
    row = write_lmdb(tmp_path / 'x.lmdb', images, compress_level=3)

    assert_holds(tmp_path / 'x.lmdb', images)
    lines = (tmp_path / 'x.lmdb' / 'meta_info.txt').read_text()
    assert lines == 'a_s001.png (1,1,3) 3\nb_s002.png (5,7,3) 3\nc.png (300,200,3) 3\n'
    assert sorted(os.listdir(tmp_path / 'x.lmdb')) == ['data.mdb', 'lock.mdb', 'meta_info.txt']
    assert sorted(os.listdir(tmp_path)) == ['x.lmdb', 'x.record.jsonl']
    header, lines = read_header(tmp_path / 'x.lmdb'), list(read_record(tmp_path / 'x.lmdb'))
    assert header is not None
    assert header['compression'] == 3
    values = util.lmdb_values(tmp_path / 'x.lmdb')
    sums = {key: hashlib.sha256(value).hexdigest() for key, value in values.items()}
    assert {line['key']: line['sha256'] for line in lines} == sums
    assert [line['shape'] for line in lines] == [[1, 1, 3], [5, 7, 3], [300, 200, 3]]
    assert (row.images, row.pixels, row.kept) == (3, 1 + 35 + 60_000, False)
    assert row.bytes == (tmp_path / 'x.lmdb' / 'data.mdb').stat().st_size


@pytest.mark.parametrize(
    ('count', 'side'), [(5001, 1), (200, 26), (200, 36), (40, 37), (1, 800)], ids=lambda value: str(value)
)
def test_map_is_large_enough(tmp_path: Path, count: int, side: int) -> None:
    # 5001 passes LmdbMaker's first commit; sides 26, 36 and 37 give values of half a memory page and about one.
    images = {f'{number:05d}': noise(side, side, number) for number in range(count)}
    assert_holds(write_lmdb(tmp_path / 'x.lmdb', images, compress_level=0).path, images)


def test_keeps_what_is_there(tmp_path: Path) -> None:
    path, images = tmp_path / 'x.lmdb', {'a': noise(9, 9)}
    first = write_lmdb(path, images)
    before = (path / 'data.mdb').stat()
    second = write_lmdb(path, images)
    after = (path / 'data.mdb').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert second.kept
    assert (second.images, second.pixels, second.bytes) == (first.images, first.pixels, first.bytes)


def test_other_images_only_with_overwrite(tmp_path: Path) -> None:
    path, old, new = tmp_path / 'x.lmdb', {'a': noise(9, 9)}, {'a': noise(9, 10), 'b': noise(3, 3)}
    write_lmdb(path, old)
    with pytest.raises(DataSetError, match=r'x\.lmdb holds other images'):
        write_lmdb(path, new)
    assert_holds(path, old)
    assert not write_lmdb(path, new, overwrite=True).kept
    assert_holds(path, new)
    assert sorted(os.listdir(tmp_path)) == ['x.lmdb', 'x.record.jsonl']


@pytest.mark.parametrize('overwrite', [False, True])
def test_deletes_no_other_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / 'x.lmdb').mkdir()
    (tmp_path / 'x.lmdb' / 'data.mdb').write_text('mine')
    with pytest.raises(DataSetError, match=r'x\.lmdb is in the way'):
        write_lmdb(tmp_path / 'x.lmdb', {'a': noise(9, 9)}, overwrite=overwrite)
    assert (tmp_path / 'x.lmdb' / 'data.mdb').read_text() == 'mine'


@pytest.mark.parametrize(
    ('name', 'images', 'message'),
    [
        ('x', {'a': noise(9, 9)}, r"must end in '\.lmdb'"),
        ('x.lmdb', {}, 'no image'),
        ('x.lmdb', {'a.png': noise(9, 9)}, r"key 'a\.png'"),
        ('x.lmdb', {'übung': noise(9, 9)}, "key 'übung'"),
        ('x.lmdb', {'a': noise(9, 9) / np.float32(255)}, r'float32 of shape \(9, 9, 3\)'),
        ('x.lmdb', {'a': noise(9, 9)[..., :2]}, r'shape \(9, 9, 2\)'),
    ],
    ids=['name', 'empty', 'dot', 'not ascii', 'float', 'two channels'],
)
def test_refuses(tmp_path: Path, name: str, images: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataSetError, match=message):
        write_lmdb(tmp_path / name, images)
    assert not os.listdir(tmp_path)


@pytest.mark.usefixtures('small_files_only')
def test_full_disk(tmp_path: Path) -> None:
    path, old = tmp_path / 'x.lmdb', {'a': noise(9, 9)}
    with pytest.raises(OSError, match=rf'^{path} cannot be written: [^\n]+; what was written so far is kept'):
        write_lmdb(path, {'a': noise(500, 500)})
    assert not path.exists()

    write_lmdb(path, old)
    with pytest.raises(OSError, match=r'x\.lmdb cannot be written'):
        write_lmdb(path, {'a': noise(500, 500)}, overwrite=True)
    assert_holds(path, old)
    assert write_lmdb(path, old).kept


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob('*') if file.is_file() and file.name != 'lock.mdb'}


@pytest.mark.parametrize('ends', [(0,), (4,), (3, 4), (2, 5, 9)], ids=str)
def test_goes_on_after_the_last_commit(tmp_path: Path, ends: tuple[int, ...]) -> None:
    entries = [encode(f'k{number}', noise(60, 60, number), 1, {'file': f'{number}.png'}) for number in range(10)]

    def write(path: Path, description: dict[str, str], end: int = 10) -> int:
        writer = LmdbWriter(path, description)
        begun = writer.begin()
        for number in range(begun, end):
            writer.put(entries[number])
            if number % 2:
                writer.commit()
        if end == 10:
            writer.finish()
        return begun

    (tmp_path / 'other').mkdir()
    write(tmp_path / 'other' / 'x.lmdb', {'a': 'b'})
    work = tmp_path / 'work'
    work.mkdir()
    for end in ends:
        write(work / 'x.lmdb', {'a': 'b'}, end)
        assert not (work / 'x.lmdb').exists()
    assert write(work / 'x.lmdb', {'a': 'b'}) == ends[-1] // 2 * 2
    assert files(work) == files(tmp_path / 'other')
    # What is made of something else is no beginning of this.
    write(work / 'y.lmdb', {'a': 'c'}, 6)
    assert write(work / 'y.lmdb', {'a': 'b'}) == 0


def interrupted(folder: Path, committed: int = 6) -> tuple[Path, list[Entry]]:
    """An LMDB of ten images, of which some are on the disk; its path and the images."""
    entries = [encode(f'k{number}', noise(60, 60, number), 1, {}) for number in range(10)]
    writer = LmdbWriter(folder / 'x.lmdb', {'a': 'b'})
    writer.begin()
    for entry in entries[:committed]:
        writer.put(entry)
        writer.commit()
    return writer.path, entries


def go_on(path: Path, entries: list[Entry]) -> int:
    writer = LmdbWriter(path, {'a': 'b'})
    begun = writer.begin()
    for entry in entries[begun:]:
        writer.put(entry)
        writer.commit()
    writer.finish()
    assert_holds(path, {entry.key: noise(60, 60, number) for number, entry in enumerate(entries)})
    assert len((path / 'meta_info.txt').read_text().splitlines()) == len(list(read_record(path))) == 10
    assert sorted(os.listdir(path.parent)) == ['x.lmdb', 'x.record.jsonl']
    return begun


@pytest.mark.parametrize(
    'torn', [b'{"key": "k6", "sha', b'\0' * 500, b'{"key": "k6"}\n{"key"'], ids=['cut', 'zeros', 'two']
)
def test_a_torn_record_loses_no_image(tmp_path: Path, torn: bytes) -> None:
    path, entries = interrupted(tmp_path)
    with open(tmp_path / '.x.partial.record.jsonl', 'ab') as file:
        file.write(torn)
    assert go_on(path, entries) == 6


@pytest.mark.parametrize('left', [0, 100, 5000, -4096], ids=str)
def test_a_damaged_partial_is_begun_anew(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture) -> None:
    path, entries = interrupted(tmp_path)
    data = tmp_path / '.x.partial.lmdb' / 'data.mdb'
    data.write_bytes(data.read_bytes()[:left])
    assert go_on(path, entries) == 0
    assert 'what an interrupted run has written is made anew: data.mdb is' in caplog.text


def test_a_partial_that_somebody_removed(tmp_path: Path) -> None:
    """Its record is not put beside the LMDB that was to be replaced."""
    path = write_lmdb(tmp_path / 'x.lmdb', {'old': noise(9, 9)}).path
    before = files(tmp_path)
    interrupted(tmp_path)
    shutil.rmtree(tmp_path / '.x.partial.lmdb')
    assert write_lmdb(path, {'old': noise(9, 9)}).kept
    assert files(tmp_path) == before


def test_an_lmdb_on_another_disk_is_replaced(tmp_path: Path) -> None:
    (tmp_path / 'disk').mkdir()
    write_lmdb(tmp_path / 'disk' / 'far.lmdb', {'old': noise(9, 9)})
    path = tmp_path / 'x.lmdb'
    path.symlink_to(tmp_path / 'disk' / 'far.lmdb')
    with pytest.raises(DataSetError, match='holds other images'):
        write_lmdb(path, {'new': noise(9, 9)})
    write_lmdb(path, {'new': noise(9, 9)}, overwrite=True)
    assert_holds(path, {'new': noise(9, 9)})
    assert path.is_symlink()
    assert write_lmdb(path, {'new': noise(9, 9)}).kept
    assert sorted(os.listdir(tmp_path / 'disk')) == ['far.lmdb', 'far.record.jsonl']


def test_writers_take_turns(tmp_path: Path) -> None:
    path, sets = tmp_path / 'x.lmdb', [{f'k{number}': noise(60, 60, number)} for number in range(20)]
    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(lambda images: write_lmdb(path, images, overwrite=True), sets))
    assert not any(row.kept for row in rows)
    assert_holds(path, next(images for images in sets if images.keys() == stored(path).keys()))
    assert sorted(os.listdir(tmp_path)) == ['x.lmdb', 'x.record.jsonl']


# Forks a process for each line that write_lmdb executes while it replaces an LMDB, and kills it there with SIGKILL. One
# interpreter for all of them, since importing takes seconds.
KILLED_AT_EVERY_LINE = """
import os, pathlib, shutil, signal, sys
from attnsr.data_prep import lmdb_dataset
from test_lmdb_dataset import assert_holds, noise

OLD, NEW = {'old': noise(40, 50)}, {'new': noise(60, 60)}
# They change no file, and forks take time.
UNCHANGING = (
    '_difference', '_lines', '_said', '_shapes', '_summary', 'check_key', 'count_entries', 'encode', 'kept', 'put',
    'read_header', 'record_of', 'write_errors',
)
folder = pathlib.Path(sys.argv[1])
path = folder / 'x.lmdb'

def killed_at(line_number):
    left = line_number
    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != lmdb_dataset.__file__:
            return None
        if frame.f_code.co_name in UNCHANGING:
            return None
        if event == 'line':
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    child = os.fork()
    if not child:
        sys.settrace(trace)
        lmdb_dataset.write_lmdb(path, NEW, overwrite=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

line_number, found = 1, {'old': 0, 'new': 0, 'nothing': 0}
while True:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lmdb_dataset.write_lmdb(path, OLD)
    if not killed_at(line_number):
        break
    if not path.exists():
        found['nothing'] += 1
    elif 'old.png' in (path / 'meta_info.txt').read_text():
        found['old'] += 1
        assert_holds(path, OLD)
    else:
        found['new'] += 1
        assert_holds(path, NEW)
    try:
        assert lmdb_dataset.write_lmdb(path, NEW).kept, f'killed at line {line_number}: the old LMDB is lost'
    except lmdb_dataset.DataSetError:
        assert_holds(path, OLD)
        lmdb_dataset.write_lmdb(path, NEW, overwrite=True)
    assert_holds(path, NEW)
    assert sorted(os.listdir(folder)) == ['x.lmdb', 'x.record.jsonl'], os.listdir(folder)
    line_number += 1
print(*found.values())
"""


def test_killed_at_every_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, '-c', KILLED_AT_EVERY_LINE, str(tmp_path / 'work')],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, Path(__file__).parents[:2]))},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    old, new, nothing = map(int, run.stdout.split())
    # Nothing has the final name only between two renames, which are lines next to each other.
    assert old > 30
    assert new > 5
    assert nothing == 1
