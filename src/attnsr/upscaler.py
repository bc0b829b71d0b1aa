"""Upscaling pictures in Python: arrays, PIL images and tensors in, the same kind out."""

import logging
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from os import PathLike
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

from attnsr.archs.arch_util import SRNetwork
from attnsr.errors import UsageError
from attnsr.inference import Dtype, PreparedNetwork
from attnsr.memory import OutOfMemory, free_memory, is_out_of_memory
from attnsr.tiling import Cut, cut_axis, upscale_bands
from attnsr.weights import load_network

__all__ = ['OVERLAP', 'Tile', 'Upscaler', 'load']

Tile: TypeAlias = int | Literal['auto'] | None
AnyImage = TypeVar('AnyImage', np.ndarray, Image.Image, Tensor)
Band = TypeVar('Band', np.ndarray, Tensor)

#: LR pixels that two tiles share at least.
OVERLAP = 32
#: Sides of tiles that ``'auto'`` chooses, in LR pixels. Larger ones gain nothing.
LEAST_TILE, LARGEST_TILE = 64, 1024
#: The share of free memory that ``'auto'`` plans with.
USED_MEMORY = 0.5

#: Largest values of what is not floating point.
LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
PIL_MODES = ('1', 'L', 'LA', 'I;16', 'P', 'PA', 'RGB', 'RGBA')

logger = logging.getLogger('attnsr')


class Upscaler:
    """Upscales pictures of any size with a network, whole or in tiles. May be used from several threads at once.

    >>> import numpy as np
    >>> from attnsr.archs import ASID
    >>> upscaler = Upscaler(ASID(upscale=2, num_feat=16, num_groups=2), device='cpu')
    >>> upscaler(np.zeros((10, 7, 3), np.uint8)).shape  # (H, W, C), RGB; grey, with alpha, of 16 bits, floating too
    (20, 14, 3)
    >>> upscaler(Image.new('LA', (7, 10))).size
    (14, 20)
    >>> upscaler(torch.rand(4, 3, 10, 7)).shape  # (B, C, H, W) or (C, H, W)
    torch.Size([4, 3, 20, 14])

    Args:
        net: The network; it is moved and converted in place, and belongs to this object from now on.
        scale: Of the result; where it is not the network's, what the network gives is resized as MATLAB's bicubic
            ``imresize`` does. Sides are rounded up.
        device: ``'auto'``, ``'cpu'``, ``'cuda'`` or ``'cuda:N'``.
        dtype: What the network computes in, by its name or as PyTorch's: ``'auto'`` is float32.
        tile: Side in LR pixels of what the network sees at once, which is rounded up to a multiple of the network's
            grid; None for the whole picture; ``'auto'`` for the whole picture where memory suffices, and else for as
            large a tile as it does, up to 1024: halved where memory runs out after all, which is logged.
        overlap: LR pixels that two tiles share at least; rounded up as tiles are.
        fast: On a GPU: replay CUDA graphs, which launch all kernels of a tile at once. The result is the same.
        compiled: Compile the network by ``torch.compile`` first, and again for other sizes, which takes minutes.

    Attributes:
        net: The network.
        scale: Of the result: a fraction.
        multiple: Tiles begin at multiples of this, in LR pixels, and their sides are multiples.

    Raises:
        UsageError: an option is out of range, or there is no such device.
    """

    def __init__(
        self,
        net: SRNetwork,
        *,
        scale: float | Fraction | None = None,
        device: str | torch.device = 'auto',
        dtype: Dtype | torch.dtype = 'auto',
        tile: Tile = 'auto',
        overlap: int = OVERLAP,
        fast: bool = False,
        compiled: bool = False,
    ) -> None:
        self.multiple = math.lcm(net.multiple, 8)
        if not (tile is None or tile == 'auto' or (isinstance(tile, int) and tile >= LEAST_TILE)):
            raise UsageError(
                f"tile must be 'auto', None for whole pictures, or at least {LEAST_TILE} pixels, got {tile!r}"
            )
        if overlap < 0:
            raise UsageError(f'overlap must be at least 0 pixels, got {overlap}')
        factor = net.upscale if scale is None else scale
        if not 1 / 16 <= factor <= 64:  # also where it is not a number
            raise UsageError(f'scale must be from 1/16 to 64, got {scale}')
        self.scale = Fraction(factor).limit_denominator(1000)
        if self.scale < net.upscale:
            # What is reduced looks two pixels of the result far, which must be within a quarter of an overlap.
            overlap = max(overlap, math.ceil(8 / self.scale))
        self.overlap = self._rounded(overlap)
        self.tile: Tile = tile if tile is None or tile == 'auto' else self._rounded(tile)
        if isinstance(self.tile, int) and 2 * self.overlap > self.tile:
            raise UsageError(
                f'overlap must be at most half of the tile: of {self.tile} pixels {self.tile // 2}, got {self.overlap}'
            )
        self._least_tile = self._rounded(max(LEAST_TILE, 2 * self.overlap))
        self.prepared = PreparedNetwork(net, device, dtype, fast, compiled)
        self.net = self.prepared.net
        # Once memory did not suffice for a larger one.
        self._limit: int | None = None

    def __call__(self, image: AnyImage) -> AnyImage:
        """Upscale an image.

        Args:
            image: One of

                - an array (H, W) or (H, W, C), uint8, uint16 or floating in [0, 1],
                - a PIL image of mode 1, L, LA, I;16, P, PA, RGB or RGBA,
                - a tensor (C, H, W) or (B, C, H, W), uint8 or floating in [0, 1], on any device,

                where C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha). Alpha is upscaled too; colours of
                wholly transparent pixels have no influence.

        Returns:
            The same kind of image, of the same dtype and device, with ``scale`` times the sides; floating ones are
            clipped to [0, 1]. PIL images of mode 1 come back as L, those with a palette as RGB, those with a
            transparent colour with alpha, and those that EXIF data say to turn come back upright; a colour profile and
            a resolution in ``info`` are kept.

        Raises:
            TypeError: it is none of these.
            ValueError: its shape or its values are not as said.
            UsageError: memory does not suffice.
        """
        if isinstance(image, np.ndarray):
            return self._array(image)
        if isinstance(image, Image.Image):
            return self._pil(image)
        if isinstance(image, Tensor):
            return self._tensor(image)
        raise TypeError(f'an image must be a NumPy array, a PIL image or a torch tensor, not {type(image).__name__}')

    def tensor(self, x: Tensor) -> Tensor:
        """Upscale (B, 3, H, W), float32 RGB in [0, 1], to (B, 3, scale H, scale W), float32, not clipped.

        On the device of the network.
        """
        batch, channels, height, width = x.shape
        bands = list(
            self._bands(lambda rows, columns: x[:, :, rows, columns], batch, channels, height, width, _as_it_is)
        )
        return bands[0] if len(bands) == 1 else torch.cat(bands, 2)

    def bands(self, pixels: np.ndarray, advance: Callable[[int], object] = lambda _: None) -> Iterator[np.ndarray]:
        """Upscale an array from top to bottom, without ever having the whole result in memory.

        Args:
            pixels: (H, W, C), see :meth:`__call__`.
            advance: Called after each tile with the number of pixels of the result that are new.

        Yields:
            (h, scale W, C) of the same dtype: the next rows of the result.
        """
        largest = LARGEST.get(pixels.dtype)

        def part(rows: slice, columns: slice) -> Tensor:
            values = np.ascontiguousarray(pixels[rows, columns], np.float32)
            return torch.from_numpy(values).to(self.prepared.device).permute(2, 0, 1)[None] / (largest or 1)

        def finished(band: Tensor) -> np.ndarray:
            values = self.checked(band)[0].permute(1, 2, 0).clamp(0, 1)
            if largest:  # as BasicSR's tensor2img does
                values = (values * largest).round().to(torch.uint8 if largest == 255 else torch.int32)
            return np.ascontiguousarray(values.cpu().numpy().astype(pixels.dtype, copy=False))

        height, width, channels = pixels.shape
        yield from self._bands(part, 1, channels, height, width, finished, advance)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for an image."""
        return math.ceil(height * self.scale), math.ceil(width * self.scale)

    def _bands(
        self,
        part: Callable[[slice, slice], Tensor],
        batch: int,
        channels: int,
        height: int,
        width: int,
        finished: Callable[[Tensor], Band],
        advance: Callable[[int], object] = lambda _: None,
    ) -> Iterator[Band]:
        """Finished bands, see :func:`attnsr.tiling.upscale_bands`, in smaller tiles from where memory did not suffice.

        ``part`` gives (B, C, h, w) of rows and columns.
        """
        tile = self.tile if self.tile != 'auto' else self._affordable(batch, channels, height, width)
        done = told = 0  # rows, and pixels
        while True:
            rows, columns = (
                cut_axis(side, tile, self.overlap, self.multiple, self.net.upscale, self.scale)
                for side in (height, width)
            )
            counted, reached = 0, 0

            def count(new: int) -> None:
                nonlocal counted, told
                counted += new
                if counted > told:
                    advance(counted - told)
                    told = counted

            def run(row: Cut, column: Cut) -> Tensor:
                return self._channels(part(slice(row.start, row.stop), slice(column.start, column.stop)))

            bands = upscale_bands(rows, columns, run, count)
            try:
                while True:
                    with torch.inference_mode():  # which is left when a band is handed out
                        band = next(bands, None)
                        if band is None:
                            return
                        reached += band.shape[2]
                        if reached <= done:  # in larger tiles
                            continue
                        result = finished(band[:, :, max(0, done - reached + band.shape[2]) :])
                        done = reached
                        del band
                    yield result
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Here, as the error keeps what was being worked on in memory.
            del bands
            tile = self._halved(max(cut.extent for axis in (rows, columns) for cut in axis.cuts))

    def _channels(self, x: Tensor) -> Tensor:
        """(B, C, h, w) with C of 1 to 4 to the network's output for it: grey as grey RGB, alpha by itself."""
        channels = x.shape[1]
        if channels == 3:
            return self.prepared(x)
        if channels == 1:
            return self.prepared(x.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
        colours, alpha = x[:, :-1], x[:, -1:]
        return torch.cat((self._channels(_filled(colours, alpha)), self._alpha(alpha)), 1)

    def _alpha(self, alpha: Tensor) -> Tensor:
        """Alpha as a grey image; where all around a pixel is opaque, or transparent, so is the result."""
        factor = self.net.upscale
        low, high = alpha.aminmax()
        if low == high:
            return alpha.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        highest, lowest = F.max_pool2d(alpha, 5, 1, 2), -F.max_pool2d(-alpha, 5, 1, 2)
        lowest, highest = (F.interpolate(bound, scale_factor=factor, mode='nearest') for bound in (lowest, highest))
        return self._channels(alpha).clamp(lowest, highest)

    def checked(self, y: Tensor) -> Tensor:
        """What the network gave, if all of it are numbers.

        Raises:
            UsageError: it is not.
        """
        if not y.isfinite().all():
            dtype = str(self.prepared.dtype).removeprefix('torch.')
            advice = 'look at the weights' if dtype == 'float32' else 'choose float32'
            raise UsageError(f'in {dtype} the network gives values that are no numbers; {advice}')
        return y

    def _halved(self, side: int) -> int:
        """The tile to go on with where memory does not suffice for one of ``side`` pixels, which is told.

        Raises:
            OutOfMemory: the tile was asked for, or is as small as it can be.
        """
        if self.tile != 'auto':
            raise OutOfMemory(f'out of memory with a tile of {side} x {side} pixels; choose a smaller one, or auto')
        half = max(self._rounded(side // 2), self._least_tile)
        if half >= side:
            advice = 'close other programs, or choose a narrower dtype or a smaller network'
            raise OutOfMemory(f'out of memory even with a tile of {side} x {side} pixels; {advice}')
        if self.prepared.device.type == 'cuda':
            torch.cuda.empty_cache()
        logger.warning('out of memory with a tile of %d x %d pixels; going on with tiles of %d', side, side, half)
        self._limit = half if self._limit is None else min(half, self._limit)
        return half

    def _affordable(self, batch: int, channels: int, height: int, width: int) -> int | None:
        """None where the whole image fits into memory; else the largest tile that does."""
        budget = USED_MEMORY * free_memory(self.prepared.device)
        try:
            per_pixel = batch * self.prepared.bytes_per_pixel
        except RuntimeError as error:  # what a GPU's memory is measured with is more than it has
            if not is_out_of_memory(error):
                raise
            return self._least_tile
        # Rows are there in float32: as sums, those that go on, and as they are rounded.
        per_band_pixel = batch * channels * 4 * 3 * float(self.scale) ** 2
        largest = LARGEST_TILE if self._limit is None else self._limit
        if self._limit is None and height * width * (per_pixel + per_band_pixel) <= budget:
            return None
        tile = self._least_tile
        while tile + self.multiple <= largest:
            larger = tile + self.multiple
            if larger**2 * per_pixel + larger * width * per_band_pixel > budget:
                break
            tile = larger
        return tile

    def _rounded(self, pixels: int) -> int:
        return math.ceil(pixels / self.multiple) * self.multiple

    def _array(self, image: np.ndarray) -> np.ndarray:
        if image.ndim not in (2, 3) or (image.ndim == 3 and not 1 <= image.shape[2] <= 4) or 0 in image.shape:
            raise ValueError(f'an array must be (H, W) or (H, W, C) with C from 1 to 4, got {image.shape}')
        if image.dtype not in LARGEST and image.dtype.kind != 'f':
            raise TypeError(f'an array must be uint8, uint16 or floating point, got {image.dtype}')
        pixels = image if image.ndim == 3 else image[..., None]
        if image.dtype.kind == 'f':
            _check_range(float(image.min()), float(image.max()))
        result = np.empty((*self.size(*image.shape[:2]), pixels.shape[2]), image.dtype)
        done = 0
        for band in self.bands(pixels):
            result[done : done + len(band)] = band
            done += len(band)
        return result if image.ndim == 3 else result[..., 0]

    def _pil(self, image: Image.Image) -> Image.Image:
        if image.mode not in PIL_MODES:
            raise ValueError(f'a PIL image must be of mode {", ".join(PIL_MODES)}, got {image.mode}; convert it first')
        image = ImageOps.exif_transpose(image)
        mode = {'1': 'L', 'P': 'RGB', 'PA': 'RGBA'}.get(image.mode, image.mode)
        if image.info.get('transparency') is not None:  # of an entry of the palette, or a colour
            mode = {'L': 'LA', 'RGB': 'RGBA'}.get(mode, mode)
        result = Image.fromarray(self._array(np.asarray(image if image.mode == mode else image.convert(mode))))
        for key in ('icc_profile', 'dpi'):
            if image.info.get(key) is not None:
                result.info[key] = image.info[key]
        return result

    def _tensor(self, image: Tensor) -> Tensor:
        if image.ndim not in (3, 4) or not 1 <= image.shape[-3] <= 4 or not image.numel():
            raise ValueError(f'a tensor must be (C, H, W) or (B, C, H, W) with C from 1 to 4, got {tuple(image.shape)}')
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f'a tensor must be uint8 or floating point, got {image.dtype}')
        x = (image if image.ndim == 4 else image[None]).detach().to(self.prepared.device, torch.float32)
        if image.dtype == torch.uint8:
            x = x / 255
        else:
            _check_range(*(float(value) for value in x.aminmax()))
        y = self.checked(self.tensor(x)).clamp(0, 1)
        if image.dtype == torch.uint8:
            y = (y * 255).round()
        y = y.to(image.device, image.dtype)
        return y if image.ndim == 4 else y[0]


def load(name: str | PathLike[str], **settings: Any) -> Upscaler:
    """The upscaler of a checkpoint.

    ``attnsr.load('elan_light_x4.pth')`` is ``Upscaler(attnsr.checkpoints.load('elan_light_x4.pth'))``. Of a file in the
    folder of a training, the network is what the option file there says.

    Args:
        name: A checkpoint file of the authors', of a training, or as ``basicsr export`` writes it; or a training: its
            folder, its name below ``./experiments``, or the name of an option file that comes with attnsr, such as
            ``'elan_light_x4'``. Of a training the newest checkpoint is taken.
        **settings: Of :class:`Upscaler`.

    Raises:
        UsageError: there is no such file or training, or an option is out of range.
        CheckpointError: the file is torn, is no checkpoint, or is of no network of attnsr.
    """
    return Upscaler(load_network(None, name), **settings)


def _as_it_is(band: Tensor) -> Tensor:
    return band


def _check_range(low: float, high: float) -> None:
    if not (low >= -0.5 and high <= 1.5):  # also where one is not a number
        raise ValueError(f'floating images must be in [0, 1], got values from {low:.4g} to {high:.4g}')


def _filled(colours: Tensor, alpha: Tensor) -> Tensor:
    """Colours in which wholly transparent pixels have that of the nearest that is not: nobody sees what they had.

    Args:
        colours: (B, C, h, w).
        alpha: (B, 1, h, w).
    """
    hidden = (alpha == 0).cpu().numpy()[:, 0]
    if not hidden.any():
        return colours
    filled = colours.clone()
    for image, mask in zip(filled, hidden, strict=True):
        if mask.any() and not mask.all():
            y, x = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
            image.copy_(image[:, torch.from_numpy(y), torch.from_numpy(x)])
    return filled
