"""From HR photographs to HR and LR LMDBs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """One photograph: its key in the LMDBs, the HR file, and LR files by scale where there are any."""

    key: str
    hr: Path
    lr: Mapping[int, Path] = field(default_factory=dict)
    """Where a scale has no file, the LR image is made from the HR one."""


@dataclass(frozen=True)
class Job:
    """LMDBs that are made together: one of HR images, and one of LR images for each scale."""

    out: Path
    """Folder that the LMDBs lie in."""
    pairs: tuple[Pair, ...]
    scales: tuple[int, ...]
    hr_name: str = 'HR'
    """Name of the HR LMDB, without '.lmdb'."""
    lr_name: str = 'LR_x{scale}'
    """Name of the LR LMDBs, without '.lmdb'."""
    crop: int | None = None
    """Side of the HR sub-images; None leaves images whole."""
    step: int | None = None
    """From one HR sub-image to the next."""
