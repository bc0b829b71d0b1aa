"""Reading and writing picture files: PNG, JPEG, WebP, TIFF and BMP, with what they say of their pixels.

:func:`read` gives a whole upright picture with all its bits, :class:`PictureWriter` takes one row by row.
"""

from attnsr.pictures.formats import FORMATS, Format, check_fits, format_named, format_of
from attnsr.pictures.metadata import Metadata
from attnsr.pictures.opening import PictureError
from attnsr.pictures.reading import Picture, header, memory_needed, read
from attnsr.pictures.writing import QUALITIES, PictureWriter, notes_on, write

__all__ = [
    'FORMATS',
    'Format',
    'Metadata',
    'Picture',
    'PictureError',
    'PictureWriter',
    'QUALITIES',
    'check_fits',
    'format_named',
    'format_of',
    'header',
    'memory_needed',
    'notes_on',
    'read',
    'write',
]
