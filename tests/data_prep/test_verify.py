"""Whatever is wrong with an LMDB is said exactly, and nothing is said of one that is right."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from test_pairs import job, photographs, picture

from attnsr.data_prep.lmdb_dataset import DataSetError
from attnsr.data_prep.pairs import prepare
from attnsr.data_prep.verify import verify


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """``out`` with sub-images of ``photos``, beside it."""
    photographs(tmp_path / 'photos', {'a': (60, 72), 'b': (48, 48)})
    prepare([job(tmp_path / 'photos', tmp_path / 'out', scales=(2, 3), crop=48, step=24)], quiet=True)
    return tmp_path / 'out'


def found(path: Path, against: Path | None = None) -> list[str]:
    """The problems, without the LMDB's path before each."""
    report = verify(path, against, workers=2, quiet=True)
    assert all(problem.startswith(f'{path}: ') for problem in report.problems)
    return [problem.removeprefix(f'{path}: ') for problem in report.problems]


def change(path: Path, key: str, new: Callable[[bytes], bytes] | None) -> None:
    """Put another value in the place of an entry's; None removes it."""
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        value = bytes(transaction.get(key.encode(), b''))
        if new is None:
            assert transaction.delete(key.encode())
        else:
            transaction.put(key.encode(), new(value))


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda value: value[:place] + bytes([value[place] ^ 255]) + value[place + 1 :]


def png(image: np.ndarray) -> bytes:
    return cv2.imencode('.png', image)[1].tobytes()


@pytest.mark.parametrize('name', ['HR', 'LR_x2', 'LR_x3'])
def test_what_is_right(made: Path, name: str) -> None:
    report = verify(made / f'{name}.lmdb', made.parent / 'photos', quiet=True)
    assert (report.images, report.problems) == (5, [])
    pairs = ['LR_x2.lmdb', 'LR_x3.lmdb'] if name == 'HR' else ['HR.lmdb']
    assert report.compared == ['meta_info.txt', 'checksums', *pairs, f'the files of {made.parent / "photos"}']


def test_given_lr_against_its_own_folder(tmp_path: Path) -> None:
    photographs(tmp_path / 'photos', {'a': (60, 72)})
    photographs(tmp_path / 'lr', {'a': (30, 36)})
    one = job(tmp_path / 'photos', tmp_path / 'out', scales=(2,))
    one.pairs[0].lr[2] = tmp_path / 'lr' / 'a.png'  # type: ignore[index]
    prepare([one], quiet=True)
    assert found(tmp_path / 'out' / 'LR_x2.lmdb', tmp_path / 'lr') == []
    assert found(tmp_path / 'out' / 'LR_x2.lmdb', tmp_path / 'photos') == [
        "entry 'a' differs from its file in 1080 of 1080 pixels"
    ]


def test_changed_entries(made: Path) -> None:
    path = made / 'HR.lmdb'
    change(path, 'a_s001', flipped(100))
    change(path, 'a_s002', lambda value: value[:-20])
    change(path, 'a_s003', lambda value: png(picture(48, 47, 3)))
    change(path, 'a_s004', lambda value: b'')
    change(path, 'b_s001', None)
    change(path, 'c_s001', lambda value: png(picture(48, 48, 3)))
    sums = ' has changed since it was written: its checksum is another'
    assert found(path) == [
        "entry 'b_s001' is missing, which meta_info.txt names",
        "entry 'c_s001' is not in meta_info.txt",
        "entry 'b_s001' is missing, which the record names",
        "entry 'c_s001' is not in the record",
        f"entry 'a_s001'{sums}",
        "entry 'a_s001' does not decode",
        f"entry 'a_s002'{sums}",
        "entry 'a_s002' does not decode",
        f"entry 'a_s003'{sums}",
        "entry 'a_s003' has shape (48,47,3), and meta_info.txt says (48,48,3)",
        f"entry 'a_s004'{sums}",
        "entry 'a_s004' does not decode",
    ]


def test_against_other_files(made: Path) -> None:
    photos = made.parent / 'photos'
    image = cv2.imread(str(photos / 'a.png'))
    image[0, :2] ^= 1
    cv2.imwrite(str(photos / 'a.png'), image)
    (photos / 'b.png').unlink()
    assert found(made / 'HR.lmdb', photos) == [
        "entry 'a_s001' differs from its file in 2 of 2304 pixels",
        f"entry 'b_s001' cannot be compared: {photos}/b.png: cannot be read: "
        'No such file or directory; make it readable, or move it away',
    ]


def test_sizes_of_pairs_and_missing_pairs(made: Path) -> None:
    lines = (made / 'LR_x3.lmdb' / 'meta_info.txt').read_text()
    (made / 'LR_x3.lmdb' / 'meta_info.txt').write_text(lines.replace('b_s001.png (16,16,3)', 'b_s001.png (16,15,3)'))
    said = "entry 'b_s001' has {} pixels (height x width), and in its pair {}: at x3 it must have {}"
    assert found(made / 'HR.lmdb') == [said.format('48 x 48', 'LR_x3.lmdb 16 x 15', '48 x 45')]
    assert found(made / 'LR_x3.lmdb') == [
        said.format('16 x 15', 'HR.lmdb 48 x 48', '16 x 16'),
        "entry 'b_s001' has shape (16,16,3), and meta_info.txt says (16,15,3)",
    ]
    shutil.rmtree(made / 'HR.lmdb')
    assert found(made / 'LR_x2.lmdb') == ['its pair HR.lmdb is not beside it']


def test_damaged_files(made: Path) -> None:
    path = made / 'HR.lmdb'
    data = (path / 'data.mdb').read_bytes()
    for cut in (len(data) - 1, 8192, 100, 0):
        (path / 'data.mdb').write_bytes(data[:cut])
        (problem,) = found(path)
        cut_off = f'data.mdb is cut off: {cut} bytes of {len(data)}'
        assert problem.startswith('data.mdb is no LMDB: ') if cut == 100 else problem in (cut_off, 'data.mdb is empty')
    # Damage to LMDB's own tables may end the process that reads them; that must not be this one.
    for page in range(2, 4):
        (path / 'data.mdb').write_bytes(data[: page * 4096] + b'\xff' * 4096 + data[(page + 1) * 4096 :])
        assert found(path)
    (path / 'data.mdb').write_bytes(data)
    assert found(path) == []
    (path / 'meta_info.txt').write_text('a_s001.png 48 48\n' + (path / 'meta_info.txt').read_text())
    assert found(path) == [
        "meta_info.txt, line 1: 'a_s001.png 48 48' is not of the form 'key.png (height,width,channels) 1'"
    ]
    (path / 'meta_info.txt').unlink()
    assert found(path) == ['meta_info.txt is missing']


def test_lmdb_of_basicsr(tmp_path: Path) -> None:
    """Without a record, names tell which file an entry belongs to."""
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    photographs(tmp_path / 'photos', {'a': (60, 72), 'b': (48, 48)})
    path = tmp_path / 'other.lmdb'
    make_lmdb_from_imgs(str(tmp_path / 'photos'), str(path), ['a.png', 'b.png'], ['a', 'b'])
    report = verify(path, tmp_path / 'photos', quiet=True)
    assert (report.images, report.problems) == (2, [])
    assert report.compared[1] == 'no checksums, as there is no record beside it'
    change(path, 'a', lambda value: png(picture(60, 72, 5)))
    assert len(found(path, tmp_path / 'photos')) == 1
    assert found(path) == []


def test_a_folder_of_lmdbs(made: Path) -> None:
    assert found(made) == [f'data.mdb is missing; name the LMDBs in it, {made}/*.lmdb']


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r'missing\.lmdb: there is no such folder; name an LMDB folder'):
        verify(tmp_path / 'missing.lmdb')
