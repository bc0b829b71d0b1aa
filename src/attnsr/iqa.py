"""LPIPS, DISTS and NIQE through pyiqa, which is an extra: ``pip install 'attnsr[iqa]'``."""

import importlib.metadata
import io
import re
import textwrap
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch

from attnsr.errors import UsageError
from attnsr.inference import choose_device

__all__ = ['METRICS', 'create', 'version']

#: {name: how to read it}.
METRICS = {'lpips': 'lower is better', 'dists': 'lower is better', 'niqe': 'without reference, lower is better'}

#: What pyiqa and PyTorch print before they download a file.
DOWNLOAD = re.compile(r'Downloading: "([^"]+)" to (\S+)')


def version() -> str:
    """Of pyiqa.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.metadata.version('pyiqa')
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"--metrics {', '.join(METRICS)}: come from pyiqa, which is not installed; pip install 'attnsr[iqa]'"
        ) from None


def create(name: str, border: int, device: str = 'auto') -> Callable[[np.ndarray, np.ndarray], float]:
    """A metric.

    Args:
        name: One of :data:`METRICS`.
        border: So many pixels are left out along each side.
        device: Where it is computed.

    Returns:
        Takes an image and the HR image, uint8 (h, w, 3) BGR, and gives a number. Threads take turns.

    Raises:
        UsageError: pyiqa is not installed; what is returned raises it for images that pyiqa refuses.
        OSError: A file of parameters that pyiqa needs is not there and cannot be downloaded.
    """
    version()
    said = io.StringIO()
    place = choose_device(device)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            import pyiqa

            metric = pyiqa.create_metric(name, device=place)
    except OSError as error:
        # At its first use, pyiqa downloads what was trained: LPIPS's and DISTS's networks, NIQE's statistics.
        downloads = DOWNLOAD.findall(said.getvalue())
        if not downloads:
            raise
        url, path = downloads[-1]
        reason = getattr(error, 'reason', error)
        raise OSError(
            f'--metrics {name}: pyiqa cannot download {url} ({reason}); put that file at {path} and run it again'
        ) from None
    lock = threading.Lock()

    def calculate(image: np.ndarray, hr: np.ndarray) -> float:
        compared = (image,) if name == 'niqe' else (image, hr)
        try:
            with lock, torch.inference_mode():
                return float(metric(*(_tensor(each, border).to(place) for each in compared)))
        except (AssertionError, RuntimeError, ValueError) as error:  # NIQE has none for less than two blocks of 96
            size = f'{hr.shape[1]} x {hr.shape[0]} pixels'
            reason = textwrap.shorten(str(error), 200) or type(error).__name__
            raise UsageError(
                f'--metrics {name}: pyiqa refuses an image of {size} ({reason}); leave {name} out'
            ) from None

    return calculate


def _tensor(image: np.ndarray, border: int) -> torch.Tensor:
    """(1, 3, h, w), RGB, float32 in [0, 1]."""
    rgb = image[border:-border, border:-border, ::-1].transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(rgb)).float().div(255)[None]
