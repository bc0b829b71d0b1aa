"""LMDB environments that several data sets of a process, and its forked workers, can read."""

import inspect
import os
import threading
from typing import Any

import lmdb
from basicsr.utils.file_client import LmdbBackend

from attnsr.compat.patches import patch, replace

# {path: ((device, inode) of the data, environment)}
_environments: dict[str, tuple[tuple[int, int], lmdb.Environment]] = {}
_lock = threading.RLock()


def _close_all() -> None:
    for _, environment in _environments.values():
        environment.close()
    _environments.clear()


def _before_fork() -> None:
    # A child would inherit environments that it may neither use nor open anew. Both sides open them again on demand.
    _lock.acquire()
    _close_all()


os.register_at_fork(before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release)


def _environment(path: str, options: dict[str, Any]) -> lmdb.Environment:
    """The environment of ``path``, with the options of whoever opened it first: they bear on the speed of reading."""
    data = os.stat(os.path.join(path, 'data.mdb'))
    file = (data.st_dev, data.st_ino)
    known, environment = _environments.get(path, (None, None))
    if environment is not None and known != file:  # made anew since it was opened
        environment.close()
        environment = None
    if environment is None:
        environment = lmdb.open(path, **options)
        _environments[path] = (file, environment)
    return environment


def _init(
    self: LmdbBackend,
    db_paths: str | list[str],
    client_keys: str | list[str] = 'default',
    readonly: bool = True,
    lock: bool = False,
    readahead: bool = False,
    **kwargs: Any,
) -> None:
    client_keys = [client_keys] if isinstance(client_keys, str) else client_keys
    self.db_paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
    if len(client_keys) != len(self.db_paths):
        raise ValueError(f'as many client_keys as db_paths are needed, got {client_keys} and {self.db_paths}')
    options = {'readonly': readonly, 'lock': lock, 'readahead': readahead, **kwargs}
    self._client = {
        key: (os.path.realpath(path), options) for key, path in zip(client_keys, self.db_paths, strict=True)
    }


def _get(self: LmdbBackend, filepath: str, client_key: str) -> bytes:
    if client_key not in self._client:
        raise KeyError(f'client_key {client_key!r} is not known; valid: {", ".join(self._client)}')
    path, options = self._client[client_key]
    with _lock, _environment(path, options).begin(write=False) as transaction:
        value = transaction.get(str(filepath).encode('ascii'))
    if value is None:
        raise KeyError(f'{path} has no entry {str(filepath)!r}, which its meta_info.txt names')
    return value


@patch(
    'lmdb',
    mends='lmdb 2 and newer open an environment once in a process, and see one opened before a fork as open: data '
    'sets on the same LMDB, and loader workers beside a validation set, fail',
    needed=lambda: 'lmdb.open' in inspect.getsource(LmdbBackend.__init__),
)
def _patch_lmdb() -> None:
    replace(LmdbBackend, '__init__', _init)
    replace(LmdbBackend, 'get', _get)
