"""What the writers of all formats have in common."""

from abc import ABC, abstractmethod
from typing import Any, BinaryIO

import numpy as np

__all__ = ['Encoder']


class Encoder(ABC):
    """Writes a picture of one format, block by block from top to bottom.

    Args:
        file: What it is written to, from the beginning.
        height, width, channels: Of the picture.
        dtype: uint8 or uint16.

    Attributes:
        block_rows: How many rows :meth:`encode` is called with, but for the last block.
    """

    block_rows: int

    def __init__(self, file: BinaryIO, height: int, width: int, channels: int, dtype: np.dtype) -> None:
        self.file = file
        self.height, self.width, self.channels, self.dtype = height, width, channels, dtype

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
