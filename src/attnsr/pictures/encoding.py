"""What the writers of all formats have in common."""

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

__all__ = ['Encoder', 'Layout', 'deflate']

# Two ways of compressing are tried on so many bytes, in parts from all over the data.
SAMPLE_PARTS, PART_BYTES = 8, 2**14

# Level and strategy for photographs, where searching for repetitions takes ten times as long and gains little, and for
# text, drawings and the like, which repetitions are all of. The first level says quickly which of them data are.
RUNS = 6, zlib.Z_RLE
QUICK = 1, zlib.Z_DEFAULT_STRATEGY
REPETITIONS = 6, zlib.Z_DEFAULT_STRATEGY


@dataclass(frozen=True)
class Layout:
    """Of the pixels of a picture, as its format holds them."""

    height: int
    width: int
    channels: int
    """1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGB and alpha."""
    dtype: np.dtype
    """uint8 or uint16."""

    @property
    def row_bytes(self) -> int:
        return self.width * self.channels * self.dtype.itemsize

    def rows_in(self, size: int) -> int:
        """How many rows take about so many bytes."""
        return min(self.height, max(1, size // self.row_bytes))


class Encoder(ABC):
    """Writes a picture of one format, block by block from top to bottom.

    Args:
        file: What it is written to, from the beginning.
        layout: Of the picture.

    Attributes:
        file: As above.
        layout: As above.
        block_rows: How many rows :meth:`encode` is called with, but for the last block.
    """

    block_rows: int

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self.file, self.layout = file, layout

    @abstractmethod
    def encode(self, rows: np.ndarray, above: np.ndarray | None) -> Any:
        """What :meth:`append` is to be called with; several threads may call this at once.

        Args:
            rows: (rows, width, channels), C-contiguous.
            above: (width, channels), the row above, None at the top.
        """

    @abstractmethod
    def append(self, encoded: Any) -> None:
        """Write the next block."""

    @abstractmethod
    def finish(self) -> None:
        """Write what follows the pixels."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what the encoder holds, at the end or after an error."""


def deflate(data: np.ndarray, end: int = zlib.Z_FINISH, raw: bool = False) -> bytes:
    """Compress differences between pixels, in the way that suits them.

    Args:
        data: C-contiguous.
        end: How zlib is to end: ``zlib.Z_SYNC_FLUSH`` where more is to follow.
        raw: Without zlib's header and checksum.
    """
    data = data.reshape(-1).view(np.uint8)
    starts = np.linspace(0, max(0, data.size - PART_BYTES), SAMPLE_PARTS if data.size > PART_BYTES else 1, dtype=int)
    sample = np.concatenate([data[start : start + PART_BYTES] for start in starts])
    quick, runs = (len(_deflate(sample, *way, zlib.Z_FINISH, raw)) for way in (QUICK, RUNS))
    return _deflate(data, *(REPETITIONS if quick < runs else RUNS), end, raw)


def _deflate(data: np.ndarray, level: int, strategy: int, end: int, raw: bool) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15 if raw else 15, 9, strategy)
    return packer.compress(data.data) + packer.flush(end)
