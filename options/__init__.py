"""Option files of the published recipes, and the safe, strict reading of any BasicSR option file.

Option files are data: :func:`load` and :func:`force` read plain values and run nothing. :func:`check` turns every
misspelt key and impossible value into one line, by the tables of :mod:`attnsr.options.schema`, before a process or a
folder is made. :func:`parse_options` takes the place of BasicSR's.
"""

from attnsr.options.checking import check
from attnsr.options.parsing import add_arguments, newest_checkpoint, parse_options
from attnsr.options.reading import Loader, OptionError, find, force, load, shipped, source_text

__all__ = [
    'Loader',
    'OptionError',
    'add_arguments',
    'check',
    'find',
    'force',
    'load',
    'newest_checkpoint',
    'parse_options',
    'shipped',
    'source_text',
]
