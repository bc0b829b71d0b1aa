"""LMDBs that several data sets of a process, and forked loader workers, read at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import util
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.file_client import LmdbBackend
from torch.utils.data import DataLoader, Dataset

from attnsr.compat import environments
from attnsr.data_prep.lmdb_dataset import write_lmdb

KEYS = list(util.pictures())


class Values(Dataset[bytes]):
    """The PNG files of an LMDB, through a back end that is opened by whoever reads first, as BasicSR's data sets do."""

    def __init__(self, backend: type[LmdbBackend], path: Path) -> None:
        self.open = lambda: backend(str(path), client_keys='gt')
        self.client: Any = None

    def __getitem__(self, index: int) -> bytes:
        self.client = self.client or self.open()
        return self.client.get(KEYS[index], 'gt')

    def __len__(self) -> int:
        return len(KEYS)


def as_uint8(tensor: Any) -> np.ndarray:
    """BGR picture of a data set's tensor."""
    return (tensor.numpy().transpose(1, 2, 0)[..., ::-1] * 255).round().astype(np.uint8)


@pytest.mark.skipif(lmdb.__version__.startswith(('0.', '1.')), reason='older lmdb opens an LMDB twice')
def test_stock_basicsr_cannot_open_an_lmdb_twice_nor_in_a_worker(tmp_path: Path) -> None:
    methods = {'__init__': util.stock(environments._init), 'get': util.stock(environments._get)}
    stock = type('Stock', (LmdbBackend,), methods)
    path = util.build_tiny(tmp_path).parent / 'hr.lmdb'  # that nothing else in this process has open
    values = Values(stock, path)
    first = values[0]
    try:
        with pytest.raises(lmdb.Error):
            stock(str(path), client_keys='gt')
        with pytest.raises(lmdb.Error):
            list(DataLoader(Values(stock, path), batch_size=None, num_workers=1))
    finally:
        values.client._client['gt'].close()
    assert next(iter(DataLoader(Values(LmdbBackend, path), batch_size=None, num_workers=1))) == first


def test_two_data_sets_and_a_worker_read_the_same_lmdbs(tiny: Path) -> None:
    expected = util.pictures()
    validation, again = (PairedImageDataset(util.paired(tiny.parent, 'val')) for _ in range(2))
    loader = DataLoader(again, batch_size=None, num_workers=1)
    for _ in range(2):  # epochs: the worker is forked anew, while this process has the LMDBs open
        assert (as_uint8(validation[0]['gt']) == expected[KEYS[0]]).all()
        for place, sample in enumerate(loader):
            for data, number in ((sample, place), (validation[-place - 1], len(KEYS) - place - 1)):
                picture = expected[KEYS[number]]
                assert (as_uint8(data['gt']) == picture).all()
                assert (as_uint8(data['lq']) == picture[:: util.SCALE, :: util.SCALE]).all()
        assert (as_uint8(again[3]['gt']) == expected[KEYS[3]]).all()


class Own(Dataset[bytes]):
    """A user's data set, which opens the LMDB itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, index: int) -> bytes:
        with lmdb.open(str(self.path), readonly=True, lock=False) as environment, environment.begin() as transaction:
            return transaction.get(KEYS[index].encode())

    def __len__(self) -> int:
        return len(KEYS)


def test_a_worker_is_free_to_open_what_its_parent_has_open(tiny: Path) -> None:
    path = tiny.parent / 'hr.lmdb'
    values = Values(LmdbBackend, path)
    expected = [values[index] for index in range(len(KEYS))]
    assert list(DataLoader(Own(path), batch_size=None, num_workers=1)) == expected
    assert values[0] == expected[0]


def test_an_lmdb_that_was_made_anew_is_opened_anew(tmp_path: Path) -> None:
    pictures = util.pictures()
    path = tmp_path / 'hr.lmdb'
    write_lmdb(path, pictures)
    values = Values(LmdbBackend, path)
    before = [values[0], values[1]]
    write_lmdb(path, {KEYS[0]: pictures[KEYS[1]], KEYS[1]: pictures[KEYS[0]]}, overwrite=True)
    assert [values[0], values[1]] == before[::-1]


def test_data_sets_with_different_options_share_an_lmdb(tiny: Path) -> None:
    path = str(tiny.parent / 'hr.lmdb')
    first, second = (LmdbBackend(path, 'gt', readahead=readahead, max_readers=8) for readahead in (False, True))
    assert [first.get(key, 'gt') for key in KEYS] == [second.get(key, 'gt') for key in KEYS]


def test_threads_share_an_lmdb(tiny: Path) -> None:
    """As BasicSR's prefetching thread and validation do."""
    values = Values(LmdbBackend, tiny.parent / 'hr.lmdb')
    expected = [values[index] for index in range(len(KEYS))]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(values.__getitem__, list(range(len(KEYS))) * 50)) == expected * 50


def test_a_missing_entry_is_named(tiny: Path) -> None:
    path = tiny.parent / 'hr.lmdb'
    backend = LmdbBackend(str(path), client_keys='gt')
    with pytest.raises(KeyError, match=r"hr\.lmdb has no entry 'lena', which its meta_info\.txt names"):
        backend.get('lena', 'gt')
    with pytest.raises(KeyError, match=r"client_key 'lq' is not known; valid: gt"):
        backend.get(KEYS[0], 'lq')
    with pytest.raises(ValueError, match='as many client_keys as db_paths'):
        LmdbBackend([str(path)], client_keys=['lq', 'gt'])
