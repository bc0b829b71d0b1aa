"""Option files are data: read safely and strictly by :mod:`attnsr.options`."""

import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import yaml
from basicsr.utils import options as basicsr_options
from basicsr.utils.dist_util import master_only

from attnsr import options
from attnsr.compat.patches import fails, patch, replace
from attnsr.files import write_atomically


class Dumper(yaml.SafeDumper):
    """Writes what :class:`attnsr.options.Loader` reads."""


Dumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))


def _ordered_yaml() -> tuple[type[Any], type[Any]]:
    return options.Loader, Dumper


@master_only
def _copy_opt_file(opt_file: str, experiments_root: str) -> None:
    # From the text that was read: the file itself may be the copy of an earlier run, and moved away with it.
    header = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
    try:
        text = options.source_text(opt_file)
    except KeyError:  # a user's own loop, which read it in its own way
        text = Path(opt_file).read_text(encoding='utf-8')
    with write_atomically(Path(experiments_root, Path(opt_file).name)) as file:
        file.write((header + text).encode())


def _load_object() -> None:
    yaml.load('!!python/name:os.getcwd', Loader=basicsr_options.ordered_yaml()[0])


@patch(
    'option files',
    mends="option files and --force_yml can run any code: they go through YAML's full loader, eval and exec",
    needed=lambda: not fails(_load_object, yaml.YAMLError),
)
def _patch_option_files() -> None:
    replace(basicsr_options, 'ordered_yaml', _ordered_yaml)
    replace(basicsr_options, 'parse_options', options.parse_options)
    replace(basicsr_options, 'copy_opt_file', _copy_opt_file)
